"""From the rows of a table to the questions of a task: the same for training and prediction."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from . import tell
from .families.prompt import prompt_length, shortened
from .files.rows import is_missing, table_rows
from .task import Task, check_asked
from .templates import as_text, check_template, columns_of, fill_template


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
    task: Task,
    rows: list[dict[str, Any]],
    columns: list[str] | None,
    tokenizer: Any,
    prompt_template: str = "auto",
    table: str = "X",
) -> list[str]:
    """The question that a task asks about each row, at most max_source_length ids as a prompt: the
    column of the most ids is cut at its end, as training cuts, then the next one.

    prompt_template: of chats, as `model.prompt_template`. table: what a message calls the rows.
    ValueError for a column that the template names and no row has, or where the prompt is too long
    without any value.
    """
    there = columns or ["text"]
    places = list(dict.fromkeys(check_template(task.template, there, table)))
    queries = []
    for row in rows:
        values = {name: _text(row.get(name)) for name in places}
        query = task.instruction + task.template.format(**values)
        if prompt_length(tokenizer, query, prompt_template) > task.max_source_length:
            query = _cut(task, values, tokenizer, prompt_template)
        queries.append(query)
    return queries


def _cut(task: Task, values: dict[str, str], tokenizer: Any, prompt_template: str) -> str:
    """The question with as much of the values as fits."""

    def query(name: str, left: str) -> str:
        return task.instruction + task.template.format(**{**values, name: left})

    def excess(name: str, left: str) -> int:
        length = prompt_length(tokenizer, query(name, left), prompt_template)
        return length - task.max_source_length

    for name in sorted(values, key=lambda name: -len(tokenizer.text_ids(values[name]))):
        left = shortened(tokenizer, values[name], partial(excess, name))
        if excess(name, left) <= 0:
            return query(name, left)
        values = {**values, name: left}
    raise ValueError(
        "max_source_length: instruction and template alone are longer; make them shorter, or it "
        "larger"
    )


def _text(value: Any) -> str:
    return "" if is_missing(value) else as_text(value)


def row_queries(
    task: Task | None,
    rows: list[dict[str, Any]],
    template: str | None,
    tokenizer: Any,
    prompt_template: str = "auto",
    table: str = "the table",
) -> list[str]:
    """The question about each row: the template with its values (None: the task's), cut as in the
    training where it asks what was trained. Errors as `fill_template` and `task_queries`; of the
    task's own template, a value that is missing is "", as in training.
    """
    if template is not None and (task is None or template != task.question):
        filled = fill_template(template, rows)  # where a row may not lack a value
        if task is None or not task.takes(template):
            return filled
        task = task.asked_by(template)
    assert task is not None
    return task_queries(task, rows, columns_of(rows), tokenizer, prompt_template, table)


def fit_question(
    task: Task | None, query: str, tokenizer: Any, prompt_template: str, strict: bool = False
) -> str:
    """A question that a user writes, as the training of a task would have it: one that is longer
    than those is cut in the same place, which is told, and so is one that begins otherwise. strict:
    the latter is a ValueError.
    """
    if task is None:
        return query
    check_asked(task, strict, query=query)
    fixed = task.instruction or task.labels  # else questions of any kind were trained
    if not fixed or not query.startswith(task.instruction):
        return query
    end = task.template.rpartition("}")[2]
    text = query[len(task.instruction) :].removesuffix(end)
    end = query[len(task.instruction) + len(text) :]

    def excess(left: str) -> int:
        asked = task.instruction + left + end
        return prompt_length(tokenizer, asked, prompt_template) - task.max_source_length

    left = shortened(tokenizer, text, excess)
    if left == text or not left:
        return query
    tell.once(
        f"a question is cut to {task.max_source_length} ids, as those that the adapter was trained "
        "on (max_source_length); model.task = None asks it whole"
    )
    return task.instruction + left + end
