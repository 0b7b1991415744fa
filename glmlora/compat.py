"""Notebooks and scripts written for transformers and peft, run as they are.

`install()` puts stand-ins named `transformers` and `peft` into sys.modules; they hold glmlora's
names and nothing else. It happens only when asked for: `%load_ext glmlora` in Jupyter,
`glmlora.compat.install()`, or `glmlora run NOTEBOOK_OR_SCRIPT`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from .notebook import children, run_notebook, run_script

STAND_INS = {
    "transformers": (
        "AutoConfig AutoModel AutoModelForCausalLM AutoTokenizer GenerationConfig "
        "TrainingArguments set_seed"
    ).split(),
    "peft": "LoraConfig PeftModel PrefixTuningConfig TaskType get_peft_model".split(),
}


class _StandIn(ModuleType):
    """A module whose names are glmlora's, looked up when they are used."""

    def __init__(self, name: str):
        super().__init__(name, f"glmlora's stand-in for {name}: {', '.join(STAND_INS[name])}.")
        self.__all__ = STAND_INS[name]
        self.__version__ = "0.0.0+glmlora"

    def __getattr__(self, name: str) -> Any:
        import glmlora

        if name in STAND_INS[self.__name__]:
            return getattr(glmlora, name)
        raise AttributeError(
            f"glmlora's stand-in for {self.__name__} has no {name!r}; it offers "
            f"{', '.join(STAND_INS[self.__name__])}"
        )


def install() -> None:
    """Make `from transformers import ...` and `from peft import ...` give glmlora's names.

    Raises RuntimeError when the real package has been imported already.
    """
    for name in STAND_INS:
        if name in sys.modules and not isinstance(sys.modules[name], _StandIn):
            raise RuntimeError(
                f"{name} is imported already: restart Python (the kernel) and load glmlora first"
            )
    for name in STAND_INS:
        sys.modules.setdefault(name, _StandIn(name))


def uninstall() -> None:
    """Take the stand-ins away; what was imported from them stays usable."""
    for name in STAND_INS:
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]


def load_ipython_extension(ipython: Any) -> None:
    """`%load_ext glmlora`."""
    install()


def unload_ipython_extension(ipython: Any) -> None:
    """`%unload_ext glmlora`."""
    uninstall()


def run(path: str | os.PathLike, argv: Sequence[str] = ()) -> int:
    """Run a .py script or an .ipynb notebook untouched, in the current directory.

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
    main = ModuleType("__main__")
    saved = sys.modules["__main__"], sys.argv, list(sys.path)
    install()
    sys.modules["__main__"], sys.argv = main, [str(place), *argv]
    sys.path.insert(0, "" if place.suffix == ".ipynb" else str(place.resolve().parent))
    try:
        with children.environment(STAND_INS):
            start = run_notebook if place.suffix == ".ipynb" else run_script
            return start(place, main)
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
