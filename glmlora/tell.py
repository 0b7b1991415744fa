"""Warnings that name the user's line, however deep in the package what they tell is found."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_silent: ContextVar[bool] = ContextVar("silent", default=False)
_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep


@contextmanager
def silence() -> Iterator[None]:
    """Nothing is told: what runs is a question of this package's own."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def warn(text: str) -> None:
    """A UserWarning at the nearest line outside this package."""
    if _silent.get():
        return
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


_told: set[str] = set()


def once(text: str) -> None:
    """The same, once in a process."""
    if text not in _told and not _silent.get():
        _told.add(text)
        warn(text)
