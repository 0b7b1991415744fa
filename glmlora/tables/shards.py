"""A table's rows in shards: processes on any machines that see one folder answer a shard each, and
one joins what they found.

    FOLDER/job.json             what all shards have in common
    FOLDER/3-of-8.journal       the results of the third shard, as they came

    {"format": 1, "form": {..}, "job": {..}, "seed": 7, "shards": [[0, 100, 8], [1, 100, 8], ..]}

job: what the results depend on, as in a journal, whose own has it, too, and the rows of the shard.
shards: the numbers of each one's rows: first, end, step. form: what the output is made of beside
the results: see `FORM`; and the labels.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.journal import Journal, differences, read_results
from ..files.rows import table_rows
from ..files.staging import remove_litter, sync_directory, temporary
from ..files.write import read_json
from ..interrupts import ending_signals
from ..seeds import next_seed
from ..templates import columns_of
from .answers import Asked, ask, split_answers
from .job import (
    Answering,
    check_rows,
    describe_job,
    job_settings,
    run_job,
    table_digest,
    write_answers,
)
from .output import check_new_place, plan_output

FILE, FORMAT = "job.json", 1
#: Of the form, as `glmlora predict` is given it: the table, and what its answers become.
FORM = (
    *("input", "columns", "add", "answer_column"),
    *("proba", "choices", "pattern", "between", "fallback"),
)
SMALLEST = 64  # rows of a shard that is dealt to workers; the rows that walk a tree of labels
TOLD = 5  # shards that are named


@dataclass(frozen=True)
class Shards:
    """The shards of a job in `folder`: see the module. A shard's number counts from 1."""

    folder: str
    job: Mapping[str, Any]
    seed: int
    ranges: Sequence[range]
    form: Mapping[str, Any]

    @property
    def path(self) -> str:
        """Where the results are."""
        return self.folder

    @property
    def rows(self) -> int:
        """Of all shards."""
        return sum(map(len, self.ranges))

    def journal_path(self, number: int) -> str:
        """Where the results of a shard are."""
        return os.path.join(self.folder, f"{number}-of-{len(self.ranges)}.journal")

    def _job(self, number: int) -> dict[str, Any]:
        rows = self.ranges[number - 1]
        return {**self.job, "shard": {"first": rows.start, "end": rows.stop, "step": rows.step}}

    def journal(self, number: int) -> Journal:
        """The journal of a shard, new or gone on with. Raises as `Journal`."""
        return Journal(self.journal_path(number), self._job(number), self.seed)

    def results_of(self, number: int) -> tuple[dict[int, Any], str]:
        """(results by row, the process that may still write them or "") of a shard so far.
        ValueError naming its journal where that is of another job or seed.
        """
        path = self.journal_path(number)
        try:
            seed, results, writer = read_results(path, self._job(number))
        except FileNotFoundError:
            return {}, ""
        if seed != self.seed:
            raise ValueError(f"{path}: has the seed {seed}, {FILE} says {self.seed}")
        return results, writer

    def missing(self) -> list[int]:
        """The shards that lack a result."""
        numbers = range(1, len(self.ranges) + 1)
        return [n for n in numbers if len(self.results_of(n)[0]) < len(self.ranges[n - 1])]

    def results(self) -> list[Any]:
        """The results of all rows, in their order. ValueError naming the shards that lack some, and
        what of a journal differs from the others.
        """
        found: dict[int, Any] = {}
        lacking: list[str] = []
        for number, rows in enumerate(self.ranges, 1):
            results, writer = self.results_of(number)
            found |= {row: results[row] for row in rows if row in results}
            if lack := sum(row not in results for row in rows):
                name = f"{number}/{len(self.ranges)} ({lack} of {len(rows)} rows"
                lacking.append(f"{name}; {writer} may still write it)" if writer else f"{name})")
        if lacking:
            more = f" and {len(lacking) - TOLD} more" if len(lacking) > TOLD else ""
            raise ValueError(
                f"{self.folder}: results are missing in shards {', '.join(lacking[:TOLD])}{more}: "
                "run these shards (again), they go on from what is there"
            )
        return [found[row] for row in range(self.rows)]

    def remove(self) -> None:
        """Remove the folder: its results are elsewhere by now."""
        for number in range(1, len(self.ranges) + 1):
            with suppress(FileNotFoundError):
                os.unlink(self.journal_path(number))
        os.unlink(os.path.join(self.folder, FILE))
        remove_litter(self.folder)
        with suppress(OSError):  # somebody's own file is in it
            os.rmdir(self.folder)


def part_of(text: str, flag: str) -> tuple[int, int]:
    """(3, 8) of "3/8". ValueError naming the flag."""
    found = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text.strip())
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"{flag}: expected a shard and how many there are, 1/8 to 8/8, got {text}")
    return int(found[1]), int(found[2])


def check_folder(path: str, flag: str = "--output") -> None:
    """OSError, ValueError for a path that can be no folder of shards."""
    if os.path.isdir(path):
        there = [
            name for name in os.listdir(path) if not name.startswith(".")
        ]  # not one that begins
        if there and not os.path.exists(os.path.join(path, FILE)):
            raise ValueError(f"{flag}: {path} has files, and is no folder of shards: no {FILE}")
        return
    if os.path.lexists(path):
        raise NotADirectoryError(f"{flag}: {path} is a file, expected the folder of all shards")
    above = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(above):
        raise FileNotFoundError(f"{flag}: there is no folder {above} to make {path} in")


def every(count: int, rows: int) -> list[range]:
    """The rows of `count` shards, each `count`-th one: whatever order a table is in, shards are
    alike.
    """
    return [range(first, rows, count) for first in range(count)]


def shrinking(rows: int, workers: int) -> list[range]:
    """The rows of shards for so many workers, each of which takes the next one when it is free:
    large ones first, then small ones, so that all workers end together.
    """
    ranges, first = [], 0
    while first < rows:
        size = min(max(SMALLEST, (rows - first) // (2 * workers)), rows - first)
        ranges.append(range(first, first + size))
        first += size
    return ranges


def open_shards(
    folder: str,
    job: Mapping[str, Any],
    seed: int | None,
    ranges: Sequence[range],
    form: Mapping[str, Any],
) -> Shards:
    """The shards in a folder, which is made where it is not there: whoever comes first says what
    the seed is (None: a drawn one), and which rows each shard has. ValueError naming what differs
    where it has another job; OSError naming the folder.
    """
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, FILE)
    stored = {
        "format": FORMAT,
        "form": dict(form),
        "job": dict(job),
        "seed": next_seed() if seed is None else seed,
        "shards": [[r.start, r.stop, r.step] for r in ranges],
    }
    if not os.path.exists(path):
        remove_litter(folder)
        _write_first(path, json.dumps(stored, ensure_ascii=False, indent=1))
    shards = read_shards(folder)
    found = differences(shards.job, json.loads(json.dumps(stored["job"])))
    if not found:
        found = differences(shards.form, json.loads(json.dumps(stored["form"])))
    if found:
        raise ValueError(
            f"{path}: the shards there are of another job: {found}; give another folder, or remove "
            "that one"
        )
    return shards


def predict_shard(
    rows: Sequence[dict[str, Any]],
    asked: Asked,
    answering: Answering,
    folder: str,
    part: tuple[int, int],
    form: Mapping[str, Any],
    *,
    describe: Callable[[], Mapping[str, Any]],
    settings: Mapping[str, Any],
    seed: int | None,
) -> Journal:
    """Answer one shard of the rows of a table, e.g. (3, 8), in the folder of all: its journal,
    which is closed. form: see `FORM`. describe, settings, seed: as in `predict_rows`. ValueError
    where the folder has another job's shards, or another number of them.
    """
    number, count = part
    check_rows(asked, rows)
    if count > len(rows):
        raise ValueError(f"--shard: expected at most {len(rows)} shards, one a row, got {count}")
    chosen = job_settings(asked, settings)
    job = describe_job(describe(), rows, asked.template, chosen, asked.task)
    form = {**form, "input": os.path.abspath(form["input"])}
    with ending_signals():
        shards = open_shards(folder, job, seed, every(count, len(rows)), form)
        if len(shards.ranges) != count:
            raise ValueError(f"--shard: {folder} has {len(shards.ranges)} shards, not {count}")
        mine = shards.ranges[number - 1]
        with shards.journal(number) as journal:
            run_job(
                journal,
                mine,
                lambda missing: answering({row: rows[row] for row in missing}, journal),
            )
            return journal


def _write_first(path: str, text: str) -> None:
    """Write a file, whole, unless another process has done so: then its file stays."""
    place, held = temporary(Path(path).parent)
    try:
        with open(held.fileno(), "w", encoding="utf-8", closefd=False) as file:
            file.write(text)
        os.fsync(held.fileno())
        with suppress(FileExistsError):
            os.link(place, path)
    finally:
        os.unlink(place)
        held.close()
    sync_directory(os.path.dirname(path))


def read_shards(folder: str) -> Shards:
    """The shards in a folder. FileNotFoundError where it is none, ValueError naming file and field
    for another program's.
    """
    path = os.path.join(folder, FILE)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path}: not there; `glmlora predict --shard 1/8 --output {folder}` writes it"
        )
    stored = read_json(path, dict)
    if stored.get("format") != FORMAT:
        raise ValueError(f"{path}: format: expected {FORMAT}, got {stored.get('format')!r:.40}")
    kinds = {"form": dict, "job": dict, "seed": int, "shards": list}
    for name, kind in kinds.items():
        if not isinstance(stored.get(name), kind):
            found = stored.get(name)
            raise ValueError(f"{path}: {name}: expected {kind.__name__}, got {found!r:.40}")
    try:
        ranges = [range(*numbers) for numbers in stored["shards"]]
        whole = sorted(row for rows in ranges for row in rows)
        if whole != list(range(len(whole))):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"{path}: shards: expected each row in one of them") from None
    return Shards(folder, stored["job"], stored["seed"], ranges, stored["form"])


@dataclass(frozen=True)
class _Stays:
    """A folder of shards, which a user removes."""

    path: str

    def remove(self) -> None:
        """It stays."""


def gather(
    folder: str, output: str, fallback: str | None = None, overwrite: bool = False
) -> tuple[int, bool]:
    """Write the table with the answers of all shards: the bytes that one run would have written.
    Returns (rows, whether every row has an answer that counts). fallback: in place of the one that
    the shards were given. The folder stays.

    ValueError naming the shards that lack rows, and how many; what a journal differs in; a table
    that is another one by now. OSError as `check_new_place`.
    """
    shards = read_shards(folder)
    form = dict(shards.form)
    if lack := [name for name in (*FORM, "labels") if name not in form]:
        raise ValueError(f"{os.path.join(folder, FILE)}: form: has no {lack[0]!r}")
    check_new_place(output, overwrite, form["input"])
    rows = table_rows(form["input"], folder)
    if found := differences({"table": shards.job["table"]}, {"table": table_digest(rows)}):
        raise ValueError(f"{form['input']}: is another table by now: {found}")
    results = shards.results()
    asked = ask(
        shards.job["template"],
        labels=form["labels"] or None,
        proba=form["proba"],
        fallback=form["fallback"] if fallback is None else fallback,
        answer_column=form["answer_column"],
        choices=split_answers(form["choices"]),
        pattern=form["pattern"],
        between=split_answers(form["between"]),
        sampling={},
    )
    planned = plan_output(
        output,
        columns_of(rows),
        form["columns"],
        form["add"] or [],
        form["answer_column"],
        asked.more,
    )
    return len(rows), write_answers(planned, rows, results, asked, _Stays(folder), overwrite)
