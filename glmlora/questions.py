"""From the rows of a table to the questions of a task: the same for training and prediction."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .families.prompt import chat_ids
from .files.rows import is_missing, table_rows
from .model.task import Task
from .templates import check_template, columns_of, fill_template


def rows_and_columns(X: Any) -> tuple[list[dict[str, Any]], list[str] | None]:
    """The rows of X and its columns in their order; texts are rows of a column "text", and have no
    columns (None). TypeError, ValueError naming what X, or a row of it, is.
    """
    given: list[Any]
    if isinstance(X, str | os.PathLike) or hasattr(X, "columns"):
        given = table_rows(X, "X")
    elif isinstance(X, Iterable) and not isinstance(X, Mapping | bytes):
        given = list(X)
    else:
        raise TypeError(
            f"X: expected a DataFrame, a list of dicts or texts, or the path of a table, got "
            f"{type(X).__name__}"
        )
    if not given:
        raise ValueError("X: expected at least one row, got none")
    are_texts = not isinstance(given[0], Mapping)
    rows = []
    for number, row in enumerate(given):
        if not are_texts and isinstance(row, Mapping):
            rows.append({str(k): "" if is_missing(v) else v for k, v in row.items()})
        elif are_texts and (isinstance(row, str) or is_missing(row)):
            rows.append({"text": row if isinstance(row, str) else ""})
        else:
            wanted = "text, as row 0 is" if are_texts and number else "a dict or text"
            wanted = wanted if are_texts else "a dict, as row 0 is"
            raise TypeError(f"X: row {number}: expected {wanted}, got {type(row).__name__}")
    return rows, None if are_texts else columns_of(rows)


def usual_instruction(labels: list[Any]) -> str:
    """The instruction where nobody gives one: it names the labels where they are few."""
    named = f"Answer with one of: {', '.join(map(str, labels))}.\n"
    return named if len(named) <= 200 else "Answer with the label.\n"


def task_queries(
    task: Task, rows: list[dict[str, Any]], columns: list[str] | None, tokenizer: Any
) -> list[str]:
    """The question that a task asks about each row, at most max_source_length ids as a prompt: the
    longest column is cut at its end, then the next one.

    ValueError for a column that the template names and no row has, or where the prompt is too long
    without any value.
    """
    there = columns or ["text"]
    places = check_template(task.template, there, "X")
    filled = [{name: row.get(name, "") for name in there} for row in rows]
    texts = fill_template(task.template, filled)

    def fits(text: str) -> bool:
        return len(chat_ids(tokenizer, task.instruction + text)) <= task.max_source_length

    queries = []
    for row, text in zip(filled, texts, strict=True):
        if not fits(text):
            values = {name: fill_template(f"{{{name}}}", [row])[0] for name in places}
            text = _shortened(task.template, values, fits)
        queries.append(task.instruction + text)
    return queries


def _shortened(template: str, values: dict[str, str], fits: Callable[[str], bool]) -> str:
    """The template filled with as much of the values as fits, the longest one cut first."""
    values = dict(values)

    def filled() -> str:
        return fill_template(template, [values])[0]

    for name in sorted(values, key=lambda name: -len(values[name])):
        whole, low, high = values[name], 0, len(values[name])
        while low < high:  # the most characters that fit
            middle = (low + high + 1) // 2
            values[name] = whole[:middle]
            low, high = (middle, high) if fits(filled()) else (low, middle - 1)
        values[name] = whole[:low]
        if fits(filled()):
            return filled()
    raise ValueError(
        "max_source_length: instruction and template alone are longer; make them shorter, or it "
        "larger"
    )
