"""The static budget of the kernels, from what nvcc compiled: shared memory, occupancy by formula,
and from the PTX of compute_75 whether attention multiplies on tensor cores and reads its operands
by ldmatrix, and whether streaming kernels move 16 bytes at a time. Nothing here ran on a GPU."""

from __future__ import annotations

import re
from pathlib import Path

from common import CUDA, HEADERS, run, stale

# Of a multiprocessor: warps, blocks, bytes of shared memory, and what a block takes beside its own.
# From the table "Technical Specifications per Compute Capability" of the CUDA programming guide.
LIMITS = {
    "75": (32, 16, 64 << 10, 0),
    "80": (64, 32, 164 << 10, 1 << 10),
    "86": (48, 16, 100 << 10, 1 << 10),
    "89": (48, 24, 100 << 10, 1 << 10),
    "90": (64, 32, 228 << 10, 1 << 10),
}
SMALL = ("75", "86", "89")  # on which no tall tile is launched
REGISTERS, REGISTER_UNIT, SHARED_UNIT = 65536, 256, 128
WITHOUT_ASKING = 48 << 10  # dynamic shared memory of a launch; GLM_LAUNCH asks for what is more

# A kernel reads and writes whole arrays once, 16 bytes a thread at a time, but for these: tiles,
# products of few rows, sums that leave little, and what computes more than it moves.
OTHERS = re.compile(
    r"k_(attention_|few_|gated_|factor$|sum_partials$|column_sum$|rmsnorm_dweight$|prefix_|merge$"
    r"|quantize$|convert_double$)"
)
# Those that only read.
NO_STORES = {
    "k_cross_entropy_forward",
    "k_sum_squares",
    "k_first_nonfinite",
    "k_argmax",
    "k_choose",
    "k_largest",
}


def tile_stride(HD: int) -> int:  # noqa: N803  as cuda/attention.cuh
    return (HD + 3) // 4 * 4 + 4


def dynamic_shared() -> dict[str, int]:
    """Bytes at launch of the kernels that take any, for the widest heads of each (the launchers in
    cuda/attention_*.cu)."""
    found = {}
    for T, HD in ((32, 64), (16, 128), (8, 256)):  # noqa: N806
        tiles = 3 * T * tile_stride(HD)
        found[f"k_attention_forward_{T}"] = 4 * (tiles + T * T)
        found[f"k_attention_dq_{T}"] = 4 * (tiles + T * (T // 2))
        found[f"k_attention_dkv_{T}"] = 4 * (tiles + 2 * T * (T // 2) + T)
    for D in (64, 128):  # noqa: N806
        for type_ in ("f16", "bf16"):
