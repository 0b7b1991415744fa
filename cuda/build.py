"""Builds the CUDA library, or checks that it compiles.

    python cuda/build.py emu              libglm_cuda_emu.so by the host's compiler, on the emulator
    python cuda/build.py emu-checked      the same with every memory access checked
    python cuda/build.py nvcc [FILE..]    each file for each architecture; warnings, spills and
                                          local memory are errors; objects are thrown away
    python cuda/build.py lib              libglm_cuda.so by nvcc, for all architectures

EMU_DIR (default cuda/emu): where the emulator is. OUT (default build/cuda): where results go.
Only files that changed are compiled; one at a time.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "cuda"
OUT = Path(os.environ.get("OUT", ROOT / "build/cuda"))
EMU = Path(os.environ.get("EMU_DIR", CUDA / "emu")).resolve()
ARCHS = os.environ.get("ARCHS", "75 80 86 89 90").split()
KERNELS = sorted(CUDA.glob("*.cu"))
HOST = [CUDA / "device.c", CUDA / "blas.c", ROOT / "csrc/status.c"]
HEADERS = [Path(__file__), *CUDA.glob("*.cuh"), *CUDA.glob("*.h"), *(ROOT / "csrc").glob("*.h")]
INCLUDE = [f"-I{CUDA}", f"-I{ROOT / 'csrc'}"]
SIMD = ["-mf16c", "-mavx2", "-mfma"]
CHECKED = ["-O1", "-fsanitize=thread", "-fsanitize=alignment"]
CHECKED += ["--param=tsan-instrument-func-entry-exit=0"]


def run(*command: object, quiet: bool = False) -> str:
    words = [str(c) for c in command]
    print(shlex.join(words) if not quiet else f"{words[0]} {words[-3]}", flush=True)
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        kept = [line for line in done.stdout.splitlines() if "ptxas info" not in line]
        print("\n".join(line for line in kept if " 0 bytes spill loads" not in line))
        raise SystemExit(f"failed: {shlex.join(words)}")
    return done.stdout


def stale(target: Path, sources: list[Path]) -> bool:
    return not target.exists() or target.stat().st_mtime < max(p.stat().st_mtime for p in sources)


def emu(checked: bool) -> Path:
    """Kernels and host code as C++, linked with the emulator's runtime."""
    out = OUT / ("emu-checked" if checked else "emu")
    out.mkdir(parents=True, exist_ok=True)
    runtime = out / "libcuda_emu.so"
    engine = [EMU / "cuda_emu.cpp", EMU / "cuda_emu.h"]
    if stale(runtime, engine):
        flags = ["-std=c++17", "-O3", *SIMD, "-g", "-fPIC", "-shared", "-w"]
        run("g++", *flags, engine[0], "-o", runtime, "-ldl")
    flags = ["-std=c++17", "-x", "c++", "-include", "cuda_emu.h", f"-I{EMU}", f"-I{EMU}/include"]
    flags += [*INCLUDE, *SIMD, "-fPIC", "-g", "-fno-strict-aliasing", "-fvisibility=hidden"]
    flags += ["-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function"]
    objects = []
    for source in KERNELS + HOST:
        target = out / f"{source.stem}.o"
        objects.append(target)
        if stale(target, [source, EMU / "cuda_emu.h", *HEADERS]):
            if source.parent != CUDA:  # the core's own C
                plain = ["-x", "c", "-O2", "-fPIC", "-fvisibility=hidden", *INCLUDE]
                run("g++", *plain, "-c", source, "-o", target)
                continue
            run("g++", *flags, *(CHECKED if checked else ["-O2"]), "-c", source, "-o", target)
    library = out / "libglm_cuda_emu.so"
    link = [f"-L{out}", "-lcuda_emu", "-Wl,-rpath,$ORIGIN", "-Wl,-z,defs"]
    run("g++", "-shared", *objects, "-o", library, *link)
    return library


def nvcc_flags() -> list[str]:
    host = ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    return ["-std=c++17", "-O3", "--threads", "1", *INCLUDE, *host]


def nvcc_gate() -> None:
    """Registers by kernel and architecture, most first."""
    gate = ["-Werror", "all-warnings", "-Xptxas"]
    gate += ["-v,-warn-spills,-warn-lmem-usage,-Werror"]
    for source in [k for k in KERNELS if k.stem in sys.argv[2:] or not sys.argv[2:]]:
        for arch in ARCHS:
            target = [f"-arch=sm_{arch}", "-c", source, "-o", os.devnull]
            text = run("nvcc", *nvcc_flags(), *gate, *target, quiet=True)
            found = re.findall(
                r"Compiling entry function '(\w+)'.*?Used (\d+) registers", text, re.S
            )
            found.sort(key=lambda f: -int(f[1]))
            print(f"  {source.stem} sm_{arch}:", *(f"{n} {r}" for n, r in found[:4]), flush=True)


def nvcc_library() -> Path:
    OUT.mkdir(parents=True, exist_ok=True)
    library = OUT / "libglm_cuda.so"
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
    code.append(f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}")
    objects = []
    for source in KERNELS + HOST:
        target = OUT / f"{source.stem}.o"
        objects.append(target)
        if stale(target, [source, *HEADERS]):
            flags = nvcc_flags() if source.suffix == ".cu" else nvcc_flags()[1:]
            run("nvcc", *flags, *code, "-c", source, "-o", target)
    run(
        "nvcc",
        "-shared",
        *objects,
        "-o",
        library,
        "-cudart",
        "static",
        "-ldl",
        "-Xlinker",
        "-zdefs",
    )
    return library


if __name__ == "__main__":
    goal = sys.argv[1] if len(sys.argv) > 1 else ""
    if goal in ("emu", "emu-checked"):
        print(emu(goal == "emu-checked"))
    elif goal == "nvcc":
        nvcc_gate()
    elif goal == "lib":
        print(nvcc_library())
    else:
        raise SystemExit(__doc__)
