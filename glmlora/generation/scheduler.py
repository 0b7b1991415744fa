"""The one token loop. Requests wait for a row of a cache; each step feeds what the running ones
lack, in one call of the core, and gives each of them its next token.

A chat is a scheduler with one row whose events are streamed; a batch has more requests than rows;
beams look at the scores and fork the rows. No request's tokens depend on what runs beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from .. import _core
from ..seeds import next_key, seed_of
from .cache import CachedRow, Model
from .config import GenerationConfig
from .processors import Row, changes_of, checked_processors
from .stopping import MaxTimeCriteria, StopStringCriteria, checked_criteria

# New tokens after which a cache grows: nothing is reserved for the 8192 positions chat may use.
ROOM = (256, 1024, 4096, 16384, 65536)


class Request:
    """A prompt, and how it goes on: `ids` are the prompt's and, behind them, the new ones."""

    def __init__(self, prompt: Sequence[int], limit: int, draw: tuple[int, int], number: int = 0):
        self.ids = prompt if isinstance(prompt, list) else list(prompt)
        self.start = len(self.ids)
        self.end = self.start + limit  # how many ids there may be
        self.draw = draw  # (seed, stream) of its random numbers
        self.number = number  # of the prompt, for functions that ask
        self.scores: list[np.ndarray] = []  # float32 (V) of each new token, where they are kept:
        self.logits: list[np.ndarray] = []  # after, and before all changes
        self.row = -1  # of the cache; from then on `ids` is that row's list

    @property
    def new(self) -> list[int]:
        """The new ids, an end id included."""
        return self.ids[self.start :]

    @property
    def index(self) -> int:
        """How many new ids there are."""
        return len(self.ids) - self.start


class Event(NamedTuple):
    """A request's new token, and whether it was the last one."""

    request: Request
    token: int
    finished: bool


class Scores:
    """Changes to the scores of a row before one is chosen, the settings', then the caller's
    functions, in order; the choice; and whether an answer ends with it.

    allowed: see `changes_of`. tokenizer: for stop_strings.
    """

    def __init__(
        self,
        settings: GenerationConfig,
        processors: Any = None,
        criteria: Any = None,
        allowed: Any = None,
        tokenizer: Any = None,
    ):
        self.settings = g = settings
        self.changes = changes_of(g, allowed)
        self.processors = checked_processors(processors)
        self.criteria = checked_criteria(criteria)
        if g.max_time is not None:
            self.criteria.append(MaxTimeCriteria(g.max_time))
        if g.stop_texts:
            if tokenizer is None:
                raise ValueError("stop_strings: need the tokenizer, pass tokenizer=")
            self.criteria.append(StopStringCriteria(tokenizer, g.stop_texts))
        self.eos = settings.eos
        self.adjusts = g.repetition_penalty != 1 or g.no_repeat_ngram_size > 0 or g.min_length > 0
        functions = bool(self.changes or self.processors)
        self.active = self.adjusts or functions  # else scores stay as they are
        self.greedy = not (g.samples or self.active)  # the highest score decides
        self.keeps = bool(g.output_scores or g.output_logits)
        cuts = g.samples and bool(g.min_p)
        self.in_core = not (functions or self.keeps or cuts)  # the core can choose

    def choice(self, requests: Sequence[Request]) -> dict[str, Any]:
        """What tells the core to choose the next tokens where the scores are."""
        g = self.settings
        draws = [(*r.draw, r.index) for r in requests]
        found: dict[str, Any] = {"draws": np.array(draws, np.uint64)}
        if g.samples:
            found |= {
                "temperature": float(g.temperature),
                "top_k": int(g.top_k),
                "top_p": float(g.top_p),
            }
        if self.adjusts:
            found |= {
                "context": np.fromiter(chain.from_iterable(r.ids for r in requests), np.int32),
                "context_lengths": np.array([len(r.ids) for r in requests], np.int32),
                "repetition_penalty": float(g.repetition_penalty),
                "no_repeat_ngram_size": int(g.no_repeat_ngram_size),
                "suppress": np.array(self.eos, np.int32),
                "min_length": int(g.min_length),
            }
        return found

    def pick(self, scores: np.ndarray, request: Request) -> int:
        """The next token of a request from its scores float32 (V), changed in place."""
        g = self.settings
        if g.output_logits:
            request.logits.append(scores.copy())
        if self.active:
            scores = self(scores, request)
        how = float(g.temperature), int(g.top_k), float(g.top_p)
        if g.samples and (g.min_p or g.output_scores):
            chances = _core.warp_logits(scores, *how)
            chances[chances < (g.min_p or 0) * chances.max()] = 0
            scores = np.where(chances > 0, scores / how[0], -np.inf).astype(np.float32)
            how = 1.0, 0, 1.0
        if g.output_scores:
            request.scores.append(scores.copy())
        if not g.samples:
            return scores.argmax().item()
        return _core.sample(scores, *how, *request.draw, request.index)

    def __call__(self, scores: np.ndarray, row: Row) -> np.ndarray:
        """scores float32 (V), changed in place. Returns float32 (V)."""
        g, ids = self.settings, row.ids
        if self.adjusts:
            suppress = self.eos if len(ids) < g.min_length and not g.min_new_tokens else ()
            _core.adjust_logits(
                scores,
                np.asarray(ids, np.int32),
                float(g.repetition_penalty),
                int(g.no_repeat_ngram_size),
                np.asarray(suppress, np.int32),
            )
        for change in self.changes:
            change(scores, row)
        for f in self.processors:
            result = np.asarray(f(np.asarray([ids], np.int64), scores[None]), np.float32)
            if result.shape not in ((1, scores.size), (scores.size,)):
                raise ValueError(
                    f"logits_processor: expected scores of shape (1, {scores.size}), got "
                    f"{result.shape}"
                )
            scores = np.ascontiguousarray(result.reshape(-1))
        if self.active:
            if np.isnan(scores).any() or scores.max() == np.inf:
                raise FloatingPointError(
                    f"logits_processor: scores are not finite at token {len(ids)}"
                )
            if scores.max() == -np.inf:
                raise ValueError(f"no token is allowed at position {len(ids)}: all are suppressed")
        return scores

    def stops(self, ids: Sequence[int], scores: Sequence[np.ndarray] = ()) -> bool:
        """Whether a criterion ends a row of these ids. scores: those kept of its new ones."""
        if not self.criteria:
            return False
        kept = tuple(s[None] for s in scores) if self.settings.output_scores else None
        row = np.asarray([ids], np.int64)
        return any(bool(np.all(criterion(row, kept))) for criterion in self.criteria)


# Growth: make room in the rows for the running requests; returns the steps for which it is enough.

Growth = Callable[[CachedRow, Sequence[Request]], int]


def first_room(lengths: Iterable[int], limits: Iterable[int]) -> int:
    """Positions of a row to begin with. lengths: of prompts, after the opening; limits: of their
    new ids.
    """
    return max(n + min(limit, ROOM[0]) for n, limit in zip(lengths, limits, strict=True))


def by_counts(rows: CachedRow, running: Sequence[Request]) -> int:
    """Rows that begin together: room for as many new tokens as the next count of ROOM says."""
    index = running[0].index
    count = next((r for r in ROOM if r > index), 1 << 62)
    rows.make_room(max(min(r.end, r.start + count) for r in running) - rows.opening)
    return count - index


def by_doubling(rows: CachedRow, running: Sequence[Request]) -> int:
    """Rows that are filled again and again: twice the longest, once it does not fit."""
    longest = max(len(r.ids) for r in running) - rows.opening
    if longest > rows.cache.capacity:
        most = max(r.end for r in running) - rows.opening
        rows.make_room(min(2 * longest, most))
    return rows.cache.capacity - longest + 1


class Scheduler:
    """Runs requests in the rows of a cache; a row whose request has ended goes to the next one.

    All prompts begin with the rows' opening. `running` is in the order of the rows.
    """

    def __init__(self, rows: CachedRow, change: Scores, grow: Growth = by_counts):
        self.rows = rows
        self.change = change
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self._taken: list[int] = []  # rows of those that run
        self._free = list(range(len(rows.ids)))
        self._ends = frozenset(change.eos)
        self._grow = grow
        self._left = 0  # steps for which the cache has room

    def submit(
        self,
        prompt: Sequence[int],
        limit: int,
        draw: tuple[int, int] = (0, 0),
        number: int = 0,
    ) -> Request:
        """Let a prompt wait for a row. limit: new ids allowed; draw: the (seed, stream) of its
        random numbers; number: of the prompt.
        """
        request = Request(prompt, limit, draw, number)
        self.waiting.append(request)
        return request

    def step(self, scores: np.ndarray | None = None) -> list[Event]:
        """The next token of every running request, in the order of rows; [] when all have ended.

        scores (rows, V): of these tokens, where they are known already.
        """
        if self.waiting and self._free:
            self._fill()
        if not self.running:
            return []
        if scores is None and self.change.in_core:  # the scores stay in the core
            return self.take(self._feed(self._choice).tolist())
        if scores is None:
            scores = self._feed()
        return self.take([*map(self.change.pick, scores, self.running)])

    def run(self) -> Iterator[Event]:
        """Every step's events, until all requests have ended."""
        while events := self.step():
            yield from events

    def scores(self) -> np.ndarray:
        """In place of a step: the scores float32 (rows, V) that it would choose from."""
        if self.waiting and self._free:
            self._fill()
        return self._feed()

    def take(self, tokens: Sequence[int]) -> list[Event]:
        """Give every running request its next token."""
        ends, events, ended = self._ends, [], False
        for request, token in zip(self.running, tokens, strict=True):
            ids = request.ids
            ids.append(token)
            finished = (
                token in ends or len(ids) == request.end or self.change.stops(ids, request.scores)
            )
            if finished:
                ended = True
            events.append(Event(request, token, finished))
        if ended:
            self._free += [e.request.row for e in events if e.finished]
            self._run([e.request for e in events if not e.finished])
        return events

    def fork(self, parents: Sequence[int]) -> None:
        """Row i goes on from a copy of what row parents[i] was, with random numbers of stream i.
        The running requests have the first rows.
        """
        self.rows.fork(parents)
        forks = []
        for row, (parent, ids) in enumerate(zip(parents, self.rows.ids, strict=True)):
            old = self.running[parent]
            fork = Request(ids, 0, (old.draw[0], row), old.number)
            fork.start, fork.end, fork.row = old.start, old.end, row
            forks.append(fork)
        self._free = []
        self._run(forks)

    def _run(self, requests: list[Request]) -> None:
        self.running, self._taken = requests, [r.row for r in requests]

    def _fill(self) -> None:
        """Waiting requests take the free rows."""
        placed = list(self.running)
        while self._free and self.waiting:
            request, row = self.waiting.popleft(), self._free.pop(0)
            self.rows.become(row, request.ids)
            request.ids, request.row = self.rows.ids[row], row
            placed.append(request)
        self._run(sorted(placed, key=lambda r: r.row))
        self._left = 0

    def _feed(self, choose: Callable[..., Any] | None = None) -> np.ndarray:
        if self._left == 0:
            self._left = self._grow(self.rows, self.running)
        self._left -= 1
        return self.rows.extend(self._taken, choose)

    def _choice(self, places: Sequence[int]) -> dict[str, Any] | None:
        if self.change.greedy:
            return None
        return self.change.choice([self.running[i] for i in places])


def limits_of(model: Model, lengths: Sequence[int], g: GenerationConfig) -> list[int]:
    """New tokens allowed after each prompt. ValueError for a prompt that leaves no room, with both
    numbers.
    """
    positions = model.config.seq_length
    limits = []
    for row, length in enumerate(lengths):
        which = f"prompt of {length} tokens" + (f" (row {row})" if len(lengths) > 1 else "")
        if length >= positions:
            raise ValueError(f"{which}: the model has positions for {positions} (seq_length)")
        if g.max_new_tokens is not None:
            if length + g.max_new_tokens > positions:
                raise ValueError(
                    f"max_new_tokens: {which} and {g.max_new_tokens} new ones exceed the model's "
                    f"{positions} positions (seq_length)"
                )
            limits.append(int(g.max_new_tokens))
            continue
        most = positions if g.max_length is None else g.max_length
        if length >= most:
            raise ValueError(
                f"max_length: {which} leaves no room for an answer: max_length is {most}, prompt "
                "included"
            )
        limits.append(min(most, positions) - length)
    return limits


def call_seed(g: GenerationConfig) -> int:
    """The seed of a call's draws; of no use, and 0, where nothing is drawn."""
    if g.seed is not None:
        return int(g.seed) % 2**64
    key = next_key()
    return seed_of(key) if g.samples else 0
