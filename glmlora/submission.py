"""Predictions as a submission: the columns, ids, order and form of a sample, and everything that is
wrong told before anything is written.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from . import tell
from .files.regular import read_bytes
from .files.rows import is_missing, table_rows
from .files.write import atomic_file
from .names import did_you_mean, listed
from .tables.output import check_new_place
from .templates import columns_of

_WHOLE = re.compile(r"[+-]?\d+")
_ZEROS = re.compile(r"([+-]?\d+)\.0+")
_MARK = b"\xef\xbb\xbf"  # of UTF-8, which spreadsheets write


@dataclass
class Submission:
    """What was written. changed: what differs from the predictions, in sentences; warnings: what is
    allowed and yet likely to be wrong; values: of each column but the ids, rows by value.
    """

    path: str
    rows: int
    id_column: str
    changed: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    values: dict[str, dict[str, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.path}: {_rows(self.rows)}, in the order and form of the sample"]
        lines += [f"  {text}" for text in self.changed]
        for column, counts in self.values.items():
            first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:6]
            shown = ", ".join(f"{value} in {_rows(n)} ({n / self.rows:.1%})" for value, n in first)
            more = f", ... ({len(counts):,} values)" if len(counts) > len(first) else ""
            lines.append(f"  {column}: {shown}{more}")
        return "\n".join(lines)


def submit(
    sample: Any, predictions: Any, output: str | os.PathLike, overwrite: bool = False
) -> Submission:
    """Write the predictions as the sample submission is written: its columns, ids, order, and whole
    numbers where it has whole numbers; a csv file's separator, line ends and byte order mark, too.

    sample, predictions: a DataFrame, a list of dicts, or the path of a csv, json or jsonl file.
    output: the csv to write. Ids are in the first of the sample's columns named like `id` or
    `uuid`, else in its first column.

    Warns of output of one class, of labels where the sample has probabilities, of values that the
    sample does not have, and of predictions that are the sample itself. Raises ValueError that
    names all that is wrong (columns and ids that are missing, ids that repeat, empty cells,
    probabilities or text where the sample has whole numbers, or numbers out of range), with nothing
    written; OSError for an output that cannot be written or is there already (overwrite: replaced).
    """
    paths = [p for p in (sample, predictions) if isinstance(p, (str, os.PathLike))]
    for path in paths or [""]:
        check_new_place(output, overwrite, path)
    wanted = table_rows(sample, "sample")
    given = table_rows(predictions, "predictions")
    header = columns_of(wanted)
    id_column = _id_column(header)
    result = Submission(os.fspath(output), len(wanted), id_column)
    _check_columns(header, columns_of(given), result)
    rows = _in_order(wanted, given, id_column, result)
    wrong: list[str] = []
    ids = [_text(row.get(id_column)) for row in wanted]
    cells, copied = {id_column: ids}, True
    for column in [c for c in header if c != id_column]:
        shown = [_text(row.get(column)) for row in wanted]
        found = [_text(row.get(column)) for row in rows]
        copied = copied and shown == found
        cells[column] = _values(column, shown, found, ids, result, wrong)
        result.values[column] = dict(Counter(cells[column]))
    if wrong:
        raise ValueError(f"predictions: {'; '.join(wrong)}")
    if copied and len(wanted) > 1:
        result.warnings.append("every value is the sample's own: is this the sample itself?")
    _write(output, sample, [cells[column] for column in header], header)
    for text in result.warnings:
        tell.warn(text)
    return result


def _rows(n: int) -> str:
    return f"{n:,} row{'' if n == 1 else 's'}"


def _id_column(header: Sequence[str]) -> str:
    names = ("id", "uuid", "guid", "index", "idx", "row_id")
    return next((c for c in header if c.strip().lower() in names), header[0])


def _text(value: Any) -> str:
    return "" if is_missing(value) else str(value).strip()


def _check_columns(header: Sequence[str], there: Sequence[str], result: Submission) -> None:
    missing = [f"{c!r}{did_you_mean(c, there)}" for c in header if c not in there]
    if missing:
        raise ValueError(
            f"predictions: the sample has the column {', '.join(missing)}, which is not among "
            f"{listed(there)}; `glmlora predict` writes constants with --add COLUMN=TEXT and the "
            "answers under --answer-column"
        )
    more = [c for c in there if c not in header]
    if more:
        result.changed.append(f"columns left out, which the sample has not: {listed(more)}")
    elif list(header) != list(there):
        result.changed.append(f"columns put into the sample's order: {listed(header)}")


def _plain_id(text: str) -> str:
    """An id without what a table program adds: "7.0" and "007" are 7."""
    found = _ZEROS.fullmatch(text)
    text = found.group(1) if found else text
    return str(int(text)) if _WHOLE.fullmatch(text) else text


def _in_order(
    wanted: Sequence[dict[str, Any]],
    given: Sequence[dict[str, Any]],
    column: str,
    result: Submission,
) -> list[dict[str, Any]]:
    """The rows of the predictions in the order of the sample's ids."""
    ids = [_text(row.get(column)) for row in wanted]
    twice = _twice(ids)
    if twice:
        raise ValueError(f"sample: ids in {column!r} stand twice: {listed(twice)}")
    have = [_text(row.get(column)) for row in given]
    if not set(have) >= set(ids) and set(map(_plain_id, have)) & set(map(_plain_id, ids)):
        form = {_plain_id(i): i for i in ids}
        if len(form) == len(ids):
            named = [form.get(_plain_id(i), i) for i in have]
            changed = [f"{a} is {b}" for a, b in zip(have, named, strict=True) if a != b]
            if changed:
                text = f"ids written as in the sample: {changed[0]} ({_rows(len(changed))})"
                result.changed.append(text)
            have = named
    wrong = []
    twice = _twice(have)
    if twice:
        wrong.append(f"ids that stand twice: {listed(twice, 5)}")
    known = set(have)
    missing = [i for i in ids if i not in known]
    if missing:
        wrong.append(f"ids that are missing: {listed(missing, 5)}; the sample has {len(ids):,}")
    asked = set(ids)
    extra = [i for i in have if i not in asked]
    if wrong:
        if extra:
            wrong.append(f"ids that the sample has not: {listed(extra, 5)}")
        raise ValueError(f"predictions: {'; '.join(wrong)} (ids are in {column!r})")
    if extra:
        result.changed.append(f"rows left out whose ids the sample has not: {listed(extra, 5)}")
    if [i for i in have if i in asked] != ids:
        result.changed.append("rows put into the order of the sample")
    rows = dict(zip(have, given, strict=True))
    return [rows[i] for i in ids]


def _twice(ids: Sequence[str]) -> list[str]:
    return [i for i, count in Counter(ids).items() if count > 1]


def _values(
    column: str,
    shown: Sequence[str],
    found: Sequence[str],
    ids: Sequence[str],
    result: Submission,
    wrong: list[str],
) -> list[str]:
    """The cells of a column in the form of the sample's, `shown`; what is wrong goes to `wrong`."""
    empty = [i for i, value in zip(ids, found, strict=True) if not value]
    if empty and any(shown):
        wrong.append(f"{column}: no value for the ids {listed(empty, 5)}")
        return list(found)
    examples = [value for value in shown if value]
    kind = _kind(examples)
    cells = list(found)
    if kind == "whole numbers":
        cells = [_ZEROS.sub(r"\1", v) if _ZEROS.fullmatch(v) else v for v in found]
        changed = [(a, b) for a, b in zip(found, cells, strict=True) if a != b]
        if changed:
            (old, new), n = changed[0], len(changed)
            result.changed.append(
                f"{column}: {old} written as {new}, as in the sample ({_rows(n)})"
            )
    odd = [(i, v) for i, v in zip(ids, cells, strict=True) if not _fits(v, kind)]
    if odd:
        (first, value), n = odd[0], len(odd)
        text = (
            f"{column}: expected {kind} as in the sample, got {value!r} for id {first} ({_rows(n)})"
        )
        if kind == "whole numbers" and all(_is_share(v) for _, v in odd):
            text += ": probabilities where labels are due, choose a threshold and write labels"
        wrong.append(text)
        return cells
    _warn_of(column, examples, cells, kind, result)
    return cells


def _kind(examples: Sequence[str]) -> str:
    if examples and all(_WHOLE.fullmatch(value) for value in examples):
        return "whole numbers"
    return "numbers" if examples and all(_is_number(value) for value in examples) else "text"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and "_" not in text
    except ValueError:
        return False


def _is_share(text: str) -> bool:
    return _is_number(text) and 0 <= float(text) <= 1


def _fits(text: str, kind: str) -> bool:
    if kind == "whole numbers":
        return _WHOLE.fullmatch(text) is not None
    return kind == "text" or _is_number(text)


def _warn_of(
    column: str, examples: Sequence[str], cells: Sequence[str], kind: str, result: Submission
) -> None:
    """Warnings about a column whose cells have the right form."""
    values, known = set(cells), set(examples)
    if len(cells) > 1 and len(values) == 1 and not (kind == "text" and values == known):
        text = f"{column}: every row has the same value, {cells[0]!r}: one class only"
        result.warnings.append(text)
        return
    if kind == "numbers" and all(_is_share(value) for value in known):
        if all(float(value) in (0, 1) for value in values):
            text = f"{column}: only 0 and 1, where the sample has probabilities: labels?"
            result.warnings.append(text)
        outside = [value for value in cells if not _is_share(value)]
        if outside:
            text = f"{column}: {outside[0]} is not between 0 and 1, as all of the sample are"
            result.warnings.append(f"{text} ({_rows(len(outside))})")
    few = 1 < len(known) <= max(2, len(examples) // 3)  # so the sample shows classes
    if few and kind != "numbers" and values - known:
        other = sorted(values - known)
        text = f"{column}: {listed(map(repr, other), 5)} is not among the sample's values, "
        result.warnings.append(text + listed(map(repr, sorted(known)), 5))


def _write(
    output: str | os.PathLike,
    sample: Any,
    columns: Sequence[Sequence[str]],
    header: Sequence[str],
) -> None:
    """A csv with the separator, line ends and byte order mark of the sample's file."""
    first, mark = b"", b""
    if isinstance(sample, (str, os.PathLike)) and os.fspath(sample).lower().endswith(".csv"):
        data = read_bytes(sample)
        first = data[: data.find(b"\n") + 1]
        mark = _MARK if data.startswith(_MARK) else b""
    separators = [",", "\t", ";"]
    delimiter = next((c for c in separators if c.encode() in first), ",")
    end = "\r\n" if first.endswith(b"\r\n") else "\n"
    with atomic_file(output, "w") as file:
        file.write(mark.decode("utf-8"))
        writer = csv.writer(file, delimiter=delimiter, lineterminator=end)
        writer.writerow(header)
        writer.writerows(zip(*columns, strict=True))
