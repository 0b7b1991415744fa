"""A table in, a table out: prompts from the columns of its rows, an answer for each row.

All that can be wrong with what was asked is found before the first row is answered. Every result is
in a journal beside the output as soon as it is there, and the same command goes on from it; the
output is written once all are there, and the journal goes.
"""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from . import tell
from .files.journal import Journal, digest, digests
from .files.rows import table_rows
from .files.small import TOKENIZER
from .files.write import atomic_file
from .generation.chat import chat_rows
from .generation.generate import ROWS
from .generation.labels import Classification, check_labels, score_rows
from .interrupts import ending_signals
from .names import did_you_mean, listed
from .progress import bar
from .seeds import next_seed, seed_of
from .templates import as_text, check_template, columns_of, fill_template, places_of


def read_table(path: str | os.PathLike, template: str) -> list[dict[str, Any]]:
    """The rows of a csv, json or jsonl table. ValueError without rows, for a row that is no object,
    for a template that cannot be filled, and for a column that it names and the table has not.
    """
    if not places_of(template):
        tell.warn("--template names no {column}: every row is asked the same question")
    rows = table_rows(path, "--input")
    check_template(template, columns_of(rows), str(path))
    return rows


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


def check_place(path: str | os.PathLike, overwrite: bool, input: str | os.PathLike) -> None:
    """OSError or ValueError for an output that has no place, is the input, or is there already and
    is none that a job with a journal may have written.
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
        if not overwrite and not os.path.exists(journal_path(path)):
            raise _there(path)


def check_new_place(path: str | os.PathLike, overwrite: bool, input: str | os.PathLike) -> None:
    """`check_place` of an output that is no job's: what is there needs `overwrite`."""
    check_place(path, overwrite, input)
    if os.path.exists(path) and not overwrite:
        raise _there(os.fspath(path))


def _there(path: str) -> FileExistsError:
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
    for name in more:
        if name in kept:
            raise ValueError(
                f"--columns: {name!r} is a column that tells of the answers; leave it out, or pass "
                "another --answer-column"
            )
    return Output(
        os.fspath(path), [name for name in kept if name != answer_column], constants, answer_column
    )


def table_text(output: Output, rows: Sequence[Mapping[str, Any]], *cells: Sequence[str]) -> str:
    """The csv of the rows' columns and, behind them, `cells`: one sequence a further column."""
    lines: list[str] = []
    # What "\r\n" has in it is quoted in cells, too, which no program takes for the end of a row.
    writer = csv.writer(SimpleNamespace(write=lines.append), lineterminator="\r\n")
    writer.writerow(output.header())
    for row, *more in zip(rows, *cells, strict=True):
        writer.writerow([*output.cells(row), *more])
    return "".join(line[:-2] + "\n" for line in lines)


# A job


def journal_path(path: str | os.PathLike) -> str:
    """Where the results for the output `path` are while they come."""
    return f"{os.fspath(path)}.journal"


_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|index\.json)|((adapter_|generation_)?config|prompt_template)\.json"
)
_TOKENIZER = re.compile("|".join(map(re.escape, TOKENIZER)))
_SAMPLE = 1 << 14  # values of a weight


def describe_folders(model: str | os.PathLike, adapter: str | os.PathLike | None) -> dict[str, Any]:
    """What answers depend on in the folders of a model and an adapter, before they are loaded."""
    return {
        "model": digests(model, _WEIGHTS),
        "adapter": None if adapter is None else digests(adapter, _WEIGHTS),
        "tokenizer": digests(model, _TOKENIZER),
    }


def describe_model(model: Any, tokenizer: Any) -> dict[str, Any]:
    """The same of a model in memory, whatever it was loaded from or trained to since: its device
    and types, and of each weight, adapters included, a sample of up to 16,384 values.
    """
    core = model.core
    sums = {}
    for name in sorted(core.names()):
        values = core.read(name).reshape(-1)
        sample = values[:: max(1, values.size // _SAMPLE)]
        form = f"{core.dtype(name)} {core.shape(name)} "
        sums[name] = digest(form.encode() + sample.tobytes())
    configs = getattr(model, "peft_config", {})
    adapters = {name: _fields_digest(config.to_dict()) for name, config in configs.items()}
    return {
        "model": {"weights": digest(json.dumps(sums).encode())},
        "adapter": adapters | {"active": str(getattr(model, "active_adapter", None))},
        "products": core.backend,
        "prompts": {"family": str(tokenizer.family), "template": model.prompt_template},
        "tokenizer": digests(tokenizer.name_or_path, _TOKENIZER),
    }


def _plain(value: Any) -> Any:
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
) -> dict[str, Any]:
    """What answers depend on, for a `Journal`. model: as `describe_folders` or `describe_model`
    give it; settings: told by name. The form of the output is none of it: one journal gives any.
    """
    table = json.dumps(rows, default=_plain).encode()
    return {
        **model,
        "template": template,
        "table": {"rows": len(rows), "content": digest(table)},
        "settings": dict(settings),
    }


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
    if journal.missing(rows) and os.path.exists(output) and not overwrite:
        with journal:
            raise _there(output)
    if journal.replaced:
        print(f"{journal.path}: {journal.replaced}; begun anew", file=sys.stderr)
    elif journal.results:
        have = len(journal.results)
        print(f"{journal.path}: goes on after {have} of {rows} rows", file=sys.stderr)
    return journal


def run_job(
    journal: Journal, rows: int, compute: Callable[[list[int]], Iterable[tuple[int, Any]]]
) -> list[Any]:
    """The results of `rows` rows, in their order: those in the journal, and those that `compute`
    yields as (row, result JSON can hold), in any order, for the rows it is given, which are added
    as they come. A progress bar on a terminal; what stops this is told where the results so far
    are. RuntimeError for a row that has none in the end.
    """
    missing = journal.missing(rows)
    count = {"total": rows, "initial": rows - len(missing)}
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
                f"{len(journal.results)} of {rows} rows are kept in {journal.path}: the same job "
                "goes on from there",
                file=sys.stderr,
            )
        raise
    if missing := journal.missing(rows):
        raise RuntimeError(f"no result came for {len(missing)} rows, the first is {missing[0]}")
    return [journal.results[row] for row in range(rows)]


# Answers

TOLD = 5  # bad rows that are named


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    journal: Journal,
    rows: Sequence[int],
    **sampling: Any,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, result) of the prompts with the numbers `rows`: {"answer": text}, or {"error": why}
    for a row that cannot be asked or answered, which is told. A row's draws depend on the journal's
    seed and its number alone.
    """

    def ask(some: Sequence[int]) -> Iterator[tuple[int, Any]]:
        seeds = [seed_of((journal.seed % 2**64, row)) for row in some]
        asked = [prompts[row] for row in some]
        return chat_rows(model, tokenizer, asked, seeds=seeds, keep_errors=True, **sampling)

    return _results(ask, rows, lambda answer: {"answer": answer_text(answer)})


def label_scores(
    model: Any, tokenizer: Any, prompts: Sequence[str], labels: Sequence[str], rows: Sequence[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `answers`, but the most probable of the labels is the answer, and "proba" has the
    probability of each: see `classify`.
    """

    def ask(some: Sequence[int]) -> Iterator[tuple[int, Any]]:
        asked = [prompts[row] for row in some]
        return score_rows(model, tokenizer, asked, labels, keep_errors=True)

    def result(found: Any) -> dict[str, Any]:
        one = Classification(list(labels), found[None])
        return {"answer": one.label[0], "proba": one.proba[0].tolist()}

    return _results(ask, rows, result)


Ask = Callable[[Sequence[int]], Iterator[tuple[int, Any]]]


def _results(
    ask: Ask, rows: Sequence[int], result: Callable[[Any], dict[str, Any]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, the result of what was found, or {"error": why}) of the rows, the first errors told."""
    told = 0
    for row, found in _one_by_one_where_it_fails(ask, rows):
        if not isinstance(found, Exception):
            yield row, result(found)
            continue
        if told < TOLD:
            print(f"row {row} has no answer: {found}", file=sys.stderr)
        told += 1
        yield row, {"error": str(found)}


def _one_by_one_where_it_fails(ask: Ask, rows: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """(row, what was found or error). Where numbers that are not finite end a batch, each of its
    rows is asked alone: it is one of them, unless all are.
    """

    def numbered(some: Sequence[int]) -> Iterator[tuple[int, Any]]:
        return ((some[i], found) for i, found in ask(some))

    waiting = dict.fromkeys(rows)
    while waiting:
        try:
            for row, found in numbered(list(waiting)):
                del waiting[row]
                yield row, found
        except FloatingPointError as error:
            alone: dict[int, Any] = {}
            for row in list(waiting)[:ROWS]:
                try:
                    alone |= numbered([row])
                except FloatingPointError as own:
                    alone[row] = own
            if all(isinstance(found, FloatingPointError) for found in alone.values()):
                raise error
            for row, found in alone.items():
                del waiting[row]
                yield row, found


def answer_text(answer: str | Mapping[str, Any]) -> str:
    """An answer as text: that of a tool's call as the model wrote it, or its arguments as JSON."""
    if isinstance(answer, str):
        return answer.strip()
    if set(answer) == {"name", "content"}:
        return f"{answer['name']}\n{answer['content']}".strip()
    return json.dumps(answer, ensure_ascii=False)


def read_answers(flag: str, given: str | None) -> list[str] | None:
    """The answers that a flag lists, or None. ValueError for an empty one, or one given twice."""
    if given is None:
        return None
    allowed = [answer.strip() for answer in given.split(",")]
    if "" in allowed:
        raise ValueError(f"{flag}: expected answers separated by commas, got {given!r}")
    twice = next((a for number, a in enumerate(allowed) if a in allowed[:number]), None)
    if twice is not None:
        raise ValueError(f"{flag}: {twice!r} is given twice")
    return allowed


def write_answers(
    output: Output,
    rows: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    choices: Sequence[str] | None,
    fallback: str | None,
    journal: Journal,
    overwrite: bool,
    labels: Sequence[str] = (),
) -> bool:
    """Write the table with the answers, and remove the journal; whether every row has one. labels:
    those whose probabilities stand behind the answers.

    A row without an answer, or whose answer is none of the choices, has `fallback`; without one its
    answer is empty, the model's own stands in `raw_column`, and the journal stays. All such rows
    are counted and told. Raises ValueError where no row has an answer, FileExistsError where
    another file stands under the output's name.
    """
    columns, bad, odd = answer_columns(results, output.answer_column, choices, fallback, labels)
    if len(bad) == len(results):
        journal.remove()
        raise ValueError(f"no row has an answer: {bad[0]}")
    output = replace(output, more=list(columns)[1:])
    text = table_text(output, rows, *(map(_as_cell, column) for column in columns.values()))
    if os.path.exists(output.path) and not overwrite:
        with open(output.path, encoding="utf-8", newline="", errors="replace") as file:
            if file.read() != text:  # else it was written, and the journal was not yet removed
                raise _there(output.path)
    with atomic_file(output.path, "w") as file:
        file.write(text)
    stands = "" if fallback is None else f", {fallback!r} stands for them"
    if bad:
        some = "; ".join(f"row {i}: {why}" for i, why in list(bad.items())[:TOLD])
        print(f"{len(bad)} of {len(rows)} rows have no answer{stands}: {some}", file=sys.stderr)
    if odd:
        some = "; ".join(f"row {i}: {results[i]['answer']!r}" for i in odd[:TOLD])
        where = stands or f", they stand in the column {output.more[0]!r}"
        print(
            f"{len(odd)} of {len(rows)} answers are none of {list(choices or ())}{where}: {some}",
            file=sys.stderr,
        )
    if (bad or odd) and fallback is None:
        print(
            f"{output.path}: {len(bad) + len(odd)} rows are without an answer; the same command "
            f"with --overwrite --fallback ANSWER gives them that one, from {journal.path}",
            file=sys.stderr,
        )
        return False
    journal.remove()
    return True


def answer_columns(
    results: Sequence[Mapping[str, Any]],
    answer_column: str,
    choices: Sequence[str] | None,
    fallback: str | None,
    labels: Sequence[str],
) -> tuple[dict[str, list[Any]], dict[int, str], list[int]]:
    """(columns by name, the answers' first; row -> why it has no answer; rows whose answers are
    none of the choices). labels: those whose probabilities are columns.
    """
    bad = {i: result["error"] for i, result in enumerate(results) if "error" in result}
    raw = [result.get("answer", "") for result in results]
    odd = [i for i, a in enumerate(raw) if i not in bad and choices and a not in choices]
    last = "" if fallback is None else fallback
    without = {*bad, *odd}
    columns: dict[str, list[Any]] = {
        answer_column: [last if i in without else answer for i, answer in enumerate(raw)]
    }
    if labels:
        none = [math.nan] * len(labels)
        found = zip(*(result.get("proba", none) for result in results), strict=True)
        columns |= {n: list(c) for n, c in zip(proba_columns(labels), found, strict=True)}
    elif odd and fallback is None:
        columns[raw_column(answer_column)] = raw
    return columns, bad, odd


def _as_cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.9g}"
    return str(value)


def predict_table(
    model: Any,
    tokenizer: Any,
    table: Any,
    template: str,
    *,
    labels: Sequence[Any] | None = None,
    choices: Sequence[Any] | None = None,
    fallback: str | None = None,
    proba: bool = False,
    answer_column: str = "label",
    output: str | os.PathLike | None = None,
    overwrite: bool = False,
    seed: int | None = None,
    **sampling: Any,
) -> Any:
    """The table with an answer for each row: a new DataFrame where it is one, else a list of dicts.

    table: a DataFrame, a list of dicts, or the path of a csv, json or jsonl file. template: the
    question, with `{column}` where a value stands. labels: the answers are weighed, the most
    probable one is taken, as in `classify`, and with `proba` a column proba_LABEL holds each one's
    probability; without labels the model writes its answers, as in `chat`, near to greedy
    (temperature 0.01) unless `sampling` says otherwise. choices: the only answers allowed. A row
    without an answer, or with another one, has `fallback`, or "" and its raw answer in a column of
    its own; both are told, and counted.

    output: a csv to write. Beside it every result is kept in a journal as soon as it is there: the
    same call after an interruption goes on from it and gives the same answers. Errors as those of
    `glmlora predict`, before the first row.
    """
    rows = table_rows(table, "table")
    check_template(template, columns_of(rows), "the table")
    texts = [] if labels is None else check_labels(labels)
    allowed = None if choices is None else [str(choice) for choice in choices]
    if proba and not texts:
        raise ValueError("proba: has no effect without labels")
    if texts and (sampling or allowed):
        name = next(iter(sampling), "choices")
        raise ValueError(f"{name}: has no effect with labels: nothing is drawn")
    sampling = {"labels": texts} if texts else {"temperature": 0.01, **sampling}
    shown = texts if proba else []
    more = proba_columns(shown)
    if allowed is not None and fallback is None:
        more = [raw_column(answer_column)]
    place = "" if output is None else os.fspath(output)
    planned = plan_output(place, columns_of(rows), None, [], answer_column, more)
    job: dict[str, Any] = {}
    if output is not None:
        check_place(output, overwrite, table if isinstance(table, str | os.PathLike) else "")
        check_space(planned, rows)
        job = describe_job(describe_model(model, tokenizer), rows, template, sampling)
    prompts = fill_template(template, rows)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model

    def compute(missing: list[int]) -> Iterator[tuple[int, Any]]:
        if texts:
            return label_scores(base, tokenizer, prompts, texts, missing)
        return answers(base, tokenizer, prompts, journal, missing, **sampling)

    with (
        ending_signals(),
        open_journal(place or None, job, len(rows), seed, overwrite) as journal,
    ):
        results = run_job(journal, len(rows), compute)
        if output is not None:
            write_answers(planned, rows, results, allowed, fallback, journal, overwrite, shown)
    found, _, _ = answer_columns(results, answer_column, allowed, fallback, shown)
    if hasattr(table, "assign"):
        return table.assign(**found)
    return [
        {**row, **dict(zip(found, cells, strict=True))}
        for row, cells in zip(rows, zip(*found.values(), strict=True), strict=True)
    ]


def proba_columns(labels: Sequence[str]) -> list[str]:
    """The columns of the labels' probabilities."""
    return [f"proba_{label}" for label in labels]


def raw_column(answer_column: str) -> str:
    """The column of the model's own answers, beside those that are choices."""
    return f"{answer_column}_raw"
