"""A question about each row of a table, as a job: every result is in a journal beside the output as
soon as it is there, and the same call or command goes on from it; the output is written once all
are there, and the journal goes.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from ..files.journal import Journal, digest, digests
from ..files.regular import read_bytes
from ..files.rows import table_rows
from ..files.small import TOKENIZER
from ..files.write import atomic_file
from ..generation.config import BatchChatArguments, check_names, spelled_out
from ..generation.identity import model_digest
from ..interrupts import ending_signals
from ..progress import bar
from ..questions import row_queries
from ..seeds import next_seed
from ..task import Task, check_asked
from ..templates import check_template, columns_of, fill_template
from .answers import TOLD, Asked, answer_columns, answers, ask, classified, label_scores
from .output import (
    Output,
    already_there,
    check_place,
    check_space,
    journal_path,
    plan_output,
    table_bytes,
)

_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|index\.json)|((adapter_|generation_)?config|prompt_template)\.json"
)
_TOKENIZER = re.compile("|".join(map(re.escape, TOKENIZER)))


def describe_folders(
    model: str | os.PathLike, adapters: Sequence[str | os.PathLike]
) -> dict[str, Any]:
    """What answers depend on in the folders of a model and its adapters, before they are loaded."""
    found = {}
    for number, folder in enumerate(adapters):
        place = f"{os.path.basename(folder)}/" if number or len(adapters) > 1 else ""
        found |= {place + name: value for name, value in digests(folder, _WEIGHTS).items()}
    return {
        "model": digests(model, _WEIGHTS),
        "adapter": found if adapters else None,
        "tokenizer": digests(model, _TOKENIZER),
    }


def describe_model(model: Any, tokenizer: Any) -> dict[str, Any]:
    """The same of a model in memory, whatever it was loaded from or trained to since."""
    configs = getattr(model, "peft_config", {})
    adapters = {name: _fields_digest(config.to_dict()) for name, config in configs.items()}
    return {
        "model": {"weights": digest(model_digest(model).encode())},
        "adapter": adapters | {"active": str(getattr(model, "active_adapter", None))},
        "products": model.core.backend,
        "prompts": {"family": str(tokenizer.family), "template": model.prompt_template},
        "tokenizer": digests(tokenizer.name_or_path, _TOKENIZER),
    }


def plain_value(value: Any) -> Any:
    """What JSON cannot hold: NumPy's values as Python's, all else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _fields_digest(fields: Mapping[str, Any]) -> str:
    """Of an adapter's settings, without those of where it was trained."""
    kept = {
        n: v for n, v in fields.items() if n not in ("base_model_name_or_path", "inference_mode")
    }
    return digest(json.dumps(kept, sort_keys=True, default=str).encode())


def describe_job(
    model: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    template: str,
    settings: Mapping[str, Any],
    task: Task | None = None,
) -> dict[str, Any]:
    """What answers depend on, for a `Journal`. model: as `describe_folders` or `describe_model`
    give it; settings: told by name. The form of the output is none of it: one journal gives any.
    """
    return {
        **model,
        "template": template,
        "task": None if task is None else task.decisive(),
        "table": table_digest(rows),
        "settings": dict(settings),
    }


def table_digest(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many rows a table has, and a sum of what is in them."""
    table = json.dumps(rows, default=plain_value).encode()
    return {"rows": len(rows), "content": digest(table)}


def open_journal(
    output: str | None, job: Mapping[str, Any], rows: int, seed: int | None, overwrite: bool
) -> Journal:
    """The journal beside an output, new or gone on with, which is told; without an output one in
    memory. seed: of sampling; None: a
    drawn one, which the journal keeps. overwrite: begin anew where it is another job's. Raises as
    `Journal`, and FileExistsError where an output is there and rows are missing.
    """
    seed = next_seed() if seed is None else seed
    if output is None:
        return Journal(None, job, seed)
    journal = Journal(journal_path(output), job, seed, anew=overwrite)
    if journal.missing(range(rows)) and os.path.exists(output) and not overwrite:
        with journal:
            raise already_there(output)
    if journal.replaced:
        print(f"{journal.path}: {journal.replaced}; begun anew", file=sys.stderr)
    elif journal.results:
        have = len(journal.results)
        print(f"{journal.path}: goes on after {have} of {rows} rows", file=sys.stderr)
    return journal


def run_job(
    journal: Journal,
    rows: Sequence[int],
    compute: Callable[[list[int]], Iterable[tuple[int, Any]]],
) -> list[Any]:
    """The results of the rows with these numbers, in their order: those in the journal, and those
    that `compute` yields as (row, result JSON can hold), in any order, for the rows it is given,
    which are added as they come. A progress bar on a terminal; what stops this is told where the
    results so far are. RuntimeError for a row that has none in the end.
    """
    missing = journal.missing(rows)
    count = {"total": len(rows), "initial": len(rows) - len(missing)}
    try:
        if missing:
            ready = compute(missing)  # a model that it loads is no time of rows
            with bar(desc="predict", unit="row", disable=None, **count) as shown:
                for row, result in ready:
                    journal.add(row, result)
                    shown.update()
    except BaseException:
        if journal.path is not None and journal.results:
            print(
                f"{len(journal.results)} of {len(rows)} rows are kept in {journal.path}: "
                "the same job goes on from there",
                file=sys.stderr,
            )
        raise
    if missing := journal.missing(rows):
        raise RuntimeError(f"no result came for {len(missing)} rows, the first is {missing[0]}")
    return [journal.results[row] for row in rows]


class Answering:
    """What answers rows of a table, a part of it at a time.

    columns: those of the whole table. load: gives the model and its tokenizer, when the first row
    is asked. classify: in place of the model, gives the probabilities of the labels, float64 (rows,
    labels), of some rows.
    """

    def __init__(
        self,
        asked: Asked,
        columns: list[str],
        load: Callable[[], tuple[Any, Any]],
        classify: Callable[[list[dict[str, Any]]], np.ndarray] | None = None,
    ):
        self._asked, self._columns = asked, columns
        self._load, self._classify = load, classify
        self._loaded: tuple[Any, Any] | None = None

    def __call__(
        self, rows: Mapping[int, dict[str, Any]], journal: Journal
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, result) of the rows, by their numbers in the table, as they are ready."""
        asked = self._asked
        if self._classify is not None:
            return classified(self._classify, rows, self._columns, asked)
        if self._loaded is None:
            self._loaded = self._load()
        model, tokenizer = self._loaded
        form = tokenizer, getattr(model, "prompt_template", "auto")
        given = list(rows.values())
        queries = row_queries(asked.task, given, asked.template, *form, columns=self._columns)
        prompts = dict(zip(rows, queries, strict=True))
        if asked.labels:
            return label_scores(model, tokenizer, prompts, asked, list(rows))
        return answers(model, tokenizer, prompts, journal, list(rows), **asked.sampling)


def check_rows(asked: Asked, rows: Sequence[Mapping[str, Any]], first: int = 0) -> None:
    """ValueError for a row that cannot be asked. first: the number of the first one."""
    if asked.task is None or asked.template != asked.task.question:
        fill_template(
            asked.template, rows, first
        )  # of the task's own, a value that is missing is ""


def job_settings(asked: Asked, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is chosen beside the model, for a journal. settings: how the model is loaded."""
    chosen = {"labels": list(asked.labels)} if asked.labels else asked.sampling
    return {**chosen, **settings}


def predict_rows(
    rows: Sequence[dict[str, Any]],
    asked: Asked,
    answering: Answering,
    *,
    output: Output | None,
    describe: Callable[[], Mapping[str, Any]],
    settings: Mapping[str, Any],
    seed: int | None,
    overwrite: bool,
) -> tuple[dict[str, list[Any]], bool]:
    """(columns of answers by name, whether every row has one that counts) of what is asked; written
    to `output` where there is one, beside which a journal keeps each row as it comes.

    describe, settings: the model, and what else answers depend on, for the journal.
    """
    check_rows(asked, rows)
    job: dict[str, Any] = {}
    if output is not None:
        check_space(output, rows)
        chosen = job_settings(asked, settings)
        job = describe_job(describe(), rows, asked.template, chosen, asked.task)

    path = None if output is None else output.path
    with ending_signals(), open_journal(path, job, len(rows), seed, overwrite) as journal:
        results = run_job(
            journal,
            range(len(rows)),
            lambda missing: answering({row: rows[row] for row in missing}, journal),
        )
        whole = True
        if output is not None:
            whole = write_answers(output, rows, results, asked, journal, overwrite)
    return answer_columns(results, asked)[0], whole


class Kept(Protocol):
    """Where results are until the output is written."""

    @property
    def path(self) -> str | None:
        """Of the file or folder."""

    def remove(self) -> None:
        """The results are in the output by now."""


def write_answers(
    output: Output,
    rows: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    asked: Asked,
    journal: Kept,
    overwrite: bool,
) -> bool:
    """Write the table with the answers, and remove the journal; whether every row has one.

    A row without an answer, or whose answer does not count, has the fallback; without one its
    answer is empty, the model's own stands in `raw_column`, and the journal stays. All such rows
    are counted and told. Raises ValueError where no row has an answer, FileExistsError where
    another file stands under the output's name.
    """
    columns, bad, odd = answer_columns(results, asked)
    if len(bad) == len(results):
        journal.remove()
        raise ValueError(f"no row has an answer: {bad[0]}")
    output = replace(output, more=list(columns)[1:])
    data = table_bytes(output, rows, columns)
    if os.path.exists(output.path) and not overwrite:
        if read_bytes(output.path) != data:  # else it was written, and the journal not yet removed
            raise already_there(output.path)
    with atomic_file(output.path) as file:
        file.write(data)
    tell_of_answers(len(rows), bad, {i: results[i]["answer"] for i in odd}, asked)
    if (bad or odd) and asked.fallback is None:
        print(
            f"{output.path}: {len(bad) + len(odd)} rows are without an answer; the same command "
            f"with --overwrite --fallback ANSWER gives them that one, from {journal.path}",
            file=sys.stderr,
        )
        return False
    journal.remove()
    return True


def tell_of_answers(
    rows: int, bad: Mapping[int, str], odd: Mapping[int, str], asked: Asked
) -> None:
    """Tell how many of so many rows have no answer (bad: row -> why), or one that does not count
    (odd: row -> answer), and the first ones.
    """
    stands = "" if asked.fallback is None else f", {asked.fallback!r} stands for them"
    if bad:
        some = "; ".join(f"row {i}: {why}" for i, why in list(bad.items())[:TOLD])
        print(f"{len(bad)} of {rows} rows have no answer{stands}: {some}", file=sys.stderr)
    if odd:
        some = "; ".join(f"row {i}: {answer!r}" for i, answer in list(odd.items())[:TOLD])
        where = stands or f", they stand in the column {asked.raw_column!r}"
        print(f"{len(odd)} of {rows} answers are {asked.allowed}{where}: {some}", file=sys.stderr)


def question_of(template: str | None, task: Task | None) -> str:
    """The template that is asked for, else the task's question. TypeError without either."""
    if template is not None:
        return template
    if task is None:
        raise TypeError("template: expected the question, the model has no task that says it")
    return task.question


@spelled_out(BatchChatArguments)
def predict_table(
    model: Any,
    tokenizer: Any,
    table: Any,
    template: str | None = None,
    *,
    labels: Sequence[Any] | None = None,
    proba: bool = False,
    choices: Sequence[Any] | None = None,
    pattern: str | None = None,
    between: Sequence[int] | None = None,
    fallback: str | None = None,
    answer_column: str = "label",
    output: str | os.PathLike | None = None,
    overwrite: bool = False,
    seed: int | None = None,
    strict: bool = False,
    **sampling: Any,
) -> Any:
    """The table with an answer for each row: a new DataFrame where it is one, else a list of dicts.

    table: a DataFrame, a list of dicts, or the path of a csv, json, jsonl or parquet file.
    template: the question, with `{column}` where a value stands. labels: the answers are weighed,
    the most probable one is taken, as in `classify`, and with `proba` a column proba_LABEL holds
    each one's probability; without labels the model writes its answers, as in `chat`, near to
    greedy (temperature 0.01) unless `sampling` says otherwise.

    Of a model with a `task`, template and labels are by default what was trained, labels by the
    threshold that was chosen, and questions are cut as in training; what is asked otherwise is
    told, and with `strict` a ValueError.

    choices: the only answers allowed; or pattern: a regular expression that a whole answer matches;
    or between: the smallest and the largest whole number. A row without an answer, or with another
    one, has `fallback`, or "" and its raw answer in a column of its own; both are told, and
    counted.

    output: a csv, jsonl or parquet file to write. Beside it every result is kept in a journal as
    soon as it is there: the same call after an interruption goes on from it and gives the same
    answers. Errors as those of `glmlora predict`, before the first row.
    """
    check_names(predict_table, sampling)
    rows, task = table_rows(table, "table"), model.task
    base = model.opened.directory if strict else None
    check_asked(task, strict, template=template, labels=labels, base=base)
    template = question_of(template, task)
    check_template(template, columns_of(rows), "the table")
    asked = ask(
        template,
        labels=labels,
        proba=proba,
        choices=choices,
        pattern=pattern,
        between=between,
        fallback=fallback,
        answer_column=answer_column,
        sampling=sampling,
        task=task,
    )
    planned = plan_output(output or "", columns_of(rows), None, [], answer_column, asked.more)
    if output is not None:
        check_place(output, overwrite, table if isinstance(table, str | os.PathLike) else "")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found, _ = predict_rows(
        rows,
        asked,
        Answering(asked, columns_of(rows), lambda: (base, tokenizer)),
        output=None if output is None else planned,
        describe=lambda: describe_model(model, tokenizer),
        settings={},
        seed=seed,
        overwrite=overwrite,
    )
    return with_columns(table, rows, found)


def with_columns(
    table: Any, rows: Sequence[Mapping[str, Any]], found: Mapping[str, Sequence[Any]]
) -> Any:
    """A table with the columns `found`: a new DataFrame where it is one, else a list of dicts."""
    if hasattr(table, "assign"):
        return table.assign(**found)
    return [
        {**row, **dict(zip(found, cells, strict=True))}
        for row, cells in zip(rows, zip(*found.values(), strict=True), strict=True)
    ]
