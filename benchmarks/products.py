"""How fast weights are read: products of few rows by instruction set, stored form and arithmetic.

    python benchmarks/products.py [--backends cpu:avx2,cpu:avx2/int16] [--kinds I8,I4,I4g32]
                                  [--rows 1] [--repeats 200] [--cache]

One op, linear_forward, over 4 MB of weights at a time out of a block that no cache holds, backends
in turn; --cache: over a matrix that stays in it, which leaves the arithmetic. A figure is the
tenth percentile of the times, since a shared machine stands still now and then: GB/s of weights
with their scales, and GFLOP/s.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from glmlora import _core  # noqa: E402
from glmlora.tools import optable  # noqa: E402
from glmlora.tools.optable import Mat, Ops  # noqa: E402

COLUMNS, UNIT, UNITS = 4096, 4 << 20, 97  # a prime: no backend has units of its own
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "I4": 0.5}


def matrices(kind, units, unit):
    """Matrices of so many bytes each, and what is read of one with its scales."""
    stored, _, group = kind.partition("g")
    rows = int(unit / BYTES[stored] / COLUMNS)
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, rows * int(COLUMNS * BYTES[stored]), np.uint8)
    made = []
    for _ in range(units):
        data = first.copy()
        if stored in ("F32", "F16"):
            data = rng.normal(size=(64, COLUMNS)).astype("f4" if stored == "F32" else "f2")
            data = np.tile(data, (rows // 64, 1))
        elif stored == "BF16":
            data = (data.view(np.uint16) & 0x3FFF).reshape(rows, -1)
        else:
            data = data.view(np.int8).reshape(rows, -1)
        shape = (rows, COLUMNS // int(group)) if group else (rows,)
        scale = np.full(shape, 0.01, np.float16) if stored[0] == "I" else None
        made.append(Mat(data, getattr(optable, stored), scale, int(group or 0)))
    return made, first.nbytes + (0 if scale is None else scale.nbytes), rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    best = _core.cpu_variants().split(",")[0]
    parser.add_argument("--backends", default=f"cpu:{best},cpu:{best}/int16,cpu:{best}/int8")
    parser.add_argument("--kinds", default="F16,I8,I4,I4g32", help="gN: groups of N columns")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--cache", action="store_true")
    args = parser.parse_args()
    ops = {name: Ops(name) for name in args.backends.split(",")}
    x = np.random.default_rng(0).normal(size=(args.rows, COLUMNS)).astype(np.float32)
    for kind in args.kinds.split(","):
        mats, read, width = matrices(kind, *((1, UNIT // 16) if args.cache else (UNITS, UNIT)))
        out = np.empty((args.rows, width), np.float32)
        times, at = {name: [] for name in ops}, 0
        for _ in range(args.repeats):
            for name, table in ops.items():
                at = (at + 1) % len(mats)
                for _ in range(1 + args.cache):  # the last of them is timed
                    start = time.perf_counter()
                    table.linear_forward(out, x, mats[at], None, args.rows, 1.0, 0)
                times[name].append(time.perf_counter() - start)
        for name in ops:
            seconds = float(np.quantile(times[name], 0.1))
            flops = 2e-9 * args.rows * width * COLUMNS / seconds
            print(
                f"{kind:6} {args.rows:3} rows  {name:24} {read / seconds / 1e9:6.1f} GB/s "
                f"{flops:7.0f} GFLOP/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
