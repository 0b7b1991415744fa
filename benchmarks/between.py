"""Everything between the products of a layer, at ChatGLM2-6B's shapes, beside the machine's limit.

    python benchmarks/between.py [--isa avx512] [--only attention] [--reps 5]

One line for each op and batch: median time, GB/s of the bytes that must move or GFLOP/s of what
causal attention needs, the share of the limit that limits.c shows in the same run, and the share of
the time that a layer's products would take at the processor's peak for 16-bit numbers.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench import Limits  # noqa: E402
from ops import F16, Dropout, Heads, Mat, Ops, Segment  # noqa: E402
from sides import SIX_B  # noqa: E402

from glmlora import _core  # noqa: E402

NAMES = "hidden_size ffn_hidden_size num_attention_heads multi_query_group_num kv_channels"
C, F, NH, KVH, HD = (SIX_B[name] for name in NAMES.split())
V = SIX_B["padded_vocab_size"]
QKV = (NH + 2 * KVH) * HD
PRODUCTS = 2 * (C * QKV + C * C + 3 * C * F)  # operations of a layer's products for one token
BATCHES = {"4 x 512": [512] * 4, "1 x 2048": [2048], "uneven": [100, 357, 620, 971]}


class Table:
    def __init__(self, limit, reps, only):
        self.limit, self.reps, self.only = limit, reps, only
        peak = limit.get("bf16_gflop_s", limit["fma_gflop_s"])
        self.products = 2048 * PRODUCTS / peak / 1e9

    def row(self, what, run, nbytes=0, flops=0):
        if self.only and self.only not in what:
            return
        run()
        seconds = []
        for _ in range(self.reps):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds)
        if flops:
            rate, unit, best = flops / median / 1e9, "GFLOP/s", self.limit["fma_gflop_s"]
        else:
            rate, unit, best = nbytes / median / 1e9, "GB/s", self.limit["read_gb_s"]
        share = f"{median / self.products:7.2%}"
        print(f"{what:34} {median * 1e3:9.3f} ms {rate:8.1f} {unit:8} {rate / best:5.0%} {share}")


def segments_of(lengths):
    begins = np.cumsum([0, *lengths])
    return [Segment(begin=int(b), count=n) for b, n in zip(begins, lengths, strict=False)]


def attention(table, ops, rng):
    heads = Heads(NH, KVH, HD)
    for name, lengths in {**BATCHES, "1 x 8192": [8192], "16 x 64": [64] * 16}.items():
        N, segments = sum(lengths), segments_of(lengths)
        qkv = rng.normal(size=(N, QKV)).astype(np.float32)
        out, lse = np.empty((N, NH * HD), np.float32), np.empty((N, NH), np.float32)
        dqkv = np.empty_like(qkv)
        pairs = sum(n * (n + 1) / 2 for n in lengths) * NH
        reps, table.reps = table.reps, 1 if N > 4096 else table.reps
        args = (out, lse, qkv, None, segments, len(segments), heads)
        table.row(
            f"attention forward {name}",
            lambda: ops.attention_forward(*args),  # noqa: B023
            flops=4 * HD * pairs,
        )
        table.row(
            f"attention backward {name}",
            lambda: ops.attention_backward(dqkv, None, out, *args),  # noqa: B023
            flops=10 * HD * pairs,
        )
        table.reps = reps
    for rows, past in ((1, 128), (1, 1024), (1, 8192), (16, 512)):
        kv = [rng.normal(size=(rows * past, KVH * HD)).astype(np.float32) for _ in "kv"]
        qkv = rng.normal(size=(rows, QKV)).astype(np.float32)
        out, lse = np.empty((rows, NH * HD), np.float32), np.empty((rows, NH), np.float32)
        decode = [
            Segment(begin=i, count=1, past_begin=i * past, past_count=past) for i in range(rows)
        ]
        table.row(
            f"attention decode {rows} after {past}",
            lambda: ops.attention_forward(out, lse, qkv, kv, decode, rows, heads),  # noqa: B023
            nbytes=2 * rows * past * KVH * HD * 4,
        )


def row_ops(table, ops, rng):
    N = 2048
    position = np.tile(np.arange(512, dtype=np.int32), 4)
    stream = np.repeat(np.arange(4, dtype=np.int32), 512)
    x, y, z = (rng.normal(size=(N, C)).astype(np.float32) for _ in range(3))
    weight, rstd = np.ones(C, np.float32), np.ones(N, np.float32)
    row = 4 * N * C
    table.row(
        "rmsnorm forward",
        lambda: ops.rmsnorm_forward(z, rstd, x, weight, N, C, 1e-5),
        nbytes=2 * row,
    )
    table.row(
        "rmsnorm backward",
        lambda: ops.rmsnorm_backward(z, None, y, x, weight, rstd, N, C),
        nbytes=4 * row,
    )
    dweight = np.zeros(C, np.float32)
    table.row(
        "rmsnorm backward, weight too",
        lambda: ops.rmsnorm_backward(z, dweight, y, x, weight, rstd, N, C),
        nbytes=4 * row,
    )
    table.row("add", lambda: ops.add(z, z, x, N * C), nbytes=3 * row)
    drop = Dropout(0.1, stream, position, 1, 2, 3)
    table.row("dropout forward", lambda: ops.dropout_forward(z, x, N, C, drop), nbytes=2 * row)
    table.row("dropout backward", lambda: ops.dropout_backward(z, x, N, C, drop), nbytes=3 * row)
    qkv = rng.normal(size=(N, QKV)).astype(np.float32)
    angles = rng.normal(size=(512, HD // 2)).astype(np.float32)
    table.row(
        "rope",
        lambda: ops.rope_forward(qkv, angles, position, N, NH + KVH, HD, QKV, HD // 2),
        nbytes=2 * 4 * N * (NH + KVH) * HD,  # whole lines: half of each head is rotated
    )
    slot = np.arange(N, dtype=np.int32)
    kv = [np.empty((N, KVH * HD), np.float32) for _ in "kv"]
    table.row(
        "kv_append",
        lambda: ops.kv_append(kv, qkv, slot, N, Heads(NH, KVH, HD)),
        nbytes=4 * 4 * N * KVH * HD,
    )
    h = rng.normal(size=(N, 2 * F)).astype(np.float32)
    act = rng.normal(size=(N, F)).astype(np.float32)
    table.row("swiglu forward", lambda: ops.swiglu_forward(act, h, N, F), nbytes=3 * 4 * N * F)
    table.row(
        "swiglu backward, in place",
        lambda: ops.swiglu_backward(h, act, h, N, F),
        nbytes=5 * 4 * N * F,
    )
    rows = np.arange(0, N, 2, dtype=np.int32)
    half = np.empty((N // 2, C), np.float32)
    table.row("gather", lambda: ops.gather_forward(half, x, rows, N // 2, C), nbytes=row)
    table.row(
        "gather back", lambda: ops.gather_backward(x, half, rows, N // 2, C), nbytes=row * 3 // 2
    )
    words = Mat(rng.integers(0, 1 << 14, (V // 8, C)).astype(np.uint16).view(np.float16), F16)
    ids = rng.integers(0, V // 8, N).astype(np.int32)
    table.row(
        "embedding forward",
        lambda: ops.embedding_forward(x, words, ids, N),
        nbytes=row * 3 // 2,
    )
    M = 128
    logits, target = rng.normal(size=(M, V)).astype(np.float32), np.zeros(M, np.int32)
    loss, lse = np.empty(M, np.float32), np.zeros(M, np.float32)
    table.row(
        "cross entropy forward, 128 rows",
        lambda: ops.cross_entropy_forward(loss, lse, logits, target, M, V),
        nbytes=4 * M * V,
    )
    table.row(
        "cross entropy backward, 128 rows",
        lambda: ops.cross_entropy_backward(logits, lse, target, M, V, 1.0),
        nbytes=8 * M * V,
    )
    P, J = 128, 56
    inp = rng.normal(size=(P, J, KVH * HD)).astype(np.float32)
    out = np.empty((J, 4 * P, KVH * HD), np.float32)
    drop = Dropout(0.1, np.arange(4 * P), np.arange(4 * P), 1, 2, 3)
    table.row(
        "prefix forward, 4 copies, dropout",
        lambda: ops.prefix_forward(out, inp, P, J, KVH * HD, 4, drop),
        nbytes=5 * inp.nbytes,
    )
    table.row(
        "prefix backward, 4 copies, dropout",
        lambda: ops.prefix_backward(inp, out, P, J, KVH * HD, 4, drop),
        nbytes=6 * inp.nbytes,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--isa", default=_core.cpu_variants().split(",")[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--reps", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        limit = Limits(Path(folder), _core.get_num_threads()).now
    ops, rng = Ops(f"cpu:{args.isa}"), np.random.default_rng(0)
    print(f"cpu:{args.isa}, {_core.get_num_threads()} threads, limits {limit}")
    table = Table(limit, args.reps, args.only)
    print(f"a layer's products for 2048 tokens at the peak: {table.products * 1e3:.0f} ms")
    row_ops(table, ops, rng)
    attention(table, ops, rng)


if __name__ == "__main__":
    main()
