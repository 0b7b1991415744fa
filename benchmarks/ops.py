"""Matrix products of the CPU backend beside NumPy's float32 `@`, medians of interleaved runs.

    python benchmarks/ops.py

One line for each shape: N rows, the layer's (out, in), stored type; GFLOP/s (or GB/s of weights
for few rows)
of out = x W^T, of dx = dy W and of dW += dy^T x, and NumPy's for out = x W^T.
"""

import statistics
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from ops import F16, F32, Mat, Ops  # noqa: E402

from glmlora import _core  # noqa: E402

SHAPES = [
    (1200, 320, 192, "F16"),
    (1200, 1024, 192, "F16"),
    (1200, 192, 512, "F16"),
    (1200, 8, 192, "F32"),
    (1200, 320, 8, "F32"),
    (1, 4608, 4096, "F16"),
    (16, 4608, 4096, "F16"),
    (256, 4608, 4096, "F16"),
    (256, 4096, 13696, "F16"),
]


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main():
    name = "cpu:" + _core.cpu_variants().split(",")[0]
    ops = Ops(name)
    print(f"{name}, {_core.get_num_threads()} threads")
    print(
        f"{'N':>5} {'out':>6} {'in':>5}  type {'forward':>9} {'dx':>7} {'dW':>7} {'numpy':>7} GF/s"
    )
    rng = np.random.default_rng(0)
    for N, O, I, dtype in SHAPES:  # noqa: E741
        x = rng.normal(size=(N, I)).astype(np.float32)
        dy = rng.normal(size=(N, O)).astype(np.float32)
        w = rng.normal(size=(O, I)).astype(np.float32)
        mat = Mat(w.astype(np.float16), F16) if dtype == "F16" else Mat(w, F32)
        out, dx, dw = np.empty((N, O), np.float32), np.empty_like(x), np.zeros_like(w)
        runs = {
            "forward": lambda: ops.linear_forward(out, x, mat, None, N, 1.0, 0),  # noqa: B023
            "dx": lambda: ops.linear_backward_input(dx, dy, mat, N, 1.0, 0),  # noqa: B023
            "dW": lambda: ops.linear_backward_weight(dw, None, dy, x, N, O, I, 1.0),  # noqa: B023
            "numpy": lambda: np.matmul(x, w.T, out=out),  # noqa: B023
        }
        times = {key: [] for key in runs}
        for _ in range(7):
            for key, run in runs.items():
                times[key].append(timed(run))
        flops = 2.0 * N * O * I
        rate = {key: flops / statistics.median(values) / 1e9 for key, values in times.items()}
        note = ""
        if N < 16:
            note = f"  forward {rate['forward'] * mat.array.itemsize / 2 / N:.1f} GB/s of weights"
        print(
            f"{N:5} {O:6} {I:6} {dtype:4} {rate['forward']:9.1f} {rate['dx']:7.1f} "
            f"{rate['dW']:7.1f} "
            f"{rate['numpy']:7.1f}{note}"
        )


if __name__ == "__main__":
    main()
