"""Reading arrays that may lie in mapped files: safe from what others do to the file meanwhile.

A file that becomes shorter raises a signal where it is read beyond its end, and one that is written
to has other values. The core guards its own reads; these functions do so for NumPy's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from .. import _core


@contextmanager
def guarded(*arrays: np.ndarray) -> Iterator[None]:
    """Read from the arrays within. OSError naming the file, at the end, where one of them lies in a
    mapped file that changed: then what was read is to be thrown away.
    """
    _core.guard(True)
    try:
        yield
    finally:
        _core.guard(False)
        for array in arrays:
            _core.check_mapped(array)


def in_memory(array: np.ndarray) -> np.ndarray:
    """The array, or a copy of one that lies in a mapped file; OSError where that changed."""
    if not _core.check_mapped(array):
        return array
    with guarded(array):
        return array.copy()
