"""Warnings that name the user's line, however deep in the package what they tell is found."""

from __future__ import annotations

import os
import sys
import warnings

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep


def warn(text: str) -> None:
    """A UserWarning at the nearest line outside this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


_told: set[str] = set()


def once(text: str) -> None:
    """The same, once in a process."""
    if text not in _told:
        _told.add(text)
        warn(text)
