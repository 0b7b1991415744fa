"""Rows of a table: csv, json (an array, or one object per line) and jsonl."""

from __future__ import annotations

import csv
import io
import json
import os
from typing import Any

from .regular import read_bytes
from .write import read_json, refuse_lfs_pointer

EXTENSIONS = (".csv", ".json", ".jsonl")


def _read_text(path: str) -> str:
    data = read_bytes(path)
    refuse_lfs_pointer(path, data)
    mark = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    try:
        return data[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = mark + error.start
        raise ValueError(
            f"{path}: not UTF-8: byte 0x{data[offset]:02x} at offset {offset}"
        ) from None


def _read_csv(path: str) -> list[dict[str, Any]]:
    """Rows of a comma-separated file (RFC 4180) with a header; every cell is text."""
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    rows: list[dict[str, Any]] = []
    header: list[str] | None = None
    try:
        for cells in reader:
            if not cells:  # an empty line
                continue
            if header is None:
                header = cells
                twice = sorted({name for name in header if header.count(name) > 1})
                if twice:
                    raise ValueError(f"{path}: column {twice[0]!r} stands twice in the header")
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{path}: line {reader.line_num}: expected {len(header)} cells as in the "
                    f"header, got {len(cells)}"
                )
            rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: not csv: {error}") from None
    if header is None:
        raise ValueError(f"{path}: expected a header line, the file is empty")
    return rows


def _read_json_lines(path: str, text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}: line {number} column {error.colno}: not JSON: {error.msg}"
            ) from None
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{path}: line {number}: not JSON: {error}") from None
    return rows


def _has_json_lines(text: str) -> bool:
    """Whether a .json file holds one object per line: its first line is a whole object, and others
    follow.
    """
    first, _, rest = text.strip().partition("\n")
    if not first.startswith("{") or not rest.strip():
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def read_rows(path: str | os.PathLike) -> list[Any]:
    """Rows of a .csv, .json (an array, or one object per line) or .jsonl file, as they stand there.

    Raises ValueError naming the file and the line, the offset of a byte that is not UTF-8, or the
    kind of value found.
    """
    path = os.fspath(path)
    extension = os.path.splitext(path)[1].lower()
    if extension == ".csv":
        return _read_csv(path)
    if extension not in EXTENSIONS:
        raise ValueError(f"{path}: expected a file ending in .csv, .json or .jsonl")
    text = _read_text(path)
    if extension == ".jsonl" or _has_json_lines(text):
        return _read_json_lines(path, text)
    return read_json(path, list)
