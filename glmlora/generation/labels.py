"""Which of some answers a model gives: the exact probability of each, no word of it drawn.

The labels of a table are whole answers, their end included, as training writes them behind the
prompt. They form a tree of shared beginnings. A prompt is fed once; then every place of the tree
where answers part or go on is visited once, for many rows in one call of the core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..families import recognition
from ..families.prompt import encode_target
from ..files.rows import table_rows
from ..progress import bar
from ..questions import fit_question, row_queries
from ..task import Task, check_asked
from ..templates import check_template, columns_of
from .cache import CachedRow, Model
from .chat import OF_ONE_ROW, chat_family
from .generate import places_for, shared_length, warn_of_weights

AT_ONCE = 64  # rows that walk the tree together, where memory allows
_WHOLE = 1 << 30  # ids of a label, none of which is cut away

Tree = dict[int, Any]  # id -> what follows it; {} behind the end of an answer


@dataclass(frozen=True)
class Classification:
    """What a model thinks of some rows.

    labels: the answers it could choose from. log_likelihood: float64 (rows, labels), in nats: the
    logarithm of the probability of each whole answer, its end included, after the row's prompt.
    """

    labels: list[str]
    log_likelihood: np.ndarray

    @property
    def log_proba(self) -> np.ndarray:
        """float64 (rows, labels): logarithms of `proba`."""
        above = self.log_likelihood - self.log_likelihood.max(axis=1, keepdims=True)
        return above - _log_sum(above)[:, None]

    @property
    def proba(self) -> np.ndarray:
        """float64 (rows, labels): the probabilities of the labels; those of a row add up to 1."""
        return np.exp(self.log_proba)

    @property
    def label(self) -> list[str]:
        """Of each row the most probable label, the first of equals."""
        return [self.labels[i] for i in self.log_likelihood.argmax(axis=1)]

    @property
    def margin(self) -> np.ndarray:
        """float64 (rows): by how much the most probable label's probability is above the next
        one's; 1 where there is one label only.
        """
        if len(self.labels) == 1:
            return np.ones(len(self))
        best = np.partition(self.proba, -2, axis=1)
        return best[:, -1] - best[:, -2]

    @property
    def mass(self) -> np.ndarray:
        """float64 (rows): the probability that the model answers with any of the labels. Near 0 it
        was not trained for this prompt, or for these labels.
        """
        return np.exp(_log_sum(self.log_likelihood))

    def __len__(self) -> int:
        return len(self.log_likelihood)

    def __repr__(self) -> str:
        return f"Classification({len(self)} rows of {', '.join(map(repr, self.labels))})"


def mean_of(found: Sequence[Classification]) -> Classification:
    """What several models think of the same rows together: the mean of their `proba`, and of their
    `mass`.
    """
    proba = np.mean([one.proba for one in found], axis=0)
    mass = np.mean([one.mass for one in found], axis=0)
    with np.errstate(divide="ignore"):  # of what no model thinks possible
        return Classification(found[0].labels, np.log(proba) + np.log(mass)[:, None])


def _log_sum(values: np.ndarray) -> np.ndarray:
    """Logarithms of the sums of exp over the last axis, float64."""
    most = values.max(axis=-1, keepdims=True)
    return np.log(np.exp(values.astype(np.float64) - most).sum(axis=-1)) + most[..., 0]


def answer_ids(model: Model, tokenizer: Any, labels: Sequence[str]) -> list[list[int]]:
    """Each label's ids, as training writes them behind a prompt: the end id is the last one."""
    template = model.prompt_template
    return [encode_target(tokenizer, label, _WHOLE, template) for label in labels]


def _tree(answers: Sequence[Sequence[int]]) -> Tree:
    """The answers' ids as a tree. ValueError for equal ones, and one that begins another."""
    tree: Tree = {}
    for ids in answers:
        node = tree
        for token in ids:
            node = node.setdefault(token, {})
    for number, ids in enumerate(answers):
        node = tree
        for token in ids:
            node = node[token]
        if node or ids in answers[:number]:
            raise ValueError(f"labels: the ids of number {number}, {ids}, begin another label's")
    return tree


def check_labels(labels: Sequence[Any] | None, name: str = "labels") -> list[str]:
    """The labels as texts. TypeError, ValueError naming what is none, empty or there twice; name:
    what a message calls them.
    """
    if isinstance(labels, str) or not isinstance(labels, Sequence | np.ndarray):
        raise TypeError(f"{name}: expected a list of answers, got {labels!r:.80}")
    texts = []
    for number, label in enumerate(labels):
        if isinstance(label, float | np.floating) or label is None:
            raise TypeError(
                f"{name}[{number}]: expected text or a whole number, as the answers were trained, "
                f"got {label!r}"
            )
        texts.append(str(label))
        if not texts[-1].strip():
            raise ValueError(f"{name}[{number}]: expected an answer, got {label!r}")
    if not texts:
        raise ValueError(f"{name}: expected at least one answer, got none")
    twice = next((t for number, t in enumerate(texts) if t in texts[:number]), None)
    if twice is not None:
        raise ValueError(f"{name}: {twice!r} is there twice")
    return texts


def prompt_writer(
    model: Model, tokenizer: Any, role: str, answer: int = 0
) -> Callable[[int, Any], list[int]]:
    """A function of a row's number and query: the ids of the prompt that `chat` would ask. It
    raises TypeError, ValueError naming the row for what is no text, or leaves no room for an answer
    of so many ids. ValueError for a tokenizer of another model.
    """
    family, config = chat_family(model, tokenizer), model.config
    recognition.check_tokenizer(tokenizer, config.family, config.padded_vocab_size)

    def prompt_ids(number: int, query: Any) -> list[int]:
        if not isinstance(query, str):
            raise TypeError(f"row {number}: expected text, got {type(query).__name__}")
        ids = list(family.chat_ids(tokenizer, query, [], role))
        if len(ids) + answer > config.seq_length:
            more = f" and a label of {answer} exceed" if answer else " exceeds"
            raise ValueError(
                f"row {number}: a prompt of {len(ids)} tokens{more} the model's "
                f"{config.seq_length} positions (seq_length)"
            )
        return ids

    return prompt_ids


def score_rows(
    model: Model,
    tokenizer: Any,
    queries: Sequence[str],
    labels: Sequence[str],
    at_once: int = AT_ONCE,
    role: str = "user",
    keep_errors: bool = False,
) -> Iterator[tuple[int, Any]]:
    """(number of a query, log-probabilities float64 (labels) of the answers to it) in the order in
    which they are ready; each is what the query alone would give. labels: as `check_labels` gives
    them. keep_errors: the error of a query that cannot be asked stands in their place.
    """
    answers = answer_ids(model, tokenizer, labels)
    prompt_ids = prompt_writer(model, tokenizer, role, max(map(len, answers)))
    kept = OF_ONE_ROW if keep_errors else ()
    numbers, prompts = [], []
    for number, query in enumerate(queries):
        try:
            ids = prompt_ids(number, query)
        except kept as error:
            yield number, error
        else:
            numbers.append(number)
            prompts.append(np.array(ids, np.int32))
    for at, row in score_ids(model, prompts, answers, at_once):
        yield numbers[at], row


def score_ids(
    model: Model,
    prompts: Sequence[Sequence[int] | np.ndarray],
    answers: Sequence[Sequence[int]],
    at_once: int = AT_ONCE,
) -> Iterator[tuple[int, np.ndarray]]:
    """As `score_rows`, of ids. Equal prompts are computed once, and so is what all begin with."""
    if not isinstance(at_once, int) or at_once < 1:
        raise ValueError(f"at_once: expected a whole number from 1, got {at_once!r:.80}")
    tree, longest = _tree(answers), max(map(len, answers))
    numbers: dict[bytes, list[int]] = {}  # as bytes, a million ids take 4 MB
    for number, prompt in enumerate(prompts):
        numbers.setdefault(np.asarray(prompt, np.int32).tobytes(), []).append(number)
    if not numbers:
        return
    warn_of_weights(model)
    different = list(numbers)
    # All others share what the first and the last in any order do.
    extremes = min(different), max(different), min(different, key=len)
    shared = shared_length(model, [*map(_ids, extremes)]) if len(different) > 1 else 0
    room = max(map(len, different)) // 4 - shared + longest
    places = places_for(model, room, min(at_once, len(different)))
    rows = CachedRow(model, places, room, _ids(different[0])[:shared])
    for first in range(0, len(different), places):
        together = different[first : first + places]
        ends = _walk(rows, [*map(_ids, together)], tree)
        found = np.stack([ends[tuple(ids)] for ids in answers], axis=1)
        for prompt, row in zip(together, found, strict=True):
            for number in numbers[prompt]:
                yield number, row


def _ids(prompt: bytes) -> list[int]:
    return np.frombuffer(prompt, np.int32).tolist()


def _walk(
    rows: CachedRow, prompts: Sequence[Sequence[int]], tree: Tree
) -> dict[tuple[int, ...], np.ndarray]:
    """Of each end of the tree the log-probabilities float64 (len(prompts)) of what leads there."""
    places = list(range(len(prompts)))
    for place, prompt in zip(places, prompts, strict=True):
        rows.become(place, prompt)
    found: dict[tuple[int, ...], np.ndarray] = {}
    waiting: list[tuple[Tree, tuple[int, ...], np.ndarray]] = [(tree, (), np.zeros(len(prompts)))]
    while waiting:
        node, path, so_far = waiting.pop()
        if path:  # the last visited place is its parent, or below a sister
            for place, prompt in zip(places, prompts, strict=True):
                rows.shorten(place, len(prompt) + len(path) - 1)
                rows.ids[place].append(path[-1])
        scores = rows.extend(places)
        totals = so_far[:, None] + scores[:, list(node)] - _log_sum(scores)[:, None]
        for total, (token, after) in zip(totals.T, node.items(), strict=True):
            if after:
                waiting.append((after, (*path, token), total))
            else:
                found[(*path, token)] = total
    return found


def queries_of(
    table_or_texts: Any,
    template: str | None,
    task: Task | None = None,
    tokenizer: Any = None,
    prompt_template: str = "auto",
    strict: bool = False,
) -> list[str]:
    """Texts, or those that a template, or that of a task, makes of the rows of a table; with a task
    cut as in its training. TypeError, ValueError naming what is neither. strict: see `check_asked`.
    """
    if template is not None:
        rows = table_rows(table_or_texts, "table_or_texts")
        check_template(template, columns_of(rows), "the table")
        return row_queries(task, rows, template, tokenizer, prompt_template)
    if isinstance(table_or_texts, str):
        raise TypeError("table_or_texts: expected a list of texts, got one text")
    is_table = hasattr(table_or_texts, "columns")
    given = table_or_texts if is_table else list(table_or_texts)
    if is_table or (given and all(isinstance(row, Mapping) for row in given)):
        if task is None:
            raise TypeError("template: a table needs one, which makes a text of each row")
        rows = table_rows(given, "table_or_texts")
        return row_queries(task, rows, None, tokenizer, prompt_template)
    if task is None:
        return given
    return [fit_question(task, text, tokenizer, prompt_template, strict) for text in given]


def classify(
    model: Model,
    tokenizer: Any,
    table_or_texts: Any,
    labels: Sequence[Any] | None = None,
    at_once: int = AT_ONCE,
    *,
    template: str | None = None,
    role: str = "user",
    strict: bool = False,
) -> Classification:
    """The probability of each label as the answer to each query, which `chat` would ask: a text,
    or with `template`, which has `{column}` where a value stands, a row of a DataFrame, of a list
    of dicts, or of a csv, json or jsonl file.

    labels: the answers, texts or whole numbers; each counts with its end, as training encodes it.
    Of a model with a `task`, None is what was trained, as labels and as template; what is asked
    otherwise is told, and with `strict` a ValueError. at_once: rows that are computed together; no
    result depends on it. Shows a progress bar on a terminal. Raises ValueError, TypeError naming
    the argument or row.
    """
    task = model.task
    base = model.opened.directory if strict else None
    check_asked(task, strict, template=template, labels=labels, base=base)
    if labels is None and task is not None and task.labels:
        labels = task.answers
    texts = check_labels(labels)
    form = task, tokenizer, model.prompt_template
    queries = queries_of(table_or_texts, template, *form, strict)
    found = np.empty((len(queries), len(texts)))
    ready = score_rows(model, tokenizer, queries, texts, at_once, role)
    for number, row in bar(ready, desc="classify", unit="row", total=len(queries), disable=None):
        found[number] = row
    return Classification(texts, found)
