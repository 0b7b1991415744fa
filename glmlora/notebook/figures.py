"""matplotlib's figures as a notebook has them: each cell begins without one, and plt.show() ends
those that are there; nothing waits at a window.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def figures(tell: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Gives a function to be called with each cell's source before it runs. `tell` is told of the
    first figure that is not shown.
    """
    saved: list[tuple[Any, Any]] = []
    backend = os.environ.get("MPLBACKEND")
    os.environ.setdefault("MPLBACKEND", "agg")
    told = False

    def show(*_: Any, **__: Any) -> None:
        nonlocal told
        pyplot = sys.modules["matplotlib.pyplot"]
        if pyplot.get_fignums() and not told:
            told = True
            tell("figures are not shown here: plt.savefig() before plt.show() keeps one")
        pyplot.close("all")

    def begin_cell(source: str) -> None:
        with contextlib.suppress(ImportError):  # the cell's to tell
            if "pyplot" in source or "pylab" in source:
                importlib.import_module("matplotlib.pyplot")
        pyplot: Any = sys.modules.get("matplotlib.pyplot")
        if pyplot is None:
            return
        pyplot.close("all")
        if not saved:
            saved.append((pyplot, pyplot.show))
            pyplot.show = show

    try:
        yield begin_cell
    finally:
        for pyplot, function in saved:
            pyplot.show = function
        if backend is None:
            os.environ.pop("MPLBACKEND", None)
