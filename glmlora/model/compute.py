"""The number type of a model's large products on the CPU: what the processor multiplies fast.

bfloat16 rounds both operands to 8 significant bits and sums in float32; int8 does so to 8-bit
integers with a scale for each 2,048 columns of a row, outliers kept apart, over int8 weights
(bfloat16 over others). Adapters, norms, attention's softmax and the optimiser stay in float32.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from .. import _core

COMPUTE_DTYPES = ("float32", "bfloat16", "int8")
_told: set[str] = set()


def compute_dtype(asked: str | None, stored: Iterable[str]) -> str:
    """The type for a model whose matrices are stored as `stored` ("F32", "F16", "I8", ..): the one
    asked for, else the environment variable GLMLORA_COMPUTE_DTYPE's, else ("auto") bfloat16 where
    the processor has such products and the weights are of 16 bits or less, float32 elsewhere.

    Raises ValueError for a type that is unknown or that this processor does not multiply.
    """
    wanted = asked or os.environ.get("GLMLORA_COMPUTE_DTYPE") or "auto"
    fast = "avx512bf16" in (os.environ.get("GLMLORA_ISA") or _core.cpu_variants()).split(",")
    if wanted == "auto":
        return "bfloat16" if fast and any(s not in ("F32", "F64") for s in stored) else "float32"
    if wanted not in COMPUTE_DTYPES:
        raise ValueError(
            f"compute_dtype: expected auto, {', '.join(COMPUTE_DTYPES)}, got {wanted!r}"
        )
    if wanted != "float32" and not fast:
        raise ValueError(
            f"compute_dtype: this processor does not multiply {wanted} (that takes AVX-512 BF16, "
            "VNNI and VBMI); expected auto or float32"
        )
    return wanted


def backend_of(backend: str, asked: str | None, stored: Iterable[str]) -> str:
    """The name of the core's backend for a model: `backend`, on the CPU with its type of products,
    which is told once on stderr where it is not float32."""
    if backend != "cpu":
        return backend
    kind = compute_dtype(asked, stored)
    if kind != "float32" and kind not in _told:
        _told.add(kind)
        print(f'products in {kind} (compute_dtype="float32" for exact ones)', file=sys.stderr)
    return backend if kind == "float32" else f"{backend}/{kind}"
