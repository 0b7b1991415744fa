"""Which device a model computes on, and the number type of its large products there.

    "cpu"; "cuda", "cuda:1", 1: a GPU; "emu": the CUDA library on the emulator, for tests;
    "auto": a GPU where there is one, else the CPU

The environment: CUDA_VISIBLE_DEVICES as everywhere; GLMLORA_DEVICE, the device of models for which
none is named and the meaning of "cuda" (GLMLORA_DEVICE=emu runs an unchanged notebook there);
GLMLORA_STRICT_DEVICE=1 makes a GPU that is not there an error; GLMLORA_CUDA_LIBRARY names the
library in place of the one beside this package; GLMLORA_CUDA_CHECK=1 waits for each op and names
the one that fails.

Products on the CPU are in what the processor multiplies fast: bfloat16 rounds both operands to 8
significant bits and sums in float32; int8 does so to 8-bit integers over weights of 8 or 4 bits
(over others bfloat16 where the processor has it, else float32), with a scale for each 2,048 columns
of a row, outliers kept apart, or for each 32 columns where the weights have groups; gradients of
what meets groups stay in bfloat16 or float32. Adapters, norms, attention's softmax and the
optimiser stay in float32.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import _core, tell
from ..progress import notices

KINDS = ("cpu", "cuda", "emu")
_COMPUTE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
COMPUTE_DTYPES = ("float32", "bfloat16", "int16", "int8")
BFLOAT16_SETS = ("amx", "avx512bf16", "neon_bf16")  # the core's instruction sets that multiply it

_warned: set[str] = set()
_announced: set[str] = set()


class Device(str):
    """Where a model computes: equal to its name ("cpu", "cuda:0"), with torch's `.type` and
    `.index`.
    """

    @property
    def type(self) -> str:
        """Kind of device, "cpu", "cuda" or "emu"."""
        return self.partition(":")[0]

    @property
    def index(self) -> int | None:
        """Number of the device, None for the CPU."""
        return int(self.partition(":")[2] or 0) if self.type != "cpu" else None


def info(device: str = "cuda") -> dict[str, Any]:
    """What `_core.device_info` says, `count` 0 and `why` where there is no library, either."""
    try:
        found = _core.device_info(device)
    except ValueError as error:
        if "CUDA devices" in str(error):
            raise
        return {"count": 0, "why": str(error)}
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not found["count"] and hidden is not None and device.startswith("cuda"):
        found["why"] += f"; CUDA_VISIBLE_DEVICES is {hidden!r}"
    return found


def is_available(kind: str = "cuda") -> bool:
    """Whether there is a device of this kind, and a library for it."""
    return info(kind)["count"] > 0


def parse(device: Any) -> Device | None:
    """A device's whole name from what users pass. None and "auto": what GLMLORA_DEVICE names, else
    None. ValueError for a name that is none.
    """
    if device is None or str(device) == "auto":
        device = os.environ.get("GLMLORA_DEVICE") or None
    if device is None:
        return None
    name = f"cuda:{device}" if isinstance(device, int) else str(device)
    found = re.fullmatch(r"(cpu|cuda|emu|mps)(?::([0-9]{1,4}))?", name)
    if not found or (found.group(1) == "cpu" and found.group(2)):
        raise ValueError(f"device: expected 'cpu', 'auto', 'cuda', 'cuda:0' .., got {device!r}")
    kind, index = found.groups()
    preferred = os.environ.get("GLMLORA_DEVICE") or ""
    if kind == "cuda" and preferred.partition(":")[0] == "emu":
        kind = "emu"
    return Device(kind if kind == "cpu" else f"{kind}:{index or 0}")


def find(device: Any, default: str = "cpu") -> Device:
    """The device to compute on. None: `default`, or what GLMLORA_DEVICE names. A GPU that is not
    there is the CPU with one warning, or a RuntimeError where GLMLORA_STRICT_DEVICE is 1.

    Raises ValueError for a name that is none, and for the fourth GPU where there are two.
    """
    wanted = parse(device)
    if wanted is None and device is None:
        return Device(default)
    if wanted is None:
        return Device("cuda:0") if is_available() else Device("cpu")
    if wanted == "cpu":
        return wanted
    if wanted.type == "mps":
        return _missing(wanted, "this build computes on the CPU and on CUDA devices")
    found = info(wanted)
    if not found["count"]:
        return _missing(wanted, found["why"])
    return wanted


def _missing(wanted: Device, why: str) -> Device:
    if os.environ.get("GLMLORA_STRICT_DEVICE") == "1":
        raise RuntimeError(f"{wanted}: {why} (GLMLORA_STRICT_DEVICE=1 makes this an error)")
    if wanted.type not in _warned:
        _warned.add(wanted.type)
        tell.warn(f"{wanted}: {why}: the model stays on the CPU")
    return Device("cpu")


def backend(device: Device, stored: str, cpu: str = "cpu", compute_dtype: str | None = None) -> str:
    """The core's name of a device for weights stored in `stored` ("F32", "F16", "BF16"): large
    products are in that type where the device has it, float32 otherwise.

    cpu: its name for the CPU. compute_dtype: "float32", "float16" or "bfloat16" in place of that.
    """
    if device == "cpu":
        return cpu
    capability = tuple(_present(device)["capability"])
    named = {name: kind for kind, name in _COMPUTE.items()}
    stored = named.get(compute_dtype or "", stored)
    if stored == "BF16" and capability < (8, 0):
        stored = "F16"
    if capability < (7, 5):
        stored = "F32"
    if device.type == "cuda":
        preload_cublas(device)
    return f"{device}/{_COMPUTE.get(stored, 'float32')}"


def _present(device: Device) -> dict[str, Any]:
    """`info` of a device that a model is on; RuntimeError where it is no longer there."""
    found = info(device)
    if not found["count"]:
        raise RuntimeError(f"{device}: {found['why']}")
    return found


def preload_cublas(device: str = "cuda") -> Path | None:
    """Load cuBLAS from NVIDIA's wheels, unless the process has it: that comes first in the core's
    own search (in the process, beside this package, by the system's loader). Returns its file.

    device: the one that will be used, since the question which CUDA it needs makes a context there.
    """
    import ctypes

    for major, folder in ((13, "cu13"), (12, "cublas")):
        try:
            ctypes.CDLL(f"libcublas.so.{major}", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            return None
        except OSError:
            pass
        for entry in sys.path:
            file = Path(entry or ".") / "nvidia" / folder / "lib" / f"libcublas.so.{major}"
            if file.is_file() and info(device).get("runtime", 0) // 1000 == major:
                ctypes.CDLL(str(file.with_name(f"libcublasLt.so.{major}")))
                ctypes.CDLL(str(file))
                return file
    return None


def memory_available(device: Device) -> int:
    """Free bytes of the device, or what this process could still get."""
    return _core.memory_available() if device == "cpu" else _present(device)["free"]


def compute_dtype(asked: str | None, stored: Iterable[str]) -> str:
    """The type for a model whose matrices are stored as `stored` ("F32", "F16", "I8", ..): the one
    asked for, else the environment variable GLMLORA_COMPUTE_DTYPE's, else ("auto") bfloat16 where
    the processor has such products and the weights are of 16 bits or less; elsewhere int16 where
    there are weights of 8 or 4 bits, and float32.

    Raises ValueError for a type that is unknown or that this processor does not multiply.
    """
    wanted = asked or os.environ.get("GLMLORA_COMPUTE_DTYPE") or "auto"
    sets = (os.environ.get("GLMLORA_ISA") or _core.cpu_variants()).split(",")
    fast = any(name in BFLOAT16_SETS for name in sets)
    if wanted == "auto":
        kinds = set(stored)
        if fast and kinds - {"F32", "F64"}:
            return "bfloat16"
        return "int16" if kinds & {"I8", "I4"} else "float32"
    if wanted not in COMPUTE_DTYPES:
        raise ValueError(
            f"compute_dtype: expected auto, {', '.join(COMPUTE_DTYPES)}, got {wanted!r}"
        )
    if wanted == "bfloat16" and not fast:
        raise ValueError(
            "compute_dtype: this processor does not multiply bfloat16 (that takes AVX-512 BF16, "
            "VNNI and VBMI, or BF16 and I8MM on aarch64); expected auto, float32, int16 or int8"
        )
    return wanted


def missing_kernels() -> list[str]:
    """Instruction sets that this processor runs and the core was built without, best first."""
    sets = _core.cpu_kernels().items()
    return [name for name, (compiled, runs) in sets if runs and not compiled]


def tell_missing_kernels() -> None:
    """Name on stderr, once, the kernels that would be faster and were not compiled."""
    if "kernels" in _announced:  # not per model: cpuid takes 0.1 ms in a virtual machine
        return
    _announced.add("kernels")
    missing = ", ".join(missing_kernels())
    if missing:
        print(
            f"glmlora was built without the kernels for {missing}, which this processor has: it "
            "computes slower. Install a wheel, or build it with a newer gcc or clang",
            file=sys.stderr,
        )


def backend_of(backend: str, asked: str | None, stored: Iterable[str]) -> str:
    """The name of the core's backend for a model: `backend`, on the CPU with its type of products,
    which is named once on stderr where it is not float32.
    """
    if backend != "cpu":
        return backend
    tell_missing_kernels()
    kind = compute_dtype(asked, stored)
    if kind != "float32" and kind not in _announced:
        _announced.add(kind)
        print(f'products in {kind} (compute_dtype="float32" for exact ones)', file=notices())
    return backend if kind == "float32" else f"{backend}/{kind}"
