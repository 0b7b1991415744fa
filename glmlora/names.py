"""The nearest right word for a misspelt name, as every error message that has one says it."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about a misspelt name: " (did you mean 'history'?)", or "" where no
    known name is near.
    """
    words = list(known)
    near = [w for w in words if name and re.match(re.escape(name) + "[-_]", w)]
    near = near or difflib.get_close_matches(name, words, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def is_only_looked_for() -> bool:
    """Whether a finder of modules is asked by `importlib.util.find_spec`, which wants to know
    whether a module is there, rather than by an import statement, which wants an error that helps.
    """
    frame = sys._getframe(2)  # who called the finder
    while frame is not None and "importlib" in frame.f_globals.get("__name__", ""):
        if frame.f_globals["__name__"] == "importlib.util":
            return True
        frame = frame.f_back
    return False


def listed(names: Iterable[object], most: int = 10) -> str:
    """Names for a message: the first ones, and how many there are where that is not all."""
    there = [str(name) for name in names]
    more = f", ... ({len(there)} in all)" if len(there) > most else ""
    return (", ".join(there[:most]) or "none") + more


def near_path(path: str | os.PathLike[str]) -> str:
    """`did_you_mean` of what stands in the same folder; where there is none, of the folder."""
    folder, name = os.path.split(os.path.abspath(path))
    if os.path.isdir(folder):
        return did_you_mean(name, os.listdir(folder))
    return f": there is no {folder}{near_path(folder)}"
