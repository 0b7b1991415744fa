"""A table in, a table out: prompts from the columns of its rows, an answer for each row.

All that can be wrong with what was asked is found before the first row is answered, and every
answer is on disk as soon as it is there, in a file beside the output that the whole one replaces.
"""

from __future__ import annotations

import csv
import json
import os
import string
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from . import tell
from .files.rows import read_rows
from .files.write import atomic_file
from .generation.chat import chat_rows
from .names import did_you_mean, listed
from .training.flags import near_path


def read_table(path: str | os.PathLike, template: str) -> list[dict[str, Any]]:
    """The rows of a csv, json or jsonl table. ValueError without rows, for a row that is no object,
    for a template that cannot be filled, and for a column that it names and the table has not.
    """
    names = _places(template)
    if not names:
        tell.warn("--template names no {column}: every row is asked the same question")
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"--input: {os.fspath(path)!r}: looked for a table (from {os.getcwd()}) and found none"
            f"{near_path(path)}"
        )
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path}: the table has no rows")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            kind = type(row).__name__
            raise ValueError(f"{path} row {number}: expected an object of columns, got {kind}")
    there = columns_of(rows)
    for name in names:
        if name not in there:
            raise ValueError(
                f"--template: {name!r} is no column of {path}{did_you_mean(name, there)}; it has "
                f"{listed(there)}"
            )
    return rows


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The columns of all rows, in the order in which they are met."""
    return list(dict.fromkeys(name for row in rows for name in row))


def fill_template(template: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The template with the values of each row in place of its `{column}`. ValueError naming a row
    without a value.
    """
    names = _places(template)
    prompts = []
    for number, row in enumerate(rows):
        for name in names:
            if row.get(name) is None:
                raise ValueError(
                    f"template: row {number} has no value in column '{name}'; columns are "
                    f"{listed(row)}"
                )
        prompts.append(template.format(**{name: _text(row[name]) for name in names}))
    return prompts


def _places(template: str) -> list[str]:
    """The columns that a template names; ValueError for one that is not written as such."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"--template: {error} (a brace of its own is written twice: {{{{ or }}}})"
        ) from None
    names = []
    for _, name, how, conversion in parts:
        if name is None:
            continue
        if not name or how or conversion or name.isdigit() or set(name) & set("{}[]."):
            more = f"{'!' + conversion if conversion else ''}{':' + how if how else ''}"
            raise ValueError(
                f"--template: expected the name of a column between braces, got '{{{name}{more}}}'"
            )
        names.append(name)
    return names


def _text(value: Any) -> str:
    """A value of a table as text: lists and objects as JSON."""
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


# The output


@dataclass(frozen=True)
class Output:
    """What is written: `columns` of each row, `constants` among them, then the answer."""

    path: str
    columns: list[str]
    constants: dict[str, str]
    answer_column: str

    def header(self) -> list[str]:
        return [*self.columns, self.answer_column]

    def cells(self, row: Mapping[str, Any], answer: str) -> list[str]:
        def cell(name: str) -> str:
            value = self.constants.get(name, row.get(name))
            return "" if value is None else _text(value)

        return [*map(cell, self.columns), answer]


def check_place(path: str | os.PathLike, overwrite: bool, input: str | os.PathLike) -> None:
    """OSError or ValueError for an output that cannot be written, is there already, or is the
    input.
    """
    path = os.fspath(path)
    extension = os.path.splitext(path)[1].lower()
    if extension in (".json", ".jsonl", ".xls", ".xlsx", ".parquet"):
        raise ValueError(f"--output: csv is written, expected a name ending in .csv, got {path}")
    if os.path.isdir(path):
        raise IsADirectoryError(f"--output: {path} is a directory, expected the name of a csv file")
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"--output: there is no folder {folder} to write {path} into")
    if os.path.exists(path):
        if os.path.exists(input) and os.path.samefile(path, input):
            raise ValueError(f"--output: {path} is the input; give it another name")
        if not overwrite:
            raise FileExistsError(f"{path} exists: pass --overwrite to replace it")
    kept = partial_path(path)
    if os.path.exists(kept) and not overwrite:
        raise FileExistsError(
            f"{kept} exists: it has the answers of a run that was stopped; move it away, or pass "
            "--overwrite to begin anew"
        )
    try:
        with atomic_file(path, "w") as file:
            file.write(" " * (1 << 16))  # a full disk shows here
            file.flush()
            os.fsync(file.fileno())
            raise _NotWritten
    except _NotWritten:
        pass
    except OSError as error:
        raise OSError(error.errno, f"--output: cannot be written: {error.strerror}", path) from None


class _NotWritten(Exception):
    """Ends a trial of writing: what stands under the name stays."""


def plan_output(
    path: str | os.PathLike,
    there: Sequence[str],
    columns: str | None,
    add: Sequence[str],
    answer_column: str,
) -> Output:
    """The output that the flags ask for. there: the table's columns; columns: those to keep,
    separated by commas (None: all); add: COLUMN=TEXT, behind the others where `columns` does not
    give it a place. ValueError naming a flag, what it names, and the nearest right word.
    """
    constants: dict[str, str] = {}
    for pair in add:
        name, equals, text = pair.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ValueError(f"--add: expected COLUMN=TEXT, got {pair!r}")
        if constants.setdefault(name, text) != text:
            raise ValueError(f"--add: {name!r} is given twice: {constants[name]!r} and {text!r}")
    if not answer_column.strip():
        raise ValueError("--answer-column: expected a name, got none")
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
    return Output(
        os.fspath(path), [name for name in kept if name != answer_column], constants, answer_column
    )


def write_table(output: Output, rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> None:
    """Write the columns of the rows and their answers, whole or not at all."""
    with atomic_file(output.path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(output.header())
        for row, answer in zip(rows, answers, strict=True):
            writer.writerow(output.cells(row, answer))


# Answers


def partial_path(path: str | os.PathLike) -> str:
    """Where the answers are while they come: the csv to be, its rows in the order of answers."""
    return f"{os.fspath(path)}.partial.csv"


def answer_all(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[str],
    output: Output,
    **sampling: Any,
) -> list[str]:
    """The model's answers to the prompts, in their order, with a progress bar.

    Each is in the file `partial_path(output.path)` as soon as it is there, and the file stays:
    `discard_partial` removes it once the whole table is written. What stops this is told where
    the answers so far are.
    """
    from tqdm.auto import tqdm

    path = partial_path(output.path)
    answers = [""] * len(prompts)
    done = 0
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["row", *output.header()])
        ready = chat_rows(model, tokenizer, prompts, **sampling)
        try:
            for i, answer in tqdm(ready, "predict", len(prompts), unit="row", file=sys.stderr):
                answers[i] = answer_text(answer)
                writer.writerow([str(i), *output.cells(rows[i], answers[i])])
                file.flush()
                done += 1
        except BaseException:
            if done:
                print(f"{done} of {len(prompts)} answers are kept in {path}", file=sys.stderr)
            raise
        finally:
            if not done:
                with suppress(OSError):
                    os.unlink(path)
    return answers


def discard_partial(path: str | os.PathLike) -> None:
    """Remove the file of answers of a run that has written its output."""
    with suppress(OSError):
        os.unlink(partial_path(path))


def answer_text(answer: str | Mapping[str, Any]) -> str:
    """An answer as text: that of a tool's call as the model wrote it, or its arguments as JSON."""
    if isinstance(answer, str):
        return answer.strip()
    if set(answer) == {"name", "content"}:
        return f"{answer['name']}\n{answer['content']}".strip()
    return json.dumps(answer, ensure_ascii=False)


def check_choices(
    answers: Sequence[str], choices: Sequence[str] | None, fallback: str | None, kept: str
) -> list[str]:
    """The answers; `fallback` stands for those that are none of the choices.

    Raises ValueError where there are such answers and no fallback. kept: where the answers are.
    """
    if not choices:
        return list(answers)
    odd = [f"row {i}: {answer!r}" for i, answer in enumerate(answers) if answer not in choices]
    if odd and fallback is None:
        raise ValueError(
            f"{len(odd)} of {len(answers)} answers are none of {choices}: {'; '.join(odd[:5])}. "
            f"All answers are kept in {kept}; --fallback ANSWER takes that answer for such rows"
        )
    if odd:
        print(
            f"{len(odd)} answers were none of {choices}, {fallback!r} stands for them: "
            f"{'; '.join(odd[:5])}",
            file=sys.stderr,
        )
    return [answer if answer in choices else str(fallback) for answer in answers]


def read_choices(choices: str | None, fallback: str | None) -> list[str] | None:
    """The answers that `--choices` allows. ValueError for none, and for a fallback without them."""
    if choices is None:
        if fallback is not None:
            raise ValueError("--fallback: has no effect without --choices")
        return None
    allowed = [choice.strip() for choice in choices.split(",")]
    if "" in allowed:
        raise ValueError(f"--choices: expected answers separated by commas, got {choices!r}")
    return allowed
