"""Notebooks run cell by cell without Jupyter, as IPython would read them; `compat.run` starts it.

cells.py reads the file, source.py makes Python of a cell, shell.py runs it and is what
`get_ipython()` gives, magics.py has the magics, children.py the programs that cells start,
figures.py what matplotlib draws.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from ..files.regular import read_bytes
from ..files.write import read_json
from . import children, magics
from .cells import read_cells
from .figures import figures
from .shell import Shell, UsageError

OWN = str(Path(__file__).parent)
HIDDEN = (OWN, str(Path(__file__).parents[1] / "standins.py"))  # of tracebacks
OWN_MAGICS = re.compile(r"register_\w*magic|load_ext (?!autoreload|glmlora|tensorboard)")
HINTS = {  # by what stands in the traceback of a module that is not there
    "google.colab": "google.colab exists on Colab only: use this machine's files instead",
    "kaggle_secrets": "kaggle_secrets exists on Kaggle only: use an environment variable instead",
    "modeling_chatglm": "the model's class is glmlora's: from transformers import AutoModel",
    "tokenization_chatglm": "its class is glmlora's: from transformers import AutoTokenizer",
    "IPython": "the notebook asks for IPython: pip install ipython",
}


def run_notebook(path: Path, main: ModuleType) -> int:
    """Run the code cells one after another in the namespace of `main`. Returns 0, or the exit
    status of what failed.
    """
    cells = read_cells(path)
    shell = Shell(path.name, main.__dict__, magics.LINE, magics.CELL)
    main.__dict__.update(In=[""], Out={}, _="", __="", _dh=[os.getcwd()], get_ipython=lambda: shell)

    def tell(text: str) -> None:
        print(f"[{path.name}] {text}", file=sys.stderr)

    if not any(OWN_MAGICS.search(cell.source) for cell in cells):
        for number, cell in enumerate(cells, 1):
            for line, text in shell.unknown_magics(cell.source):
                tell(f"the run may end in cell {number}, line {line}: {text.partition(';')[0]}")
    trained = any("xfg_train.sh" in cell.source for cell in cells)
    ipython = any("IPython" in cell.source for cell in cells)
    with _names_in_place(shell, ipython), figures(shell.tell) as begin_cell:
        for number, cell in enumerate(cells, 1):
            if "skip-execution" in cell.tags:
                tell(f"cell {number} is tagged skip-execution")
                continue
            tell(f"cell {number} of {len(cells)}")
            before = _data_files()
            try:
                begin_cell(cell.source)
                shell.run_notebook_cell(number, cell.source)
            except KeyboardInterrupt:
                raise
            except SystemExit as stop:
                tell(f"cell {number} ends the run: SystemExit({stop.code!r})")
                raise
            except BaseException as error:
                show(error, shell)
                if "raises-exception" not in cell.tags:
                    return 1
            written = [name for name, state in _data_files().items() if before.get(name) != state]
            if written and not trained and os.path.exists("xfg_train.sh"):
                trained = True
                tell(f"{written[0]} is written: sh xfg_train.sh")
                status = children.run(["sh", "xfg_train.sh"]).status
                if status:
                    print(f"{path.name}: xfg_train.sh ended with {status}", file=sys.stderr)
                    return status if status > 0 else 128 - status
        if shell.failed:
            tell("\n  ".join(["commands that failed:", *shell.failed]))
    return 0


def run_script(path: Path, main: ModuleType) -> int:
    """Run a Python file in the namespace of `main`. Returns 0, or 1 after an exception, which is
    shown."""
    main.__file__ = str(path)
    shell = Shell(path.name, main.__dict__, magics.LINE, magics.CELL)
    with _names_in_place(shell, ipython=False):
        try:
            code = compile(read_bytes(path), str(path), "exec", dont_inherit=True)
            exec(code, main.__dict__)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            show(error, shell)
            return 1
    return 0


@contextlib.contextmanager
def _names_in_place(shell: Shell, ipython: bool) -> Iterator[None]:
    """For the time of a run: `get_ipython` and `display` are there, IPython's get_ipython is ours
    where it is asked for, and tqdm's bars for Jupyter are those for a terminal.
    """
    import tqdm.std

    bars = ModuleType("tqdm.notebook", "Bars of the terminal.")
    for name in ("tqdm", "tqdm_notebook"):
        setattr(bars, name, tqdm.std.tqdm)
    for name in ("trange", "tnrange"):
        setattr(bars, name, tqdm.std.trange)
    places: list[tuple[Any, str, Any]] = [
        (builtins, "get_ipython", lambda: shell),
        (builtins, "display", shell.display),
        (tqdm, "notebook", bars),
    ]
    if ipython:
        with contextlib.suppress(ImportError):
            import IPython
            from IPython.core import getipython

            places += [(m, "get_ipython", lambda: shell) for m in (IPython, getipython)]
    absent = object()
    saved = [(place, name, getattr(place, name, absent)) for place, name, _ in places]
    saved_bars = sys.modules.get("tqdm.notebook")
    sys.modules["tqdm.notebook"] = bars
    for place, name, value in places:
        setattr(place, name, value)
    try:
        yield
    finally:
        shell.close()
        for place, name, value in saved:
            if value is absent:
                delattr(place, name)
            else:
                setattr(place, name, value)
        del sys.modules["tqdm.notebook"]
        if saved_bars is not None:
            sys.modules["tqdm.notebook"] = saved_bars


def show(error: BaseException, shell: Shell) -> None:
    """An exception as Python shows it, from the cell on; of a command, a line with its place."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if isinstance(error, UsageError):
        where = shell.name
        for frame, line in frames:
            if place := shell.place_of(frame.f_code.co_filename):
                where = f"{shell.name}: {place}, line {line}"
        print(f"{where}: {error}", file=sys.stderr)
        return
    start: TracebackType | None = error.__traceback__
    while start is not None and not _is_users(start.tb_frame.f_code.co_filename, shell):
        start = start.tb_next
    text = traceback.TracebackException(type(error), error, start, compact=True)
    shown: traceback.TracebackException | None = text
    while shown is not None:
        users = [f for f in shown.stack if not f.filename.startswith(HIDDEN)]
        shown.stack = traceback.StackSummary.from_list(users)
        shown = shown.__cause__ or shown.__context__
    lines = "".join(text.format())
    print(lines, end="", file=sys.stderr)
    if isinstance(error, SyntaxError) and not shell.execution_count:
        if (error.text or "").lstrip().startswith(("!", "%")):
            print(f"{shell.name}: named .ipy, it is read as a notebook's cell", file=sys.stderr)
    if isinstance(error, ModuleNotFoundError):
        for word, hint in HINTS.items():
            if word in lines:
                print(f"{shell.name}: {hint}", file=sys.stderr)


def _is_users(filename: str, shell: Shell) -> bool:
    """Whether a frame is of a cell or of a script, not of what runs them."""
    own = filename.startswith(OWN) or "asyncio" in Path(filename).parts
    return shell.place_of(filename) is not None or not own and not shell.execution_count


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
