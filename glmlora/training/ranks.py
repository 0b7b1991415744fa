"""The processes that train one model together, as `mpiexec -n N glmlora train ..` starts them: what
they tell each other, by mpi4py.

Every exchange begins with `agree`, in which each rank says whether something went wrong in its own
`share` of the work, or a signal arrived: then all ranks raise at the same place. So none waits for
one that has given up, and no signal falls between two updates. What dies without a word is noticed
by mpiexec (or srun --kill-on-bad-exit), which ends the others.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import (
    ExitStack,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from typing import Any, TypeVar

import numpy as np

from .. import _core
from ..interrupts import Shield, Terminated, arrived_signal, ended_by, heard, signals_arrived
from ..model import device as devices

Value = TypeVar("Value")

#: Numbers a rank says in `agree`, beside whether it failed and which signal it got.
MOST_VALUES = 6
#: Numbers in one message.
MOST_AT_ONCE = 1 << 26
#: Seconds that rank 0 waits for the others after a signal before it saves without them.
PATIENCE = 15.0
#: How the launchers tell a process how many there are: Open MPI, MPICH and PMI, Slurm with PMIx.
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")
#: What errors of one rank are on the others, the nearest first.
_ERRORS = (
    FloatingPointError,
    MemoryError,
    FileNotFoundError,
    OSError,
    TypeError,
    ValueError,
    RuntimeError,
)


class Alone:
    """One process: whatever is asked of the others is there already."""

    rank, size, local_size = 0, 1, 1

    def together(self) -> Any:
        """A block in which all raise what one rank raises; only rank 0 prints and warns."""
        return nullcontext()

    def share(self, work: Callable[[], Value]) -> Value:
        """This rank's own work: signals are heard in it, and what it raises waits for the next
        exchange, which raises it on all ranks.
        """
        return work()

    def shielded(self) -> Any:
        """A block in which signals wait for the next exchange, but in a `share`."""
        return nullcontext()

    def agree(self, *values: float) -> np.ndarray:
        """What each rank says, float64 (size, len(values)); raises what a rank's share raised, or
        KeyboardInterrupt or Terminated where a rank got a signal.
        """
        return np.array([values], np.float64)

    def settle(self, error: BaseException) -> None:
        """All ranks raise, if they do not yet, since this one has to."""

    def add(self, array: np.ndarray) -> None:
        """The array becomes the sum over all ranks, the same bits on each; begins with `agree`."""

    def add_gradients(self, core: Any, buffer: np.ndarray) -> None:
        """The gradients in `core` become the sum over all ranks, as many numbers at a time as the
        buffer has. An `agree` came before.
        """

    def gather(
        self, pieces: list[tuple[Any, np.ndarray]], take: Callable[..., None], like: np.ndarray
    ) -> None:
        """Rank 0 takes the (key, array) of the other ranks, in their order, each like `like`. An
        `agree` came before.
        """

    def same(self, values: Mapping[str, Any]) -> None:
        """ValueError naming the first of these values (JSON) that a rank has otherwise."""

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What `make` returns on rank 0, where alone it is called."""
        return make()

    def copy(self, array: np.ndarray) -> None:
        """The array becomes that of rank 0."""

    def wait(self) -> None:
        """Until all ranks are here."""

    def settle_threads(self, asked: int | None) -> None:
        """Threads as asked; else those of the system."""
        if asked:
            _core.set_num_threads(asked)

    def device(self, kind: str) -> str:
        """The device of this rank, of the kind that "auto" or a device's name says."""
        return kind


ALONE = Alone()


class Ranks(Alone):
    """This process among those of an MPI communicator (mpi4py)."""

    def __init__(self, comm: Any, mpi: Any):
        self._comm, self._mpi = comm, mpi
        self.rank, self.size = comm.rank, comm.size
        node = comm.Split_type(mpi.COMM_TYPE_SHARED)
        self.local_size = node.size
        self._node = node
        self._error: BaseException | None = None  # of this rank's share
        self._raised: BaseException | None = None  # on all ranks
        self._exchanging = self._left = False

    # Together

    @contextmanager
    def together(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.rank:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            try:
                yield
                self.agree()
            except BaseException as error:
                if isinstance(error, SystemExit) and not isinstance(error, Terminated):
                    raise  # of the command line, which all have
                self.settle(error)
                if self._left:
                    self._abort(error)
                raise

    def settle(self, error: BaseException) -> None:
        if self._raised is not None:
            return
        if self._exchanging or signals_arrived() > 1:
            self._abort(error)
        self._error = error
        with suppress(BaseException):
            self.agree()
        self._raised = error

    def _abort(self, error: BaseException) -> None:
        """End all ranks now."""
        status = error.status if isinstance(error, Terminated) else 1
        if isinstance(error, KeyboardInterrupt):
            status = 130
        elif not isinstance(error, Terminated):
            print(f"rank {self.rank}: {type(error).__name__}: {error}", file=sys.__stderr__)
            if not isinstance(error, _ERRORS):
                traceback.print_exception(error, file=sys.__stderr__)
        for stream in (sys.__stdout__, sys.__stderr__):
            if stream is not None:
                stream.flush()
        self._comm.Abort(status)

    def share(self, work: Callable[[], Value]) -> Value:
        try:
            with heard():
                return work()
        except BaseException as error:
            self._error = error
            return None  # type: ignore[return-value]  # of which nobody hears: agree raises

    def shielded(self) -> Any:
        return Shield()

    def _wait_for(self, request: Any) -> None:
        """Until it is done, without a processor: others may use it. Rank 0 gives the others up a
        while after a signal: they may be dead, and what was trained can be saved.
        """
        pause, since = 0.0, None
        while not request.Test():
            time.sleep(pause)
            pause = min(pause + 2e-5, 1e-3)
            if self.rank == 0 and arrived_signal():
                since = since or time.monotonic()
                if time.monotonic() - since > PATIENCE:
                    self._left, self._raised = True, ended_by(arrived_signal())
                    raise self._raised

    def agree(self, *values: float) -> np.ndarray:
        error, self._error = self._error, None
        number = arrived_signal()
        if isinstance(error, KeyboardInterrupt):
            number, error = signal.SIGINT, None
        elif isinstance(error, Terminated):
            number, error = error.status - 128, None
        row = np.zeros(2 + MOST_VALUES)
        row[:2] = error is not None, number
        row[2 : 2 + len(values)] = values
        table = np.empty((self.size, len(row)))
        self._wait_for(self._comm.Iallgather(row, table))
        failed = np.flatnonzero(table[:, 0])
        if failed.size:
            self._raise_of(int(failed[0]), error)
        number = int(table[:, 1].max())
        if number:
            self._raised = ended_by(number)
            raise self._raised
        return table[:, 2 : 2 + len(values)]

    def _raise_of(self, rank: int, error: BaseException | None) -> None:
        """Raise the error of `rank`, on that rank itself, on the others as theirs."""
        kind = next((k.__name__ for k in _ERRORS if isinstance(error, k)), "RuntimeError")
        told = self._comm.bcast((kind, f"{error}") if self.rank == rank else None, root=rank)
        if self.rank == rank and error is not None:
            self._raised = error
            raise error
        kinds = {k.__name__: k for k in _ERRORS}
        self._raised = kinds[told[0]](f"rank {rank}: {told[1]}")
        raise self._raised from error

    # Exchanges

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """All ranks are here: from now on none may give up."""
        self._exchanging = True
        with Shield():
            yield
            self._exchanging = False

    def add(self, array: np.ndarray) -> None:
        self.agree()
        with self._exchange():
            self._comm.Allreduce(self._mpi.IN_PLACE, array)

    def add_gradients(self, core: Any, buffer: np.ndarray) -> None:
        with self._exchange():
            for first in range(0, core.gradient_size, len(buffer)):
                part = buffer[: core.gradient_size - first]
                core.read_gradients(part, first)
                self._comm.Allreduce(self._mpi.IN_PLACE, part)
                core.write_gradients(part, first)

    def gather(
        self, pieces: list[tuple[Any, np.ndarray]], take: Callable[..., None], like: np.ndarray
    ) -> None:
        with self._exchange():
            keys = self._comm.gather([key for key, _ in pieces])
            for _, array in pieces if self.rank else ():
                for part in _parts(array):
                    self._comm.Send(part, 0)
            for rank in range(1, self.size if self.rank == 0 else 1):
                for key in keys[rank]:
                    array = np.empty_like(like)
                    for part in _parts(array):
                        self._comm.Recv(part, rank)
                    take(key, array)

    def same(self, values: Mapping[str, Any]) -> None:
        self.agree()
        ours = json.loads(json.dumps(dict(values), default=str))
        theirs = self._comm.bcast(ours, root=0)

        def compare() -> None:
            for name in sorted({*ours, *theirs}):
                if ours.get(name) != theirs.get(name):
                    raise ValueError(
                        f"{name}: rank {self.rank} has {ours.get(name)!r}, rank 0 has "
                        f"{theirs.get(name)!r}; all ranks of a run have the same"
                    )

        self.share(compare)
        self.agree()

    def from_first(self, make: Callable[[], Value]) -> Value:
        value: Any = self.share(make) if self.rank == 0 else None
        self.agree()
        return self._comm.bcast(value, root=0)

    def copy(self, array: np.ndarray) -> None:
        with self._exchange():
            for part in _parts(array):
                self._comm.Bcast(part, root=0)

    def wait(self) -> None:
        if not self._left:
            self._wait_for(self._comm.Ibarrier())

    # What the ranks of a machine share

    def settle_threads(self, asked: int | None) -> None:
        mine = sorted(os.sched_getaffinity(0))
        others = self._node.allgather(mine)
        if asked or not os.environ.get("OMP_NUM_THREADS"):
            _core.set_num_threads(asked or max(1, len(mine) // others.count(mine)))

    def device(self, kind: str) -> str:
        found = devices.find(kind)
        seen = self._node.allgather(os.environ.get("CUDA_VISIBLE_DEVICES"))
        if found.type == "cpu":
            return "cpu"
        index = seen[: self._node.rank].count(seen[self._node.rank])
        count = devices.info(found.type)["count"]
        if index >= count:
            raise ValueError(
                f"mpiexec: {self.local_size} ranks on one machine with {count} GPUs: start a rank "
                "for each GPU, or train on the CPU (no_cuda)"
            )
        return f"{found.type}:{index}"


def _parts(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array in pieces whose sizes are numbers of MPI."""
    flat = array.reshape(-1)
    for first in range(0, flat.size, MOST_AT_ONCE):
        yield flat[first : first + MOST_AT_ONCE]


def launched_size(environ: Mapping[str, str] = os.environ) -> int:
    """How many processes the launcher says that it has started, 1 without one."""
    told = [environ[name] for name in SIZES if name in environ]
    if not told and "PMIX_RANK" in environ:
        told = [environ.get("SLURM_STEP_NUM_TASKS", "1")]
    return int(told[0]) if told and told[0].isdigit() else 1


def world() -> Alone:
    """The ranks that this process was started with. mpi4py is imported only where a launcher has
    started several.

    Raises ModuleNotFoundError that says what to install, RuntimeError where mpi4py does not find
    the library of MPI, or that of another launcher.
    """
    size = launched_size()
    if size == 1:
        return ALONE
    if "OMPI_COMM_WORLD_SIZE" in os.environ:  # which mpi4py's wheels do not see by themselves
        os.environ.setdefault("MPI4PY_MPIABI", "openmpi")
    try:
        from mpi4py import MPI
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f'{size} processes were started by MPI, which needs mpi4py: pip install "glmlora[mpi]"'
        ) from None
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(
            f"{size} processes were started by MPI, and mpi4py cannot use its library: {error} "
            "(mpi4py's wheels load libmpi.so.12 of MPICH or libmpi.so.40 of Open MPI; build it for "
            "another with pip install --no-binary mpi4py mpi4py)"
        ) from None
    if MPI.COMM_WORLD.size != size:
        raise RuntimeError(
            f"{size} processes were started by MPI, and mpi4py sees {MPI.COMM_WORLD.size}: it has "
            f"loaded another MPI ({MPI.Get_library_version().splitlines()[0]}) than that of mpiexec"
        )
    return Ranks(MPI.COMM_WORLD, MPI)
