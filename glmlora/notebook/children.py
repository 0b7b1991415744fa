"""Programs that a notebook or script starts: the interpreter they find, the stand-ins that Python
programs among them see, their output and their end.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

GRACE = 10  # seconds for a program to save what it has after Ctrl-C
WAKE = 0.2  # seconds within which a signal is seen while a program runs

# A module first on the path of Python programs below a run. Another Python than the run's has its
# own packages and keeps them.
STAND_IN = """\
import importlib, sys

del sys.modules[__name__]
if sys.prefix == {prefix!r}:
    from glmlora import standins

    standins.install()
else:
    sys.path[:] = [p for p in sys.path if p != {place!r}]
    importlib.import_module(__name__)
"""

# `python`: also under a PYTHONPATH of the command's own, as in `!PYTHONPATH=src python train.py`.
COMMAND = """\
#!/bin/sh
case ":$PYTHONPATH:" in
*:{place}:*) ;;
*) export PYTHONPATH={place}"${{PYTHONPATH:+:$PYTHONPATH}}"{package} ;;
esac
exec {words} "$@"
"""


@contextlib.contextmanager
def environment(stand_ins: Iterable[str]) -> Iterator[None]:
    """For the time of the block, programs find this interpreter as `python`, the command `glmlora`
    and this interpreter's pip; Python programs import `stand_ins` from glmlora.
    """
    python = shlex.quote(sys.executable)
    commands = {"python": python, "python3": python, "glmlora": f"{python} -m glmlora"}
    if importlib.util.find_spec("pip"):
        commands |= {"pip": f"{python} -m pip", "pip3": f"{python} -m pip"}
    package = str(Path(__file__).resolve().parents[2])
    if os.path.basename(package) in ("site-packages", "dist-packages"):
        package = ""  # found anyway; a checkout is not
    saved = {name: os.environ.get(name) for name in ("PATH", "PYTHONPATH")}
    with tempfile.TemporaryDirectory(prefix="glmlora-") as place:
        commands_at, modules_at = Path(place, "bin"), Path(place, "modules")
        commands_at.mkdir()
        modules_at.mkdir()
        for name, words in commands.items():
            behind = package and ":" + shlex.quote(package)
            at = shlex.quote(str(modules_at))
            text = COMMAND.format(place=at, package=behind, words=words)
            (commands_at / name).write_text(text)
            (commands_at / name).chmod(0o755)
        for name in stand_ins:
            text = STAND_IN.format(prefix=sys.prefix, place=str(modules_at))
            (modules_at / f"{name}.py").write_text(text)
        paths = [str(modules_at), saved["PYTHONPATH"], package]
        os.environ["PATH"] = f"{commands_at}{os.pathsep}{saved['PATH'] or os.defpath}"
        os.environ["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
        try:
            yield
        finally:
            for name, value in saved.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


class Done(NamedTuple):
    """How a program ended: its status (minus the signal that killed it), and what was kept of its
    output, "" for what was shown."""

    status: int
    out: str = ""
    err: str = ""


def shell(command: str) -> list[str]:
    """The words that have the user's shell run a command; sh where that shell is of another kind
    or is none (/usr/sbin/nologin)."""
    own = os.environ.get("SHELL", "")
    known = os.path.basename(own) in ("bash", "zsh", "ksh", "dash") and os.access(own, os.X_OK)
    return [own if known else "sh", "-c", command]


def run(
    words: Sequence[str],
    script: str | None = None,
    keep_out: bool = False,
    keep_err: bool = False,
    merge: bool = False,
) -> Done:
    """Run a program to its end. `script` is its standard input, else ours is. Its output goes where
    sys.stdout and sys.stderr go, or is kept; `merge` sends its errors where its output goes.

    Ctrl-C ends the program, which has GRACE seconds to save what it has, and all that it started.
    """
    out = subprocess.PIPE if keep_out else _file_of(sys.stdout)
    err = subprocess.PIPE if keep_err else _file_of(sys.stderr)
    # With a terminal, Ctrl-C there reaches the program by itself, and the program may read there.
    apart = script is not None or not os.isatty(0)
    with _Interrupts() as interrupts:
        child = subprocess.Popen(
            list(words),
            stdin=None if script is None else subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT if merge else err,
            start_new_session=apart,
        )
        try:
            interrupts.raise_from_now()
            texts = _communicate(child, None if script is None else script.encode())
        except BaseException:
            _end(child, apart)
            raise
    shown = [(t or b"").decode(errors="replace") for t in texts]
    for text, kept, stream in ((shown[0], keep_out, sys.stdout), (shown[1], keep_err, sys.stderr)):
        if text and not kept:
            stream.write(text)
    status = child.returncode
    return Done(128 - status if status > 128 else status, *shown)


def _communicate(child: subprocess.Popen[bytes], given: bytes | None) -> tuple[Any, Any]:
    """As `child.communicate`, which a signal that comes just before it blocks would not wake."""
    while True:
        try:
            return child.communicate(given, timeout=WAKE)
        except subprocess.TimeoutExpired:
            given = None  # it is being sent


def _file_of(stream: Any) -> IO[Any] | int:
    """What a child writes to: the stream's file, or a pipe for a stream that has none."""
    try:
        stream.flush()
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return subprocess.PIPE
    return stream


class _Interrupts:
    """Ctrl-C and SIGTERM in a block that starts a program: held until `raise_from_now`, so that
    none falls between the program's start and the place that ends it.
    """

    def __enter__(self) -> _Interrupts:
        self.pending, self.held = 0, True
        self.saved: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            ours = (signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)
            for number, usual in ours:
                if signal.getsignal(number) is usual:
                    self.saved[number] = signal.signal(number, self.arrive)
        return self

    def arrive(self, number: int, frame: Any) -> None:
        if self.held:
            self.pending = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)

    def raise_from_now(self) -> None:
        self.held = False
        if self.pending:
            self.arrive(self.pending, None)

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.saved.items():
            signal.signal(number, handler)


def _end(child: subprocess.Popen[bytes], apart: bool) -> None:
    """End a program and what it started; a second Ctrl-C does not wait for it."""
    started = _below(child.pid)
    if apart:
        with contextlib.suppress(OSError):
            os.killpg(child.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt, ValueError):
        try:
            child.communicate(timeout=1)
        except subprocess.TimeoutExpired:
            print(f"waiting {GRACE} s for the program; Ctrl-C ends it at once", file=sys.stderr)
            child.communicate(timeout=GRACE)
    if apart:
        with contextlib.suppress(OSError):
            os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    for pid in started | _below(child.pid):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    child.wait()


def _below(pid: int) -> set[int]:
    """Processes that descend from one."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {c for c, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}
