"""The nearest right word for a misspelt name, as every error message that has one says it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about a misspelt name: " (did you mean 'history'?)", or "" where no
    known name is near.
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
