"""Chat templates that checkpoints bring, in the language of jinja2: rendered by `worker.py`, in a
process of its own that the system bounds; this side asks it.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# What one rendering may take: the text in characters, the process in bytes, its time in seconds.
MAX_CHARACTERS, MAX_MEMORY, MAX_SECONDS = 1 << 24, 1 << 30, 10
_WORKER = Path(__file__).with_name("worker.py")


class TemplateError(ValueError):
    """A template that cannot be rendered, or that refuses what it is given."""


def available() -> bool:
    """Whether jinja2 is installed."""
    return find_spec("jinja2") is not None


class _Worker:
    """The process, started when it is first asked and again after it was ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, request: Mapping[str, Any]) -> Any:
        """The answer of the worker. TemplateError for its error, or where it had to be ended;
        ImportError where it cannot start.
        """
        text = json.dumps(request).encode() + b"\n"
        with self._lock:
            process = self._process or self._start()
            try:
                answer = self._exchange(process, text)
            except BaseException:  # Ctrl-C, too: what it would still answer is nobody's
                self.end(signal.SIGKILL)
                raise
            if answer is None:
                raise TemplateError(self._death(process))
        if "error" in answer:
            raise TemplateError(answer["error"])
        return answer["result"]

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C at a terminal is for this process
        )
        self._process = process
        limits = {"characters": MAX_CHARACTERS, "memory": MAX_MEMORY, "seconds": MAX_SECONDS}
        first = {"path": [*map(os.path.abspath, sys.path)], "limits": limits}
        answer = self._exchange(process, json.dumps(first).encode() + b"\n")
        if answer is None or "error" in answer:
            self.end(signal.SIGKILL)
            why = "its process ended" if answer is None else answer["error"]
            raise ImportError(f"chat templates cannot be rendered: {why}")
        return process

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes) -> Any:
        """Its answer; None where it is dead."""
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            return None
        return json.loads(answer) if answer.endswith(b"\n") else None

    def _death(self, process: subprocess.Popen[bytes]) -> str:
        self.end(signal.SIGKILL)
        if process.returncode == -signal.SIGALRM:
            return f"takes longer than {MAX_SECONDS} s"
        return f"the process that renders it ended with status {process.returncode}"

    def end(self, by: int = 0) -> None:
        """No process is left; by: a signal, where its input's end does not do."""
        process, self._process = self._process, None
        if process is None:
            return
        if by:
            process.send_signal(by)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass
        process.wait()

    def forget(self) -> None:
        """In a forked process, whose parent has the worker."""
        process, self._process, self._lock = self._process, None, threading.Lock()
        if process is not None:
            for pipe in (process.stdin, process.stdout):
                os.close(pipe.fileno())  # type: ignore[union-attr]
            process.returncode = 0  # not a child of this process


_worker = _Worker()
atexit.register(_worker.end)
os.register_at_fork(after_in_child=_worker.forget)


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text of a template, with plain variables of JSON, as transformers renders it.

    Raises TemplateError naming what is wrong with the template, what it said by `raise_exception`,
    or the limit that it exceeds; TypeError for a variable that JSON does not have; ImportError
    where jinja2 is missing or too old.
    """
    return str(_ask({"template": template, "variables": dict(variables)}))


def variables_of(template: str) -> frozenset[str]:
    """The names that a template reads and does not set. Errors as of `render`."""
    return frozenset(_ask({"template": template}))


def _ask(request: dict[str, Any]) -> Any:
    if not available():
        raise ImportError(
            'jinja2 is missing, which renders chat templates: pip install "glmlora[templates]"'
        )
    return _worker.ask(request)
