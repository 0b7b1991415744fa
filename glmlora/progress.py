"""Progress bars on standard error, for terminals and notebooks."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from functools import lru_cache
from typing import Any, TextIO


@lru_cache
def _kind() -> Any:
    """tqdm's bar with a lock and no watching thread of its own.

    tqdm's own lock is a semaphore that a process shares with those it forked: one that is killed
    while it draws leaves all the others waiting for ever.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a notebook without ipywidgets gets the plain bar
        from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        monitor_interval = 0

    def unlocked() -> None:
        Bar.set_lock(threading.RLock())

    unlocked()
    os.register_at_fork(after_in_child=unlocked)
    return Bar


def bar(iterable: Any = None, *, disable: bool | None = False, **settings: Any) -> Any:
    """A tqdm bar: `total`, `initial`, `desc`, `unit` as there; disable None: where standard error
    is no terminal.
    """
    return _kind()(iterable, disable=disable, file=sys.stderr, dynamic_ncols=True, **settings)


def say(text: str) -> None:
    """A line on standard output, above the bars that are there."""
    _kind().write(text, file=sys.stdout)


def notices() -> TextIO:
    """Where a line that is no warning goes: standard error; not in Jupyter, where that is red."""
    return sys.stdout if in_notebook() else sys.stderr


def in_notebook() -> bool:
    """Whether this runs in a kernel of Jupyter."""
    shell = sys.modules.get("IPython")
    found = None if shell is None else shell.get_ipython()
    return getattr(found, "kernel", None) is not None
