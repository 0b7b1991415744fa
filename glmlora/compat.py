"""Notebooks and scripts written for transformers and peft, run as they are.

`install()` puts stand-ins named `transformers` and `peft` into sys.modules; they hold glmlora's
names and nothing else. It happens only when asked for: `%load_ext glmlora` in Jupyter,
`glmlora.compat.install()`, or `glmlora run NOTEBOOK_OR_SCRIPT`.
"""

from __future__ import annotations

import ast
import contextlib
import linecache
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from .files.regular import read_text
from .files.write import read_json
from .standins import STAND_INS as STAND_INS
from .standins import install, uninstall


def load_ipython_extension(ipython: Any) -> None:
    """`%load_ext glmlora`."""
    install()


def unload_ipython_extension(ipython: Any) -> None:
    """`%unload_ext glmlora`."""
    uninstall()


def run(path: str | os.PathLike, argv: Sequence[str] = ()) -> int:
    """Run a .py script or an .ipynb notebook untouched, in the current directory.

    A notebook's cells run one after another in one namespace; lines `!command`, `%cd DIR` and cells
    `%%time`, `%%bash`, `%%sh` work, other magics are refused by name. After the cell that writes a
    data file named in data/dataset_info.json, `sh xfg_train.sh` is run once if it is there and no
    cell runs it. Returns 0, or the exit status of what failed (130 after Ctrl-C). Raises OSError or
    ValueError for a file that is no notebook.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"{place}: no such notebook or script")
    main = ModuleType("__main__")
    main.__file__ = str(place)
    saved = sys.modules["__main__"], sys.argv, list(sys.path)
    install()
    sys.modules["__main__"], sys.argv = main, [str(place), *argv]
    sys.path.insert(0, "" if place.suffix == ".ipynb" else str(place.resolve().parent))
    try:
        if place.suffix == ".ipynb":
            return _Notebook(place, main).run()
        exec(compile(read_text(place), str(place), "exec"), main.__dict__)
        return 0
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        sys.modules["__main__"], sys.argv, sys.path[:] = saved
        uninstall()


class _CellError(Exception):
    """A cell that cannot be run; the message names cell and line."""


class _Notebook:
    def __init__(self, path: Path, main: ModuleType):
        content = read_json(path, expect=dict)
        if content.get("nbformat", 0) < 4 or not isinstance(content.get("cells"), list):
            raise ValueError(f"{path}: expected a notebook of nbformat 4, got other JSON")
        self.name = path.name
        self.scope = main.__dict__
        self.cells = [
            "".join(c["source"]) if isinstance(c["source"], list) else c["source"]
            for c in content["cells"]
            if c.get("cell_type") == "code"
        ]
        self.starts_training = any("xfg_train.sh" in c for c in self.cells)

    def run(self) -> int:
        trained = self.starts_training or not os.path.exists("xfg_train.sh")
        for number, source in enumerate(self.cells, 1):
            print(f"[{self.name}] cell {number} of {len(self.cells)}", file=sys.stderr)
            before = _data_files()
            try:
                self.cell(number, source)
            except _CellError as error:
                print(f"{self.name}: {error}", file=sys.stderr)
                return 1
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                self.show(error)
                return 1
            written = [name for name, state in _data_files().items() if before.get(name) != state]
            if written and not trained:
                trained = True
                print(f"[{self.name}] {written[0]} is written: sh xfg_train.sh", file=sys.stderr)
                status = _shell("sh xfg_train.sh")
                if status:
                    print(f"{self.name}: xfg_train.sh ended with {status}", file=sys.stderr)
                    return status
        return 0

    def show(self, error: BaseException) -> None:
        """The traceback from the cell on, without this module's frames."""
        tb = error.__traceback__
        while tb is not None and tb.tb_frame.f_code.co_filename == __file__:
            tb = tb.tb_next
        traceback.print_exception(type(error), error, tb)

    def cell(self, number: int, source: str) -> None:
        lines = source.split("\n")
        timed = False
        if lines[0].startswith("%%"):
            magic, rest = lines[0].split()[0], "\n".join(lines[1:])
            if magic in ("%%bash", "%%sh"):
                return _checked_shell(rest, f"cell {number}")
            if magic != "%%time":
                raise _CellError(f"cell {number}, line 1: the magic {magic} is not supported")
            timed, lines = True, ["", *lines[1:]]
        where = f"{self.name}[cell {number}]"
        code = "\n".join(self.plain(number, i, line) for i, line in enumerate(lines, 1))
        linecache.cache[where] = (len(code), None, code.splitlines(keepends=True), where)
        tree = ast.parse(code, where)
        last = tree.body[-1] if tree.body else None
        self.scope["_glmlora_shell"] = _checked_shell
        start = time.perf_counter()
        if isinstance(last, ast.Expr):
            body = ast.Module(tree.body[:-1], [])
            exec(compile(body, where, "exec"), self.scope)
            value = eval(compile(ast.Expression(last.value), where, "eval"), self.scope)
            if value is not None and not source.rstrip().endswith(";"):
                print(repr(value))
        else:
            exec(compile(tree, where, "exec"), self.scope)
        if timed:
            print(f"Wall time: {time.perf_counter() - start:.1f} s")

    def plain(self, number: int, line_number: int, line: str) -> str:
        """The line as Python: `!command` and the line magics that are known."""
        text = line.lstrip()
        indent = line[: len(line) - len(text)]
        where = f"cell {number}, line {line_number}"
        if text.startswith("!"):
            return f"{indent}_glmlora_shell({text[1:]!r}, {where!r})"
        words = text.split()
        if not text.startswith("%") or len(words[0]) < 2 or not words[0][1].isalpha():
            return line
        if words[0] in ("%load_ext", "%matplotlib", "%config"):
            return f"{indent}pass"
        if words[0] == "%cd" and len(words) == 2:
            return f"{indent}__import__('os').chdir({words[1]!r})"
        if words[0] == "%pip":
            return f"{indent}_glmlora_shell({'python -m ' + text[1:]!r}, {where!r})"
        raise _CellError(f"{where}: the magic {words[0]} is not supported")


def _data_files() -> dict[str, tuple[int, int]]:
    """Data files named in data/dataset_info.json -> (time of change, size)."""
    found = {}
    with contextlib.suppress(OSError, ValueError):
        for entry in read_json("data/dataset_info.json", expect=dict).values():
            name = os.path.join("data", str(entry.get("file_name")))
            with contextlib.suppress(OSError):
                state = os.stat(name)
                found[name] = (state.st_mtime_ns, state.st_size)
    return found


@contextlib.contextmanager
def _python_on_path() -> Iterator[dict[str, str]]:
    """An environment in which `python` is the interpreter that runs now."""
    with tempfile.TemporaryDirectory(prefix="glmlora-") as place:
        for name in ("python", "python3"):
            wrapper = Path(place) / name
            wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
            wrapper.chmod(0o755)
        package = str(Path(__file__).resolve().parent.parent)
        paths = [package, os.environ.get("PYTHONPATH")]
        yield os.environ | {
            "PATH": place + os.pathsep + os.environ.get("PATH", ""),
            "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        }


def _shell(command: str) -> int:
    """Exit status of a shell command, whose output goes where ours goes; Ctrl-C ends it too."""
    sys.stdout.flush()
    with _python_on_path() as environment:
        child = subprocess.Popen(["sh", "-c", command], env=environment)
        try:
            return child.wait()
        except KeyboardInterrupt:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)  # it got the Ctrl-C as well, and saves what it has
            child.kill()
            raise


def _checked_shell(command: str, where: str) -> None:
    status = _shell(command)
    if status:
        raise _CellError(f"{where}: `{command.strip()}` ended with {status}")
