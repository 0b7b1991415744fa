"""Rows by position, as notebooks of pandas 1 and 2 read them: `row = table.loc[0]; row[1]`.

pandas 3 takes every whole number for a label, and pandas 2 warns of it at each use. While this is
installed, a whole number is a position in a Series whose labels are text, silently in all of them.
pandas is not imported here: it is changed where it is there, or as it is imported.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

import numpy as np

_HOME = "pandas.core.series"
_TEXT = ("string", "mixed")  # kinds of labels, as pandas infers them


def _by_position(self: Any, key: Any) -> Any:
    """Series.__getitem__: the value of a label, a slice, .., or of a position."""
    whole = isinstance(key, (int, np.integer)) and not isinstance(key, bool)
    if whole and self.index.nlevels == 1 and self.index.inferred_type in _TEXT:
        return self.iloc[key]
    return _by_position.usual(self, key)  # type: ignore[attr-defined]


class _Finder(MetaPathFinder):
    """Asked first: has the module of Series change it at the end of its import."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != _HOME:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((s for f in others if (s := f.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                _change(module.Series)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_FINDER = _Finder()


def _change(series: Any) -> None:
    if series.__getitem__ is not _by_position:
        _by_position.usual = series.__getitem__  # type: ignore[attr-defined]
        series.__getitem__ = _by_position


def install() -> None:
    """From now on, until `uninstall`."""
    if _HOME in sys.modules:
        _change(sys.modules[_HOME].Series)
    elif _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def uninstall() -> None:
    """Series are pandas' own again."""
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
    series = getattr(sys.modules.get(_HOME), "Series", None)
    if series is not None and series.__getitem__ is _by_position:
        series.__getitem__ = _by_position.usual  # type: ignore[attr-defined]
