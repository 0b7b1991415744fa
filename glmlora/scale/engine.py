"""Shards of a table, answered by Ray's workers: each is an actor that has loaded the model, answers
one shard at a time, and keeps every row in the shard's journal, in a folder that all nodes see.

A worker that dies is replaced, and its shard goes on from the journal: what is computed twice is
the batch that it was at. The weights are mapped from the model's files, so that the workers of a
node share their pages.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .. import _core
from ..files.journal import Journal
from ..interrupts import Shield, Terminated
from ..prediction import Source
from ..progress import bar
from ..tables.answers import Asked
from ..tables.job import run_job
from ..tables.shards import Shards

DEATHS = 5  # of workers at one shard, without a row more, that end the job
POLL_SECONDS = 0.2
STORE_BYTES = 128 << 20  # what Ray's object store has where this process starts Ray: rows pass it
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def import_ray() -> Any:
    """The module ray. ImportError that says how it is installed."""
    try:
        import ray
    except ImportError as error:
        raise ImportError(f'Ray is not here ({error}): pip install "glmlora[ray]"') from None
    return ray


def check_workers(workers: Any) -> None:
    """ValueError for a number of workers that is none."""
    if workers is not None and (type(workers) is not int or workers < 1):
        raise ValueError(f"workers: expected a whole number from 1, got {workers!r:.40}")


@contextmanager
def ray_running(workers: int) -> Iterator[Any]:
    """The module ray, connected: to what this process has connected to, or to RAY_ADDRESS, if any;
    else to a Ray of its own on this machine, which ends with the block.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to others
        cores = max(_core.get_num_threads(), workers)
        quiet |= {"address": "local", "num_cpus": cores, "object_store_memory": STORE_BYTES}
        quiet |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in _SIGNALS if in_main}
    try:
        _start(ray, quiet)
        for number, handler in handlers.items():  # Ray sets its own
            signal.signal(number, handler)
        yield ray
    finally:
        ray.shutdown()


def _start(ray: Any, settings: dict[str, Any]) -> None:
    """Start Ray, or connect. RuntimeError where it does not; once more on a machine so busy that a
    part of it was waited for too long.
    """
    for last in (False, True):
        try:
            ray.init(**settings)
            return
        except SystemExit as end:  # what Ray makes of SIGTERM
            raise end if isinstance(end, Terminated) else Terminated(128 + signal.SIGTERM) from None
        except Exception as error:
            ray.shutdown()
            if last:
                raise RuntimeError(f"Ray does not start: {error}") from error


def resources(nodes: Sequence[tuple[float, float]], workers: int | None, gpu: bool) -> Any:
    """(workers, {"num_cpus", "num_gpus"} of each) for nodes with so many (cores, GPUs). Without a
    number of workers, one a node that has what it needs, or one a GPU. ValueError where there is no
    room for as many.
    """
    fit = [(cores, gpus) for cores, gpus in nodes if cores >= 1 and (gpus >= 1 or not gpu)]
    if not fit:
        raise ValueError(f"workers: no node of Ray has a {'GPU' if gpu else 'core'} to spare")
    if workers is None:
        workers = int(sum(gpus for _, gpus in fit)) if gpu else len(fit)

    def places(cores: int) -> int:
        return sum(int(min(c // cores, g if gpu else c)) for c, g in fit)

    cores = int(sum(c for c, _ in fit)) // workers
    while cores > 1 and places(cores) < workers:
        cores -= 1
    if cores < 1 or places(cores) < workers:
        what = "GPUs" if gpu else "cores"
        raise ValueError(f"workers: expected at most {places(1)}, Ray's {what}, got {workers}")
    return workers, {"num_cpus": cores, "num_gpus": int(gpu)}


class Worker:
    """Answers shards, in a process of its own. threads: for the model's products."""

    def __init__(
        self,
        source: Source,
        asked: Asked,
        columns: list[str],
        shards: Shards,
        rows_of: Callable[[Any], list[dict[str, Any]]],
        threads: int,
    ):
        _core.set_num_threads(threads)
        self._source, self._asked, self._columns = source, asked, columns
        self._shards, self._rows_of = shards, rows_of
        self._answering: Any = None

    def answer(self, number: int, part: Any) -> None:
        """Answer what is missing of a shard. part: its rows, as `rows_of` takes them."""
        if self._answering is None:
            self._answering = self._source.answering(self._asked, self._columns)
        mine = self._shards.ranges[number - 1]
        with _opened(self._shards, number) as journal:
            if not journal.missing(mine):
                return
            rows = dict(zip(mine, self._rows_of(part), strict=True))
            run_job(
                journal,
                mine,
                lambda missing: self._answering({row: rows[row] for row in missing}, journal),
            )


def _opened(shards: Shards, number: int) -> Journal:
    """The journal of a shard, which the worker before may hold for a moment after its death."""
    for _ in range(50):
        try:
            return shards.journal(number)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        time.sleep(0.1)
    return shards.journal(number)


def as_rows(part: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that a worker is given as they are."""
    return part


def answer_shards(
    ray: Any,
    shards: Shards,
    source: Source,
    asked: Asked,
    columns: list[str],
    part: Callable[[int], Any],
    rows_of: Callable[[Any], list[dict[str, Any]]] = as_rows,
    workers: int | None = None,
) -> None:
    """Have all rows of the shards answered. part: of a shard's number, what the worker makes its
    rows of by `rows_of`. Shows a progress bar on a terminal. The first error of a worker ends all
    of them and is raised here; RuntimeError where workers die and no row comes.
    """
    gpu = str(source.settings()["device"]) == "cuda"
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = [(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes]
    count, options = resources(room, workers, gpu)
    kind = ray.remote(max_restarts=0, max_task_retries=0, **options)(Worker)
    words = source, asked, columns, shards, rows_of, options["num_cpus"]
    waiting = deque(shards.missing())
    running: dict[Any, tuple[Any, int]] = {}
    deaths: dict[int, tuple[int, int]] = {}  # shard -> (rows kept, workers that died since)
    grown = _Grown(shards)
    begin = grown.rows(shards.numbers)

    def give(worker: Any) -> None:
        """The next shard to a worker, a new one where there is none."""
        if waiting:
            worker = kind.remote(*words) if worker is None else worker
            number = waiting.popleft()
            running[worker.answer.remote(number, part(number))] = worker, number

    shown = bar(desc="predict", unit="row", disable=None, total=shards.rows, initial=begin)
    try:
        for _ in range(min(count, len(waiting))):
            give(None)
        while running:
            with Shield():  # Ray takes the exception of a signal for its own
                done, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
            shown.update(grown.rows([number for _, number in running.values()]))
            for call in done:
                worker, number = running.pop(call)
                try:
                    with Shield():
                        ray.get(call)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except ray.exceptions.RayActorError as error:
                    ray.kill(worker)  # it may only be out of reach
                    kept = grown.of(number)
                    before, times = deaths.get(number, (-1, 0))
                    deaths[number] = kept, times + 1 if kept == before else 1
                    if deaths[number][1] == DEATHS:
                        raise RuntimeError(
                            f"{DEATHS} workers died one after another at shard {number} without a "
                            f"row more, the last one: {str(error).strip()}"
                        ) from None
                    waiting.appendleft(number)
                    worker = None
                give(worker)
    finally:
        for worker, _ in running.values():
            ray.kill(worker)
        shown.close()


class _Grown:
    """How many rows are in the journals of shards, which others write."""

    def __init__(self, shards: Shards):
        self._shards = shards
        self._read: dict[int, tuple[int, int]] = {}  # shard -> (bytes, rows)

    def of(self, number: int) -> int:
        """The rows of a shard's journal by now."""
        at, rows = self._read.get(number, (0, 0))
        with (
            suppress(FileNotFoundError),
            Path(self._shards.journal_path(number)).open("rb") as file,
        ):
            file.seek(at)
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            rows += sum(line.startswith(b'{"row": ') for line in whole.splitlines())
            self._read[number] = at + len(whole), rows
        return rows

    def rows(self, numbers: Sequence[int]) -> int:
        """How many came since the last time in the journals of these shards."""
        before = [self._read.get(number, (0, 0))[1] for number in numbers]
        return sum(map(self.of, numbers)) - sum(before)
