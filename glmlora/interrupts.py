"""Signals that end work: Ctrl-C comes through while a library computes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


def interruptible(function: Callable[..., Result], *args: Any) -> Result:
    """function(*args), computed beside the main thread, where Ctrl-C then comes through at once.

    What was begun ends unheard; the program does not end before it. For functions that leave the
    interpreter to others while they compute.
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

    # Not a daemon: C++ that is cut off at the end of the interpreter ends in abort(). Not join():
    # up to Python 3.12, Ctrl-C in it makes the interpreter believe that the thread has ended.
    threading.Thread(target=work).start()
    while not done.wait(0.05):
        pass
    if errors:
        raise errors[0]
    return results[0]
