"""Notebooks and scripts written for transformers and peft, run as they are.

`install()` puts stand-ins named `transformers` and `peft` into sys.modules; they hold glmlora's
names and nothing else. It happens only when asked for: `%load_ext glmlora` in Jupyter,
`glmlora.compat.install()`, or `glmlora run NOTEBOOK_OR_SCRIPT`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from .notebook import children, run_notebook, run_script
from .standins import STAND_INS as STAND_INS
from .standins import install, uninstall

_programs = contextlib.ExitStack()
atexit.register(_programs.close)


def load_ipython_extension(ipython: Any) -> None:
    """`%load_ext glmlora`: the stand-ins, for the cells and for Python programs that they start."""
    install()
    _programs.close()
    _programs.enter_context(children.environment(STAND_INS))


def unload_ipython_extension(ipython: Any) -> None:
    """`%unload_ext glmlora`."""
    _programs.close()
    uninstall()


def run(path: str | os.PathLike, argv: Sequence[str] = ()) -> int:
    """Run a .py script, an .ipynb notebook or an .ipy file untouched, in the current directory.

    A notebook's cells run one after another in one namespace and are read as IPython reads them:
    `!command`, `x = !command`, the usual magics, top-level await. Python programs that it starts
    find the stand-ins, too. After the cell that writes a data file named in data/dataset_info.json,
    `sh xfg_train.sh` is run once if it is there and no cell runs it. An exception is shown as
    Python shows it. Returns 0, or the exit status of what failed (130 after Ctrl-C). Raises OSError
    or ValueError for a file that is no notebook.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"{place}: no such notebook or script")
    if place.is_dir():
        raise IsADirectoryError(f"{place}: is a directory, expected a notebook or script")
    main = ModuleType("__main__")
    saved = sys.modules["__main__"], sys.argv, list(sys.path)
    install()
    sys.modules["__main__"], sys.argv = main, [str(place), *argv]
    is_notebook = place.suffix.lower() in (".ipynb", ".ipy")
    sys.path.insert(0, "" if is_notebook else str(place.resolve().parent))
    try:
        with children.environment(STAND_INS):
            return (run_notebook if is_notebook else run_script)(place, main)
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
