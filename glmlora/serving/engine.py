"""The thread that owns the model. Requests come through a queue, wait in turn for a row of the
cache, and run together; what they yield goes back by a function of each.

The cache is taken whole when the engine begins, so no request can be what memory is not enough for:
`Limits` say how many rows there are and how long they can be.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import _core
from ..generation.cache import CHUNK, CachedRow
from ..generation.config import GenerationConfig
from ..generation.labels import score_ids
from ..generation.scheduler import Request, Scheduler, Scores
from ..model.kept import Kept
from .guided import Guide
from .metrics import Metrics

WEIGHED = 8  # prompts that are classified between two steps of the answers


@dataclass(frozen=True)
class Limits:
    """rows: answers that run together; context: tokens of a prompt and its answer; waiting: answers
    that may wait; seconds: of an answer, with its waiting.
    """

    rows: int = 8
    context: int = 4096
    waiting: int = 256
    seconds: float = 600


class Busy(RuntimeError):
    """Too many answers wait already, or the server ends."""


class TooLate(TimeoutError):
    """An answer took longer than the server allows."""


class Choice(Scores):
    """How one answer's tokens are chosen: settings, what a guide allows, and the log-probabilities
    that the caller wants to see. An error is kept, and ends this answer alone.
    """

    def __init__(self, settings: GenerationConfig, guide: Guide | None, top: int | None):
        """top: how many of the best tokens' log-probabilities to keep beside the chosen one's;
        None: none at all.
        """
        super().__init__(settings)
        self.guide, self.top = guide, top
        self.error: Exception | None = None
        self.seen: deque[tuple[float, list[tuple[int, float]]]] = deque()
        if guide is not None:
            self.active = True
        if guide is not None or top is not None:
            self.in_core = self.greedy = False

    def pick(self, scores: np.ndarray, request: Request) -> int:
        """See `Scores.pick`."""
        try:
            before = scores.copy() if self.top is not None else scores
            if self.guide is not None:
                self.guide.restrict(scores)
            token = super().pick(scores, request)
            if self.guide is not None:
                self.guide.take(token)
            if self.top is not None:
                self.seen.append(self._logprobs(before, token))
        except (ValueError, ArithmeticError, LookupError) as error:
            self.error = error
            return next(iter(self.eos), 0)
        return token

    def _logprobs(self, scores: np.ndarray, token: int) -> tuple[float, list[tuple[int, float]]]:
        most = float(scores.max())
        total = most + math.log(float(np.exp(scores.astype(np.float64) - most).sum()))
        best: list[tuple[int, float]] = []
        if self.top:
            ids = np.argpartition(-scores, min(self.top, scores.size - 1))[: self.top]
            ids = sorted(ids.tolist(), key=lambda i: -scores[i])
            best = [(i, float(scores[i]) - total) for i in ids]
        return float(scores[token]) - total, best


@dataclass(eq=False)
class Job:
    """One answer. `token` is called in the engine's thread with each new id and whether it is an
    end; it returns whether the answer is complete. `end` is called once, with the reason ("stop",
    "length", "cancelled") or an error.
    """

    ids: list[int]
    limit: int
    change: Choice
    model: Kept
    draw: tuple[int, int]
    caller: str
    token: Callable[[int, bool], bool]
    end: Callable[[str | Exception], None]
    begun: float = field(default_factory=time.monotonic)
    placed: float | None = None
    first: float | None = None
    request: Request | None = None
    done: bool = False

    @property
    def reused(self) -> int:
        """Tokens of the prompt that were not computed again."""
        return 0 if self.request is None else self.request.reused


@dataclass(eq=False)
class Weighing:
    """Prompts whose labels are weighed. `end` gets float64 (prompts, labels), or an error."""

    prompts: list[list[int]]
    answers: list[list[int]]
    model: Kept
    caller: str
    end: Callable[[np.ndarray | Exception], None]
    begun: float = field(default_factory=time.monotonic)
    rows: Iterator[tuple[int, np.ndarray]] | None = None
    found: np.ndarray | None = None
    done: bool = False


class Turns:
    """What waits, dealt out to callers in turn: one with a hundred requests waits behind one with
    one.
    """

    def __init__(self) -> None:
        self._of: OrderedDict[str, deque[Any]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def put(self, caller: str, item: Any) -> None:
        self._of.setdefault(caller, deque()).append(item)

    def next(self) -> Any:
        """The next one; its caller is the last from then on."""
        caller, items = next(iter(self._of.items()))
        item = items.popleft()
        self._of.move_to_end(caller)
        if not items:
            del self._of[caller]
        return item

    def remove(self, item: Any) -> None:
        items = self._of.get(item.caller, deque())
        with suppress(ValueError):
            items.remove(item)
        if not items:
            self._of.pop(item.caller, None)

    def __iter__(self) -> Iterator[Any]:
        return (item for items in list(self._of.values()) for item in list(items))


class Engine:
    """See the head of this file. Made in any thread; from `start` on the model is its thread's."""

    def __init__(self, models: Mapping[str, Kept], limits: Limits, metrics: Metrics | None = None):
        """models: as `keep_adapters` gives them. MemoryError naming the bytes of a cache that
        cannot be had.
        """
        self.models, self.limits = models, limits
        self.metrics = metrics or Metrics()
        base = next(iter(models.values())).base
        self.core: _core.Model = base.core
        self.core.reserve(min(CHUNK, limits.context) + limits.rows, limits.rows, limits.rows, False)
        self.rows = CachedRow(base, limits.rows, limits.context)
        settings = GenerationConfig(eos_token_id=[])
        self.scheduler = Scheduler(self.rows, Scores(settings), lambda *_: 1 << 30, True)
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._waiting, self._weighing = Turns(), Turns()
        self._jobs: dict[Request, Job] = {}
        self._draining = False
        self.failed: BaseException | None = None
        self._lock = threading.Lock()
        self._accepted = 0  # that have not ended
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # For other threads

    def start(self) -> None:
        """Let it run."""
        self._thread.start()

    def submit(self, item: Job | Weighing) -> None:
        """Let an answer or a weighing wait. Busy where too many do."""
        with self._lock:
            if self._draining or self.failed:
                raise Busy("the server is ending" if self._draining else "the server has failed")
            if self._accepted >= self.limits.waiting + self.limits.rows:
                raise Busy(f"{self.limits.waiting} requests wait already: ask again later")
            self._accepted += 1
        self._inbox.put(item)

    def cancel(self, item: Job | Weighing) -> None:
        """Let it go, at the next token."""
        if not item.done:
            self._inbox.put((item,))

    def drain(self) -> None:
        """Take nothing more; the thread ends once all answers have."""
        with self._lock:
            self._draining = True
        self._inbox.put(None)

    def join(self, seconds: float | None = None) -> bool:
        """Wait until the thread has ended; whether it has."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def draining(self) -> bool:
        """Whether it takes nothing more."""
        return self._draining

    @property
    def running(self) -> int:
        """Answers that have a row."""
        return len(self._jobs)

    @property
    def waiting(self) -> int:
        """Answers and weighings that have none."""
        return max(0, self._accepted - len(self._jobs))

    # The thread

    def _run(self) -> None:
        try:
            while self._take_inbox():
                self._admit()
                self._step()
                self._weigh()
        except BaseException as error:  # a fault of this program: nobody waits for ever
            self.failed = error
            for item in [*self._jobs.values(), *self._waiting, *self._weighing]:
                self._ended(item, RuntimeError(f"the engine failed: {error}"))
            raise

    def _busy(self) -> bool:
        return bool(self._jobs or len(self._waiting) or len(self._weighing))

    def _take_inbox(self) -> bool:
        """What has come since; waits where there is nothing to do. False at the end."""
        while True:
            try:
                item = self._inbox.get(block=not self._busy() and not self._draining)
            except queue.Empty:
                return self._busy() or not self._draining
            if isinstance(item, Job):
                self._waiting.put(item.caller, item)
            elif isinstance(item, Weighing):
                self._weighing.put(item.caller, item)
            elif isinstance(item, tuple):
                self._let_go(item[0], "cancelled")

    def _let_go(self, item: Job | Weighing, reason: str | Exception) -> None:
        if item.done:
            return
        if isinstance(item, Weighing):
            self._weighing.remove(item)
        elif item.request is None:
            self._waiting.remove(item)
        else:
            self.scheduler.cancel(item.request)
            self._jobs.pop(item.request, None)
        if reason == "cancelled":
            self.metrics.add("cancelled")
        self._ended(item, reason)

    def _ended(self, item: Any, result: Any) -> None:
        item.done = True
        with self._lock:
            self._accepted -= 1
        item.end(result)

    def _admit(self) -> None:
        """Free rows go to those that wait; what took too long ends."""
        now = time.monotonic()
        late = now - self.limits.seconds
        for item in [*self._jobs.values(), *self._waiting, *self._weighing]:
            if item.begun < late:
                self._let_go(item, TooLate(f"took longer than {self.limits.seconds:g} seconds"))
        while self.scheduler.free > 0 and len(self._waiting):
            job = self._waiting.next()
            job.request = self.scheduler.submit(
                job.ids, job.limit, job.draw, change=job.change, adapter=job.model.number
            )
            job.placed = now
            self.metrics.observe("queue_seconds", now - job.begun)
            self._jobs[job.request] = job

    def _step(self) -> None:
        if not self._jobs:
            return
        try:
            events = self.scheduler.step()
        except (ArithmeticError, ValueError, MemoryError) as error:
            for job in list(self._jobs.values()):  # whose scores these were is not known
                self._let_go(job, error)
            self.rows.forget()
            return
        for event in events:
            job = self._jobs[event.request]
            if job.first is None:
                job.first = time.monotonic()
                self.metrics.observe("first_token_seconds", job.first - job.begun)
            is_end = event.token in job.change.ends
            if job.change.error is not None:
                self._finish(job, event.finished, job.change.error)
            elif job.token(event.token, is_end) or event.finished:
                full = event.finished and not is_end and event.request.index >= job.limit
                self._finish(job, event.finished, "length" if full and not job.done else "stop")

    def _finish(self, job: Job, finished: bool, result: str | Exception) -> None:
        assert job.request is not None
        if not finished:  # by a stop, which the scheduler does not know
            self.scheduler.cancel(job.request)
        del self._jobs[job.request]
        self.metrics.add("prompt_tokens", len(job.ids))
        self.metrics.add("cached_tokens", job.reused)
        self.metrics.add("completion_tokens", job.request.index)
        self._ended(job, result)

    def _weigh(self) -> None:
        """A few prompts of whoever's turn it is."""
        if not len(self._weighing):
            return
        item: Weighing = self._weighing.next()
        try:
            if item.rows is None:
                item.found = np.zeros((len(item.prompts), len(item.answers)))
                longest = max(map(len, item.prompts)) + max(map(len, item.answers))
                at_once = max(1, min(WEIGHED, self.limits.context // longest))
                adapter = item.model.number
                item.rows = score_ids(item.model.base, item.prompts, item.answers, at_once, adapter)
            assert item.found is not None
            for _ in range(WEIGHED):
                number, row = next(item.rows)
                item.found[number] = row
        except StopIteration:
            assert item.found is not None
            self.metrics.add("prompt_tokens", sum(map(len, item.prompts)))
            self._ended(item, item.found)
        except (ArithmeticError, ValueError, MemoryError) as error:
            self._ended(item, error)
        else:
            self._weighing.put(item.caller, item)


def draws(seed: int | None, answers: int, fresh: Callable[[], int]) -> Sequence[tuple[int, int]]:
    """(seed, stream) of the random numbers of each of some answers to one prompt."""
    first = fresh() if seed is None else seed % 2**64
    return [(first, stream) for stream in range(answers)]
