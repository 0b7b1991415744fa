"""The emulator of cuda/emu from Python: the library on it, built once, and its controls where
GLMLORA_CUDA_LIBRARY names such a library."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
needs_compiler = pytest.mark.skipif(
    not shutil.which("g++") or "GLMLORA_SANITIZED" in os.environ,
    reason="the emulator needs g++ and a plain build: no device is tested",
)


def built(goal: str = "emu", **env: str) -> Path:
    """The library that cuda/build.py makes; one process at a time builds, the others find it."""
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / "cuda.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            [sys.executable, str(ROOT / "cuda" / "build.py"), goal],
            env=os.environ | env, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return Path(done.stdout.split()[-1])


class Emulator:
    """Controls and counters of the emulator's runtime (cuda/emu/cuda_emu.h)."""

    def __init__(self, path: Path) -> None:
        self._c = ctypes.CDLL(str(path))
        self._c.emu_reports.restype = ctypes.c_uint64

    def mode(self, seed: int = 0, lazy: bool = False, protect: bool = False) -> None:
        """seed: in which order threads run; lazy: streams run when something waits for them;
        protect: host code that touches device memory faults."""
        self._c.emu_mode(0, int(lazy), int(protect), seed)

    def reports(self) -> tuple[int, str]:
        """How many there were so far, and the last one."""
        text = ctypes.create_string_buffer(500)
        count = self._c.emu_reports(text, ctypes.c_size_t(len(text)))
        return count, text.value.decode(errors="replace")

    def checked(self) -> bool:
        """Every load and store of the library's kernels is looked at."""
        return bool(self._c.emu_checked())

    def mutant(self, number: int) -> None:
        """Which mutant of cuda/mutate.py is in force; -1 for none."""
        self._c.emu_set_mutant(number)

    def reached(self, number: int) -> bool:
        """A thread came by the mutant's place since mutant()."""
        return bool(self._c.emu_reached(number))

    def metrics(self, on: bool) -> None:
        """Counts from zero; on: those of memory too."""
        self._c.emu_metrics(int(on))

    def traffic(self) -> dict[str, dict[str, int]]:
        """{kernel: counts} since metrics(); those of memory in the checked build only."""
        found, name, counts = {}, ctypes.create_string_buffer(100), np.zeros(5, np.uint64)
        while self._c.emu_traffic(
            len(found), name, ctypes.c_size_t(100), ctypes.c_void_p(counts.ctypes.data)
        ):
            keys = ("launches", "barriers", "asked", "distinct", "sectors")
            found[name.value.decode()] = dict(zip(keys, map(int, counts), strict=True))
        return found


@lru_cache
def emulator() -> Emulator | None:
    """None where no emulated library is in use."""
    library = os.environ.get("GLMLORA_CUDA_LIBRARY")
    path = Path(library or "").with_name("libcuda_emu.so") if library else None
    return Emulator(path) if path and path.is_file() else None
