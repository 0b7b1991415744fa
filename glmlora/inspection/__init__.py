"""A table looked at before a model is trained on it: what is missing, double, contradictory or
leaked, how long its prompts are, and what training and prediction would take.

`similar.py` finds equal and near-equal rows, `lengths.py` counts tokens and forecasts, `report.py`
is what users see.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..files.hub import model_directory
from ..files.rows import is_missing, table_rows
from ..model.configuration import ChatGLMConfig
from ..names import did_you_mean, listed
from ..task import read_task
from ..templates import check_template, columns_of, fill_template, places_of
from ..tools.demo import PAPERS
from ..tools.project import tiny_directory
from ..training.records import COLUMNS
from .lengths import forecast, prompt_lengths, suggested_length
from .report import Alike, Leak, Report, TestPart
from .similar import similar_rows

_MISSING = frozenset(("", "nan", "NaN", "NAN", "null", "NULL", "<NA>", "#N/A", "NaT"))
_ID_NAMES = ("id", "uuid", "guid", "index", "idx", "row_id")
_ANSWER_ROOM = 8  # positions of the model kept for a label and its end


@dataclass(frozen=True)
class _Table:
    """A table as it is looked at: which column is what, and the cells that are used, as text."""

    name: str
    rows: list[dict[str, Any]]
    columns: list[str]
    ids: list[Any]
    id_column: str | None
    repeated_ids: list[str]
    missing: dict[str, list[int]]  # column -> rows without a value


def inspect(
    table: Any,
    test: Any = None,
    label: str | None = None,
    template: str | None = None,
    tokenizer: Any = None,
    max_source_length: int | None = None,
    adapter: str | os.PathLike | None = None,
) -> Report:
    """Look at a table, and at the test table that is to be predicted.

    table, test: a DataFrame, a list of dicts, or the path of a csv, json or jsonl file. label: the
    column of the answers; None: `label`, `output` or `response`, where there is one. template: the
    prompt with `{column}` places; None: that of the paper workflow where its columns are there,
    else `instruction` and `input`, else all columns but id and label. tokenizer: one of this
    package, or a model directory; lengths are characters without one. max_source_length: where
    training cuts prompts, in tokens; None: 512. adapter: the folder of one that is to predict
    `table` or `test`: its task.json gives template, base and max_source_length where they are not
    given.

    Returns a Report: its fields are plain numbers and lists of row ids (of a column named like
    `id` or `uuid` whose values differ, else row numbers from 0); printed, it is a text. Raises
    ValueError naming a column that is not there, and as the reading of a file does.
    """
    if adapter is not None:
        task = read_task(adapter)
        template = task.question if template is None else template
        tokenizer = (task.base or tiny_directory()) if tokenizer is None else tokenizer
        if max_source_length is None:
            max_source_length = task.max_source_length
    max_source_length = 512 if max_source_length is None else max_source_length
    if type(max_source_length) is not int or max_source_length < 3:
        raise ValueError(
            f"max_source_length: expected a whole number from 3, got {max_source_length!r}"
        )
    rows = table_rows(table, "table")
    test_rows = None if test is None else table_rows(test, "test")
    columns = columns_of(rows)
    label = _label_column(label, columns)
    id_column = next((c for c in columns if c.lower() in _ID_NAMES and c != label), None)
    template = _template(template, columns, [c for c in (label, id_column) if c])
    used = list(dict.fromkeys(check_template(template, columns, "table")))
    if not used:
        raise ValueError("template: names no {column}: every row is asked the same question")
    if label in used:
        raise ValueError(f"template: {label!r} is the label: a prompt must not hold its answer")
    train = _looked_at(_name(table, "table"), rows, columns, id_column)
    asked = None
    if test_rows is not None:
        check_template(template, columns_of(test_rows), "test")
        asked = _looked_at(_name(test, "test"), test_rows, columns_of(test_rows), id_column)

    constants = _constants(train)
    report = Report(
        table=train.name,
        rows=len(rows),
        columns=columns,
        id_column=train.id_column,
        label_column=label,
        text_columns=used,
        template=template,
        constant_columns={c: v for c, v in constants.items() if c != label and len(rows) > 1},
        missing={c: [train.ids[n] for n in at] for c, at in train.missing.items()},
        repeated_ids=train.repeated_ids,
        max_source_length=max_source_length,
    )
    for column, at in train.missing.items():
        report.note("missing", "table", at, train.ids, detail=column)
    labels = None if label is None else _labels(train, label, report)
    compared = [c for c in used if c not in constants] or used
    _compare(report, train, asked, labels, compared)
    _measure(report, train, asked, template, used, tokenizer)
    return report


def _name(table: Any, otherwise: str) -> str:
    is_path = isinstance(table, (str, os.PathLike))
    return os.path.basename(os.fspath(table)) if is_path else otherwise


def _label_column(label: str | None, columns: Sequence[str]) -> str | None:
    if label is None:
        return next((c for c in ("label", *COLUMNS["response"][::-1]) if c in columns), None)
    if label not in columns:
        near = did_you_mean(label, columns)
        raise ValueError(
            f"label: {label!r} is no column of the table{near}; it has {listed(columns)}"
        )
    return label


def _template(template: str | None, columns: Sequence[str], apart: Sequence[str]) -> str:
    """The template that was given, or the one that fits the columns."""
    if template is not None:
        places_of(template)  # ValueError for braces that are none of a column
        return template
    if {"title", "abstract"} <= set(columns):
        return PAPERS
    records = [c for field in ("prompt", "query") for c in COLUMNS[field] if c in columns]
    if any(c in COLUMNS["prompt"] for c in records):
        return "".join(f"{{{c}}}" for c in records)
    plain = [c for c in columns if c not in apart and not set(c) & set("{}[].!:")]
    if not plain:
        raise ValueError(
            f"table: expected a column of text beside id and label, got {listed(columns)}"
        )
    return "\n".join(f"{{{c}}}" for c in plain)


def _is_missing(value: Any) -> bool:
    if isinstance(value, str):
        return value.isspace() or (len(value) < 20 and value.strip() in _MISSING)
    return is_missing(value)


def _looked_at(
    name: str, rows: list[dict[str, Any]], columns: list[str], id_column: str | None
) -> _Table:
    missing = {c: [n for n, row in enumerate(rows) if _is_missing(row.get(c))] for c in columns}
    missing = {c: at for c, at in missing.items() if at}
    ids: list[Any] = list(range(len(rows)))
    repeated: list[str] = []
    if id_column in columns:
        counts = Counter(str(row.get(id_column)) for row in rows)
        repeated = [value for value, count in counts.items() if count > 1]
        if not repeated and id_column not in missing:
            ids = [str(row[id_column]) for row in rows]
    return _Table(name, rows, columns, ids, id_column, repeated, missing)


def _constants(table: _Table) -> dict[str, str]:
    """The columns that have the same value in every row, and that value."""
    found = {}
    for column in table.columns:
        first = table.rows[0].get(column)
        if all(row.get(column) == first for row in table.rows) and not _is_missing(first):
            found[column] = str(first)
    return found


def _labels(table: _Table, column: str, report: Report) -> list[str | None]:
    """The label of each row as text, None where it is missing; counted in the report."""
    without = set(table.missing.get(column, ()))
    labels = [None if n in without else str(row.get(column)) for n, row in enumerate(table.rows)]
    there = [value for value in labels if value is not None]
    report.labels = dict(sorted(Counter(there).items(), key=lambda item: (-item[1], item[0])))
    apart = Counter(value.strip().lower().removesuffix(".0") for value in report.labels)
    report.label_spellings = [
        value for value in report.labels if apart[value.strip().lower().removesuffix(".0")] > 1
    ]
    if len(report.labels) > 1 and len(there) >= 20:
        runs = 1 + sum(one != other for one, other in zip(there, there[1:], strict=False))
        mixed = len(there) * (1 - sum((n / len(there)) ** 2 for n in report.labels.values()))
        report.sorted_by_label = runs < 0.5 * mixed
    return labels


def _texts(table: _Table, columns: Sequence[str]) -> list[str]:
    """What the rows are compared by: their values in the columns."""
    return [
        "\n".join("" if _is_missing(row.get(c)) else str(row.get(c)) for c in columns)
        for row in table.rows
    ]


def _compare(
    report: Report,
    train: _Table,
    test: _Table | None,
    labels: list[str | None] | None,
    columns: Sequence[str],
) -> None:
    """Duplicates, near-duplicates, label conflicts and leaks: a row in one of the first three at
    most.
    """
    texts = _texts(train, columns)
    n = len(texts)
    found = similar_rows(texts + ([] if test is None else _texts(test, columns)))
    report.all_compared = found.complete
    members: dict[int, list[int]] = {}
    for row, group in enumerate(found.group.tolist()):
        members.setdefault(group, []).append(row)
    for group, rows in members.items():
        if len(rows) < 2:
            continue
        similarity = found.similarity.get(group, 1.0)
        own = [row for row in rows if row < n]
        if own:
            _own_group(report, train, own, found.equal, similarity, labels)
        if test is not None and own:
            for row in rows[len(own) :]:
                equal = [r for r in own if found.equal[r] == found.equal[row]]
                near = 1.0 if equal else similarity
                partner = train.ids[(equal or own)[0]]
                report.leaks.append(Leak(test.ids[row - n], partner, near))
                report.note("leak", "test", [row - n], test.ids, partner, f"{near:.2f}")


def _own_group(
    report: Report,
    train: _Table,
    rows: list[int],
    equal: np.ndarray,
    similarity: float,
    labels: list[str | None] | None,
) -> None:
    """Rows of the table that are equal or nearly so."""
    if len(rows) < 2:
        return
    ids = train.ids
    seen = [None if labels is None else labels[row] for row in rows]
    texts = {int(equal[row]) for row in rows}
    near = 1.0 if len(texts) == 1 else similarity
    if len({value for value in seen if value is not None}) > 1:
        report.conflicts.append(Alike([ids[row] for row in rows], near, seen))
        report.note("label conflict", "table", rows, ids, ids[rows[0]], f"{near:.2f}")
        return
    for text in texts:
        same = [row for row in rows if equal[row] == text]
        if len(same) > 1:
            report.duplicates.append([ids[row] for row in same])
            report.note("duplicate", "table", same, ids, ids[same[0]], "1.00")
    if len(texts) > 1:
        report.near_duplicates.append(Alike([ids[row] for row in rows], near, seen))
        report.note("near-duplicate", "table", rows, ids, ids[rows[0]], f"{near:.2f}")


def _measure(
    report: Report,
    train: _Table,
    test: _Table | None,
    template: str,
    columns: Sequence[str],
    tokenizer: Any,
) -> None:
    """Lengths of the prompts, those that would be cut, and the forecast."""
    model = None
    if isinstance(tokenizer, (str, os.PathLike)):
        from ..tokenization import AutoTokenizer

        model = model_directory(tokenizer)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    elif tokenizer is not None:
        model = getattr(tokenizer, "name_or_path", None)
    report.unit = "characters" if tokenizer is None else "tokens"

    def lengths(table: _Table) -> np.ndarray:
        cells = [
            {c: "" if _is_missing(row.get(c)) else row[c] for c in columns} for row in table.rows
        ]
        prompts = fill_template(template, cells)
        if tokenizer is None:
            return np.fromiter(map(len, prompts), np.int32, len(prompts))
        return prompt_lengths(tokenizer, prompts)

    def cut(lengths: np.ndarray, table: _Table, name: str) -> dict[Any, int]:
        if tokenizer is None:
            return {}
        over = lengths - report.max_source_length
        for row in np.flatnonzero(over > 0).tolist():
            report.note("cut", name, [row], table.ids, detail=str(over[row]))
        return {table.ids[row]: int(over[row]) for row in np.flatnonzero(over > 0)}

    report.lengths = lengths(train)
    report.cut = cut(report.lengths, train, "table")
    if test is not None:
        there = lengths(test)
        missing = {c: [test.ids[n] for n in at] for c, at in test.missing.items()}
        for column, at in test.missing.items():
            report.note("missing", "test", at, test.ids, detail=column)
        report.test = TestPart(
            test.name, len(test.rows), missing, test.repeated_ids, there, cut(there, test, "test")
        )
    if tokenizer is None or not model or not os.path.exists(os.path.join(model, "config.json")):
        return
    most = ChatGLMConfig.from_pretrained(model).seq_length - _ANSWER_ROOM
    asked = report.lengths if report.test is None else report.test.lengths
    report.suggested_max_source_length = suggested_length(report.lengths, most)
    limit = min(report.max_source_length, most)
    report.forecast = forecast(model, report.lengths, asked, limit)


__all__ = ["Report", "inspect"]
