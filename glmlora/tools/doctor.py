"""`glmlora doctor`: the machine, the core, the libraries, and what to do about what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from pathlib import Path

LIBRARIES = [  # name, needed?, what for, how to get it
    ("numpy", True, "arrays", "pip install numpy"),
    ("tqdm", True, "progress bars", "pip install tqdm"),
    ("sentencepiece", True, "the tokenizer", "pip install sentencepiece"),
    ("tiktoken", False, "tokenizers of byte pairs", 'pip install "glmlora[tiktoken]"'),
    ("jinja2", False, "other chat templates", 'pip install "glmlora[templates]"'),
    ("pandas", False, "tables in your notebook", "pip install pandas"),
    ("matplotlib", False, "loss plots", 'pip install "glmlora[plot]"'),
    ("nbclient", False, "running notebooks in tests", 'pip install "glmlora[notebook]"'),
    ("jieba", False, "ROUGE scores", 'pip install "glmlora[metrics]"'),
]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gib(n: int) -> str:
    return f"{n / 2**30:.1f} GiB"


DRIVERS = {11: "450", 12: "525", 13: "580"}  # from which on a CUDA version's libraries run


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def library_lines(kind: str = "cuda") -> list[str]:
    """The CUDA library and cuBLAS, where there is one."""
    from glmlora import _core
    from glmlora.model import device

    try:
        device.preload_cublas()
        library = _core.device_library(kind)
    except ValueError:
        return []
    how, runtime = library["built"], device.info(kind).get("runtime", 0)
    if runtime:
        least = DRIVERS.get(runtime // 1000)
        how += f"; CUDA {_cuda(runtime)}" + (f", drivers from {least} on" if least else "")
    return [
        f"cuda library  {library['path']}",
        f"              {how}",
        f"cublas        {library['cublas']}",
    ]


def gpu_lines() -> list[str]:
    """What there is to compute on beside the CPU: a line for each GPU, or why there is none; then
    the library."""
    from glmlora.model import device

    first = device.info("cuda")
    if not first["count"]:
        lines = [f"gpu           none: {first['why']}", "              .cuda() stays on the CPU"]
        return lines + library_lines()
    lines = []
    for index in range(first["count"]):
        found = device.info(f"cuda:{index}")
        if not found["count"]:
            lines.append(f"gpu {index}         {found['why']}")
            continue
        major, minor = found["capability"]
        lines.append(
            f"gpu {index}         {found['name']}, capability {major}.{minor}, "
            f"{_gib(found['free'])} of {_gib(found['total'])} free"
        )
    lines.append(f"driver        {_driver()}for CUDA up to {_cuda(first['driver'])}")
    lines += library_lines()
    try:
        from glmlora import _core

        _core.op_table("cuda")
    except (ValueError, RuntimeError, MemoryError) as error:
        lines.append(f"              it cannot be used: {error}")
    return lines


def _driver() -> str:
    """Its version with a comma, where the kernel tells it."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return ""
    return f"{found[0]}, " if found else ""


def cpu_lines() -> list[str]:
    """The instruction sets in use, of the processor and of the build, what the build lacks, and
    the threads. Raises ValueError where GLMLORA_ISA forces what cannot be used."""
    from glmlora import _core
    from glmlora.model import device

    threads = _core.get_num_threads()
    kernels = _core.cpu_kernels().items()
    used = _core.backend_name("cpu").removeprefix("cpu:")
    forced = " (GLMLORA_ISA)" if os.environ.get("GLMLORA_ISA") else ""
    lines = [
        f"instructions  {used} in use{forced}; "
        f"this processor runs {', '.join(name for name, (_, runs) in kernels if runs)}",
        f"              compiled are {', '.join(name for name, (there, _) in kernels if there)}",
    ]
    lacking = [name for name, (_, runs) in kernels if not runs]
    if lacking:
        lines.append(f"              it lacks what these take: {', '.join(lacking)}")
    missing = device.missing_kernels()
    if missing:
        lines.append(
            f"              NOT compiled: {', '.join(missing)}, which this processor runs faster; "
            "install a wheel, or build with a newer gcc or clang"
        )
    chosen = os.environ.get("OMP_NUM_THREADS")
    source = f"OMP_NUM_THREADS={chosen}" if chosen else "the cores this process may use"
    lines.append(f"threads       {threads} ({source}; glmlora.set_num_threads changes it)")
    return lines


def report(speed: bool = False) -> int:
    """Print the report; 0 when glmlora can work here, 1 when something needed is missing.
    speed: measure the machine, too.
    """
    problems: list[str] = []
    print(f"python        {platform.python_version()} at {sys.executable}")
    print(f"machine       {platform.machine()}, {platform.system()} {platform.release()}")
    try:
        from glmlora import __version__, _core
    except ImportError as error:
        print(f"glmlora       the C core cannot be loaded: {error}")
        print("              build it: pip install . (needs a C compiler, gcc or clang)")
        return 1
    print(f"glmlora       {__version__}")
    try:
        lines = cpu_lines()
    except ValueError as error:
        lines = []
        problems.append(str(error))
    if speed and not problems:
        from glmlora.tools import speed as measured

        lines += measured.lines()
    for line in lines:
        print(line)
    print(f"memory        {_gib(_core.memory_available())} available")
    print(f"disk here     {_gib(shutil.disk_usage('.').free)} free")
    for line in gpu_lines():
        print(line)
    for name, needed, purpose, how in LIBRARIES:
        version = _version(name)
        if version is None and needed:
            problems.append(f"{name} is missing: {how}")
        note = version or f"absent: {how}"
        print(f"{name:<13} {note}  ({purpose})")
    from glmlora.tools.project import tiny_directory

    try:
        print(f"glm-tiny      {tiny_directory()}")
    except FileNotFoundError as error:
        problems.append(str(error))
    for problem in problems:
        print(f"PROBLEM       {problem}")
    if not problems:
        print("All that is needed is here.")
    return 1 if problems else 0
