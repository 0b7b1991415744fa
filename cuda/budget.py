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
# products of few rows or ranks, sums that leave little, what computes more than it moves, and
# k_widen, whose threads have seven loads each on their way (2.2 to 2.6 TB/s on an H100).
OTHERS = re.compile(
    r"k_(attention_|few_|turned_|gated_|normed_|turn$|thin_(in|out|gradient)(_dropped)?(_b?f16)?$|adapter_[ab](_dropped)?(_b?f16)?$|widen$|factor$|sum_partials$|column_sum$|rmsnorm_dweight$|layernorm_gradients$|prefix_|merge$"
    r"|quantize$|convert_double$|dora_norm$|dora_dmagnitude$)"
)
# Those that only read.
NO_STORES = {
    "k_cross_entropy_forward",
    "k_sum_squares",
    "k_first_nonfinite",
    "k_argmax",
    "k_choose",
    "k_largest",
    "k_swiglu_largest",
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
            found[f"k_attention_forward_{type_}_{D}"] = (64 + 2 * 64) * D * 2
            found[f"k_attention_forward_{type_}_{D}_tall"] = (128 + 2 * 64) * D * 2
            found[f"k_attention_gradients_{type_}_{D}"] = 128 * (D + 8) * 2 + (9 << 10)
    return found


def blocks_at_once(arch: str, threads: int, registers: int, shared: int) -> int:
    """Blocks of a multiprocessor at the same time."""
    warps, blocks, bytes_, per_block = LIMITS[arch]
    of_block = -(-threads // 32)
    of_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    taken = -(-(shared + per_block) // SHARED_UNIT) * SHARED_UNIT
    by_registers = REGISTERS // of_warp // of_block
    return min(warps // of_block, blocks, by_registers, bytes_ // taken if taken else blocks)


def entries(ptx: str) -> dict[str, str]:
    """The text of each kernel."""
    parts = re.split(r"\.visible \.entry (\w+)\(", ptx)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def count(text: str, *pieces: str) -> int:
    return sum(len(re.findall(piece, text)) for piece in pieces)


def check(table: dict[str, dict], folder: Path, flags: list[str]) -> None:
    """Prints a line for each kernel; SystemExit names those over the budget."""
    faults, dynamic, seen = [], dynamic_shared(), set()
    print(f"{'kernel':<34}{'threads':>8}{'shared':>8}{'sm_75':>8}{'sm_86':>8}  16-byte moves, mma")
    for file, by_arch in table.items():
        ptx = folder / f"{file}.ptx"
        if stale(ptx, [CUDA / f"{file}.cu", *HEADERS]):
            run(
                "nvcc",
                *flags,
                "-ptx",
                "-arch=compute_75",
                CUDA / f"{file}.cu",
                "-o",
                ptx,
                quiet=True,
            )
        for name, text in entries(ptx.read_text()).items():
            streams = not OTHERS.match(name)
            seen.add(name)
            threads = int(re.search(r"\.maxntid (\d+)", text)[1])
            shared = by_arch["75"]["kernels"][name]["shared"] + dynamic.get(name, 0)
            blocks, share = {}, {}
            for arch in LIMITS:
                if arch not in by_arch:
                    continue
                registers = by_arch[arch]["kernels"][name]["registers"]
                blocks[arch] = blocks_at_once(arch, threads, registers, shared)
                share[arch] = blocks[arch] * -(-threads // 32) / LIMITS[arch][0]
            loads = count(
                text, r"ld\.global(?:\.nc)?\.v4\.[a-z]32", r"ld\.global(?:\.nc)?\.v2\.[a-z]64"
            )
            stores = count(text, r"st\.global\.v4\.[a-z]32", r"st\.global\.v2\.[a-z]64")
            mma, operands = count(text, r"mma\.sync"), count(text, r"ldmatrix", r"wmma\.load")
            shown = "".join(f"{share[a]:8.0%}" for a in ("75", "86") if a in share)
            print(f"{name:<34}{threads:>8}{shared:>8}{shown}  {loads} in, {stores} out, {mma}")
            if shared > WITHOUT_ASKING and not name.endswith("_tall"):
                faults.append(f"{name}: {shared} bytes of shared memory")
            if ".local " in text:
                faults.append(f"{name}: local memory")
            for arch in share:
                if streams and share[arch] < 0.5:
                    faults.append(f"{name}: occupancy {share[arch]:.0%} on sm_{arch}")
                small = arch in (SMALL if name.endswith("_tall") else SMALL[:1])
                full = small and re.search(r"attention_((forward|gradients)_b?f16|decode)", name)
                if "attention" in name and blocks[arch] < (1 if full else 2):
                    faults.append(f"{name}: {blocks[arch]} blocks at once on sm_{arch}")
            if streams and (not loads or (not stores and name not in NO_STORES)):
                faults.append(f"{name}: {loads} loads and {stores} stores of 16 bytes")
            tiles = re.search(r"attention_(forward|gradients)_f16", name)
            if tiles and not name.endswith("_tall") and not (mma and operands):
                faults.append(f"{name}: {mma} mma, {operands} ldmatrix")
    absent = (NO_STORES | set(dynamic)) - seen
    if absent:
        faults.append(f"no such kernels: {', '.join(sorted(absent))}")
    if faults:
        raise SystemExit("over the budget: " + "; ".join(faults))
    print("within the budget")
