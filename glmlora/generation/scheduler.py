"""The one token loop. Requests wait for a row of a cache; each step feeds what the running ones
lack, in one call of the core, and gives each of them its next token.

A chat is a scheduler with one row whose events are streamed; a batch has more requests than rows;
beams look at the scores and fork the rows; a server's requests come and go while others run, each
with settings of its own. No request's tokens depend on what runs beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from .. import _core
from ..seeds import next_key, seed_of
from .cache import CHUNK as PIECE
from .cache import CachedRow, Model
from .config import GenerationConfig
from .processors import Row, changes_of, checked_processors
from .stopping import MaxTimeCriteria, StopStringCriteria, checked_criteria

# New tokens after which a cache grows: nothing is reserved for the 8192 positions chat may use.
ROOM = (256, 1024, 4096, 16384, 65536)


class Request:
    """A prompt, and how it goes on: `ids` are the prompt's and, behind them, the new ones."""

    def __init__(
        self,
        prompt: Sequence[int],
        limit: int,
        draw: tuple[int, int],
        number: int = 0,
        change: Scores | None = None,
        adapter: int = 0,
    ):
        self.ids = prompt if isinstance(prompt, list) else list(prompt)
        self.start = len(self.ids)
        self.end = self.start + limit  # how many ids there may be
        self.draw = draw  # (seed, stream) of its random numbers
        self.number = number  # of the prompt, for functions that ask
        self.change = change  # in place of the scheduler's
        self.adapter = adapter  # of the core, 0: none beside the model's own
        self.turn = 0  # how many had a row before it
        self.reused = 0  # ids of the prompt that a cache held already
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
        self.ends = frozenset(self.eos)
        self._how = (g.samples, g.temperature, g.top_k, g.top_p, self.eos if self.adjusts else None)
        self._how += (g.repetition_penalty, g.no_repeat_ngram_size, g.min_length)

    def alike(self, other: Scores) -> bool:
        """Whether the core can choose for rows of both in one call."""
        same = self.greedy if other.greedy else self._how == other._how
        return self is other or (self.in_core and other.in_core and same)

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

    All prompts begin with the rows' opening. `running` is in the order of the rows. in_pieces: a
    long prompt is fed a piece a step, while other requests get their tokens.
    """

    def __init__(
        self, rows: CachedRow, change: Scores, grow: Growth = by_counts, in_pieces: bool = False
    ):
        self.rows = rows
        self.change = change
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self._free = list(range(len(rows.ids)))
        self._grow = grow
        self._in_pieces = in_pieces
        self._left = 0  # steps for which the cache has room
        self._turns = 0

    def submit(
        self,
        prompt: Sequence[int],
        limit: int,
        draw: tuple[int, int] = (0, 0),
        number: int = 0,
        change: Scores | None = None,
        adapter: int = 0,
    ) -> Request:
        """Let a prompt wait for a row. limit: new ids allowed; draw: the (seed, stream) of its
        random numbers; number: of the prompt; change: in place of the scheduler's; adapter: of the
        core.
        """
        request = Request(prompt, limit, draw, number, change or self.change, adapter)
        self.waiting.append(request)
        return request

    @property
    def free(self) -> int:
        """Rows that a new request could have at once."""
        return len(self._free) - len(self.waiting)

    def cancel(self, request: Request) -> None:
        """Let a request go, whether it waits or runs; nothing where it has ended."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.running:
            self._free.append(request.row)
            self.running.remove(request)

    def step(self, scores: np.ndarray | None = None) -> list[Event]:
        """The next token of every running request, in the order of rows; [] when all have ended,
        or, in pieces, while only prompts were fed.

        scores (rows, V): of these tokens, where they are known already.
        """
        if self.waiting and self._free:
            self._fill()
        ready = self._fed_whole() if self._in_pieces else self.running
        if not ready:
            return []
        first = ready[0].change or self.change
        together = all(first.alike(r.change or self.change) for r in ready)
        if scores is None and together and first.in_core:  # the scores stay in the core
            return self.take(self._feed(ready, self._choice(first, ready)).tolist(), ready)
        if scores is None:
            scores = self._feed(ready)
        picked = zip(scores, ready, strict=True)
        return self.take([(r.change or self.change).pick(s, r) for s, r in picked], ready)

    def run(self, unseen: bool = False) -> Iterator[Event]:
        """Every step's events, until all requests have ended. unseen: nobody looks at a token
        before its request has ended: only the last of several steps may have events.
        """
        while (events := (unseen and self._several()) or self.step()) or self.running:
            yield from events

    def _several(self) -> list[Event]:
        """The events of the last of several steps that the core takes by itself, in some
        milliseconds; [] where it cannot.
        """
        of = self.running
        most = min((r.end - len(r.ids) for r in of), default=0)
        if min(most, self._left) < 2 or self._in_pieces or (self.waiting and self._free):
            return []
        changes = {r.change for r in of}
        change = changes.pop()
        if changes or change is None or not (change.greedy and change.in_core) or change.criteria:
            return []
        places = [r.row for r in of]
        if any(self.rows.lacks(place) != 1 for place in places):
            return []
        tokens, steps = self.rows.go_on(places, min(most, self._left), change.eos)
        self._left -= steps
        return self.take(tokens, of)

    def scores(self) -> np.ndarray:
        """In place of a step: the scores float32 (rows, V) that it would choose from."""
        if self.waiting and self._free:
            self._fill()
        return self._feed(self.running)

    def take(self, tokens: Sequence[int], of: Sequence[Request] | None = None) -> list[Event]:
        """Give requests, all that run or those of `of`, their next tokens."""
        events, ended = [], False
        for request, token in zip(self.running if of is None else of, tokens, strict=True):
            ids, change = request.ids, request.change or self.change
            ids.append(token)
            finished = (
                token in change.ends or len(ids) == request.end or change.stops(ids, request.scores)
            )
            if finished:
                ended = True
            events.append(Event(request, token, finished))
        if ended:
            gone = {e.request for e in events if e.finished}
            self._free += [e.request.row for e in events if e.finished]
            self.running = [r for r in self.running if r not in gone]
        return events

    def fork(self, parents: Sequence[int]) -> None:
        """Row i goes on from a copy of what row parents[i] was, with random numbers of stream i.
        The running requests have the first rows.
        """
        self.rows.fork(parents)
        forks = []
        for row, (parent, ids) in enumerate(zip(parents, self.rows.ids, strict=True)):
            old = self.running[parent]
            fork = Request(ids, 0, (old.draw[0], row), old.number, old.change, old.adapter)
            fork.start, fork.end, fork.row = old.start, old.end, row
            forks.append(fork)
        self._free = []
        self.running = forks

    def _fill(self) -> None:
        """Waiting requests take the free rows: each the one that holds most of its beginning."""
        placed = list(self.running)
        while self._free and self.waiting:
            request = self.waiting.popleft()
            row = self.rows.best(self._free, request.ids, request.adapter)
            self._free.remove(row)
            held = self.rows.become(row, request.ids, request.adapter)
            request.reused = min(held, request.start - 1)
            request.ids, request.row = self.rows.ids[row], row
            request.turn = self._turns = self._turns + 1
            placed.append(request)
        self.running = sorted(placed, key=lambda r: r.row)
        self._left = 0

    def _fed_whole(self) -> list[Request]:
        """The running requests that get a token: those whose prompts are fed, and of the others, in
        the order in which they came, those that a piece in all is enough for. A longer one is fed
        that piece.
        """
        fed = {r for r in self.running if self.rows.lacks(r.row) == 1}
        room, ready = PIECE, set(fed)
        for request in sorted(set(self.running) - fed, key=lambda r: r.turn):
            piece, whole = self.rows.next_piece(request.row)
            if piece > room:
                break
            room -= piece
            if whole:
                ready.add(request)
            else:
                self._make_room()
                self.rows.feed_piece(request.row)
        return [r for r in self.running if r in ready]

    def _make_room(self) -> None:
        if self._left == 0:
            self._left = self._grow(self.rows, self.running)

    def _feed(self, of: Sequence[Request], choose: Callable[..., Any] | None = None) -> np.ndarray:
        self._make_room()
        self._left -= 1
        return self.rows.extend([r.row for r in of], choose)

    def _choice(self, change: Scores, of: Sequence[Request]) -> Callable[..., Any]:
        """What tells the core how to choose for rows of requests that are alike."""

        def choose(places: Sequence[int]) -> dict[str, Any] | None:
            return None if change.greedy else change.choice([of[i] for i in places])

        return choose


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
