"""`%magic` and `%%magic`: those of IPython that notebooks use."""

from __future__ import annotations

import argparse
import contextlib
import glob
import importlib
import inspect
import io
import math
import os
import runpy
import shlex
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from ..files.regular import read_bytes
from . import children
from .cells import read_cells
from .shell import CellMagic, LineMagic, Shell, UsageError

LINE: dict[str, LineMagic] = {}
CELL: dict[str, CellMagic] = {}


def line_magic(*names: str, takes_code: bool = False) -> Callable[[LineMagic], LineMagic]:
    """`%name`; one that takes code gets its line with `{}` and `$` as they are."""

    def enter(function: LineMagic) -> LineMagic:
        function.takes_code = takes_code  # type: ignore[attr-defined]
        LINE.update(dict.fromkeys(names, function))
        return function

    return enter


def cell_magic(*names: str) -> Callable[[CellMagic], CellMagic]:
    def enter(function: CellMagic) -> CellMagic:
        CELL.update(dict.fromkeys(names, function))
        return function

    return enter


class _Options(argparse.ArgumentParser):
    """The options of a magic."""

    def __init__(self, name: str):
        super().__init__(prog=name, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}")

    def read(self, line: str) -> argparse.Namespace:
        return self.parse_args(_words(line))


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise UsageError(f"{line}: {error}") from None


def _without_comment(line: str) -> str:
    return "" if line.startswith("#") else line.split(" #")[0].strip()


# -- places, variables of the environment ---------------------------------------------------------


@line_magic("cd")
def _cd(shell: Shell, line: str) -> None:
    visited = shell.user_ns.setdefault("_dh", [os.getcwd()])
    quiet = line.startswith("-q")
    place = line.removeprefix("-q").strip()
    if not os.path.isdir(os.path.expanduser(place)):
        place = _without_comment(place)
    place = place.strip("'\"") or "~"
    if place == "-":
        if len(visited) < 2:
            raise UsageError("%cd -: there is no directory before this one")
        place = visited[-2]
    try:
        os.chdir(os.path.expanduser(place))
    except OSError as error:
        raise UsageError(f"%cd {place}: {error.strerror} (from {os.getcwd()})") from None
    visited.append(os.getcwd())
    if not quiet:
        print(os.getcwd())


@line_magic("pwd")
def _pwd(shell: Shell, line: str) -> str:
    return os.getcwd()


@line_magic("env")
def _env(shell: Shell, line: str) -> Any:
    if not line:
        secret = ("key", "token", "secret")
        return {
            n: "<hidden>" if any(s in n.lower() for s in secret) else v
            for n, v in os.environ.items()
        }
    if "=" in line or " " in line:
        return _set_env(shell, line)
    if line not in os.environ:
        raise UsageError(f"%env: the environment has no {line}")
    return os.environ[line]


@line_magic("set_env")
def _set_env(shell: Shell, line: str) -> None:
    name, mark, value = line.partition("=" if "=" in line else " ")
    name, value = name.strip(), value.strip()
    if not mark or not name or " " in name:
        raise UsageError(f"%env {line}: expected NAME=VALUE")
    os.environ[name] = value
    print(f"env: {name}={value}")


# -- programs -------------------------------------------------------------------------------------

ALIASES = {
    **{name: name for name in ("cat", "cp", "mkdir", "mv", "rm", "rmdir")},
    **dict.fromkeys(("less", "more", "pycat"), "cat"),
    "ls": "ls -F",
    "ll": "ls -F -o",
    "pip": f"{shlex.quote(sys.executable)} -m pip",
    "conda": "conda",
    "mamba": "mamba",
    "uv": "uv",
}


def _alias(command: str) -> LineMagic:
    return lambda shell, line: shell.system(f"{command} {line}".strip())


LINE.update({name: _alias(command) for name, command in ALIASES.items()})


@line_magic("alias")
def _define_alias(shell: Shell, line: str) -> None:
    name, _, command = line.partition(" ")
    if not command or "%" in command:
        raise UsageError(f"%alias {line}: expected NAME COMMAND, without %s and %l")
    shell.line_magics[name] = _alias(command)


@line_magic("sx", "system")
def _sx(shell: Shell, line: str) -> Any:
    return shell.getoutput(line)


@line_magic("shell")
def _shell(shell: Shell, line: str) -> None:
    shell.system(line)


@cell_magic("sx", "system", "!")
def _sx_cell(shell: Shell, line: str, cell: str) -> Any:
    return shell.getoutput(cell)


def _script(shell: Shell, name: str, words: list[str], line: str, cell: str) -> None:
    """Run a cell as the standard input of a program."""
    options = _Options(f"%%{name}")
    options.add_argument("--out")
    options.add_argument("--err")
    options.add_argument("--no-raise-error", action="store_true")
    options.add_argument("--bg", action="store_true")
    options.add_argument("--proc")
    given, rest = options.parse_known_args(_words(_without_comment(line)))
    if given.bg or given.proc:
        raise UsageError(f"%%{name} --bg: cells run one after another here")
    words = [*words, *rest]
    if not words:
        raise UsageError(f"%%{name}: expected a program")
    try:
        done = children.run(words, cell, given.out is not None, given.err is not None)
    except FileNotFoundError:
        raise UsageError(f"%%{name}: there is no program {words[0]!r}") from None
    for variable, text in ((given.out, done.out), (given.err, done.err)):
        if variable:
            shell.user_ns[variable] = text
    shell.user_ns["_exit_code"] = done.status
    if done.status and not given.no_raise_error:
        raise UsageError(f"%%{name} ended with {done.status}")
    if done.status:
        shell.tell(f"%%{name} ended with {done.status}")


def _program(name: str, *words: str) -> None:
    CELL[name] = lambda shell, line, cell: _script(shell, name, list(words), line, cell)


for _name in ("bash", "sh", "zsh", "perl", "ruby", "python", "python3"):
    _program(_name, _name)
_program("shell", "bash")
_program("script")


# -- Python ---------------------------------------------------------------------------------------


def format_time(seconds: float) -> str:
    """1.5 s, 12 ms, 3.1 µs."""
    if seconds >= 60:
        return f"{int(seconds // 60)} min {seconds % 60:.0f} s"
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1 or unit == "µs":
            break
    return f"{seconds * scale:.3g} {unit}"


@contextlib.contextmanager
def _timed() -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        print(f"Wall time: {format_time(time.perf_counter() - start)}")


@line_magic("time", takes_code=True)
def _time(shell: Shell, line: str) -> Any:
    with _timed():
        return shell.execute(line, show=False)


@cell_magic("time")
def _time_cell(shell: Shell, line: str, cell: str) -> None:
    if line and not line.startswith("#"):
        raise UsageError(f"%%time {line}: expected nothing behind %%time")
    with _timed():
        shell.execute(cell)


class TimeitResult:
    """Seconds of one loop: average, stdev, best, worst; timings of each run."""

    def __init__(self, loops: int, runs: list[float]):
        self.loops, self.repeat = loops, len(runs)
        self.all_runs = runs
        self.timings = [seconds / loops for seconds in runs]
        self.best, self.worst = min(self.timings), max(self.timings)
        self.average = math.fsum(self.timings) / len(runs)
        self.stdev = (math.fsum((t - self.average) ** 2 for t in self.timings) / len(runs)) ** 0.5

    def __repr__(self) -> str:
        return (
            f"{format_time(self.average)} ± {format_time(self.stdev)} per loop "
            f"(mean ± std. dev. of {self.repeat} runs, {self.loops:,} loops each)"
        )


def _measure(shell: Shell, line: str, cell: str | None) -> Any:
    options = _Options("%timeit")
    options.add_argument("-n", type=int)
    options.add_argument("-r", type=int, default=7)
    options.add_argument("-p", type=int)
    for flag in "qotc":
        options.add_argument(f"-{flag}", action="store_true")
    words: list[str] = []
    while line.startswith("-"):
        word, _, line = line.partition(" ")
        line = line.lstrip()
        if word in ("-n", "-r", "-p"):  # their number is the next word
            number, _, line = line.partition(" ")
            word += number
        words.append(word)
    given = options.parse_args(words)
    setup, code = ("pass", line) if cell is None else (line or "pass", cell)
    texts = [shell.python(text) for text in (code, setup)]
    timer = timeit.Timer(texts[0], texts[1], globals=shell.user_ns)
    loops = given.n or timer.autorange()[0]
    result = TimeitResult(loops, timer.repeat(given.r, loops))
    if not given.q:
        print(result)
    return result if given.o else None


@line_magic("timeit", takes_code=True)
def _timeit(shell: Shell, line: str) -> Any:
    return _measure(shell, line, None)


@cell_magic("timeit")
def _timeit_cell(shell: Shell, line: str, cell: str) -> Any:
    return _measure(shell, line, cell)


def _profile(shell: Shell, source: str) -> None:
    import cProfile

    profile = cProfile.Profile()
    try:
        profile.runcall(shell.execute, source)
    finally:
        profile.print_stats("cumulative")


@line_magic("prun", takes_code=True)
def _prun(shell: Shell, line: str) -> None:
    _profile(shell, line)


@cell_magic("prun")
def _prun_cell(shell: Shell, line: str, cell: str) -> None:
    _profile(shell, cell)


class Captured:
    """What a cell under %%capture wrote and showed."""

    def __init__(self, stdout: str, stderr: str, outputs: list[Any]):
        self.stdout, self.stderr, self.outputs = stdout, stderr, outputs

    def show(self) -> None:
        sys.stdout.write(self.stdout)
        sys.stderr.write(self.stderr)
        for value in self.outputs:
            print(repr(value))

    __call__ = show

    def __str__(self) -> str:
        return self.stdout


@cell_magic("capture")
def _capture(shell: Shell, line: str, cell: str) -> None:
    options = _Options("%%capture")
    options.add_argument("output", nargs="?")
    for stream in ("stdout", "stderr", "display"):
        options.add_argument(f"--no-{stream}", action="store_true")
    given = options.read(_without_comment(line))
    out, err = io.StringIO(), io.StringIO()
    values: list[Any] = []
    before = shell.captured
    try:
        with contextlib.ExitStack() as stack:
            if not given.no_stdout:
                stack.enter_context(contextlib.redirect_stdout(out))
            if not given.no_stderr:
                stack.enter_context(contextlib.redirect_stderr(err))
            shell.captured = before if given.no_display else values
            shell.execute(cell)
    except BaseException:
        Captured(out.getvalue(), err.getvalue(), values).show()
        raise
    finally:
        shell.captured = before
    if given.output:
        shell.user_ns[given.output] = Captured(out.getvalue(), err.getvalue(), values)


@cell_magic("writefile", "file")
def _writefile(shell: Shell, line: str, cell: str) -> None:
    options = _Options("%%writefile")
    options.add_argument("-a", "--append", action="store_true")
    options.add_argument("filename")
    given = options.read(line)
    path = Path(given.filename).expanduser()
    what = "Writing" if not path.exists() else "Appending to" if given.append else "Overwriting"
    print(f"{what} {path}")
    with open(path, "a" if given.append else "w", encoding="utf-8") as file:
        file.write(cell)


@line_magic("run")
def _run(shell: Shell, line: str) -> None:
    options = _Options("%run")
    for flag in "intpde":
        options.add_argument(f"-{flag}", action="store_true")
    options.add_argument("-m")
    options.add_argument("path", nargs="?")
    options.add_argument("arguments", nargs=argparse.REMAINDER)
    given = options.read(line)
    if given.p or given.d:
        raise UsageError("%run: -p and -d are not supported")
    words = [given.path] * (given.path is not None) + given.arguments
    if given.m:
        _run_apart([given.m, *words], lambda: runpy.run_module(given.m, None, "__main__", True))
        return
    if given.path is None:
        raise UsageError("%run: expected a file")
    path = Path(given.path).expanduser()
    if not path.is_file() and Path(f"{path}.py").is_file():
        path = Path(f"{path}.py")
    if not path.is_file():
        raise UsageError(f"%run {path}: no such file (in {os.getcwd()})")
    arguments = [f for a in given.arguments for f in (sorted(glob.glob(a)) or [a])]
    if path.suffix == ".ipynb":
        for number, cell in enumerate(read_cells(path), 1):
            shell.execute(cell.source, where=f"{path.name}[cell {number}]")
        return
    module = ModuleType("__main__" if not given.n else path.stem)
    names = shell.user_ns if given.i else module.__dict__
    module.__file__ = str(path)
    code = compile(read_bytes(path), str(path), "exec", dont_inherit=True)
    with _timed() if given.t else contextlib.nullcontext():
        _run_apart([str(path), *arguments], lambda: exec(code, names), None if given.i else module)
    if not given.i:
        shell.user_ns.update({n: v for n, v in names.items() if not n.startswith("__")})


def _run_apart(
    words: list[str], start: Callable[[], Any], module: ModuleType | None = None
) -> None:
    """Run a program in this process: with its own arguments and module `__main__`."""
    saved = sys.argv, sys.modules["__main__"], list(sys.path)
    sys.argv = words
    if module is not None:
        sys.modules["__main__"] = module
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
    try:
        start()
    except SystemExit as stop:
        if stop.code not in (None, 0):
            raise UsageError(f"%run {words[0]}: ended with {stop.code}") from None
    finally:
        sys.argv, sys.modules["__main__"], sys.path[:] = saved


# -- names ----------------------------------------------------------------------------------------


def _own_names(shell: Shell) -> list[str]:
    kept = ("In", "Out", "get_ipython", "exit", "quit", "display")
    return sorted(n for n in shell.user_ns if not n.startswith("_") and n not in kept)


@line_magic("who")
def _who(shell: Shell, line: str) -> None:
    print("\t ".join(_own_names(shell)) or "Interactive namespace is empty.")


@line_magic("who_ls")
def _who_ls(shell: Shell, line: str) -> list[str]:
    return _own_names(shell)


@line_magic("whos")
def _whos(shell: Shell, line: str) -> None:
    for name in _own_names(shell):
        value = shell.user_ns[name]
        print(f"{name:<16} {type(value).__name__:<16} {' '.join(repr(value).split())[:60]}")


@line_magic("reset")
def _reset(shell: Shell, line: str) -> None:
    for name in _own_names(shell):
        del shell.user_ns[name]


@line_magic("xdel")
def _xdel(shell: Shell, line: str) -> None:
    if line not in shell.user_ns:
        raise UsageError(f"%xdel: there is no {line!r}")
    del shell.user_ns[line]


@line_magic("pinfo", "pinfo2", "psource", "pdoc", "pdef", takes_code=True)
def _pinfo(shell: Shell, line: str) -> None:
    """`name?`: signature and documentation."""
    if line.lstrip("%") in shell.line_magics:
        print(f"%{line.lstrip('%')} is a magic")
        return
    try:
        value = shell.ev(line)
    except Exception:
        print(f"Object `{line}` not found.")
        return
    with contextlib.suppress(TypeError, ValueError):
        print(f"Signature: {line}{inspect.signature(value)}")
    print(f"Type: {type(value).__name__}\n{inspect.getdoc(value) or 'no documentation'}")


@line_magic("psearch", takes_code=True)
def _psearch(shell: Shell, line: str) -> None:
    import fnmatch

    print("\n".join(fnmatch.filter(shell.user_ns, line)))


@line_magic("lsmagic", "magic", "quickref")
def _lsmagic(shell: Shell, line: str) -> None:
    print("Line magics: " + " ".join(f"%{n}" for n in sorted(shell.line_magics)))
    print("Cell magics: " + " ".join(f"%%{n}" for n in sorted(shell.cell_magics)))


# -- what has nothing to do here -----------------------------------------------------------------


@line_magic("matplotlib", "gui", "colors", "xmode", "autosave", "autoreload", "aimport")
def _nothing(shell: Shell, line: str) -> None:
    """Settings of a display or an editor that is not there."""


@line_magic("pylab")
def _pylab(shell: Shell, line: str) -> None:
    shell.ex("import numpy, numpy as np; from matplotlib import pyplot, pyplot as plt")
    shell.ex("from numpy import *; from matplotlib.pylab import *")


@line_magic("config")
def _config(shell: Shell, line: str) -> None:
    name, mark, value = line.partition("=")
    if mark and name.strip() == "InteractiveShell.ast_node_interactivity":
        shell.ast_node_interactivity = value.strip().strip("'\"")


@line_magic("load_ext", "reload_ext", "unload_ext")
def _load_ext(shell: Shell, line: str) -> None:
    name = _without_comment(line)
    if name == "glmlora":  # what it does is done already
        return
    for known, why in (
        ("autoreload", "a module is imported once"),
        ("tensorboard", "only text is shown here"),
    ):
        if name == known:
            shell.tell(f"{name} does nothing here: {why}")
            return
    try:
        importlib.import_module(name).load_ipython_extension(shell)
    except Exception as error:
        shell.tell(f"the extension {name} is not loaded ({error}): its magics are not known")


def _told(mark: str, name: str, why: str) -> None:
    def tell(shell: Shell, *_: str) -> None:
        shell.tell(f"{mark}{name} is skipped: {why}")

    if mark == "%":
        LINE[name] = tell
    else:
        CELL[name] = tell


for _name in ("html", "HTML", "javascript", "js", "latex", "markdown", "svg", "SVG"):
    _told("%%", _name, "only text is shown here")
for _name in ("debug", "pdb"):
    _told("%", _name, "nobody can answer a debugger here")
for _name in ("tensorboard", "precision", "tensorflow_version", "history", "hist", "tb"):
    _told("%", _name, "it has no effect under glmlora")
