"""The code cells of a notebook file."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from ..files.regular import read_text
from ..files.write import read_json


class Cell(NamedTuple):
    """Text and tags of a code cell."""

    source: str
    tags: tuple[str, ...] = ()


def read_cells(path: str | os.PathLike) -> list[Cell]:
    """Code cells of an .ipynb file, of nbformat 4 or as worksheets of nbformat 3 have them; an .ipy
    file is one cell.

    Raises ValueError for another file, and for a notebook in another language than Python.
    """
    if str(path).endswith(".ipy"):
        return [Cell(_text(read_text(path)) or "")]
    content = read_json(path, expect=dict)
    cells = content.get("cells")
    if cells is None and isinstance(content.get("worksheets"), list):
        sheets = [s.get("cells") for s in content["worksheets"] if isinstance(s, dict)]
        cells = [c for sheet in sheets if isinstance(sheet, list) for c in sheet]
    version = content.get("nbformat", 0)
    if not isinstance(version, int) or version < 3 or not isinstance(cells, list):
        raise ValueError(f"{path}: expected a notebook of nbformat 4 (or 3), got other JSON")
    metadata = _dict(content.get("metadata"))
    kernel, info = _dict(metadata.get("kernelspec")), _dict(metadata.get("language_info"))
    language = kernel.get("language") or info.get("name") or "python"
    if "python" not in str(language).lower():
        raise ValueError(f"{path}: its cells are {language}, expected Python")
    found = []
    for number, cell in enumerate(cells, 1):
        if not isinstance(cell, dict):
            raise ValueError(f"{path}: cell {number}: expected an object, got {cell!r:.40}")
        if cell.get("cell_type") != "code":
            continue
        source = _text(cell.get("source", cell.get("input", "")))
        if source is None:
            raise ValueError(f"{path}: cell {number}: its source is no text and no list of lines")
        tags = _dict(cell.get("metadata")).get("tags")
        found.append(Cell(source, tuple(tags) if isinstance(tags, list) else ()))
    return found


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        value = "".join(value)
    if not isinstance(value, str):
        return None
    return value.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")
