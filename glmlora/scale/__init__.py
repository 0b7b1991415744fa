"""Tables of millions of rows, by Ray: `predict` a Ray Dataset, a DataFrame or a file with workers
on one machine or many. `glmlora predict --engine ray` is the same; without Ray, `--shard` is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..files.owner import owned
from ..files.rows import table_rows
from ..generation.config import BatchChatArguments, check_names, spelled_out
from ..interrupts import ending_signals
from ..prediction import Source
from ..tables.answers import Asked, answer_columns, ask
from ..tables.job import (
    check_rows,
    describe_job,
    job_settings,
    question_of,
    with_columns,
    write_answers,
)
from ..tables.output import Output, already_there, check_space, plan_output
from ..tables.shards import FILE, Shards, open_shards, remove_journals, shrinking
from ..task import check_asked
from ..templates import check_template, columns_of
from .datasets import Blocks, is_dataset
from .engine import answer_shards, check_workers, import_ray, ray_running


def folder_of(output: str | os.PathLike) -> str:
    """Where the shards of the output are while they come."""
    return f"{os.path.abspath(output)}.shards"


def job_file(output: str | os.PathLike) -> str:
    """The file whose presence says that a job of this output was begun, and is not done."""
    return os.path.join(folder_of(output), FILE)


def check_engine(workers: int | None) -> None:
    """ImportError without Ray, ValueError for a number of workers that is none."""
    check_workers(workers)
    import_ray()


def _shards(
    folder: str, job: Mapping[str, Any], rows: int, seed: int | None, workers: int, anew: bool
) -> Shards:
    """The shards of a job in a folder that this process owns, new or gone on with: told."""
    if not os.path.exists(os.path.join(folder, FILE)):  # a job's that was done
        remove_journals(folder)
    shards = open_shards(folder, job, seed, shrinking(rows, workers), {}, anew)
    if have := shards.kept():
        print(f"{folder}: goes on after {have} of {rows} rows", file=sys.stderr)
    return shards


def predict_rows(
    rows: Sequence[dict[str, Any]],
    asked: Asked,
    source: Source,
    *,
    output: Output,
    seed: int | None,
    overwrite: bool,
    workers: int | None,
) -> bool:
    """Write the table with the answers to `output`, as `tables.job.predict_rows` does, by Ray's
    workers: whether every row has one that counts. None: a worker a node, or a GPU.
    """
    check_engine(workers)
    check_rows(asked, rows)
    check_space(output, rows)
    source.answering(asked, columns_of(rows))  # ValueError for what cannot be asked
    settings = job_settings(asked, source.settings())
    job = describe_job(source.describe(), rows, asked.template, settings, asked.task)
    folder = folder_of(output.path)
    os.makedirs(folder, exist_ok=True)
    with ending_signals():
        with owned(folder):
            shards = _shards(folder, job, len(rows), seed, workers or 1, overwrite)
            lack = shards.missing()
            if lack and os.path.exists(output.path) and not overwrite:
                raise already_there(output.path)
            if lack:
                _answer(rows, shards, source, asked, workers)
            whole = write_answers(output, rows, shards.results(), asked, shards, overwrite)
        with suppress(OSError):  # the owner's file was in it
            os.rmdir(folder)
    return whole


def _answer(
    rows: Sequence[dict[str, Any]],
    shards: Shards,
    source: Source,
    asked: Asked,
    workers: int | None,
) -> None:
    def part(number: int) -> list[dict[str, Any]]:
        mine = shards.ranges[number - 1]
        return [rows[row] for row in mine]

    try:
        with ray_running(workers or 1) as ray:
            answer_shards(ray, shards, source, asked, columns_of(rows), part, workers=workers)
    except BaseException:
        if have := shards.kept():
            print(
                f"{have} of {len(rows)} rows are kept in {shards.path}: the same job goes on from "
                "there",
                file=sys.stderr,
            )
        raise


@spelled_out(BatchChatArguments)
def predict(
    table: Any,
    model: str | os.PathLike,
    template: str | None = None,
    *,
    folder: str | os.PathLike,
    adapter: str | os.PathLike | None = None,
    labels: Sequence[Any] | None = None,
    proba: bool = False,
    choices: Sequence[Any] | None = None,
    pattern: str | None = None,
    between: Sequence[int] | None = None,
    fallback: str | None = None,
    answer_column: str = "label",
    seed: int | None = None,
    strict: bool = False,
    workers: int | None = None,
    family: str = "auto",
    dtype: str | None = None,
    compute_dtype: str | None = None,
    device: str = "auto",
    **sampling: Any,
) -> Any:
    """The table with an answer for each row, by Ray's workers: what `model.predict_table` gives.

    table: a Ray Dataset, whose blocks the workers read, and which comes back as one, its rows in
    their order; else as `predict_table` takes and returns it. model, adapter: directories that all
    nodes see, loaded as `glmlora predict` does (family, dtype, compute_dtype, device). template,
    labels, .., fallback, strict, sampling: as there.

    folder: where every result is kept in a journal as soon as it is there, seen by all nodes: the
    same call after an interruption goes on from it. It stays; a Dataset reads it until it is used.
    workers: processes, each with an equal part of the cores; None: one a node, or one a GPU. Ray is
    what this process is connected to, RAY_ADDRESS, or one of its own on this machine for the length
    of the call; for a Dataset it is there already.

    Raises ImportError without Ray, ValueError naming an argument that is wrong, the parts of a job
    that differ from the one in the folder, or a row without a value; OSError naming file or folder.
    """
    check_names(predict, sampling)
    check_engine(workers)
    given = os.fspath(model), None if adapter is None else os.fspath(adapter)
    source = Source(*given, family, dtype, compute_dtype, device).absolute()
    directory, task, folder = source.directory, source.task, os.path.abspath(folder)
    base = directory if strict and adapter is not None else None
    check_asked(task, strict, template=template, labels=labels, base=base)
    template = str(question_of(template, task))
    blocks = Blocks(import_ray(), table) if is_dataset(table) else None
    rows = [] if blocks is not None else table_rows(table, "table")
    columns = columns_of(rows) if blocks is None else blocks.columns
    check_template(template, columns, "the table")
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
    plan_output("", columns, None, [], answer_column, asked.more)
    source.answering(asked, columns)
    settings = job_settings(asked, source.settings())
    job = describe_job(source.describe(), rows, template, settings, task)
    if blocks is not None:
        job["table"] = blocks.look(asked)
    else:
        check_rows(asked, rows)
    os.makedirs(folder, exist_ok=True)
    number = len(rows) if blocks is None else blocks.rows
    with ending_signals(), owned(folder):
        shards = _shards(folder, job, number, seed, workers or 1, False)
        if blocks is not None:
            blocks.answer(shards, source, asked, workers)
            return blocks.answered(shards, asked)
        if shards.missing():
            _answer(rows, shards, source, asked, workers)
        return with_columns(table, rows, answer_columns(shards.results(), asked)[0])
