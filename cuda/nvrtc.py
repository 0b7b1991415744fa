"""The kernels by NVRTC 12.9: cubins for sm_70 to sm_120, with no warning, spill or local memory,
and PTX for what comes later. Needs the wheels nvidia-cuda-nvrtc-cu12 and -runtime-cu12, no nvcc."""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import sysconfig
import time
from pathlib import Path

import common
from common import CUDA, HOST, INCLUDE, KERNELS, ROOT, about, run, stale

ARCHS = "70 75 80 86 89 90 100 120".split()
VERDICT = "no warning, spill or local memory"
PTX = "70"  # of which a driver makes code for a GPU that none of ARCHS is for

# What the sources want of the C library; the compiler has memcpy and the mathematics built in.
HEADERS = {
    "stddef.h": "#pragma once\n",
    "string.h": "#pragma once\n",
    "stdint.h": """#pragma once
typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long long int64_t;
typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned uint32_t;
typedef unsigned long long uint64_t; typedef unsigned long long uintptr_t;
""",
}


def wheels() -> Path:
    """The folder `nvidia` of the wheels; SystemExit with what to install."""
    # pip hides the environment's packages from what it builds, but not where they lie
    own = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for entry in [os.environ.get("NVIDIA_WHEELS", ""), *sys.path, *own]:
        folder = Path(entry or ".") / "nvidia"
        if all(
            (folder / part).is_dir() for part in ("cuda_nvrtc/lib", "cuda_runtime", "cuda_nvcc")
        ):
            return folder
    raise SystemExit(
        "NVRTC is not found: pip install nvidia-cuda-nvrtc-cu12==12.9.86 "
        "nvidia-cuda-runtime-cu12==12.9.79 nvidia-cuda-nvcc-cu12==12.9.86, or set NVIDIA_WHEELS"
    )


class Compiler:
    """NVRTC, for one source at a time."""

    def __init__(self) -> None:
        self.folder = wheels()
        self.lib = ctypes.CDLL(str(self.folder / "cuda_nvrtc" / "lib" / "libnvrtc.so.12"))
        self.lib.nvrtcGetErrorString.restype = ctypes.c_char_p

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(self.lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        getattr(self.lib, f"nvrtcGet{what}")(program, text)
        return text.raw

    def compile(self, source: Path, arch: str, folders: list[Path]) -> tuple[bytes, str]:
        """(cubin of "sm_86", or PTX of "compute_70"; the log). SystemExit with it on errors."""
        names = (ctypes.c_char_p * len(HEADERS))(*(n.encode() for n in HEADERS))
        texts = (ctypes.c_char_p * len(HEADERS))(*(t.encode() for t in HEADERS.values()))
        program = ctypes.c_void_p()
        self.lib.nvrtcCreateProgram(
            ctypes.byref(program), source.read_bytes(), source.name.encode(),
            len(HEADERS), texts, names,
        )  # fmt: skip
        options = [f"--gpu-architecture={arch}", "-std=c++17", "-default-device"]
        options.append("--ptxas-options=-v")
        folders = [*folders, self.folder / "cuda_runtime" / "include"]
        options += [f"-I{folder}" for folder in folders]
        given = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        status = self.lib.nvrtcCompileProgram(program, len(options), given)
        log = self._text(program, "ProgramLog").rstrip(b"\0").decode()
        if status:
            raise SystemExit(f"{source.name} {arch}: {log[-3000:]}")
        code = self._text(program, "CUBIN" if arch.startswith("sm_") else "PTX")
        self.lib.nvrtcDestroyProgram(ctypes.byref(program))
        return code, log


def faults_of(log: str) -> list[str]:
    """Warnings, spills and local memory that a log tells of."""
    old = "Architectures prior to '<compute/sm>_75' are deprecated"  # of the option, not the source
    lines = [line for line in log.splitlines() if old not in line]
    found = [line for line in lines if "warning" in line.lower()]
    for frame, stores, loads in re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    ):
        if int(frame) or int(stores) or int(loads):
            found.append(f"{frame} bytes of stack, {stores} and {loads} of spills")
    return found


def gate(out: Path, archs: list[str], strict: bool = True) -> dict[str, dict[str, float]]:
    """Compiles for these architectures, and to PTX, what changed into out/nvrtc;
    {file: {architecture: seconds}}. strict: SystemExit for what faults_of finds."""
    compiler, faults, table = None, [], {}
    for source in KERNELS:
        for arch in targets(archs):
            target = out / "nvrtc" / f"{source.stem}.{arch}"
            target.parent.mkdir(parents=True, exist_ok=True)
            record = target.with_name(target.name + ".json")
            if stale(record, [source, *common.HEADERS]):
                compiler = compiler or Compiler()
                begin = time.process_time()
                code, log = compiler.compile(source, arch, [CUDA, ROOT / "csrc"])
                seconds = round(time.process_time() - begin, 2)
                bad = faults_of(log)
                faults += [f"{source.stem} {arch}: {b}" for b in bad]
                target.write_bytes(code)
                if not bad:
                    kernels = len(re.findall("Compiling entry function", log))
                    record.write_text(json.dumps({"seconds": seconds, "kernels": kernels}))
                table.setdefault(source.stem, {})[arch] = seconds
            else:
                table.setdefault(source.stem, {})[arch] = json.loads(record.read_text())["seconds"]
    if faults and strict:
        raise SystemExit("\n".join(faults))
    return table


# The host part of a .cu file for a plain C++ compiler: what is for the device goes, kernels are
# only declared (named.h says what stands for them).

MARKS = """#pragma once
#include <cuda_runtime_api.h>
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#undef __forceinline__
#define __global__ GLM_MARK_KERNEL
#define __device__ GLM_MARK_DEVICE
#define __host__ GLM_MARK_HOST
#define __shared__ static
#define __launch_bounds__(...)
#define __forceinline__ inline
"""


def host_part(text: str) -> str:
    """Preprocessed source without device functions and without bodies of kernels."""
    out, head, at = [], "", 0
    while at < len(text):
        c = text[at]
        if c == '"':  # a string of a declaration: extern "C"
            end = text.index('"', at + 1) + 1
            head, at = head + text[at:end], end
        elif c == ";":
            if "GLM_MARK_DEVICE" not in head or "GLM_MARK_HOST" in head:
                out.append(head + ";")
            head, at = "", at + 1
        elif c == "{" and re.fullmatch(r'\s*extern\s+"C"\s*', head):
            out.append(head + "{")
            head, at = "", at + 1
        elif c == "}":  # of an extern "C" block
            out.append(head + "}")
            head, at = "", at + 1
        elif c == "{":
            end, depth = at, 0
            while True:
                if text[end] in "\"'":
                    quote, end = text[end], end + 1
                    while text[end] != quote:
                        end += 2 if text[end] == "\\" else 1
                depth += {"{": 1, "}": -1}.get(text[end], 0)
                end += 1
                if depth == 0:
                    break
            body = text[at:end]
            if "GLM_MARK_KERNEL" in head:
                out.append(head + ";")
                head = ""
            elif "GLM_MARK_DEVICE" in head and "GLM_MARK_HOST" not in head:
                head = ""
            elif re.search(r"\b(struct|enum|union|class)\b[^()]*$|=\s*$", head):
                head += body  # goes on to its semicolon
            else:
                out.append(head + body)
                head = ""
            at = end
        else:
            head, at = head + c, at + 1
    return re.sub(r"\bGLM_MARK_\w+\b", "", "".join(out) + head)


def linked(out: Path, archs: list[str]) -> Path:
    """libglm_cuda12.so: host parts by the C++ compiler, code of all targets inside, cudart 12.9
    linked in. Opens on machines without CUDA."""
    runtime, folder = wheels() / "cuda_runtime", out / "nvrtc"
    (folder / "include").mkdir(parents=True, exist_ok=True)
    (folder / "include" / "cuda_runtime.h").write_text(MARKS)
    for name in ("cuda_fp16.h", "cuda_bf16.h"):
        (folder / "include" / name).write_text("#pragma once\n")
    toolkit = [f"-I{runtime / 'include'}", f"-I{wheels() / 'cuda_nvcc' / 'include'}"]
    paths = [f"-I{folder / 'include'}", *INCLUDE, *toolkit]
    flags = ["-O2", "-fPIC", "-fvisibility=hidden", "-DGLM_NAMED"]
    objects, names = [], []
    for source in KERNELS:
        words = ["g++", "-E", "-P", "-x", "c++", "-std=c++17", "-DGLM_NAMED", *paths, source]
        text = host_part(run(*words, quiet=True))
        names += re.findall(r"void\s+(k_\w+)\s*\(", text)
        made = folder / f"{source.stem}.host.cpp"
        made.write_text(text)
        objects.append(folder / f"{source.stem}.host.o")
        run("g++", "-std=c++17", "-w", *flags, "-c", made, "-o", objects[-1], quiet=True)
    lines = [f'const char {n}[] = "{n}";' for n in sorted(set(names))]
    table = []
    for i, (source, arch) in enumerate((s, a) for s in KERNELS for a in targets(archs)):
        kind, _, sm = arch.partition("_")
        file = folder / f"{source.stem}.{arch}"
        lines.append(
            f'__asm__(".section .rodata\\n.balign 64\\nimage{i}: .incbin \\"{file}\\"\\n'
            f'.byte 0\\n.previous"); extern const unsigned char image{i}[];'
        )
        table.append(f"{{{sm}, {int(kind == 'compute')}, image{i}}}")
    lines.append(f"const struct glm_image glm_images[] = {{{', '.join(table)}}};")
    lines.append(f"const int glm_n_images = {len(table)};")
    lines.append(about(archs, "NVRTC 12.9", PTX))
    made = folder / "images.c"
    made.write_text('#include "named.h"\n' + "\n".join(lines) + "\n")
    plain = [*toolkit, *INCLUDE]
    for source in [*HOST, CUDA / "named.c", made]:
        objects.append(folder / f"{source.stem}.host.o")
        words = ["gcc", "-std=gnu11", "-Wall", "-Wno-parentheses", *flags, *plain]
        run(*words, "-c", source, "-o", objects[-1], quiet=True)
    target = out / "libglm_cuda12.so"
    link = [runtime / "lib" / "libcudart_static.a", "-lpthread", "-ldl", "-lrt", "-Wl,-z,defs"]
    run("g++", "-shared", *objects, "-o", target, *link, quiet=True)
    return target


def targets(archs: list[str]) -> list[str]:
    """What there is code for, as NVRTC names it."""
    return [*(f"sm_{a}" for a in archs), f"compute_{PTX}"]


def print_gate(out: Path, archs: list[str]) -> None:
    for file, by in gate(out, archs).items():
        print(f"{file:<20} {max(by.values()):5.1f} s at most, {len(by)} targets")


def library(out: Path, archs: list[str], strict: bool = True) -> Path:
    """libglm_cuda12.so, after the gate."""
    gate(out, archs, strict)
    return linked(out, archs)
