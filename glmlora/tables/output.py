"""Tables on disk: what is read, and what is written, checked before the work."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from .. import tell
from ..files.parquet import import_pyarrow, parquet_bytes
from ..files.rows import is_missing
from ..files.write import atomic_file
from ..names import did_you_mean, listed
from ..templates import as_text, check_template, columns_of


def check_question(template: str, rows: Sequence[Mapping[str, Any]], path: str) -> None:
    """ValueError for a template that cannot be filled, and for a column that it names and the rows
    of the table at `path` have not.
    """
    if not check_template(template, columns_of(rows), path):
        tell.warn("--template names no {column}: every row is asked the same question")


# The output


@dataclass(frozen=True)
class Output:
    """What is written: `columns` of each row, `constants` among them, then the answer, and behind
    it what the columns `more` tell of it.
    """

    path: str
    columns: list[str]
    constants: dict[str, str]
    answer_column: str
    more: Sequence[str] = ()

    def header(self) -> list[str]:
        return [*self.columns, self.answer_column, *self.more]

    def cells(self, row: Mapping[str, Any]) -> list[str]:
        """What a row has before its answer."""

        def cell(name: str) -> str:
            value = self.constants.get(name, row.get(name))
            return "" if value is None else as_text(value)

        return [*map(cell, self.columns)]


def journal_path(path: str | os.PathLike) -> str:
    """Where the results for the output `path` are while they come."""
    return f"{os.fspath(path)}.journal"


def check_place(
    path: str | os.PathLike, overwrite: bool, input: str | os.PathLike, kept: str | None = None
) -> None:
    """OSError or ValueError for an output that has no place, is the input, or is there already and
    is none that a job may have written whose results are kept in the file `kept` (None: in the
    journal beside it); ImportError for parquet without pyarrow.
    """
    path = os.fspath(path)
    extension = os.path.splitext(path)[1].lower()
    if extension in (".json", ".xls", ".xlsx"):
        raise ValueError(
            "--output: csv, jsonl or parquet is written, expected a name that ends in one of them, "
            f"got {path}"
        )
    if extension == ".parquet":
        import_pyarrow()
    if os.path.isdir(path):
        raise IsADirectoryError(f"--output: {path} is a directory, expected the name of a csv file")
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"--output: there is no folder {folder} to write {path} into")
    if os.path.exists(path):
        if os.path.exists(input) and os.path.samefile(path, input):
            raise ValueError(f"--output: {path} is the input; give it another name")
        if not overwrite and not os.path.exists(kept or journal_path(path)):
            raise already_there(path)


def check_new_place(path: str | os.PathLike, overwrite: bool, input: str | os.PathLike) -> None:
    """`check_place` of a csv that is no job's: what is there needs `overwrite`."""
    if os.path.splitext(path)[1].lower() in (".jsonl", ".parquet"):
        raise ValueError(f"--output: csv is written, expected a name ending in .csv, got {path}")
    check_place(path, overwrite, input)
    if os.path.exists(path) and not overwrite:
        raise already_there(os.fspath(path))


def already_there(path: str) -> FileExistsError:
    return FileExistsError(f"{path} exists: pass --overwrite to replace it")


def check_space(output: Output, rows: Sequence[Mapping[str, Any]]) -> None:
    """OSError where the output cannot be written, e.g. for a disk without room for the rows and 128
    bytes of answer each; ValueError naming a cell that is no text.
    """
    size = 0
    for number, row in enumerate(rows):
        cells = output.cells(row)
        for name, cell in zip(output.columns, cells, strict=True):
            try:
                size += len(cell.encode()) + 1
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"--columns: row {number} has half a character in column {name!r}, at "
                    f"{error.start}: it cannot be written as UTF-8"
                ) from None
    size += 128 * len(rows)  # the answer, and its line in the journal
    try:
        with atomic_file(output.path, "w") as file:
            file.write(" " * min(size, 1 << 16))
            file.flush()
            os.fsync(file.fileno())  # a full disk shows here, or there:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # cannot be asked there
                    raise
            raise _NotWritten
    except _NotWritten:
        pass
    except OSError as error:
        what = f"--output: cannot be written: {error.strerror}"
        raise OSError(error.errno, what, output.path) from None


class _NotWritten(Exception):
    """Ends a trial of writing: what stands under the name stays."""


def plan_output(
    path: str | os.PathLike,
    there: Sequence[str],
    columns: str | None,
    add: Sequence[str],
    answer_column: str,
    more: Sequence[str] = (),
) -> Output:
    """The output that the flags ask for. there: the table's columns; columns: those to keep,
    separated by commas (None: all); add: COLUMN=TEXT, behind the others where `columns` does not
    give it a place; more: columns that may stand behind the answer. ValueError naming a flag, what
    it names, and the nearest right word.
    """
    constants: dict[str, str] = {}
    for pair in add:
        name, equals, text = pair.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ValueError(f"--add: expected COLUMN=TEXT, got {pair!r}")
        if constants.setdefault(name, text) != text:
            raise ValueError(f"--add: {name!r} is given twice: {constants[name]!r} and {text!r}")
    if answer_column in constants:
        raise ValueError(f"--add: {answer_column!r} is the column of the answers")
    kept = list(there) if columns is None else [name.strip() for name in columns.split(",")]
    known = {*there, *constants, answer_column}
    for name in kept:
        if name not in known:
            near = did_you_mean(name, known)
            raise ValueError(
                f"--columns: {name!r} is no column of the table{near}; it has {listed(there)}"
            )
    twice = [name for name, count in Counter(kept).items() if count > 1]
    if twice:
        raise ValueError(f"--columns: {twice[0]!r} is named twice")
    if answer_column in there:
        tell.warn(
            f"the table's own column {answer_column!r} is left out: the answers have its name "
            "(--answer-column gives them another)"
        )
    kept += [name for name in constants if name not in kept]
    for name in more:
        if name in kept:
            raise ValueError(
                f"--columns: {name!r} is a column that tells of the answers; leave it out, or pass "
                "another --answer-column"
            )
    return Output(
        os.fspath(path), [name for name in kept if name != answer_column], constants, answer_column
    )


def table_bytes(
    output: Output, rows: Sequence[Mapping[str, Any]], answers: Mapping[str, Sequence[Any]]
) -> bytes:
    """The table of the rows' columns and, behind them, `answers` by name: parquet or one object a
    line, whose values are the rows' own, where the output's name says so, else csv.
    """
    extension = os.path.splitext(output.path)[1].lower()
    if extension not in (".jsonl", ".parquet"):
        cells = ([_as_cell(value) for value in column] for column in answers.values())
        return table_text(output, rows, *cells).encode()
    columns: dict[str, Sequence[Any]] = {
        name: [output.constants.get(name, row.get(name)) for row in rows] for name in output.columns
    }
    columns |= {n: [None if is_missing(x) else x for x in cells] for n, cells in answers.items()}
    if extension == ".parquet":
        return parquet_bytes(columns)
    lines = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    write = json.JSONEncoder(ensure_ascii=False, default=str).encode
    return "".join(write(line) + "\n" for line in lines).encode()


def _as_cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.9g}"
    return str(value)


def table_text(output: Output, rows: Sequence[Mapping[str, Any]], *cells: Sequence[str]) -> str:
    """The csv of the rows' columns and, behind them, `cells`: one sequence a further column."""
    lines: list[str] = []
    # What "\r\n" has in it is quoted in cells, too, which no program takes for the end of a row.
    writer = csv.writer(SimpleNamespace(write=lines.append), lineterminator="\r\n")
    writer.writerow(output.header())
    for row, *more in zip(rows, *cells, strict=True):
        writer.writerow([*output.cells(row), *more])
    return "".join(line[:-2] + "\n" for line in lines)
