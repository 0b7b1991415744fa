"""Time of single ops on a GPU at ChatGLM2-6B's shapes, kernel by kernel, as torch's profiler sees
them.

    python benchmarks/gpu_ops.py [--only attention ..] [--type bfloat16] [--device cuda]

A line a case: microseconds of a call, and of each kernel in it. Products go round copies of their
weights, so that no cache holds them; shares are of 2.99 TB/s of weights (an H100's copy).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from glmlora.tools.optable import (  # noqa: E402
    BF16,
    F16,
    F32,
    I4,
    I8,
    SIGNATURES,
    Choice,
    DeviceOps,
    Heads,
    Mat,
    Segment,
    sized,
    stored,
)

COPY = 2.99e12
AWAY = 200 << 20  # bytes of weights that no cache holds
C, F, QKV, V, NH, KVH, HD = 4096, 13696, 4608, 65024, 32, 2, 128
RNG = np.random.default_rng(0)


class Timed(DeviceOps):
    """A call is timed: its arrays are put on the device once, and nothing comes back."""

    def _call(self, op: str, args: tuple[Any, ...]) -> None:
        signature, args = SIGNATURES[op], sized(op, args)
        mats = [a for a in args if isinstance(a, Mat)]
        nbytes = max((m.array.nbytes for m in mats), default=AWAY)
        rounds = max(1, min(16, -(-AWAY // nbytes)))
        calls, kept = [], []
        for copy in range(rounds):
            again = [
                Mat(a.array.copy(), a.struct.dtype, a.scale, a.struct.group)
                if copy and isinstance(a, Mat)
                else a
                for a in args
            ]
            kept.append(again)  # addresses are keys
            calls.append([self._pass(t, a, op) for t, a in zip(signature, again, strict=True)])
        word = np.empty(1, np.float32)
        some = next(iter(self._held.values()))[0]

        def run(n: int) -> float:
            begin = time.perf_counter()
            for i in range(n):
                self._functions[op](self._cx, *calls[i % rounds])
            self._download(self._be, word.ctypes.data, some, 4)  # waits
            return (time.perf_counter() - begin) / n

        run(2)
        error = self._error(self._be)
        if error:
            raise RuntimeError(error.decode())
        n = int(np.clip(0.02 / run(3), 3, 200))
        self.found = {"a call": 1e6 * run(n)}
        try:
            from torch.profiler import ProfilerActivity, profile
        except ImportError:
            profile = None
        if profile and not self.name.startswith("emu"):
            with profile(activities=[ProfilerActivity.CUDA]) as p:
                run(n)
            kernels = {
                e.key: e.self_device_time_total / n
                for e in p.key_averages()
                if e.self_device_time_total and "DtoH" not in e.key
            }
            self.found = {"kernels": sum(kernels.values())} | kernels | self.found
        for base, _, _ in self._held.values():
            self._free(self._be, base)
        self._held = {}


def normal(*shape: int) -> np.ndarray:
    """Random floats, cheaply."""
    n = int(np.prod(shape))
    return np.resize(RNG.standard_normal(min(n, 1 << 20), np.float32), n).reshape(shape)


def matrix(rows: int, cols: int, dtype: int) -> Mat:
    """A random matrix; int4 in groups of 32."""
    if dtype in (I8, I4):
        n = rows * cols // (1 if dtype == I8 else 2)
        data = np.resize(RNG.integers(-128, 128, 1 << 20, np.int8), n).reshape(rows, -1)
        scale = np.full((rows, cols // 32) if dtype == I4 else (rows,), 0.01, np.float16)
        return Mat(data, dtype, scale, 32 if dtype == I4 else 0)
    return Mat(stored(0.02 * normal(rows, cols), dtype), dtype)


def cases(type_: str) -> Iterator[tuple[str, float, Callable[[Any], None]]]:
    """(name, bytes of weights it reads, the call)."""
    own = {"bfloat16": BF16, "float16": F16, "float32": F32}[type_]
    shapes = {
        "query_key_value": (QKV, C),
        "dense": (C, C),
        "dense_4h_to_h": (C, F),
        "output_layer": (V, C),
    }
    names = {own: type_, I8: "int8", I4: "int4"}
    for dtype, name in names.items():
        for n in (1, 4, 8, 16, 64, 1024):
            for which, (rows, cols) in shapes.items():
                if which == "output_layer" and (dtype != own or n > 16):
                    continue
                nbytes = rows * cols * {I8: 1, I4: 0.5625}.get(dtype, 4 if own == F32 else 2)

                def call(o, dtype=dtype, n=n, rows=rows, cols=cols):  # noqa: E301
                    o.linear_forward(np.empty((n, rows), np.float32), normal(n, cols),
                                     matrix(rows, cols, dtype), None, n, 1.0, 0)  # fmt: skip

                yield f"linear {name} {which}, {n} rows", nbytes, call

            def gated(o, dtype=dtype, n=n):
                out, h = np.empty((n, F), np.float32), np.empty((n, 2 * F), np.float32)
                o.linear_swiglu_forward(out, h, normal(n, C), matrix(2 * F, C, dtype), None, n)

            nbytes = 2 * F * C * {I8: 1, I4: 0.5625}.get(dtype, 4 if own == F32 else 2)
            yield f"linear {name} dense_h_to_4h with swiglu, {n} rows", nbytes, gated
    n, R = 2048, 8  # noqa: N806
    A, B = normal(R, C), normal(QKV, R)  # noqa: N806
    x, dy, xa = normal(n, C), normal(n, QKV), normal(n, R)
    weight = "linear_backward_weight"
    adapter = {
        "x A": ("linear_forward", np.empty((n, R), np.float32), x, Mat(A, F32), None, n, 1.0, 0),
        "dy B": ("linear_backward_input", np.empty((n, R), np.float32), dy, Mat(B, F32), n, 1.0, 0),
        "u A": ("linear_backward_input", np.empty((n, C), np.float32), xa, Mat(A, F32), n, 1.0, 1),
        "dB": (weight, np.empty((QKV, R), np.float32), None, dy, xa, n, QKV, R, 1.0),
        "dA": (weight, np.empty((R, C), np.float32), None, xa, x, n, R, C, 1),
    }  # fmt: skip
    for name, (op, *args) in adapter.items():
        yield f"adapter {name}", 0, lambda o, op=op, args=args: getattr(o, op)(*args)
    bias = normal(QKV)

    def adapted(o):
        o.adapted_forward(np.empty((n, QKV), np.float32), x, matrix(QKV, C, own), bias, xa,
                          Mat(B, F32), n, 0.5)  # fmt: skip

    yield "adapter adapted_forward", 0, adapted
    heads = Heads(NH, KVH, HD, 1)
    for rows, past in ((1, 128), (1, 1024), (1, 8192), (1, 32000), (16, 1024), (64, 1024)):

        def decode(o, rows=rows, past=past):
            room = rows * (past + 1)
            segments = [Segment(i, 1, 0, 0, i * (past + 1), past, 0) for i in range(rows)]
            cache = (normal(room, KVH * HD), normal(room, KVH * HD))
            out, lse = np.empty((rows, NH * HD), np.float32), np.empty((rows, NH), np.float32)
            o.attention_forward(out, lse, normal(rows, QKV), cache, segments, rows, heads)

        yield f"attention decode, {rows} rows at {past}", 0, decode
    uneven = np.clip(np.random.default_rng(0).lognormal(np.log(200), 0.5, 16), 10, 512).astype(int)
    for name, lengths, past in (
        ("1 x 1024", [1024], 0),
        ("1 x 8192", [8192], 0),
        ("2,048 after 6,144", [2048], 6144),
        ("4 x 512", [512] * 4, 0),
        ("16 uneven", uneven, 0),
        ("1 x 4096", [4096], 0),
    ):
        n, ends = int(sum(lengths)), np.cumsum(lengths)
        segments = [
            Segment(int(e - k), int(k), 0, 0, 0, past, 0)
            for e, k in zip(ends, lengths, strict=True)
        ]
        longest = Heads(NH, KVH, HD, int(max(lengths)))

        def forward(o, n=n, segments=segments, past=past, heads=longest):
            cache = (normal(past + 1, KVH * HD), normal(past + 1, KVH * HD))
            out, lse = np.empty((n, NH * HD), np.float32), np.empty((n, NH), np.float32)
            o.attention_forward(out, lse, normal(n, QKV), cache, segments, len(segments), heads)

        def backward(o, n=n, segments=segments, heads=longest):
            out, lse = normal(n, NH * HD), np.full((n, NH), 9, np.float32)
            o.attention_backward(np.empty((n, QKV), np.float32), None, normal(n, NH * HD), out, lse,
                                 normal(n, QKV), None, segments, len(segments), heads)  # fmt: skip

        yield f"attention forward, {name}", 0, forward
        if not past and n < 8192:
            yield f"attention backward, {name}", 0, backward
    for n in (1, 16, 2048):

        def norms(o, n=n):
            o.add_rmsnorm_forward(np.empty((n, C), np.float32), np.empty(n, np.float32),
                                  np.empty((n, C), np.float32), normal(n, C), normal(n, C),
                                  normal(C), n, C, 1e-5)  # fmt: skip

        yield f"elements add_rmsnorm, {n} rows", 0, norms
    for n in (1, 16):

        def choose(o, n=n):
            o.choose(np.zeros(n, np.int32), normal(n, V), n, V, None, None)

        yield f"elements argmax, {n} rows", 0, choose
    for top_k, top_p in ((0, 0.8), (50, 1.0)):

        def draw(o, top_k=top_k, top_p=top_p):
            how = [Choice(top_p, 1, 2, 3, 1.0, 1.0, top_k, 0, 0, 0)]
            o.choose(np.zeros(1, np.int32), 3 * normal(1, V), 1, V, how, np.zeros(1, np.int32))

        yield f"elements draw, top_k {top_k}, top_p {top_p}", 0, draw
    n = 2048

    def swiglu(o):
        o.swiglu_backward(np.empty((n, 2 * F), np.float32), normal(n, F), normal(n, 2 * F), n, F)

    def product(o):
        o.linear_backward_input(np.empty((n, C), np.float32), normal(n, 2 * F),
                                matrix(2 * F, C, own), n, 1.0, 0)  # fmt: skip

    yield "elements swiglu_backward, 2048 rows", 0, swiglu
    yield "linear backward dense_h_to_4h, 2048 rows", 0, product


def main() -> None:
    """A line a case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[""], help="cases whose names hold one of it")
    parser.add_argument("--type", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    ops = Timed(f"{args.device}/{args.type}")
    for name, nbytes, call in cases(args.type):
        if not any(each in name for each in args.only):
            continue
        try:
            call(ops)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        found = dict(ops.found)
        total = found.pop("kernels", None) or found["a call"]
        share = f" {nbytes / total / COPY * 1e6:4.0%}" if nbytes else ""
        parts = ", ".join(f"{k[:44]} {v:.1f}" for k, v in found.items())
        print(f"{name}: {total:.1f} us{share}  ({parts})", flush=True)


if __name__ == "__main__":
    main()
