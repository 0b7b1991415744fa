"""Builds the CUDA library, or checks that it compiles.

    python cuda/build.py emu              libglm_cuda_emu.so by the host's compiler, on the
                                          emulator
    python cuda/build.py emu-checked      the same with every memory access checked
    python cuda/build.py nvcc [FILE..]    the gate: each file for each architecture; warnings,
                                          spills and local memory are errors
    python cuda/build.py budget           shared memory, occupancy, tensor cores and 128-bit moves
                                          of what the gate compiled
    python cuda/build.py here             the library for the GPU of this machine, by nvcc where
                                          it is installed, else by NVRTC; what `pip install` does
    python cuda/build.py lib              libglm_cuda.so by nvcc, for all architectures
    python cuda/build.py nvrtc            the gate by NVRTC 12.9 (wheels nvidia-cuda-nvrtc-cu12,
                                          -runtime-cu12 and -nvcc-cu12), cubins for sm_70 to sm_120
    python cuda/build.py lib12            libglm_cuda12.so: those cubins and PTX, for drivers of
                                          CUDA 12 and newer

EMU_DIR (default cuda/emu): where the emulator is. OUT (default build/cuda): where results go.
ARCHS (default "75 80 86 89 90"): for nvcc, which is looked for on PATH and in CUDA_HOME
(default /usr/local/cuda). NVIDIA_WHEELS: a folder that the wheels were installed
into, where it is not site-packages. Only files that changed are compiled.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import (
    CUDA,
    EMU,
    HEADERS,
    HOST,
    INCLUDE,
    KERNELS,
    OUT,
    ROOT,
    about,
    run,
    stale,
    written,
)

ARCHS = os.environ.get("ARCHS", "75 80 86 89 90").split()
CUDA_HOME = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
NVCC = shutil.which("nvcc") or shutil.which(f"{CUDA_HOME}/bin/nvcc")
OLDEST = 70  # compute capability that there can be code for
SIMD = ["-mf16c", "-mavx2", "-mfma"]
CHECKED = ["-O1", "-fsanitize=thread", "-fsanitize=alignment"]
CHECKED += ["-fno-tree-sra"]  # a vector is one access
CHECKED += ["--param=tsan-instrument-func-entry-exit=0"]


def emu(checked: bool, cuda: Path = CUDA, name: str = "") -> Path:
    """Kernels and host code of a folder as C++, linked with the emulator's runtime."""
    out = OUT / (name or ("emu-checked" if checked else "emu"))
    out.mkdir(parents=True, exist_ok=True)
    runtime, includes = out / "libcuda_emu.so", [f"-I{cuda}", f"-I{ROOT / 'csrc'}"]
    commands = []
    if stale(runtime, [EMU / "cuda_emu.cpp", EMU / "cuda_emu.h"]):
        flags = ["-std=c++17", "-O3", *SIMD, "-g", "-fPIC", "-shared", "-w"]
        commands.append(["g++", *flags, EMU / "cuda_emu.cpp", "-o", runtime, "-ldl"])
    flags = ["-std=c++17", "-x", "c++", "-include", "cuda_emu.h", f"-I{EMU}", f"-I{EMU}/include"]
    flags += [*includes, *SIMD, "-fPIC", "-g", "-fno-strict-aliasing", "-fvisibility=hidden"]
    flags += ["-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function"]
    flags += CHECKED if checked else ["-O2"]
    objects, headers = [], [Path(__file__), EMU / "cuda_emu.h", *(ROOT / "csrc").glob("*.h")]
    headers += [*cuda.glob("*.cuh"), *cuda.glob("*.h")]
    host = [cuda / source.name if source.parent == CUDA else source for source in HOST]
    for source in [*sorted(cuda.glob("*.cu")), *host]:
        target = out / f"{source.stem}.o"
        objects.append(target)
        if stale(target, [source, *headers]):
            plain = ["-x", "c", "-O2", "-fPIC", "-fvisibility=hidden", *includes]
            own = source.parent == cuda  # else the core's own C
            commands.append(["g++", *(flags if own else plain), "-c", source, "-o", target])
    # the largest files first, two at a time
    commands.sort(key=lambda words: -Path(words[-3]).stat().st_size if "-c" in words else 0)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda words: run(*words), commands))
    library = out / "libglm_cuda_emu.so"
    if stale(library, [runtime, *objects]):
        link = [f"-L{out}", "-lcuda_emu", "-Wl,-rpath,$ORIGIN", "-Wl,-z,defs"]
        run("g++", "-shared", *objects, "-o", library, *link)
    return library


def nvcc_flags() -> list[str]:
    host = ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    return ["-std=c++17", "-O3", "--threads", "1", *INCLUDE, *host]


def cpu_seconds(run_it: Callable[[], str]) -> tuple[str, float]:
    """Its result, and the processor time of the processes it ran: other work does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    text = run_it()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return text, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def kernels_of(text: str) -> dict[str, dict[str, int]]:
    """Registers and static shared memory of each kernel, from what ptxas -v says."""
    found = {}
    entry = r"Compiling entry function '(\w+)'.*?\n.*?Used (\d+) registers(.*?)\n"
    for name, registers, rest in re.findall(entry, text + "\n", re.S):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[name] = {"registers": int(registers), "shared": int(shared[1]) if shared else 0}
    return found


def nvcc_gate(only: list[str]) -> dict[str, dict]:
    """{file: {architecture: {seconds, kernels}}}; once more for the host part."""
    gate = ["-Werror", "all-warnings", "-Xptxas"]
    gate += ["-v,-warn-spills,-warn-lmem-usage,-Werror"]
    table: dict[str, dict] = {}
    for source in [k for k in KERNELS if k.stem in only or not only]:
        for arch in ["host", *ARCHS]:
            target = OUT / "nvcc" / f"{source.stem}.{arch}"
            record = target.with_suffix(f".{arch}.json")
            target.parent.mkdir(parents=True, exist_ok=True)
            if stale(record, [source, *HEADERS]):
                how = ["-cubin", f"-arch=sm_{arch}"]
                if arch == "host":
                    how = ["-c", f"-arch=sm_{ARCHS[0]}", "-Xcompiler", "-Wall,-Wno-unused-function"]
                words = [NVCC or "nvcc", *nvcc_flags(), *gate, *how, source, "-o", target]
                text, seconds = cpu_seconds(lambda words=words: run(*words, quiet=True))
                made = {"seconds": round(seconds, 2), "kernels": kernels_of(text)}
                record.write_text(json.dumps(made))
            table.setdefault(source.stem, {})[arch] = json.loads(record.read_text())
    return table


def print_gate(table: dict[str, dict]) -> None:
    for file, by in table.items():
        most = max(by.values(), key=lambda d: d["seconds"])["seconds"]
        registers = {a: max((k["registers"] for k in d["kernels"].values()), default=0)
                     for a, d in by.items() if a != "host"}  # fmt: skip
        shown = ", ".join(f"sm_{a} {r}" for a, r in registers.items())
        print(f"{file:<20} {most:5.1f} s at most; registers: {shown}")


def nvcc_says(*words: str) -> str:
    return subprocess.run([NVCC or "nvcc", *words], capture_output=True, text=True).stdout


def library_archs() -> list[str]:
    """ARCHS, where it is set; else all that we know and this nvcc has code for."""
    if "ARCHS" in os.environ:
        return ARCHS
    listed = nvcc_says("--list-gpu-code").split()
    return [a for a in "75 80 86 89 90 100 120".split() if f"sm_{a}" in listed] or ARCHS


def nvcc_library(archs: list[str]) -> Path:
    OUT.mkdir(parents=True, exist_ok=True)
    library = OUT / "libglm_cuda.so"
    release = re.search(r"release ([0-9.]+)", nvcc_says("--version"))
    text = about(archs, f"nvcc {release[1] if release else ''}", archs[-1])
    built = written(OUT / "about.c", text)
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    code.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    sources = sorted([*KERNELS, *HOST, built], key=lambda source: -source.stat().st_size)
    objects = [OUT / f"{source.stem}.o" for source in sources]

    def compile_it(source: Path, target: Path) -> None:
        flags = nvcc_flags() if source.suffix == ".cu" else nvcc_flags()[1:]
        if stale(target, [source, built, *HEADERS]):
            run(NVCC or "nvcc", *flags, *code, "-c", source, "-o", target)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # 200 MB each
        list(pool.map(compile_it, sources, objects))
    if stale(library, objects):
        # Whole at once: somebody may have the one before it open.
        link = ["-cudart", "static", "-ldl", "-Xlinker", "-zdefs"]
        new = library.with_suffix(f".{os.getpid()}.so")
        run(NVCC or "nvcc", "-shared", *objects, "-o", new, *link)
        new.replace(library)
    return library


def capabilities() -> list[int] | None:
    """Compute capabilities, 90 for 9.0, of the GPUs that nvidia-smi lists, none where it is too old
    to tell them; None where there is no GPU."""
    try:
        words = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        asked = subprocess.run(words, capture_output=True, text=True, timeout=60)
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if listed.returncode or "GPU" not in listed.stdout:
        return None
    found = re.findall(r"^\s*(\d+)\.(\d)\s*$", asked.stdout, re.M) if not asked.returncode else []
    return sorted({10 * int(major) + int(minor) for major, minor in found})


def fitting(found: list[int], archs: list[str]) -> list[str]:
    """For each GPU the code that it runs best: its own, else the nearest before it, which it runs
    where the first digits are equal and by PTX, of the last, elsewhere."""
    best = [[a for a in archs if int(a) <= capability] for capability in found]
    return sorted({fit[-1] for fit in best if fit}, key=int)


def here() -> Path:
    """The library for this machine's GPUs. SystemExit with a sentence where none can be made."""
    import nvrtc

    found, why = capabilities(), []
    if found is None:
        raise SystemExit("no GPU answers here (nvidia-smi -L)")
    usable = [capability for capability in found if capability >= OLDEST]
    if found and not usable:
        told = ", ".join(f"{capability / 10:.1f}" for capability in found)
        raise SystemExit(f"this GPU's compute capability is {told}: there is code from 7.0 on")
    if NVCC:
        listed = re.findall(r"sm_(\d+)\b", nvcc_says("--list-gpu-code"))
        archs = fitting(usable, sorted(listed, key=int)) if usable else library_archs()
        try:
            if archs:
                return nvcc_library(archs)
            why.append(f"{NVCC} has no code for compute capability {usable[0] / 10:.1f}")
        except SystemExit as error:
            why.append(str(error)[:300])
    try:
        # a kernel that spills is slow there, and better than none
        return nvrtc.library(OUT, fitting(usable, nvrtc.ARCHS) or nvrtc.ARCHS, strict=False)
    except SystemExit as error:
        why.append(str(error)[:300])
    raise SystemExit(
        "; ".join([*why, "or install a CUDA toolkit (11.8 or newer), whose nvcc does it"])
    )


if __name__ == "__main__":
    goal = sys.argv[1] if len(sys.argv) > 1 else ""
    if goal in ("emu", "emu-checked"):
        print(emu(goal == "emu-checked"))
    elif goal == "nvcc":
        print_gate(nvcc_gate(sys.argv[2:]))
    elif goal == "budget":
        import budget

        budget.check(nvcc_gate([]), OUT / "nvcc", nvcc_flags())
    elif goal == "here":
        print(here())
    elif goal == "lib":
        print(nvcc_library(library_archs()))
    elif goal in ("nvrtc", "lib12"):
        import nvrtc

        nvrtc.print_gate(OUT, nvrtc.ARCHS)
        print(nvrtc.library(OUT, nvrtc.ARCHS) if goal == "lib12" else nvrtc.VERDICT)
    else:
        raise SystemExit(__doc__)
