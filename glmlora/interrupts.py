"""Signals that end work: SIGTERM and SIGHUP end a run as Ctrl-C does, none of them in the middle of
an update, and Ctrl-C comes through while a library computes.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

Result = TypeVar("Result")


class Terminated(SystemExit):
    """SIGTERM or SIGHUP during a run; the process ends with status 128 + the signal's number."""

    @property
    def status(self) -> int:
        return int(str(self.code))


#: What ends a run, where its handler is still the one that Python starts with.
_DEFAULTS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}


class _Run:
    """Signals of a run: how many came, and the first one while it has to wait."""

    def __init__(self) -> None:
        self.arrived = self.shields = 0
        self.pending: int | None = None
        self._old: dict[int, Any] = {}
        for number, default in _DEFAULTS.items():
            if signal.getsignal(number) is default:
                self._old[number] = signal.signal(number, self._arrive)

    def restore(self) -> None:
        while self._old:
            signal.signal(*self._old.popitem())

    def _arrive(self, number: int, *_: Any) -> None:
        self.arrived += 1
        if self.arrived > 1:
            self.restore()
        elif self.shields:
            self.pending = number
            return
        raise _error(number)


_run: _Run | None = None


def _error(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(128 + number)


@contextmanager
def ending_signals() -> Iterator[None]:
    """For the length of a run in the main thread: the first signal raises KeyboardInterrupt
    (SIGINT) or Terminated, where a `Shield` ends if it comes in one; a second raises at once,
    wherever the run is. Handlers that the user has set stay.
    """
    global _run
    if _run is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _run = _Run()
    try:
        yield
    finally:
        _run.restore()
        _run = None


def signals_arrived() -> int:
    """How many came in the run so far."""
    return _run.arrived if _run is not None else 0


class Shield:
    """A first signal waits until the block ends, so that the state is never between two updates."""

    def __enter__(self) -> Shield:
        self._signals = ending_signals()
        self._signals.__enter__()
        main = threading.current_thread() is threading.main_thread()
        self._run = _run if main else None
        if self._run is not None:
            self._run.shields += 1
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        run = self._run
        if run is not None:
            run.shields -= 1
        self._signals.__exit__(None, None, None)
        if run is not None and run.pending is not None and not run.shields:
            number, run.pending = run.pending, None
            if kind is None:
                raise _error(number)


_computing: set[threading.Thread] = set()


def end_now(status: int) -> None:
    """End the process with `status` where a function that was interrupted still computes: Python
    would wait for it, which may take longer than a user waits after Ctrl-C. Else do nothing.
    """
    if not any(thread.is_alive() for thread in _computing):
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def interruptible(function: Callable[..., Result], *args: Any) -> Result:
    """function(*args), computed beside the main thread, where Ctrl-C then comes through at once.

    What was begun ends unheard; the program does not end before it but by `end_now`. For functions
    that leave the interpreter to others while they compute.
    """
    if threading.current_thread() is not threading.main_thread():
        return function(*args)
    done = threading.Event()
    results: list[Result] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(function(*args))
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=work)
    # Not a daemon: C++ that is cut off at the end of the interpreter ends in abort(). Not join():
    # up to Python 3.12, Ctrl-C in it makes the interpreter believe that the thread has ended.
    _computing.add(thread)
    try:
        thread.start()
        while not done.wait(0.05):
            pass
    finally:
        if done.is_set():
            _computing.discard(thread)
    if errors:
        raise errors[0]
    return results[0]
