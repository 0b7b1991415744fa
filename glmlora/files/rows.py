"""Rows of a table: csv, json (an array, or one object per line), jsonl and parquet."""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from .. import tell
from ..names import near_path
from .parquet import read_parquet
from .regular import read_bytes
from .write import no_key_twice, refuse_lfs_pointer

EXTENSIONS = (".csv", ".json", ".jsonl", ".parquet")

# First bytes of files that are often renamed to .csv, and what to do with them.
_OTHER_FORMATS = (
    (b"PK\x03\x04", "a zip file or an Excel workbook; save it as CSV UTF-8"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook; save it as CSV UTF-8"),
    (b"PAR1", "a parquet file; give it a name ending in .parquet"),
    (b"\x1f\x8b", "compressed by gzip; unpack it first"),
)
_MARKS = (  # the longer ones first: UTF-32 begins as UTF-16 does
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CELL_MAX = 2**31 - 1  # characters; a C long on every system


def _notice(path: str, text: str) -> None:
    tell.warn(f"{path}: {text}")


def _read_text(path: str) -> str:
    """The text of a file in UTF-8; UTF-16 and GB18030, which spreadsheets write, with a notice."""
    data = read_bytes(path)
    refuse_lfs_pointer(path, data)
    for start, what in _OTHER_FORMATS:
        if data.startswith(start):
            raise ValueError(f"{path}: expected text, this is {what}")
    text = _decode(path, data)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path}: line {line}: not text: has a NUL character")
    return text


def _decode(path: str, data: bytes) -> str:
    mark = 3 if data.startswith(codecs.BOM_UTF8) else 0
    encoding = next((name for start, name in _MARKS if data.startswith(start)), None)
    sample = data[:4096]
    if encoding is None and b"\0" in sample:  # one without a mark: every other byte of ASCII is NUL
        for name, zeros in (("utf-16-le", sample[1::2]), ("utf-16-be", sample[::2])):
            if zeros.count(0) > 0.4 * len(sample[::2]):
                encoding = name
    if encoding is None:
        try:
            return data[mark:].decode("utf-8")
        except UnicodeDecodeError as error:
            offset = mark + error.start
            found = f"not UTF-8: byte 0x{data[offset]:02x} at offset {offset}"
        if mark or not _is_chinese(data):
            raise ValueError(f"{path}: {found}; save the file as UTF-8")
        _notice(path, f"{found}; read as GB18030 (save it as UTF-8 if characters are wrong)")
        return data.decode("gb18030")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not {encoding.upper()}: byte offset {error.start}") from None
    _notice(path, f"is {encoding.upper()}, read as that; UTF-8 is what other programs expect")
    return text


def _is_chinese(data: bytes) -> bool:
    """Whether bytes that are not UTF-8 are GB18030 text: nearly any bytes can be decoded so, but
    only Chinese text has most of its characters in the common ones of GB 2312. UTF-8 with a broken
    byte or a line from another file in it is not.
    """
    part = data[:1_000_000]
    utf8 = sum(map(len, re.findall(rb"[\xe0-\xef][\x80-\xbf]{2}", part)))
    if utf8 > sum(byte >= 0x80 for byte in part) / 2:
        return False
    try:
        text = data.decode("gb18030")
    except UnicodeDecodeError:
        return False
    beyond = [character for character in text[:100_000] if not character.isascii()]
    common = "".join(beyond).encode("gb2312", "ignore").decode("gb2312")
    return len(common) >= 0.8 * len(beyond)


# csv


def _csv_records(text: str, delimiter: str, strict: bool) -> Iterator[tuple[int, list[str]]]:
    """(first line, cells) of each record that is not an empty line. csv.Error for a quote that is
    never closed, and with strict for text after a closing quote.
    """
    ended = False

    def lines() -> Iterator[str]:
        nonlocal ended
        yield from io.StringIO(text, newline="")
        if not text.endswith(("\n", "\r")):
            yield "\n"
        ended = True
        yield "end"  # a record of its own, unless a quote is still open

    reader = csv.reader(lines(), delimiter=delimiter, strict=strict)
    line = 1
    try:
        for cells in reader:
            if ended and cells != ["end"]:
                raise csv.Error("a quote is opened and never closed")
            if cells and not ended:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise csv.Error(f"line {line}: {error}") from None


def _header(path: str, cells: list[str]) -> list[str]:
    """Column names; a blank one is called by its place, as pandas does."""
    names = [name if name.strip() else f"Unnamed: {i}" for i, name in enumerate(cells)]
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"{path}: column {twice!r} stands twice in the header")
    return names


def _delimiter(path: str, text: str) -> str:
    """A comma, unless the header has none but tabs or semicolons."""
    first = io.StringIO(text.lstrip("\r\n"), newline="").readline()
    if "," not in first:
        for delimiter, name in (("\t", "tabs"), (";", "semicolons")):
            if delimiter in first:
                _notice(path, f"columns are separated by {name}, read as that; expected commas")
                return delimiter
    return ","


def _cells(path: str, text: str, delimiter: str, strict: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    header: list[str] | None = None
    blank: list[str] = []
    for line, cells in _csv_records(text, delimiter, strict):
        if header is None:
            header = _header(path, cells)
            blank = [name for name in header if name.startswith("Unnamed: ")]
            continue
        n = len(header)
        if n > 1 and len(cells) == 1 and cells[0].isspace():  # a line of spaces
            continue
        if len(cells) > n and not any(cells[n:]):  # delimiters at the end of a line
            cells = cells[:n]
        if len(cells) != n:
            raise ValueError(
                f"{path}: line {line}: expected {n} cells as in the header, got {len(cells)}"
            )
        rows.append(dict(zip(header, cells, strict=True)))
    if header is None:
        raise ValueError(f"{path}: expected a header line, the file is empty")
    for name in blank:  # a spreadsheet's empty columns hold nothing
        if not any(row[name] for row in rows):
            for row in rows:
                del row[name]
    return rows


def _read_csv(path: str, text: str) -> list[dict[str, Any]]:
    """Rows of a comma-separated file (RFC 4180) with a header; every cell is text.

    Read as pandas.read_csv does where quotes stand inside quoted cells, with a notice.
    """
    limit = csv.field_size_limit(_CELL_MAX)
    delimiter = _delimiter(path, text)
    try:
        return _cells(path, text, delimiter, strict=True)
    except csv.Error as error:
        strict_error = str(error)
    finally:
        csv.field_size_limit(limit)
    limit = csv.field_size_limit(_CELL_MAX)
    try:
        rows = _cells(path, text, delimiter, strict=False)
    except csv.Error as error:
        raise ValueError(f"{path}: not csv: {error}") from None
    finally:
        csv.field_size_limit(limit)
    _notice(
        path,
        f"not exactly csv, read as pandas does: {strict_error} (a quote inside a "
        "quoted cell is written twice)",
    )
    return rows


# JSON


_DECODER = json.JSONDecoder(object_pairs_hook=no_key_twice)


def _parse(path: str, text: str, line: int | None = None) -> Any:
    """A JSON value; ValueError naming the file, and the place in it. line: where `text` stands, if
    it is not the whole file.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if line:
            raise ValueError(
                f"{path}: line {line} column {error.colno}: not JSON: {error.msg}"
            ) from None
        where = f"line {error.lineno} column {error.colno}"
        raise ValueError(f"{path}: not JSON: {error.msg} at {where}") from None
    except RecursionError:
        raise ValueError(f"{path}: JSON nested too deeply") from None
    except ValueError as error:  # a key twice, or a number with thousands of digits
        where = f"line {line}: " if line else ""
        raise ValueError(f"{path}: {where}not JSON: {error}") from None


def _read_json_lines(path: str, text: str) -> list[Any]:
    return [
        _parse(path, line, number)
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]


def _has_json_lines(text: str) -> bool:
    """Whether a .json file holds one object per line: its first line is a whole object."""
    first, _, rest = text.strip().partition("\n")
    if not first.startswith("{"):
        return False
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return False
    # A single line may also be a whole table, see _rows_of.
    return bool(rest.strip()) or not any(isinstance(v, (list, dict)) for v in value.values())


def _rows_of(path: str, value: Any) -> list[Any]:
    """The rows in a file that is one JSON value."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict) and value:
        lists = [
            name
            for name, rows in value.items()
            if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
        ]
        tables = [name for name in lists if not _is_conversation(value[name])]
        if len(tables) > 1:
            raise ValueError(
                f"{path}: expected an array of objects, got an object with several: "
                f"{', '.join(tables[:10])}; save each in a file of its own"
            )
        if tables:
            others = [name for name in value if name != tables[0]]
            more = f"; not used: {', '.join(others[:10])}" if others else ""
            _notice(path, f"an object, its list {tables[0]!r} is read{more}")
            return list(value[tables[0]])
        if lists or any(isinstance(cell, str) for cell in value.values()):  # a single row
            return [value]
        if all(isinstance(column, (list, dict)) for column in value.values()):
            raise ValueError(
                f"{path}: expected an array of objects, got an object of columns; pandas writes "
                "rows with to_json(path, orient='records', force_ascii=False)"
            )
    kind = {dict: "an object", str: "a string", type(None): "null"}.get(type(value), "a number")
    raise ValueError(
        f"{path}: expected an array of objects as the outermost JSON value, got {kind}"
    )


def _is_conversation(messages: list[dict[str, Any]]) -> bool:
    return all({"role", "content"} <= set(m) or {"from", "value"} <= set(m) for m in messages)


def _is_json(text: str) -> bool:
    if not text.lstrip().startswith(("[{", "[\n", "[\r", '{"')):
        return False
    try:
        json.loads(text.strip().partition("\n")[0])
    except (ValueError, RecursionError):
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return False
    return True


def read_rows(path: str | os.PathLike) -> list[Any]:
    """Rows of a .csv, .json (an array, or one object per line), .jsonl or .parquet file, as they
    stand there.

    A file whose content is of the other kind than its name says, that is not UTF-8, or whose cells
    are not separated by commas is read where that is certain, with a warning. Raises ValueError
    naming the file and the line, the offset of a byte that is no text, or the kind of value found.
    """
    path = os.fspath(path)
    extension = os.path.splitext(path)[1].lower()
    if extension not in EXTENSIONS:
        more = "; save the workbook as CSV UTF-8" if extension in (".xls", ".xlsx") else ""
        raise ValueError(f"{path}: expected a file ending in .csv, .json, .jsonl or .parquet{more}")
    if extension == ".parquet":
        return [
            {name: None if is_missing(value) else value for name, value in row.items()}
            for row in read_parquet(path)
        ]
    text = _read_text(path)
    if extension == ".csv":
        if not _is_json(text):
            return _read_csv(path, text)
        _notice(path, "holds JSON, read as that")
    elif not text.strip():
        raise ValueError(f"{path}: expected rows, the file is empty")
    if text.lstrip().startswith("["):
        return _rows_of(path, _parse(path, text))
    if extension == ".jsonl" or _has_json_lines(text):
        return _read_json_lines(path, text)
    return _rows_of(path, _parse(path, text))


def table_rows(table: Any, name: str) -> list[dict[str, Any]]:
    """Rows of a DataFrame, of a list of dicts, or of a file as `read_rows` reads it; a cell of a
    DataFrame without a value is None.

    name: of the argument, for errors. Raises FileNotFoundError for a file that is not there,
    ValueError for a table without rows, a column that stands twice or a row that is no object,
    TypeError for other data.
    """
    if isinstance(table, (str, os.PathLike)):
        if not os.path.exists(table):
            raise FileNotFoundError(
                f"{name}: {os.fspath(table)!r}: looked for a table (from {os.getcwd()}) and found "
                f"none{near_path(table)}"
            )
        name, rows = os.fspath(table), read_rows(table)
    elif hasattr(table, "columns") and hasattr(table, "to_dict"):  # a DataFrame
        names = list(table.columns)
        if len(set(names)) < len(names):
            twice = next(n for n, count in Counter(names).items() if count > 1)
            raise ValueError(f"{name}: column {twice!r} stands twice")
        # Column by column: a row of a mixed frame would turn its ints into floats.
        cells = zip(*(list(table[n]) for n in names), strict=True)
        rows = [
            {str(n): None if is_missing(v) else v for n, v in zip(names, row, strict=True)}
            for row in cells
        ]
    elif isinstance(table, Iterable) and not isinstance(table, (Mapping, bytes)):
        rows = list(table)
    else:
        raise TypeError(
            f"{name}: expected a DataFrame, a list of dicts or a file name, got "
            f"{type(table).__name__}"
        )
    if not rows:
        raise ValueError(f"{name}: the table has no rows")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            kind = type(row).__name__
            raise ValueError(f"{name} row {number}: expected an object of columns, got {kind}")
    return rows


def is_missing(value: Any) -> bool:
    """Whether a cell is None, or NaN, NA or NaT of a DataFrame."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, (float, np.floating)) and math.isnan(value)
