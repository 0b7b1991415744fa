"""Cases of every op, which the self-test runs on a device and on the CPU.

A case makes its arguments from the generator, in the backend's type, and returns outputs; each
group has three shapes or more, of odd sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .optable import (
    BF16,
    F16,
    F32,
    I4,
    I8,
    Choice,
    Dropout,
    Heads,
    Mat,
    Ops,
    Segment,
    SelfAttention,
    stored,
)

Case = Callable[[Ops, np.random.Generator], list[np.ndarray]]

OP_CASES: dict[str, Case] = {}
TYPES = {"float32": F32, "float16": F16, "bfloat16": BF16, "int8": I8, "int4": I4}
SHAPES = ((1, 1), (3, 33), (17, 260))


def _over(arguments: dict[str, tuple[Any, ...]]) -> Callable[[Callable[..., Case]], Any]:
    """Cases by name, of what the function makes of these arguments."""

    def register(make: Callable[..., Case]) -> Callable[..., Case]:
        OP_CASES.update((name, make(*each)) for name, each in arguments.items())
        return make

    return register


def _normal(o: Ops, rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(o.real)


def _matrix(rng: np.random.Generator, O: int, I: int, dtype: int) -> Mat:  # noqa: E741, N803
    if dtype in (I8, I4):
        cols = I if dtype == I8 else I // 2
        scale = (0.01 * (1 + rng.random(O))).astype(np.float16)
        return Mat(rng.integers(-127, 128, (O, cols)).astype(np.int8), dtype, scale)
    return Mat(stored(rng.standard_normal((O, I)).astype(np.float32), dtype), dtype)


@_over(
    {
        f"linear {name} {N}x{O}x{I}": (N, O, I, dtype)
        for name, dtype in TYPES.items()
        for N, O, I in ((1, 33, 70), (5, 64, 96), (37, 129, 66), (20, 300, 260))  # noqa: E741
    }
)
def _linear(N: int, O: int, I: int, dtype: int) -> Case:  # noqa: E741, N803
    def case(o: Ops, rng: np.random.Generator) -> list[np.ndarray]:
        W, x, dy = _matrix(rng, O, I, dtype), _normal(o, rng, N, I), _normal(o, rng, N, O)  # noqa: N806
        y, dx, bias = _normal(o, rng, N, O), _normal(o, rng, N, I), _normal(o, rng, O)
        dW, db = _normal(o, rng, O, I), _normal(o, rng, O)  # noqa: N806
        o.linear_forward(y, x, W, bias, N, 0.5, 1)
        R = 1 + O % 9  # noqa: N806
        A, B = _normal(o, rng, N, R), Mat(_normal(o, rng, O, R), F32)  # noqa: N806
        both, h, act, normed = (_normal(o, rng, N, n) for n in (O, O, O // 2, O // 2))
        o.adapted_forward(both, x, W, bias, A, B, N, 0.5)
        if O % 2 == 0:
            o.linear_swiglu_forward(act, h, x, W, bias, N)
            ln, rstd, norm = _normal(o, rng, N, I), _normal(o, rng, N), _normal(o, rng, I)
            o.rmsnorm_swiglu_forward(normed, h, ln, rstd, x, norm, W, bias, N, 1e-5)
        o.linear_backward_input(dx, dy, W, N, 2.0, 1)
        o.linear_backward_weight(dW, db, dy, x, N, O, I, 1.0)
        return [y, dx, dW, db, both, act, normed]

    return case


@_over(
    {
        f"linear {name} into heads {N}x{HD}": (N, HD, dtype)
        for name, dtype in TYPES.items()
        for N, HD in ((1, 64), (4, 8), (20, 32))
    }
)
def _into_heads(N: int, HD: int, dtype: int) -> Case:  # noqa: N803
    def case(o: Ops, rng: np.random.Generator) -> list[np.ndarray]:
        W, x, bias = (
            _matrix(rng, 8 * HD, 96, dtype),
            _normal(o, rng, N, 96),
            _normal(o, rng, 8 * HD),
        )  # noqa: N806
        angle, at = rng.random((9, HD // 4)), rng.integers(0, 9, N).astype(np.int32)
        table = np.stack([np.cos(angle), np.sin(angle)], -1).astype(o.real)
        slot = rng.permutation(N + 3)[:N].astype(np.int32)
        qkv, k, v = (_normal(o, rng, *s) for s in ((N, 8 * HD), (N + 3, 2 * HD), (N + 3, 2 * HD)))
        heads = Heads(4, 2, HD)
        o.linear_rope_append((k, v), qkv, x, W, bias, table, at, slot, N, heads, HD // 2)
        qkv2, ln, rstd = _normal(o, rng, N, 8 * HD), _normal(o, rng, N, 96), _normal(o, rng, N)
        k2, v2 = (_normal(o, rng, N + 3, 2 * HD) for _ in range(2))
        norm, rest = _normal(o, rng, 96), (table, at, slot, N, heads, HD // 2)
        o.rmsnorm_rope_append((k2, v2), qkv2, ln, rstd, x, norm, W, bias, *rest, 1e-5)
        return [qkv, k, v, qkv2, k2, v2]

    return case


@_over(
    {
        f"linear {name} of swiglu {N}x{C}": (N, C, dtype)
        for name, dtype in TYPES.items()
        for N, C in ((1, 64), (5, 96), (20, 256))
    }
)
def _of_swiglu(N: int, C: int, dtype: int) -> Case:  # noqa: N803
    def case(o: Ops, rng: np.random.Generator) -> list[np.ndarray]:
        down, up = _matrix(rng, 33, C, dtype), _matrix(rng, 2 * C, C, dtype)
        h, dact, bias = _normal(o, rng, N, 2 * C), _normal(o, rng, N, C), _normal(o, rng, 33)
        y, act, dx = (np.empty((N, n), o.real) for n in (33, C, C))
        o.swiglu_linear_forward(y, act, h, down, bias, N)
        o.swiglu_linear_backward(dx, dact, h, up, N)
        total, b, dout = (_normal(o, rng, N, C) for _ in range(3))
        weight, square = _normal(o, rng, C), _matrix(rng, C, C, dtype)
        z, rstd, kept, dln = (np.empty(s, o.real) for s in ((N, C), N, (N, 2 * C), (N, C)))
        o.swiglu_mlp_forward(z, rstd, total, act, kept, b, weight, up, square, None, N, 1e-5)
        o.swiglu_mlp_backward(dln, kept, dout, up, square, N)
        return [y, dx, z, rstd, total, dln]

    return case


@_over({f"norm {N}x{C}": (N, C) for N, C in (*SHAPES, (3, 5000))})
def _norm(N: int, C: int) -> Case:  # noqa: N803
    def case(o: Ops, rng: np.random.Generator) -> list[np.ndarray]:
        x, b, w, dy = (_normal(o, rng, *s) for s in ((N, C), (N, C), (C,), (N, C)))
        y, z, r, total = (np.empty(s, o.real) for s in ((N, C), (N, C), N, (N, C)))
        dx, dw = _normal(o, rng, N, C), _normal(o, rng, C)
        o.rmsnorm_forward(y, r, x, w, N, C, 1e-5)
        o.rmsnorm_backward(dx, dw, dy, x, w, r, N, C)
        o.add_rmsnorm_forward(z, r, total, x, b, w, N, C, 1e-5)
        bias, out, mean, rstd = _normal(o, rng, C), *(np.empty(s, o.real) for s in ((N, C), N, N))
        dz, dw2, db = _normal(o, rng, N, C), _normal(o, rng, C), _normal(o, rng, C)
        # in a row of one, rstd magnifies the roundings of differences that are 0
        o.layernorm_forward(out, mean, rstd, x, w, bias, N, C, 0.1)
        o.layernorm_backward(dz, dw2, db, dy, x, w, mean, rstd, N, C)
        return [y, dx, dw, z, r, total, out, mean, rstd, dz, dw2, db]

    return case


@_over(
    {f"embedding {N}x{C}": (N, C, F32) for N, C in SHAPES}
    | {"embedding float16 9x64": (9, 64, F16)}
)
def _embedding(N: int, C: int, dtype: int) -> Case:  # noqa: N803
    def case(o: Ops, rng: np.random.Generator) -> list[np.ndarray]:
        W, ids = _matrix(rng, 11, C, dtype), rng.integers(0, 11, N).astype(np.int32)  # noqa: N806
        y, dW, dy = np.empty((N, C), o.real), _normal(o, rng, 11, C), _normal(o, rng, N, C)  # noqa: N806
        o.embedding_forward(y, W, ids, N)
        o.embedding_backward(dW, dy, ids, N, C)
        return [y, dW]

    return case


@_over(
    {f"rotary {N}x{HD}": (N, HD, rotary) for N, HD, rotary in ((1, 8, 4), (7, 64, 32), (5, 33, 10))}
)
def _rotary(N: int, HD: int, rotary: int) -> Case:  # noqa: N803
    def case(o: Ops, rng: np.random.Generator) -> list[np.ndarray]:
        angle = rng.random((9, rotary // 2))
        table = np.stack([np.cos(angle), np.sin(angle)], -1).reshape(9, rotary).astype(o.real)
        at = rng.integers(0, 9, N).astype(np.int32)
        slot = rng.permutation(N + 3)[:N].astype(np.int32)
        width = 8 * HD  # 4 heads, 2 of keys and 2 of values
        x, y, z = (_normal(o, rng, N, width) for _ in range(3))
        k, v, k2, v2 = (_normal(o, rng, N + 3, 2 * HD) for _ in range(4))
        o.rope_forward(x, table, at, N, 6, HD, width, rotary)
        o.rope_backward(y, table, at, N, 6, HD, width, rotary)
        o.rope_append((k, v), z, table, at, slot, N, Heads(4, 2, HD), rotary)
        o.kv_append((k2, v2), x, slot, N, Heads(4, 2, HD))
        qkv, parts = np.empty_like(x), [np.empty((N, n), o.real) for n in (4 * HD, 2 * HD, 2 * HD)]
        o.qkv_backward(*parts, x, N, Heads(4, 2, HD))
        o.qkv_forward(qkv, *parts, N, Heads(4, 2, HD))
        return [x, y, z, k, v, k2, v2, qkv, *parts]

    return case


@_over(
    {f"rotary in 2 dimensions {N}x{HD}": (N, HD) for N, HD in ((1, 4), (7, 64), (5, 36), (3, 128))}
)
def _rotary_2d(N: int, HD: int) -> Case:  # noqa: N803
    def case(o: Ops, rng: np.random.Generator) -> list[np.ndarray]:
        angle = rng.random((9, HD // 4))
        table = np.stack([np.cos(angle), np.sin(angle)], -1).astype(o.real)
        at, block = (rng.integers(0, 9, N).astype(np.int32) for _ in range(2))
        heads, width = Heads(2, 2, HD), 6 * HD
        inp, x, y, back = _normal(o, rng, N, width), *(np.empty((N, width), o.real) for _ in "123")
        o.qkv_by_head_forward(x, inp, N, heads)
        y[...] = x
        o.rope_2d_forward(x, table, at, block, N, 4, HD, width)
        o.rope_2d_backward(y, table, at, block, N, 4, HD, width)
        o.qkv_by_head_backward(back, x, N, heads)
        return [x, y, back]

    return case


@_over(
    {
        "attention 3 of 64": ((1, 1, 1), 4, 2, 64, 3, 9),
        "attention 3 of 32": ((13, 1, 40), 4, 2, 32, 0, 0),
        "attention 2 of 128": ((65, 9), 2, 1, 128, 5, 7),
        "attention 32 of 128, 1,000 before": ((1, 4, 2), 32, 2, 128, 9, 1000),
        "attention 18 of 64, 4,100 before": ((1, 3), 18, 1, 64, 0, 4100),
        "attention 2 of 96, 300 before": ((1, 3), 2, 2, 96, 0, 300),
        "attention 0 of 16": ((), 2, 2, 16, 0, 0),
        "attention 4 of 128, 3 seen by all": ((4, 1), 2, 2, 128, 3, 0, 3),
        "attention 70 of 64, 37 seen by all": ((70, 9), 3, 3, 64, 0, 0, 37),
    }
)
def _attention(
    counts: tuple[int, ...],
    NH: int,  # noqa: N803
    KVH: int,  # noqa: N803
    HD: int,  # noqa: N803
    shared: int,
    past: int,
    context: int = 0,
) -> Case:
    def case(o: Ops, rng: np.random.Generator) -> list[np.ndarray]:
        segments, begin, row = [], 0, shared
        for count in counts:
            segments.append(Segment(begin, count, 0, shared, row, past, min(context, count)))
            begin, row = begin + count, row + past
        width, heads = (NH + 2 * KVH) * HD, Heads(NH, KVH, HD)
        qkv, dout = _normal(o, rng, begin, width), _normal(o, rng, begin, NH * HD)
        cache = [_normal(o, rng, row + 1, KVH * HD) for _ in range(2)]
        dcache = [_normal(o, rng, row + 1, KVH * HD) for _ in range(2)]
        out, lse = np.empty((begin, NH * HD), o.real), np.empty((begin, NH), o.real)
        dqkv = np.empty_like(qkv)
        n = len(segments)
        o.attention_forward(out, lse, qkv, tuple(cache), segments, n, heads)
        o.attention_backward(
            dqkv, tuple(dcache), dout, out, lse, qkv, tuple(cache), segments, n, heads
        )
        return [out, lse, dqkv, *dcache]

    return case


@_over(
    {
        f"self-attention {name} {sum(counts)} of {HD}": (counts, NH, HD, dtype, p)
        for name, dtype in TYPES.items()
        for counts, NH, HD, p in (((3,), 2, 8, 0.1), ((21, 5), 6, 64, 0.3), ((70, 1), 2, 128, 0))
    }
)
def _self_attention(counts: tuple[int, ...], NH: int, HD: int, dtype: int, p: float) -> Case:  # noqa: N803
    """Of a layer's half: its adapter trains, and rows that all segments share."""

    def case(o: Ops, rng: np.random.Generator) -> list[np.ndarray]:
        N, C, R, O = sum(counts), 64, 5, (NH + 4) * HD  # noqa: E741, N806
        begins = np.cumsum([0, *counts]).tolist()
        angle = rng.random((9, HD // 4))
        A, B = _normal(o, rng, R, C), _normal(o, rng, O, R)  # noqa: N806
        kv = [_normal(o, rng, 4, 2 * HD) for _ in range(4)]
        of = SelfAttention(
            norm=_normal(o, rng, C) / 10,
            eps=1e-5,
            qkv=_matrix(rng, O, C, dtype),
            dense=_matrix(rng, C, NH * HD, dtype),
            table=np.stack([np.cos(angle), np.sin(angle)], -1).astype(o.real),
            position=rng.integers(0, 9, N).astype(np.int32),
            rotary_dim=HD // 2,
            segments=[Segment(at, n, 0, 4, 0, 0, 0) for at, n in zip(begins, counts, strict=False)],
            heads=Heads(NH, 2, HD),
            qkv_bias=_normal(o, rng, O),
            A=Mat(A, F32),
            B=Mat(B, F32),
            scale=0.1,
            dropout=Dropout(p, np.arange(N) % 3, np.arange(N), seed=7, step=2, site=3),
            dropped=np.empty((N, C), o.real),
            cache=(kv[0], kv[1]),
            dcache=(kv[2], kv[3]),
        )
        total, b, dout = (_normal(o, rng, N, C) for _ in range(3))
        dA, dB = _normal(o, rng, R, C), _normal(o, rng, O, R)  # noqa: N806
        shapes = (N, C), (N, C), (N, NH * HD), (N, NH), (N, O), (N, R), N, (N, O), (N, R)
        out, ln, att, lse, qkv, xa, rstd, dqkv, u = (np.empty(s, o.real) for s in shapes)
        dinp, work = np.empty((N, C), o.real), np.empty((N, max(C, NH * HD)), o.real)
        o.self_attention_norm(ln, rstd, total, b, of, N)
        o.self_attention_forward(out, att, lse, qkv, xa, ln, of, N)
        o.self_attention_backward(
            dinp, dA, dB, work, dqkv, u, rstd, dout, att, lse, qkv, xa, total, of, N
        )
        return [total, rstd, out, lse, xa, dinp, dA, dB, kv[2], kv[3]]

    return case


@_over({f"elements {N}x{C}": (N, C) for N, C in SHAPES})
def _elements(N: int, C: int) -> Case:  # noqa: N803
    def case(o: Ops, rng: np.random.Generator) -> list[np.ndarray]:
        x, a, b, dy = (_normal(o, rng, N, n) for n in (2 * C, C, C, C))
        y, dx, t, dt, s = (np.empty((N, n), o.real) for n in (C, 2 * C, C, C, C))
        o.swiglu_forward(y, x, N, C)
        o.swiglu_backward(dx, dy, x, N, C)
        o.tanh_forward(t, a, N * C)
        o.tanh_backward(dt, dy, t, N * C)
        o.add(s, a, b, N * C)
        g, dg, scaled = (np.empty((N, C), o.real) for _ in range(3))
        o.gelu_forward(g, a, N * C)
        o.gelu_backward(dg, dy, a, N * C)
        o.scaled_add(scaled, a, b, N * C, 7.5)
        mask = Dropout(0.3, np.arange(N), np.arange(N)[::-1].copy(), seed=7, step=2, site=3)
        dropped, back = np.empty((N, C), o.real), _normal(o, rng, N, C)
        o.dropout_forward(dropped, a, N, C, mask)
        o.dropout_backward(back, dy, N, C, mask)
        noisy = b.copy()
        o.noise(noisy, N, C, 0.5, mask)
        rows = np.arange(0, N, 2, dtype=np.int32)
        taken, spread = np.empty((len(rows), C), o.real), _normal(o, rng, N, C)
        o.gather_forward(taken, a, rows, len(rows), C)
        o.gather_backward(spread, taken, rows, len(rows), C)
        return [y, dx, t, dt, s, g, dg, scaled, dropped, back, noisy, taken, spread]

    return case


@_over({f"loss {N}x{C + 1}": (N, C + 1) for N, C in SHAPES})
def _loss(M: int, V: int) -> Case:  # noqa: N803
    def case(o: Ops, rng: np.random.Generator) -> list[np.ndarray]:
        logits, target = _normal(o, rng, M, V), rng.integers(0, V, M).astype(np.int32)
        loss, lse, ids = np.empty(M, o.real), np.empty(M, o.real), np.zeros(M, np.int32)
        o.choose(ids, logits, M, V, None, None)
        o.cross_entropy_forward(loss, lse, logits, target, M, V)
        o.cross_entropy_backward(logits, lse, target, M, V, 0.5)
        return [loss, lse, logits, ids.astype(o.real)]

    return case


@_over(
    {
        f"draws of {V}": (5, V, top_k, top_p)
        for V, top_k, top_p in ((7, 0, 1.0), (33, 3, 0.9), (1001, 50, 0.8), (5003, 0, 0.7))
    }
)
def _draws(M: int, V: int, top_k: int, top_p: float) -> Case:  # noqa: N803
    def case(o: Ops, rng: np.random.Generator) -> list[np.ndarray]:
        logits, ids = _normal(o, rng, M, V), np.zeros(M, np.int32)
        touched = np.concatenate([rng.permutation(V) for _ in range(2)]).astype(np.int32)
        how = (top_p, 5, 0, 3, 0.8, 1.3, top_k, V // 2, V // 3, V // 4)
        choices = [Choice(*how) for _ in range(M)]
        for row, choice in enumerate(choices):
            choice.stream = row
        o.choose(ids, logits, M, V, choices, touched)
        return [ids.astype(o.real)]

    return case


@_over({f"flat {N * C}": (N * C,) for N, C in SHAPES})
def _flat(n: int) -> Case:
    def case(o: Ops, rng: np.random.Generator) -> list[np.ndarray]:
        p, g, m = (_normal(o, rng, n) for _ in range(3))
        v, total = np.square(_normal(o, rng, n)), np.zeros(1)
        o.adamw(p, g, m, v, n, 1e-3, 0.9, 0.999, 1e-8, 0.1, 5, 0.5)
        o.sum_squares(total, g, n)
        return [p, m, v, total.astype(o.real)]

    return case


@_over({f"prefix {shape}": shape for shape in ((1, 2, 1, 1), (5, 4, 33, 2), (8, 2, 64, 3))})
def _prefix(P: int, J: int, KV: int, copies: int) -> Case:  # noqa: N803
    def case(o: Ops, rng: np.random.Generator) -> list[np.ndarray]:
        rows = np.arange(copies * P)
        mask = Dropout(0.2, rows, rows, seed=5)
        x, y = _normal(o, rng, P, J, KV), np.empty((J, copies * P, KV), o.real)
        o.prefix_forward(y, x, P, J, KV, copies, mask)
        dx = _normal(o, rng, P, J, KV)
        o.prefix_backward(dx, y, P, J, KV, copies, mask)
        return [y, dx]

    return case


@_over({f"dora {N}x{2 * C}": (N, 2 * C) for N, C in SHAPES})
def _dora(N: int, O: int) -> Case:  # noqa: E741, N803
    def case(o: Ops, rng: np.random.Generator) -> list[np.ndarray]:
        half, merged = stored(rng.standard_normal((O, 40)), F16), np.empty((O, 40), np.float32)
        B, A, m = _normal(o, rng, O, 4), _normal(o, rng, 4, 40), _normal(o, rng, O)  # noqa: N806
        rnorm, dm = np.empty(O, o.real), _normal(o, rng, O)
        o.dora_norm(rnorm, Mat(half, F16), B, A, 4, 0.5)
        x, dy = _normal(o, rng, N, O), _normal(o, rng, N, O)
        y, dx = np.empty((N, O), o.real), np.empty((N, O), o.real)
        o.dora_forward(y, x, m, rnorm, _normal(o, rng, O), N, O)
        o.dora_backward(dx, dm, dy, x, m, rnorm, N, O)
        merged[...] = half
        o.merge(merged, F32, B, A, m, rnorm, O, 40, 4, 0.5)
        return [rnorm, y, dx, dm, merged.astype(o.real)]

    return case


@_over({f"stored {N}x{2 * C}": (N, 2 * C) for N, C in SHAPES})
def _stored(O: int, I: int) -> Case:  # noqa: E741, N803
    """Conversions, merging and quantization: what comes back is compared as it is."""

    def case(o: Ops, rng: np.random.Generator) -> list[np.ndarray]:
        w = rng.standard_normal((O, I)).astype(np.float32)
        half = np.empty((O, I), np.float16)
        o.convert(half, F16, w, F32, O * I)
        B, A = _normal(o, rng, O, 4), _normal(o, rng, 4, I)  # noqa: N806
        o.merge(half, F16, B, A, None, None, O, I, 4, 0.5)
        q, s = np.empty((O, I), np.int8), np.empty(O, np.float16)
        o.quantize(q, s, I8, 0, w, F32, O, I)
        return [half.astype(o.real), q.astype(o.real), s.astype(o.real)]

    return case
