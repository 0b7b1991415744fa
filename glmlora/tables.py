"""A table in, a table out: prompts from the columns of its rows, an answer for each row."""

from __future__ import annotations

import csv
import os
import string
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from .files.rows import read_rows
from .files.write import atomic_file
from .generation.generate import chat_rows


def read_table(path: str | os.PathLike, template: str) -> list[dict[str, Any]]:
    """The rows of a csv, json or jsonl table. ValueError without rows, or without a column that the
    template names.
    """
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path}: the table has no rows")
    missing = [name for name in _columns(template) if name not in rows[0]]
    if missing:
        raise ValueError(f"--template names {missing}, but {path} has the columns {list(rows[0])}")
    return rows


def fill_template(template: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The template with the values of each row in place of its `{column}`."""
    names = _columns(template)
    prompts = []
    for number, row in enumerate(rows):
        for name in names:
            if row.get(name) is None:
                raise ValueError(
                    f"template: row {number} has no value in column '{name}'; columns are "
                    f"{sorted(row)}"
                )
        prompts.append(template.format(**{name: str(row[name]) for name in names}))
    return prompts


def answer_all(model: Any, tokenizer: Any, prompts: Sequence[str], **sampling: Any) -> list[str]:
    """The model's answers to the prompts, in their order, with a progress bar."""
    from tqdm.auto import tqdm

    answers = [""] * len(prompts)
    ready = chat_rows(model, tokenizer, prompts, **sampling)
    for i, answer in tqdm(ready, "predict", len(prompts), unit="row", file=sys.stderr):
        answers[i] = answer
    return answers


def check_choices(
    answers: Sequence[str], choices: Sequence[str] | None, fallback: str | None
) -> list[str]:
    """The answers, stripped; `fallback` stands for those that are none of the choices.

    Raises ValueError where there are such answers and no fallback.
    """
    odd: list[str] = []
    checked = []
    for i, answer in enumerate(answers):
        if choices and answer.strip() not in choices:
            odd.append(f"row {i}: {answer!r}")
            answer = answer if fallback is None else fallback
        checked.append(answer.strip())
    if odd and fallback is None:
        raise ValueError(
            f"{len(odd)} of {len(answers)} answers are none of {choices}: {'; '.join(odd[:5])}. "
            "Nothing was written; --fallback ANSWER takes that answer for such rows"
        )
    if odd:
        print(
            f"{len(odd)} answers were none of {choices}, {fallback!r} stands for them",
            file=sys.stderr,
        )
    return checked


def write_table(
    path: str | os.PathLike,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    constants: Mapping[str, str],
    answer_column: str,
    answers: Sequence[str],
) -> None:
    """Write the given columns of the rows, constant ones too; the answers come last."""
    kept = [name for name in columns if name != answer_column]
    with atomic_file(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*kept, answer_column])
        for row, answer in zip(rows, answers, strict=True):
            writer.writerow([*(constants.get(name, row.get(name, "")) for name in kept), answer])


def _columns(template: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]
