"""What is asked of every row of a table, which answers count, and the columns they become."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..files.journal import Journal
from ..generation.chat import chat_rows
from ..generation.generate import ROWS
from ..generation.labels import AT_ONCE, Classification, check_labels, score_rows
from ..seeds import seed_of
from ..task import Task
from ..templates import columns_of

TOLD = 5  # bad rows that are named

# What is asked


@dataclass(frozen=True)
class Allowed:
    """The answers that count: those of `choices`, or texts that a regular expression matches from
    their first character to their last, or whole numbers from `between[0]` to `between[1]`.
    """

    choices: tuple[str, ...] = ()
    pattern: re.Pattern[str] | None = None
    between: tuple[int, int] | None = None

    def __contains__(self, answer: str) -> bool:
        if self.pattern is not None:
            return self.pattern.fullmatch(answer) is not None
        if self.between is not None:
            low, high = self.between
            return bool(re.fullmatch("[+-]?[0-9]{1,99}", answer)) and low <= int(answer) <= high
        return answer in self.choices

    def __str__(self) -> str:
        """The end of a sentence: "3 of 9 answers are none of ['0', '1']"."""
        if self.pattern is not None:
            return f"no match of {self.pattern.pattern!r}"
        if self.between is not None:
            return f"no whole number from {self.between[0]} to {self.between[1]}"
        return f"none of {list(self.choices)}"


@dataclass(frozen=True)
class Asked:
    """One question about every row.

    template: with `{column}` where a value stands. labels: the answers that are weighed; none: the
    model writes its answers as `sampling` says, and `allowed`, if given, says which ones count.
    fallback: the answer of rows that have none. proba: the labels' probabilities are columns, too.
    task: what the model was trained for: where that is asked, questions are cut as in training.
    threshold: (number of one of two labels, the probability from which on it is the answer).
    """

    template: str
    answer_column: str
    labels: Sequence[str]
    proba: bool
    allowed: Allowed | None
    fallback: str | None
    sampling: Mapping[str, Any]
    task: Task | None = None
    threshold: tuple[int, float] | None = None

    @property
    def more(self) -> list[str]:
        """The columns that may stand behind the answer's."""
        if self.proba:
            return [f"proba_{label}" for label in self.labels]
        return [] if self.allowed is None or self.fallback is not None else [self.raw_column]

    @property
    def raw_column(self) -> str:
        """The column of the model's own answers, beside those that count."""
        return f"{self.answer_column}_raw"


def ask(
    template: str,
    *,
    labels: Sequence[Any] | None,
    proba: bool,
    choices: Sequence[Any] | None,
    pattern: str | None,
    between: Sequence[int] | None,
    fallback: str | None,
    answer_column: str,
    sampling: Mapping[str, Any],
    task: Task | None = None,
    spelled: Callable[[str], str] = str,
) -> Asked:
    """What the arguments ask. task: what the model was trained for, whose labels are weighed where
    no arguments say how answers are written. spelled: an argument's name as the user has written
    it. TypeError, ValueError naming an argument that is wrong, or has no effect beside another one.
    """
    rules = {"choices": choices, "pattern": pattern, "between": between}
    given = [name for name, rule in rules.items() if rule is not None]
    threshold = None
    if task is not None and task.labels:
        if labels is None and not sampling and not given:
            labels = task.answers
        if labels is not None and task.threshold is not None:
            texts = [str(label) for label in labels]
            if sorted(texts) == sorted(task.answers):
                threshold = texts.index(task.answers[1]), float(task.threshold)
    texts = [] if labels is None else check_labels(labels, spelled("labels"))
    if proba and not texts:
        raise ValueError(f"{spelled('proba')}: has no effect without {spelled('labels')}")
    if texts and (sampling or given):
        name = spelled([*sampling, *given][0])
        raise ValueError(f"{name}: has no effect with {spelled('labels')}: nothing is drawn")
    if len(given) > 1:
        names = " or ".join(spelled(name) for name in given)
        raise ValueError(f"{spelled(given[1])}: expected one of {names}, got both")
    allowed = None
    if choices is not None:
        allowed = Allowed(choices=tuple(check_labels(choices, spelled("choices"))))
    elif pattern is not None:
        try:
            allowed = Allowed(pattern=re.compile(pattern))
        except (re.error, TypeError) as error:
            name = spelled("pattern")
            raise ValueError(f"{name}: {pattern!r} is no regular expression: {error}") from None
    elif between is not None:
        allowed = Allowed(between=_range(between, spelled("between")))
    if not answer_column.strip():
        raise ValueError(f"{spelled('answer_column')}: expected a name, got none")
    return Asked(
        template,
        answer_column,
        texts,
        proba,
        allowed,
        fallback,
        {} if texts else {"temperature": 0.01, **sampling},
        task,
        threshold,
    )


def _range(between: Sequence[int], name: str) -> tuple[int, int]:
    wrong = f"{name}: expected the smallest and the largest whole number, got {between!r:.80}"
    try:
        low, high = (int(end) if isinstance(end, str) else end.__index__() for end in between)
    except (TypeError, ValueError, AttributeError):
        raise ValueError(wrong) from None
    if low > high:
        raise ValueError(wrong)
    return low, high


# What comes back


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
    model: Any, tokenizer: Any, prompts: Sequence[str], asked: Asked, rows: Sequence[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `answers`, but the most probable of the labels is the answer, or the one that the
    threshold says, and "proba" has the probability of each: see `classify`.
    """

    def ask(some: Sequence[int]) -> Iterator[tuple[int, Any]]:
        some_prompts = [prompts[row] for row in some]
        return score_rows(model, tokenizer, some_prompts, asked.labels, keep_errors=True)

    def result(found: Any) -> dict[str, Any]:
        return _label(asked, Classification(list(asked.labels), found[None]).proba[0])

    return _results(ask, rows, result)


def classified(
    classify: Callable[[list[dict[str, Any]]], np.ndarray],
    rows: Sequence[Mapping[str, Any]],
    asked: Asked,
    numbers: Sequence[int],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `label_scores`, by a function of some rows that gives probabilities (rows, labels)."""
    columns = columns_of(rows)
    for first in range(0, len(numbers), AT_ONCE):
        some = numbers[first : first + AT_ONCE]
        found = classify([{name: rows[row].get(name) for name in columns} for row in some])
        yield from ((row, _label(asked, one)) for row, one in zip(some, found, strict=True))


def _label(asked: Asked, proba: np.ndarray) -> dict[str, Any]:
    number = int(proba.argmax())
    if asked.threshold is not None:
        at, least = asked.threshold
        number = at if proba[at] >= least else 1 - at
    return {"answer": asked.labels[number], "proba": proba.tolist()}


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


def split_answers(given: str | None) -> list[str] | None:
    """The parts between the commas of a flag, or None for one that is not given."""
    return None if given is None else [part.strip() for part in given.split(",")]


def answer_columns(
    results: Sequence[Mapping[str, Any]], asked: Asked
) -> tuple[dict[str, list[Any]], dict[int, str], list[int]]:
    """(columns by name, the answers' first; row -> why it has no answer; rows whose answers do not
    count).
    """
    bad = {i: result["error"] for i, result in enumerate(results) if "error" in result}
    raw = [result.get("answer", "") for result in results]
    odd: list[int] = []
    if asked.allowed is not None:
        odd = [i for i, answer in enumerate(raw) if i not in bad and answer not in asked.allowed]
    last = "" if asked.fallback is None else asked.fallback
    without = {*bad, *odd}
    columns: dict[str, list[Any]] = {
        asked.answer_column: [last if i in without else answer for i, answer in enumerate(raw)]
    }
    if asked.proba:
        none = [math.nan] * len(asked.labels)
        found = zip(*(result.get("proba", none) for result in results), strict=True)
        columns |= {name: list(column) for name, column in zip(asked.more, found, strict=True)}
    elif odd and asked.fallback is None:
        columns[asked.raw_column] = raw
    return columns, bad, odd
