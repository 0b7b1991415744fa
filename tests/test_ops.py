# ruff: noqa: E741 - N, O, I are the sizes of ops.h
"""Every op of csrc/ops.h: gradients, and every backend against the reference.

A case is a function of a Maker, which makes the same numbers for every backend: float32 values, so
that the reference in double gets exactly the inputs that a float backend gets. It returns {output:
(array, tolerance)}. Tolerances: a float sum of n terms is off by about sqrt(n) roundings of the sum
of the terms' magnitudes (rounding errors are independent; their worst case, n roundings, needs them
all to have one sign), plus a few roundings of the operations around it; EPS is two roundings.
How poll stops an op is tested through the model: the table of ops does not show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from ctypes import c_int
from functools import cache, lru_cache
from typing import Any

import numpy as np
import pytest
from ops import (
    BF16,
    F16,
    F32,
    F64,
    I4,
    I8,
    SIGNATURES,
    STORED,
    Choice,
    DeviceOps,
    Dropout,
    Heads,
    Mat,
    Ops,
    Segment,
    SelfAttention,
    backends,
    bf16_to_float,
    dequantized,
    float_to_bf16,
    ops_of,
    stored,
    unstored,
)

from glmlora import _core
from glmlora.model.device import BFLOAT16_SETS

EPS = 2.0**-23
REF = Ops("ref_f64")
TESTED = ["ref_f32", *backends()]
DTYPES = {"F32": F32, "F16": F16, "BF16": BF16, "F64": F64}
QUANTIZED = {"I8": (I8, 0), "I4": (I4, 0), "I4 by 32": (I4, 32), "I4 by 96": (I4, 96)}  # and group


def quantized(rng: np.random.Generator, rows: int, cols: int, kind: str) -> tuple[Mat, np.ndarray]:
    """Any integers and scales, -128 and -8 too, and their values."""
    dtype, group = QUANTIZED[kind]
    array = rng.integers(-128, 128, (rows, cols // 2 if dtype == I4 else cols)).astype(np.int8)
    shape = (rows, -(-cols // group)) if group else (rows,)
    scale = rng.uniform(0.001, 0.02, shape).astype(np.float16)
    return Mat(array, dtype, scale, group), dequantized(array, dtype, scale, group)


def usable(kind: str, cols: int) -> bool:
    """Two 4-bit columns share a byte."""
    return not kind.startswith("I4") or cols % 2 == 0


every_backend = pytest.mark.parametrize("backend", TESTED)


def ops_by_case() -> dict[str, set[str]]:
    """Of every function of cases the ops that it calls."""

    class Recording(Ops):
        called: set[str] = set()

        def _call(self, op: str, args: tuple[Any, ...]) -> None:
            self.called.add(op)
            super()._call(op, args)

    found = {}
    for name, cases in cases_by_op().items():
        found[name] = Recording.called = set()
        for seed, case in cases[:9]:
            case[0](Maker(Recording("cpu"), seed), *case[1:])
    return found


def test_every_op_has_cases() -> None:
    assert set().union(*ops_by_case().values()) == set(SIGNATURES)


# ---- gradients of the reference ----


def numeric(f: Any, x: np.ndarray, dout: np.ndarray, h: float = 3e-5) -> np.ndarray:
    """d sum(f() * dout) / dx by central differences; f reads x."""
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        kept = x[i]
        x[i] = kept + h
        above = f().copy()
        x[i] = kept - h
        below = f()
        x[i] = kept
        gradient[i] = np.sum((above - below) * dout) / (2 * h)
    return gradient


def assert_gradient(analytic: np.ndarray, expected: np.ndarray) -> None:
    """1e-8: truncation is h^2 / 6 f''' = 2e-10 f''', rounding 1e-16 |f| / h = 4e-12 |f|."""
    error = np.max(np.abs(analytic - expected)) / max(np.max(np.abs(expected)), 1e-300)
    assert error <= 1e-8, f"relative error {error:.2e}"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240501)


def test_embedding_gradient(rng: np.random.Generator) -> None:
    V, C, ids = 5, 3, np.array([4, 0, 4, 2], np.int32)
    weight, dout = rng.normal(size=(V, C)), rng.normal(size=(4, C))

    def f() -> np.ndarray:
        out = np.empty((4, C))
        REF.embedding_forward(out, Mat(weight, F64), ids, 4)
        return out

    start = rng.normal(size=(V, C))
    dweight = start.copy()
    REF.embedding_backward(dweight, dout, ids, 4, C)
    assert_gradient(dweight - start, numeric(f, weight, dout))


def test_rmsnorm_gradient(rng: np.random.Generator) -> None:
    N, C, eps = 3, 7, 1e-5
    inp, weight, dout = rng.normal(size=(N, C)), rng.normal(size=C), rng.normal(size=(N, C))
    rstd = np.empty(N)

    def f() -> np.ndarray:
        out = np.empty((N, C))
        REF.rmsnorm_forward(out, rstd, inp, weight, N, C, eps)
        return out

    expected = numeric(f, inp, dout), numeric(f, weight, dout)
    f()
    start = rng.normal(size=(N, C)), rng.normal(size=C)
    dinp, dweight = start[0].copy(), start[1].copy()
    REF.rmsnorm_backward(dinp, dweight, dout, inp, weight, rstd, N, C)
    assert_gradient(dinp - start[0], expected[0])
    assert_gradient(dweight - start[1], expected[1])
    frozen = start[0].copy()
    REF.rmsnorm_backward(frozen, None, dout, inp, weight, rstd, N, C)
    assert np.array_equal(frozen, dinp)


def test_layernorm_gradient(rng: np.random.Generator) -> None:
    N, C, eps = 3, 7, 1e-5
    inp, dout = rng.normal(size=(N, C)) + 2, rng.normal(size=(N, C))
    weight, bias = rng.normal(size=C), rng.normal(size=C)
    mean, rstd = np.empty(N), np.empty(N)

    def f() -> np.ndarray:
        out = np.empty((N, C))
        REF.layernorm_forward(out, mean, rstd, inp, weight, bias, N, C, eps)
        return out

    xhat = (inp - inp.mean(1)[:, None]) / np.sqrt(inp.var(1)[:, None] + eps)
    assert np.allclose(f(), xhat * weight + bias, rtol=1e-13, atol=1e-14)
    expected = numeric(f, inp, dout), numeric(f, weight, dout), numeric(f, bias, dout)
    f()
    start = rng.normal(size=(N, C)), rng.normal(size=C), rng.normal(size=C)
    got = [part.copy() for part in start]
    REF.layernorm_backward(*got, dout, inp, weight, mean, rstd, N, C)
    for new, old, wanted in zip(got, start, expected, strict=True):
        assert_gradient(new - old, wanted)
    frozen = start[0].copy()
    REF.layernorm_backward(frozen, None, None, dout, inp, weight, mean, rstd, N, C)
    assert np.array_equal(frozen, got[0])


@pytest.mark.parametrize("accumulate", [0, 1])
def test_linear_gradient(rng: np.random.Generator, accumulate: int) -> None:
    N, O, I, scale = 4, 5, 3, 0.7
    inp, weight, bias = rng.normal(size=(N, I)), rng.normal(size=(O, I)), rng.normal(size=O)
    dout, old = rng.normal(size=(N, O)), rng.normal(size=(N, O))

    def f() -> np.ndarray:
        out = old.copy()
        REF.linear_forward(out, inp, Mat(weight, F64), bias, N, scale, accumulate)
        return out

    start = rng.normal(size=(N, I))
    dinp = start.copy()
    REF.linear_backward_input(dinp, dout, Mat(weight, F64), N, scale, accumulate)
    assert_gradient(dinp - start * accumulate, numeric(f, inp, dout))
    start_weight, start_bias = rng.normal(size=(O, I)), rng.normal(size=O)
    dweight, dbias = start_weight.copy(), start_bias.copy()
    REF.linear_backward_weight(dweight, dbias, dout, inp, N, O, I, scale)
    assert_gradient(dweight - start_weight, numeric(f, weight, dout))
    assert_gradient(dbias - start_bias, scale * numeric(f, bias, dout))
    if accumulate:
        assert_gradient(dout, numeric(f, old, dout))


def test_dora_gradient(rng: np.random.Generator) -> None:
    """Of equation 5 with the norm held constant, and the norm itself against NumPy."""
    N, O, I, R, scale = 4, 5, 7, 2, 0.7
    inp, bias, magnitude = rng.normal(size=(N, O)), rng.normal(size=O), rng.normal(size=O)
    weight, B, A = rng.normal(size=(O, I)), rng.normal(size=(O, R)), rng.normal(size=(R, I))
    rnorm, dout = np.empty(O), rng.normal(size=(N, O))
    REF.dora_norm(rnorm, Mat(weight, F64), B, A, R, scale)
    assert np.allclose(rnorm, 1 / np.linalg.norm(weight + scale * B @ A, axis=1), rtol=1e-14)

    def f() -> np.ndarray:
        out = np.empty((N, O))
        REF.dora_forward(out, inp, magnitude, rnorm, bias, N, O)
        return out

    assert np.allclose(f(), magnitude * rnorm * inp + bias, rtol=1e-14)
    start = rng.normal(size=O)
    dinp, dmagnitude = np.empty((N, O)), start.copy()
    REF.dora_backward(dinp, dmagnitude, dout, inp, magnitude, rnorm, N, O)
    assert_gradient(dinp, numeric(f, inp, dout))
    assert_gradient(dmagnitude - start, numeric(f, magnitude, dout))
    frozen = inp.copy()  # in its place
    REF.dora_backward(frozen, None, dout, frozen, magnitude, rnorm, N, O)
    assert np.array_equal(frozen, dinp)


def rope_table(positions: int, rotary_dim: int) -> np.ndarray:
    angle = np.outer(np.arange(positions), 10000.0 ** -np.linspace(0, 1, rotary_dim // 2))
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def test_rope_gradient(rng: np.random.Generator) -> None:
    N, heads, HD, stride, rotary_dim = 3, 2, 6, 15, 4
    table, position = rope_table(9, rotary_dim), np.array([0, 8, 3], np.int32)
    x, dout = rng.normal(size=(N, stride)), rng.normal(size=(N, stride))

    def f() -> np.ndarray:
        out = x.copy()
        REF.rope_forward(out, table, position, N, heads, HD, stride, rotary_dim)
        return out

    dx = dout.copy()
    REF.rope_backward(dx, table, position, N, heads, HD, stride, rotary_dim)
    assert_gradient(dx, numeric(f, x, dout))
    untouched = np.ones(stride, bool)
    for h in range(heads):
        untouched[h * HD : h * HD + rotary_dim] = False
    assert np.array_equal(f()[:, untouched], x[:, untouched])
    z = x[1, HD] + 1j * x[1, HD + 1]  # position 8, head 1, pair 0: frequency 1
    assert np.allclose(f()[1, HD], (z * np.exp(8j)).real) and np.allclose(
        f()[1, HD + 1], (z * np.exp(8j)).imag
    )


def test_rope_2d_gradient(rng: np.random.Generator) -> None:
    N, heads, HD, stride = 3, 2, 8, 27
    table = rope_table(9, HD // 2)
    position, block = np.array([0, 8, 3], np.int32), np.array([0, 2, 7], np.int32)
    x, dout = rng.normal(size=(N, stride)), rng.normal(size=(N, stride))

    def f() -> np.ndarray:
        out = x.copy()
        REF.rope_2d_forward(out, table, position, block, N, heads, HD, stride)
        return out

    dx = dout.copy()
    REF.rope_2d_backward(dx, table, position, block, N, heads, HD, stride)
    assert_gradient(dx, numeric(f, x, dout))
    assert np.array_equal(f()[:, heads * HD :], x[:, heads * HD :])
    for half, angle in ((0, 8j), (1, 2j)):  # of row 1, head 1, pair 0: frequency 1
        at = HD + half * HD // 2
        z = (x[1, at] + 1j * x[1, at + 2]) * np.exp(angle)
        assert np.allclose(f()[1, [at, at + 2]], [z.real, z.imag])


# All that segments can ask for, over 13 tokens and 9 cache rows.
SEGMENTS = [
    Segment(begin=0, count=4, shared_begin=1, shared_count=2),
    Segment(begin=4, count=3, shared_begin=1, shared_count=2, past_begin=5, past_count=3),
    Segment(begin=7, count=5, context=3),
    Segment(begin=12, count=1),
]
SHARED_ROWS = [1, 2]


def test_attention_gradient(rng: np.random.Generator) -> None:
    N, rows, heads = 13, 9, Heads(4, 2, 4)
    qkv, k, v = rng.normal(size=(N, 32)), rng.normal(size=(rows, 8)), rng.normal(size=(rows, 8))
    dout, lse = rng.normal(size=(N, 16)), np.empty((N, 4))

    def f() -> np.ndarray:
        out = np.empty((N, 16))
        REF.attention_forward(out, lse, qkv, (k, v), SEGMENTS, 4, heads)
        return out

    expected = numeric(f, qkv, dout), numeric(f, k, dout), numeric(f, v, dout)
    out = f()
    start_k, start_v = rng.normal(size=(rows, 8)), rng.normal(size=(rows, 8))
    dqkv, dk, dv = np.full((N, 32), np.nan), start_k.copy(), start_v.copy()
    REF.attention_backward(dqkv, (dk, dv), dout, out, lse, qkv, (k, v), SEGMENTS, 4, heads)
    assert_gradient(dqkv, expected[0])
    assert_gradient((dk - start_k)[SHARED_ROWS], expected[1][SHARED_ROWS])
    assert_gradient((dv - start_v)[SHARED_ROWS], expected[2][SHARED_ROWS])
    others = [row for row in range(rows) if row not in SHARED_ROWS]
    assert np.array_equal(dk[others], start_k[others])
    assert np.array_equal(dv[others], start_v[others])
    assert (
        np.abs(expected[1][5:8]).min() > 0
    )  # past rows are used: they get no gradient by contract
    without = np.empty((N, 32))
    REF.attention_backward(without, None, dout, out, lse, qkv, (k, v), SEGMENTS, 4, heads)
    assert np.array_equal(without, dqkv)


def test_attention_reference_is_softmax(rng: np.random.Generator) -> None:
    """The reference against the formula in NumPy: who sees whom, which head reads which."""
    N, NH, KVH, HD = 13, 4, 2, 4
    qkv, k, v = rng.normal(size=(N, 32)), rng.normal(size=(9, 8)), rng.normal(size=(9, 8))
    out, lse = np.empty((N, 16)), np.empty((N, NH))
    REF.attention_forward(out, lse, qkv, (k, v), SEGMENTS, 4, Heads(NH, KVH, HD))
    for s in SEGMENTS:
        cached = [*range(s.shared_begin, s.shared_begin + s.shared_count)]
        cached += range(s.past_begin, s.past_begin + s.past_count)
        for t in range(s.count):
            own = s.begin + np.arange(max(t + 1, min(s.context, s.count)))
            for h in range(NH):
                g = slice(h // 2 * HD, (h // 2 + 1) * HD)
                keys = np.concatenate([k[cached, g], qkv[own, 16:24][:, g]])
                values = np.concatenate([v[cached, g], qkv[own, 24:32][:, g]])
                scores = keys @ qkv[s.begin + t, h * HD : (h + 1) * HD] / 2
                p = np.exp(scores) / np.exp(scores).sum()
                assert np.allclose(out[s.begin + t, h * HD : (h + 1) * HD], p @ values, rtol=1e-13)
                assert np.isclose(lse[s.begin + t, h], np.log(np.exp(scores).sum()), rtol=1e-13)


@pytest.mark.parametrize("p", [None, 0.4])
def test_prefix_gradient(rng: np.random.Generator, p: float | None) -> None:
    P, J, KV, copies = 3, 4, 5, 2
    inp, dout = rng.normal(size=(P, J, KV)), rng.normal(size=(J, copies * P, KV))
    dropout = None if p is None else Dropout(p, np.arange(6) + 3, np.arange(6) % 3, 9, 2, 5)

    def f() -> np.ndarray:
        out = np.empty((J, copies * P, KV))
        REF.prefix_forward(out, inp, P, J, KV, copies, dropout)
        return out

    start = rng.normal(size=(P, J, KV))
    dinp = start.copy()
    REF.prefix_backward(dinp, dout, P, J, KV, copies, dropout)
    assert_gradient(dinp - start, numeric(f, inp, dout))
    if dropout is None:
        assert np.array_equal(f(), np.tile(inp.transpose(1, 0, 2), (1, copies, 1)))


def test_swiglu_gradient(rng: np.random.Generator) -> None:
    N, F = 3, 5
    inp, dout = rng.normal(size=(N, 2 * F)), rng.normal(size=(N, F))

    def f() -> np.ndarray:
        out = np.empty((N, F))
        REF.swiglu_forward(out, inp, N, F)
        return out

    expected = numeric(f, inp, dout)
    dinp = np.empty((N, 2 * F))
    REF.swiglu_backward(dinp, dout, inp, N, F)
    assert_gradient(dinp, expected)
    REF.swiglu_backward(inp, dout, inp, N, F)
    assert np.array_equal(inp, dinp)


def test_gelu_gradient(rng: np.random.Generator) -> None:
    x, dout, out, dinp = 2 * rng.normal(size=11), rng.normal(size=11), np.empty(11), np.empty(11)

    def f() -> np.ndarray:
        REF.gelu_forward(out, x, 11)
        return out

    u = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    assert np.allclose(f(), 0.5 * x * (1 + np.tanh(u)), rtol=1e-13)
    expected = numeric(f, x, dout)
    REF.gelu_backward(dinp, dout, x, 11)
    assert_gradient(dinp, expected)


def test_tanh_gradient(rng: np.random.Generator) -> None:
    x, dout, out, dinp = rng.normal(size=11), rng.normal(size=11), np.empty(11), np.empty(11)

    def f() -> np.ndarray:
        REF.tanh_forward(out, x, 11)
        return out

    expected = numeric(f, x, dout)
    REF.tanh_backward(dinp, dout, f(), 11)
    assert_gradient(dinp, expected)


def test_dropout_gradient(rng: np.random.Generator) -> None:
    N, C = 4, 6
    x, dout, start = rng.normal(size=(N, C)), rng.normal(size=(N, C)), rng.normal(size=(N, C))
    dropout = Dropout(0.3, [0, 0, 1, 1], [0, 1, 0, 1], seed=7, step=3, site=2)

    def f() -> np.ndarray:
        out = np.empty((N, C))
        REF.dropout_forward(out, x, N, C, dropout)
        return out

    dinp = start.copy()
    REF.dropout_backward(dinp, dout, N, C, dropout)
    assert_gradient(dinp - start, numeric(f, x, dout))


def test_gather_gradient(rng: np.random.Generator) -> None:
    rows = np.array([0, 2, 5], np.int32)
    x, dout, start = rng.normal(size=(6, 4)), rng.normal(size=(3, 4)), rng.normal(size=(6, 4))

    def f() -> np.ndarray:
        out = np.empty((3, 4))
        REF.gather_forward(out, x, rows, 3, 4)
        return out

    dinp = start.copy()
    REF.gather_backward(dinp, dout, rows, 3, 4)
    assert_gradient(dinp - start, numeric(f, x, dout))


def test_qkv_gradient(rng: np.random.Generator) -> None:
    N, heads = 3, Heads(4, 2, 3)
    parts = [rng.normal(size=(N, n)) for n in (12, 6, 6)]
    dout = rng.normal(size=(N, 24))

    def f() -> np.ndarray:
        qkv = np.empty((N, 24))
        REF.qkv_forward(qkv, *parts, N, heads)
        return qkv

    assert np.array_equal(f(), np.concatenate(parts, axis=1))
    gradients = [np.empty_like(part) for part in parts]
    REF.qkv_backward(*gradients, dout, N, heads)
    for part, gradient in zip(parts, gradients, strict=True):
        assert_gradient(gradient, numeric(f, part, dout))


def test_qkv_by_head_gradient(rng: np.random.Generator) -> None:
    N, heads = 3, Heads(4, 4, 3)
    inp, dout, dinp = rng.normal(size=(N, 36)), rng.normal(size=(N, 36)), np.empty((N, 36))

    def f() -> np.ndarray:
        qkv = np.empty((N, 36))
        REF.qkv_by_head_forward(qkv, inp, N, heads)
        return qkv

    parts = inp.reshape(N, 4, 3, 3).transpose(0, 2, 1, 3)  # head, part -> part, head
    assert np.array_equal(f(), parts.reshape(N, 36))
    REF.qkv_by_head_backward(dinp, dout, N, heads)
    assert_gradient(dinp, numeric(f, inp, dout))


def test_cross_entropy_gradient(rng: np.random.Generator) -> None:
    M, V, scale, target = 3, 7, 0.3, np.array([6, 0, 3], np.int32)
    logits, loss, lse = 3 * rng.normal(size=(M, V)), np.empty(M), np.empty(M)

    def f() -> np.ndarray:
        REF.cross_entropy_forward(loss, lse, logits, target, M, V)
        return loss

    expected = numeric(f, logits, np.full(M, scale))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert np.allclose(f(), -np.log(p[np.arange(M), target]), rtol=1e-13)
    REF.cross_entropy_backward(logits, lse, target, M, V, scale)
    assert_gradient(logits, expected)


def test_adamw_reference(rng: np.random.Generator) -> None:
    """Two steps of Loshchilov & Hutter 2019, algorithm 2, against NumPy."""
    p, m, v = rng.normal(size=9), np.zeros(9), np.zeros(9)
    expected, em, ev = p.copy(), m.copy(), v.copy()
    lr, b1, b2, eps, wd, gscale = 1e-2, 0.9, 0.999, 1e-8, 0.1, 0.5
    for t in (1, 2):
        grad = rng.normal(size=9)
        REF.adamw(p, grad, m, v, 9, lr, b1, b2, eps, wd, t, gscale)
        g = gscale * grad
        em, ev = b1 * em + (1 - b1) * g, b2 * ev + (1 - b2) * g * g
        expected *= 1 - lr * wd
        expected -= lr * (em / (1 - b1**t)) / (np.sqrt(ev / (1 - b2**t)) + eps)
        for got, want in ((p, expected), (m, em), (v, ev)):
            assert np.allclose(got, want, rtol=1e-13, atol=0)


# ---- every backend against the reference ----


class Maker:
    """Inputs from a seed, and outputs between sentinels that must survive."""

    def __init__(self, ops: Ops, seed: int) -> None:
        self.ops, self.rng, self._guarded = ops, np.random.default_rng(seed), []

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return self.put(self.rng.normal(size=shape) * scale)

    def put(self, values: np.ndarray) -> np.ndarray:
        """A writable array of these values as float32, misaligned, with sentinels around it."""
        values = np.asarray(values, np.float32)
        room = np.full(values.size + 2 * 37, 12345.0, self.ops.real)
        self._guarded.append(room)
        array = room[37 : 37 + values.size].reshape(values.shape)
        array[...] = values
        return array

    def out(self, *shape: int) -> np.ndarray:
        """An output that must be overwritten: NaN so far."""
        return self.put(np.full(shape, np.nan))

    def ints(self, high: int, *shape: int) -> np.ndarray:
        return self.rng.integers(0, high, size=shape, dtype=np.int32)

    def weight(self, rows: int, cols: int, dtype: str) -> tuple[Mat, np.ndarray]:
        """A stored matrix and its values in double."""
        if dtype in QUANTIZED:
            return quantized(self.rng, rows, cols, dtype)
        array = stored(self.rng.normal(size=(rows, cols)).astype(np.float32), DTYPES[dtype])
        return Mat(array, DTYPES[dtype]), unstored(array, DTYPES[dtype])

    def dropout(self, N: int, p: float) -> Dropout:
        stream, position = self.ints(1000, N), self.ints(1000, N)
        return Dropout(p, stream, position, seed=0x123456789ABCDEF, step=77, site=13)

    def check(self) -> None:
        for room in self._guarded:
            assert (room[:37] == 12345).all() and (room[-37:] == 12345).all(), "wrote outside"


def run(case: Any, backend: str, seed: int, args: tuple[Any, ...]) -> dict[str, Any]:
    maker = Maker(ops_of(backend), seed)
    result = case(maker, *args)
    maker.check()
    return result


@cache
def expected_of(case: Any, seed: int, args: tuple[Any, ...]) -> dict[str, Any]:
    return run(case, "ref_f64", seed, args)


SIZES = (1, 2, 3, 7, 8, 9, 15, 17, 31, 33, 64, 100, 255)
ROWS = [(1, 1), (1, 7), (3, 8), (2, 31), (17, 33), (1, 64), (5, 255), (100, 100), (3, 1025), (0, 9)]
LENGTHS = (0, *SIZES, 1025, 5000)
ROTARY = [(3, 2, 8, 4), (1, 1, 2, 2), (17, 3, 64, 64), (5, 2, 33, 10), (0, 2, 8, 8)]
PREFIXES = [(1, 2, 1, 1), (3, 4, 5, 2), (8, 6, 64, 3), (5, 2, 255, 1), (7, 4, 33, 9)]
CASES: list[tuple[Any, ...]] = []  # (function, its arguments ..)


def over(arguments: Iterable[tuple[Any, ...]]) -> Callable[[Any], Any]:
    """Cases of the function: these arguments."""

    def register(case: Any) -> Any:
        CASES.extend((case, *each) for each in arguments)
        return case

    return register


def sum_error(terms: int, magnitude: Any) -> Any:
    """See the head of this file."""
    return (np.sqrt(terms) + 8) * EPS * magnitude


def linear_forward(
    m: Maker, N: int, O: int, I: int, dtype: str, bias: bool, scale: float, add: int
):
    W, w = m.weight(O, I, dtype)
    x, b, out = m.normal(N, I), m.normal(O) if bias else None, m.normal(N, O)
    size = abs(scale) * np.abs(x) @ np.abs(w.T) + (np.abs(b) if bias else 0)
    size = size + add * np.abs(out)
    m.ops.linear_forward(out, x, W, b, N, scale, add)
    return {"out": (out, sum_error(I, size))}


def adapted_forward(m: Maker, N: int, O: int, I: int, R: int, dtype: str, bias: bool):
    W, w = m.weight(O, I, dtype)
    x, b, xa = m.normal(N, I), m.normal(O) if bias else None, m.normal(N, R)
    B, out = m.normal(O, R), m.out(N, O)
    size = np.abs(x) @ np.abs(w.T) + (np.abs(b) if bias else 0) + 0.5 * np.abs(xa) @ np.abs(B.T)
    kind = F64 if B.dtype == np.float64 else F32
    m.ops.adapted_forward(out, x, W, b, xa, Mat(B, kind), N, 0.5)
    return {"out": (out, sum_error(I + R, size))}


def linear_swiglu_forward(m: Maker, N: int, F: int, I: int, dtype: str, bias: bool):
    W, w = m.weight(2 * F, I, dtype)
    x, b = m.normal(N, I, scale=0.3), m.normal(2 * F) if bias else None
    out, h = m.out(N, F), m.out(N, 2 * F)
    size = np.abs(x) @ np.abs(w.T) + (np.abs(b) if bias else 0)
    error = np.broadcast_to(sum_error(I, size), (N, 2 * F))
    y = np.abs(x @ w.T + (b if bias else 0))  # |silu| is at most |x|, its slope at most 1.1
    off = 1.1 * y[:, F:] * error[:, :F] + y[:, :F] * error[:, F:] + 8 * EPS * y[:, :F] * y[:, F:]
    m.ops.linear_swiglu_forward(out, h, x, W, b, N)
    return {"out": (out, off)}


def quantize(m: Maker, rows: int, cols: int, kind: str, inp_dtype: str, size: float):
    """Row-wise: the reference's bits. In groups: as small an error, and integers that fit it."""
    dtype, group = QUANTIZED[kind]
    w = stored(m.rng.normal(size=(rows, cols)).astype(np.float32) * size, DTYPES[inp_dtype])
    if rows > 2:
        w[1], w[2, : cols // 2] = 0, 0
    data = np.zeros((rows, cols // 2 if dtype == I4 else cols), np.int8)
    scale = np.zeros((rows, -(-cols // group)) if group else rows, np.float16)
    m.ops.quantize(data, scale, dtype, group, w, DTYPES[inp_dtype], rows, cols)
    if not group:
        return {"data": (data, 0), "scale": (scale, 0)}
    value, back = unstored(w, DTYPES[inp_dtype]), dequantized(data, dtype, scale, group)
    error = np.add.reduceat((value - back) ** 2, range(0, cols, group), axis=1)
    return {"error": (error, 2e-2 * error + 1e-30)}  # a quotient near .5 may go either way


def linear_backward_input(m: Maker, N: int, O: int, I: int, dtype: str, scale: float, add: int):
    W, w = m.weight(O, I, dtype)
    dout, dinp = m.normal(N, O), m.normal(N, I)
    size = abs(scale) * np.abs(dout) @ np.abs(w) + add * np.abs(dinp)
    m.ops.linear_backward_input(dinp, dout, W, N, scale, add)
    return {"dinp": (dinp, sum_error(O, size))}


def linear_backward_weight(
    m: Maker, N: int, O: int, I: int, scale: float, weight: bool, bias: bool
):
    dout, x, dw, db = m.normal(N, O), m.normal(N, I), m.normal(O, I), m.normal(O)
    tol_w = sum_error(N, np.abs(dw) + abs(scale) * np.abs(dout.T) @ np.abs(x))
    tol_b = sum_error(N, np.abs(db) + abs(scale) * np.abs(dout).sum(0))
    m.ops.linear_backward_weight(
        dw if weight else None, db if bias else None, dout, x, N, O, I, scale
    )
    return {"dweight": (dw, tol_w), "dbias": (db, tol_b)}


@over((N, C, scale) for N, C in ROWS for scale in (1.0, 1e-4, 1e17))
def rmsnorm_forward(m: Maker, N: int, C: int, scale: float):
    inp, weight, out, rstd = m.normal(N, C, scale=scale), m.normal(C), m.out(N, C), m.out(N)
    m.ops.rmsnorm_forward(out, rstd, inp, weight, N, C, 1e-5)
    return {"out": (out, sum_error(C, np.abs(out))), "rstd": (rstd, sum_error(C, np.abs(rstd)))}


@over((N, C, into) for N, C in ROWS for into in ("a", "b", "out"))
def add_rmsnorm_forward(m: Maker, N: int, C: int, into: str):
    a, b, weight, out, rstd = m.normal(N, C), m.normal(N, C), m.normal(C), m.out(N, C), m.out(N)
    total = {"a": a, "b": b, "out": m.out(N, C)}[into]
    m.ops.add_rmsnorm_forward(out, rstd, total, a, b, weight, N, C, 1e-5)
    return {
        "out": (out, sum_error(C, np.abs(out))),
        "rstd": (rstd, sum_error(C, np.abs(rstd))),
        "sum": (total, EPS * np.abs(total)),
    }


@over((N, C, weight_too) for N, C in ROWS for weight_too in (True, False))
def rmsnorm_backward(m: Maker, N: int, C: int, weight_too: bool):
    inp, weight, dout = m.normal(N, C), m.normal(C), m.normal(N, C)
    rstd = m.put(1 / np.sqrt((inp.astype(float) ** 2).mean(1) + 1e-5))
    dinp, dweight = m.normal(N, C), m.normal(C)
    r, g = rstd[:, None], np.abs(dout * weight)
    mean = (g * np.abs(inp)).mean(1, keepdims=True)
    size = np.abs(dinp) + r * g + np.abs(inp) * r**3 * mean
    size_w = np.abs(dweight) + np.abs(dout * inp * r).sum(0)
    m.ops.rmsnorm_backward(dinp, dweight if weight_too else None, dout, inp, weight, rstd, N, C)
    return {"dinp": (dinp, sum_error(C, size)), "dweight": (dweight, sum_error(N, size_w))}


@over((N, C, offset) for N, C in ROWS for offset in (0.0, 100.0))
def layernorm_forward(m: Maker, N: int, C: int, offset: float):
    inp = m.put(m.rng.normal(size=(N, C)) + offset)
    weight, bias = m.normal(C), m.normal(C)
    out, mean, rstd = m.out(N, C), m.out(N), m.out(N)
    m.ops.layernorm_forward(out, mean, rstd, inp, weight, bias, N, C, 1e-5)
    most = np.abs(inp).max(axis=1, initial=0)
    off = sum_error(C, most)  # of the mean, and so of each difference and their root mean square
    size = np.abs(out) + np.abs(bias)
    wide = (off * rstd)[:, None] * (np.abs(weight) + size)
    return {
        "out": (out, sum_error(C, size) + wide),
        "mean": (mean, off),
        "rstd": (rstd, sum_error(C, rstd) + off * rstd * rstd),
    }


@over((N, C, weight, bias) for N, C in ROWS for weight, bias in ((1, 1), (1, 0), (0, 1), (0, 0)))
def layernorm_backward(m: Maker, N: int, C: int, with_weight: int, with_bias: int):
    inp, weight, dout = m.normal(N, C), m.normal(C), m.normal(N, C)
    exact = inp.astype(float)
    mean, rstd = m.put(exact.mean(1)), m.put(1 / np.sqrt(exact.var(1) + 1e-5))
    dinp, dweight, dbias = m.normal(N, C), m.normal(C), m.normal(C)
    g, r = np.abs(dout * weight), rstd[:, None]
    xhat = (np.abs(inp) + np.abs(mean[:, None])) * r  # magnitudes: the difference may cancel
    size = r * (g + g.mean(1, keepdims=True) + xhat * (g * xhat).mean(1, keepdims=True))
    size_w, size_b = np.abs(dweight) + np.abs(dout * xhat).sum(0), np.abs(dbias)
    m.ops.layernorm_backward(
        dinp,
        dweight if with_weight else None,
        dbias if with_bias else None,
        *(dout, inp, weight, mean, rstd, N, C),
    )
    return {
        "dinp": (dinp, sum_error(C, size + np.abs(dinp))),
        "dweight": (dweight, sum_error(N, size_w)),
        "dbias": (dbias, sum_error(N, size_b + np.abs(dout).sum(0))),
    }


@over((N, C, dtype) for N, C in ROWS for dtype in DTYPES)
def embedding_forward(m: Maker, N: int, C: int, dtype: str):
    W, _ = m.weight(11, C, dtype)
    out = m.out(N, C)
    m.ops.embedding_forward(out, W, m.ints(11, N), N)
    return {"out": (out, EPS * np.abs(out) if dtype == "F64" else 0)}


@over(ROWS)
def embedding_backward(m: Maker, N: int, C: int):
    ids, dout, dweight = m.ints(5, N), m.normal(N, C), m.normal(6, C)
    size = np.abs(dweight)
    np.add.at(size, ids, np.abs(dout))
    m.ops.embedding_backward(dweight, dout, ids, N, C)
    return {"dweight": (dweight, sum_error(N, size))}


@over(
    (N, heads, HD, extra, rotary_dim, forward)
    for N, heads, HD, rotary_dim in ROTARY
    for extra, forward in ((0, False), (11, True), (3, False))
)
def rope(m: Maker, N: int, heads: int, HD: int, extra: int, rotary_dim: int, forward: bool):
    stride = heads * HD + extra
    x, table = m.normal(N, stride), m.put(rope_table(300, rotary_dim))
    tolerance = 4 * EPS * np.abs(x).max(initial=0)  # two products and a sum
    op = m.ops.rope_forward if forward else m.ops.rope_backward
    op(x, table, m.ints(300, N), N, heads, HD, stride, rotary_dim)
    return {"x": (x, tolerance)}


@over(
    (N, heads, HD, extra, forward)
    for N, heads, HD in ((3, 2, 8), (1, 1, 4), (17, 3, 64), (5, 2, 36), (9, 4, 128), (0, 2, 8))
    for extra, forward in ((0, False), (11, True), (3, False))
)
def rope_2d(m: Maker, N: int, heads: int, HD: int, extra: int, forward: bool):
    stride = heads * HD + extra
    x, table = m.normal(N, stride), m.put(rope_table(300, HD // 2))
    tolerance = 4 * EPS * np.abs(x).max(initial=0)  # two products and a sum
    op = m.ops.rope_2d_forward if forward else m.ops.rope_2d_backward
    op(x, table, m.ints(300, N), m.ints(300, N), N, heads, HD, stride)
    return {"x": (x, tolerance)}


def segments_of(kind: str, counts: tuple[int, ...]) -> tuple[list[Segment], int]:
    """Segments over the counts, in order, and the cache rows they need."""
    segments, begin, row = [], 0, 9
    for i, count in enumerate(counts):
        s = Segment(begin=begin, count=count)
        if "shared" in kind:
            s.shared_begin, s.shared_count = 1, 4
        if "tiles" in kind:  # of 32 keys, and one more
            s.shared_begin, s.shared_count, row = 32 * i, 32 + i, 100
        if "64" in kind:  # a tile of 64 keys, and its last one with 64 more
            s.shared_begin, s.shared_count, row = 63 * i, 64 + i, 200
        if "apart" in kind:  # ranges that overlap in part, that touch, and that are apart
            s.shared_begin, s.shared_count = ((4, 3), (2, 3), (5, 3), (0, 2))[i % 4]
        if "past" in kind:
            s.past_begin, s.past_count = row, 3 * i + 1
        if "long" in kind:
            s.past_begin, s.past_count = row, 70
        if "far" in kind:  # more keys than 64 runs of 64 (cuda/decode.h)
            s.past_begin, s.past_count = row, 4093 + 60 * i
        if "keys" in kind:  # so many, and in each segment 64 more than in the one before
            s.past_begin, s.past_count = row, int(kind.split()[-1]) + 64 * i
        if "context" in kind:
            s.context = count * 2 // 3
        row += s.past_count
        begin += count
        segments.append(s)
    return segments, row


def attention_inputs(m: Maker, kind: str, counts: tuple[int, ...], shape: tuple[int, int, int]):
    segments, rows = segments_of(kind, counts)
    NH, KVH, HD = shape
    N, KV = sum(counts), KVH * HD
    qkv = m.normal(N, (NH + 2 * KVH) * HD)
    if kind == "cold":  # scores near -120: what exp(-lse) would be is infinite
        qkv = m.put(qkv / 64 + np.repeat([11.0, -11.0, 0.0], [NH * HD, KV, KV]) / HD**0.25)
    cache = (
        None if kind in ("plain", "context", "cold") else (m.normal(rows, KV), m.normal(rows, KV))
    )
    keys = max(counts, default=0) + max(
        (s.shared_count + s.past_count for s in segments), default=0
    )
    # a score sums HD products near 1, over HD^1/2; exp makes its error a relative one
    score = sum_error(HD, np.sqrt(HD)) * 2
    return segments, qkv, cache, Heads(*shape), N, rows, keys, score


def attention_forward(m: Maker, kind: str, counts: tuple[int, ...], shape: tuple[int, int, int]):
    segments, qkv, cache, heads, N, _, keys, score = attention_inputs(m, kind, counts, shape)
    out, lse = m.out(N, heads.NH * heads.HD), m.out(N, heads.NH)
    m.ops.attention_forward(out, lse, qkv, cache, segments, len(segments), heads)
    relative = 2 * score + sum_error(keys, 1)
    largest = max([np.abs(qkv).max(initial=0), *(np.abs(a).max() for a in cache or ())])
    return {
        "out": (out, relative * largest),
        "lse": (lse, relative + 8 * EPS * np.abs(lse)),
    }


def attention_backward(m: Maker, kind: str, counts: tuple[int, ...], shape: tuple[int, int, int]):
    segments, qkv, cache, heads, N, rows, keys, score = attention_inputs(m, kind, counts, shape)
    NH, KVH, HD = shape
    exact = [None if a is None else a.astype(np.float64) for a in (qkv, *(cache or (None, None)))]
    out, lse = np.zeros((N, NH * HD)), np.zeros((N, NH))
    kv = None if cache is None else (exact[1], exact[2])
    REF.attention_forward(out, lse, exact[0], kv, segments, len(segments), heads)
    out, lse, dout = m.put(out), m.put(lse), m.normal(N, NH * HD)
    dqkv, dcache = m.out(*qkv.shape), None
    if "shared" in kind:
        dcache = m.normal(rows, KVH * HD), m.normal(rows, KVH * HD)
    m.ops.attention_backward(
        dqkv, dcache, dout, out, lse, qkv, cache, segments, len(segments), heads
    )
    outputs = {"dqkv": dqkv}
    if dcache:
        outputs |= {"dk": dcache[0], "dv": dcache[1]}
    # p carries the error of its score and of lse; a gradient is a sum over keys or tokens and head
    # groups of p times sums over HD. Relative to the largest gradient, since these sums cancel.
    largest = max(np.abs(a).max(initial=0) for a in outputs.values())
    terms = keys + N * NH // KVH + HD
    tolerance = 4 * (2 * score + sum_error(terms, 1)) * largest
    return {name: (array, tolerance) for name, array in outputs.items()}


@over(
    (N, *shape) for N in (0, 1, 3, 17) for shape in ((1, 1, 1), (4, 2, 6), (3, 1, 33), (8, 2, 64))
)
def qkv(m: Maker, N: int, NH: int, KVH: int, HD: int):
    heads, widths = Heads(NH, KVH, HD), (NH * HD, KVH * HD, KVH * HD)
    qkv, dqkv = m.out(N, sum(widths)), m.normal(N, sum(widths))
    gradients = [m.out(N, width) for width in widths]
    m.ops.qkv_forward(qkv, *(m.normal(N, width) for width in widths), N, heads)
    m.ops.qkv_backward(*gradients, dqkv, N, heads)
    return {"qkv": (qkv, 0), **{f"d{n}": (d, 0) for n, d in zip("qkv", gradients, strict=True)}}


@over((N, *shape) for N in (0, 1, 3, 17) for shape in ((1, 1), (4, 6), (3, 33), (8, 64), (2, 128)))
def qkv_by_head(m: Maker, N: int, NH: int, HD: int):
    heads, width = Heads(NH, NH, HD), 3 * NH * HD
    qkv, dinp = m.out(N, width), m.out(N, width)
    m.ops.qkv_by_head_forward(qkv, m.normal(N, width), N, heads)
    m.ops.qkv_by_head_backward(dinp, m.normal(N, width), N, heads)
    return {"qkv": (qkv, 0), "dinp": (dinp, 0)}


@over((N, 4, 2, C) for N, C in ROWS)
def kv_append(m: Maker, N: int, NH: int, KVH: int, HD: int):
    qkv, k, v = (
        m.normal(N, (NH + 2 * KVH) * HD),
        m.normal(N + 5, KVH * HD),
        m.normal(N + 5, KVH * HD),
    )
    slot = m.rng.permutation(N + 5)[:N].astype(np.int32)
    m.ops.kv_append((k, v), qkv, slot, N, Heads(NH, KVH, HD))
    return {"k": (k, 0), "v": (v, 0)}


@over((N, 2 * heads, heads, HD, rotary_dim) for N, heads, HD, rotary_dim in ROTARY)
def rope_append(m: Maker, N: int, NH: int, KVH: int, HD: int, rotary_dim: int):
    qkv = m.normal(N, (NH + 2 * KVH) * HD)
    k, v, table = m.normal(N + 5, KVH * HD), m.normal(N + 5, KVH * HD), m.normal(7, rotary_dim)
    slot = m.rng.permutation(N + 5)[:N].astype(np.int32)
    position = m.rng.integers(0, 7, N).astype(np.int32)
    most = 8 * EPS * max(np.abs(qkv).max(initial=0) * np.abs(table).max(initial=0), 1)
    heads = Heads(NH, KVH, HD)
    m.ops.rope_append((k, v), qkv, table, position, slot, N, heads, rotary_dim)
    return {"qkv": (qkv, most), "k": (k, most), "v": (v, 0)}


APPENDED = [
    (N, *heads, dtype)
    for dtype in (*DTYPES, *QUANTIZED)
    for N, *heads in ((1, 4, 2, 8, 4), (3, 2, 1, 16, 16), (4, 2, 2, 2, 2), (5, 2, 1, 10, 6),
                      (2, 2, 1, 33, 10), (9, 2, 1, 8, 8), (33, 4, 2, 8, 4), (0, 2, 1, 8, 4))
    if dtype != "I4 by 96"
]  # fmt: skip


@over(APPENDED)
def linear_rope_append(
    m: Maker, N: int, NH: int, KVH: int, HD: int, rotary_dim: int, dtype: str, normed: bool = False
):
    """Each element is a product's, or of two of them, turned."""
    O, I = (NH + 2 * KVH) * HD, 64  # noqa: E741, N806
    W, w = m.weight(O, I, dtype)
    x, b = m.normal(N, I, scale=0.3), m.normal(O)
    k, v, table = m.normal(N + 5, KVH * HD), m.normal(N + 5, KVH * HD), m.normal(7, rotary_dim)
    slot = m.rng.permutation(N + 5)[:N].astype(np.int32)
    position = m.rng.integers(0, 7, N).astype(np.int32)
    norm, ln, rstd = m.normal(I, scale=0.3), m.out(N, I), m.out(N)
    size = np.abs(x) if not normed else np.abs(x * norm) / np.sqrt((x**2).mean(1, keepdims=True))
    size = size @ np.abs(w.T) + np.abs(b)
    error = (sum_error(I, size) + 4 * EPS * normed * size).max(initial=0)
    most = 2 * error * max(np.abs(table).max(initial=0), 1) + 8 * EPS * 10
    qkv = m.out(N, O)
    rest = (table, position, slot, N, Heads(NH, KVH, HD), rotary_dim)
    if normed:
        m.ops.rmsnorm_rope_append((k, v), qkv, ln, rstd, x, norm, W, b, *rest, 1e-5)
    else:
        m.ops.linear_rope_append((k, v), qkv, x, W, b, *rest)
    return {"qkv": (qkv, most), "k": (k, most), "v": (v, most)}


# kind, tokens of segments, (NH, KVH, HD), rotary_dim, C, R, dtype, dropout where there is some
HALVES = [
    ("plain", (), (2, 1, 8), 4, 16, 4, "F32"),
    ("plain", (3,), (2, 1, 8), 4, 16, 4, "F16"),
    ("plain", (12, 5), (2, 1, 8), 6, 16, 4, "F32", 0.1),
    ("plain", (9, 4), (2, 1, 8), 8, 264, 9, "F16", 0.25),
    ("plain", (20,), (2, 1, 8), 4, 8, 12, "F16", 0.5),
    ("plain", (19,), (2, 1, 8), 8, 40, 34, "BF16"),
    ("plain", (1, 5, 20), (4, 2, 32), 16, 40, 0, "BF16"),
    ("plain", (40, 9), (6, 2, 64), 32, 64, 8, "F16"),
    ("plain", (66,), (2, 1, 128), 64, 24, 9, "BF16"),
    ("context", (21, 11), (2, 2, 96), 96, 16, 1, "F32"),
    ("shared", (9, 17), (4, 1, 64), 32, 32, 3, "F16", 0.1),
    ("shared past", (7, 6), (4, 2, 40), 20, 32, 0, "I8"),
    ("past", (70,), (2, 1, 64), 32, 32, 5, "I4 by 32"),
    ("past", (2, 30), (2, 1, 64), 32, 32, 2, "F16"),
    ("plain", (14,), (2, 1, 33), 10, 16, 2, "F16"),
    ("plain", (13,), (2, 1, 8), 8, 7, 2, "F16"),
    ("plain", (11,), (20, 5, 8), 4, 16, 70, "F16"),
    ("plain", (10,), (2, 1, 160), 80, 16, 4, "BF16"),
    ("plain", (290,), (3, 1, 24), 12, 8, 20, "F32"),
]


class Half:
    """Arguments of the ops of struct glm_self_attention, and what bounds of their outputs need."""

    def __init__(self, m: Maker, case: tuple[Any, ...], bias: bool) -> None:
        kind, counts, (NH, KVH, HD), rotary_dim, C, R, dtype, *p = case
        segments, rows = segments_of(kind, counts)
        self.N, self.O, self.C, self.R = N, O, C, R = sum(counts), (NH + 2 * KVH) * HD, C, R
        (W, self.w), (D, self.d) = m.weight(O, C, dtype), m.weight(C, NH * HD, dtype)
        weight = m.normal(C, scale=0.4 / C**0.5)
        cache, slot = None, None
        if kind not in ("plain", "context"):
            cache = tuple(m.normal(rows + N, KVH * HD, scale=0.4) for _ in "kv")
        if "past" in kind:
            slot = (rows + m.rng.permutation(N)).astype(np.int32)
        self.dcache = None
        if kind == "shared":
            self.dcache = tuple(m.normal(rows + N, KVH * HD) for _ in "kv")
        # of any rank it adds about as much: softmax of large scores is a step
        self.A, self.B = m.normal(R, C), m.normal(O, R, scale=min(1, (4 / max(R, 1)) ** 0.5))
        real = F64 if m.ops.real == np.float64 else F32
        self.of = SelfAttention(
            norm=weight,
            eps=1e-5,
            qkv=W,
            dense=D,
            table=m.put(rope_table(300, rotary_dim)),
            position=m.ints(300, N),
            rotary_dim=rotary_dim,
            segments=segments,
            heads=Heads(NH, KVH, HD),
            qkv_bias=m.normal(O, scale=0.3) if bias else None,
            dense_bias=m.normal(C) if bias else None,
            A=Mat(self.A, real) if R else None,
            B=Mat(self.B, real) if R else None,
            scale=0.5,
            dropout=m.dropout(N, p[0]) if p else None,
            dropped=m.out(N, C) if p else None,
            slot=slot,
            cache=cache,
            dcache=self.dcache,
        )
        self.sum, self.b = m.normal(N, C), m.normal(N, C)
        x = self.sum.astype(np.float64) + self.b
        ln = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5) * weight
        self.x = ln.copy()
        if p:
            REF.dropout_forward(self.x, ln, N, C, self.of.dropout)
        most = 1 / (1 - p[0]) if p else 1
        self.xabs = np.abs(self.x) @ np.abs(self.A.T)
        self.weff = np.abs(self.w) + 0.5 * most * np.abs(self.B) @ np.abs(self.A)
        size = (np.abs(ln) @ self.weff.T).max(initial=0) + 1
        # a sum of C terms of a norm, whose own is one of C, then turned
        off = 2 * (sum_error(C + R, 2 * size) + (C + 8) * EPS * size)
        y = ln @ self.w.T + 0.5 * (self.x @ self.A.T) @ self.B.T
        self.largest = 1.5 * np.abs(y).max(initial=0) + 2
        score = 2 * HD**0.5 * off * self.largest + 2 * sum_error(HD, HD**0.5 * self.largest)
        self.keys = max(counts, default=0) + max(
            (s.shared_count + s.past_count for s in segments), default=0
        )
        self.relative = 2 * score + sum_error(self.keys, 1)
        self.off, self.ln = off, ln
        self.att, self.lse = m.out(N, NH * HD), m.out(N, NH)
        self.qkv, self.xa, self.rstd = m.out(N, O), m.out(N, R), m.out(N)

    def forward(self, m: Maker) -> np.ndarray:
        out, ln = m.out(self.N, self.C), m.out(self.N, self.C)
        m.ops.self_attention_norm(ln, self.rstd, self.sum, self.b, self.of, self.N)
        m.ops.self_attention_forward(
            out, self.att, self.lse, self.qkv, self.xa, ln, self.of, self.N
        )
        return out


@over((*case, bias) for case in HALVES for bias in (False, True))
def self_attention_forward(m: Maker, *case: Any):
    h = Half(m, case[:-1], case[-1])
    out = h.forward(m)
    off = h.relative * h.largest + h.off
    rows = np.abs(h.d).sum(1).max(initial=0)
    found = {
        "out": (out, (off + sum_error(h.att.shape[1], h.largest)) * rows + 8 * EPS * 8),
        "lse": (h.lse, h.relative + 8 * EPS * np.abs(h.lse)),
        "sum": (h.sum, 2 * EPS * np.abs(h.sum)),
        "rstd": (h.rstd, (h.C + 8) * EPS * np.abs(h.rstd)),
    }
    if h.R:
        found["xa"] = h.xa, sum_error(2 * h.C, 2 * h.xabs) + (h.C + 8) * EPS * h.xabs
    if h.of.slot is not None and h.of.cache:
        found |= {"k": (h.of.cache[0], h.off), "v": (h.of.cache[1], h.off)}
    return found


@over((*case, through) for case in HALVES for through in (True, False) if "past" not in case[0])
def self_attention_backward(m: Maker, *case: Any):
    """Of what its forward left, its input's norm made again. Bounds as those of attention_backward,
    through products."""
    *case, through = case
    h = Half(m, tuple(case), True)
    h.forward(m)
    of, (N, O, C, R) = h.of, (h.N, h.O, h.C, h.R)
    AO, dout = h.att.shape[1], m.normal(N, C)
    dA, dB = m.normal(R, C), m.normal(O, R)
    exact = dqkv_of(m, h, dout)
    work, dinp = m.out(N * max(C, AO)), None
    if through:  # in work's memory, where it is as large
        dinp = work if C >= AO else m.out(N * C)
    m.ops.self_attention_backward(
        dinp, dA if R else None, dB if R else None, work, m.out(N, O), m.out(N, R), h.rstd, dout,
        h.att, h.lse, h.qkv, h.xa, h.sum, of, N
    )  # fmt: skip
    terms = h.keys + N * of.heads.NH // of.heads.KVH + of.heads.HD + C
    off = 4 * (2 * h.relative + h.off / h.largest + sum_error(terms, 1)) * exact
    off = off + sum_error(N + O + C + R, exact)
    found = {}
    if R:
        lns = np.abs(h.x).sum(0).max(initial=0)
        found["dB"] = dB, off * 0.5 * h.xabs.sum(0).max(initial=0) + 8 * EPS * np.abs(dB)
        found["dA"] = dA, off * 0.5 * np.abs(h.B).sum(0).max() * lns + 8 * EPS * np.abs(dA)
    if dinp is not None:
        found["dinp"] = dinp.reshape(N, C), off * h.weff.sum(0).max()
    if h.dcache:
        found |= {"dk": (h.dcache[0], off + 8 * EPS * 4), "dv": (h.dcache[1], off + 8 * EPS * 4)}
    return found


def dqkv_of(m: Maker, h: Half, dout: np.ndarray) -> float:
    """The largest gradient of queries, keys, values and of the cache, in double."""
    of, N = h.of, h.N
    qkv = h.ln @ h.w.T + 0.5 * (h.x @ h.A.astype(np.float64).T) @ h.B.T
    qkv = np.ascontiguousarray(qkv + (0 if of.qkv_bias is None else of.qkv_bias), np.float64)
    table = of.table.astype(np.float64)
    heads = of.heads
    REF.rope_forward(qkv, table, of.position, N, heads.NH + heads.KVH, heads.HD, h.O, of.rotary_dim)
    cache = tuple(a.astype(np.float64) for a in of.cache) if of.cache else None
    out, lse, dqkv = np.zeros(h.att.shape), np.zeros(h.lse.shape), np.zeros_like(qkv)
    n = len(of.segments)
    REF.attention_forward(out, lse, qkv, cache, of.segments, n, heads)
    dcache = tuple(a.astype(np.float64) for a in h.dcache) if h.dcache else None
    datt = np.ascontiguousarray(dout.astype(np.float64) @ h.d)
    REF.attention_backward(dqkv, dcache, datt, out, lse, qkv, cache, of.segments, n, heads)
    return max(np.abs(a).max(initial=0) for a in (dqkv, *(dcache or ())))


@over((*shape, p) for shape in PREFIXES for p in (None, 0.1))
def prefix_forward(m: Maker, P: int, J: int, KV: int, copies: int, p: float | None):
    inp, out = m.normal(P, J, KV), m.out(J, copies * P, KV)
    dropout = None if p is None else m.dropout(copies * P, p)
    m.ops.prefix_forward(out, inp, P, J, KV, copies, dropout)
    return {"out": (out, 0 if p is None else 2 * EPS * np.abs(out))}


@over((*shape, p) for shape in PREFIXES for p in (None, 0.1))
def prefix_backward(m: Maker, P: int, J: int, KV: int, copies: int, p: float | None):
    dinp, dout = m.normal(P, J, KV), m.normal(J, copies * P, KV)
    size = np.abs(dinp) + np.abs(dout).reshape(J, copies, P, KV).sum(1).transpose(1, 0, 2) * 2
    dropout = None if p is None else m.dropout(copies * P, p)
    m.ops.prefix_backward(dinp, dout, P, J, KV, copies, dropout)
    return {"dinp": (dinp, sum_error(copies, size))}


@over((N, C, scale) for N, C in ROWS for scale in (1.0, 100.0))
def swiglu_forward(m: Maker, N: int, F: int, scale: float):
    inp, out = m.normal(N, 2 * F, scale=scale), m.out(N, F)
    m.ops.swiglu_forward(out, inp, N, F)
    return {"out": (out, 16 * EPS * np.abs(out) + 1e-33)}  # 1e-33: exp(100) may overflow to silu 0


@over((N, C, *how) for N, C in ROWS for how in ((1.0, False), (100.0, True)))
def swiglu_backward(m: Maker, N: int, F: int, scale: float, in_place: bool):
    inp, dout = m.normal(N, 2 * F, scale=scale), m.normal(N, F)
    gate, up = np.split(inp.astype(np.float64), 2, axis=1)
    sigmoid = 1 / (1 + np.exp(-gate))
    # 1 - sigmoid cancels: it is off by a rounding of 1, and gate times that
    size = np.abs(np.hstack([dout * up * sigmoid * (1 + np.abs(gate)), dout * gate * sigmoid]))
    dinp = inp if in_place else m.out(N, 2 * F)
    m.ops.swiglu_backward(dinp, dout, inp, N, F)
    return {"dinp": (dinp, 16 * EPS * size + 1e-33)}


ACTIVATED = [
    (0, 8, 16),
    (1, 5, 8),
    (3, 33, 24),
    (8, 16, 96),
    (9, 64, 128),
    (11, 7, 42),
    (70, 96, 192),
]


@over((*shape, dtype, bias) for shape in ACTIVATED for dtype in (*DTYPES, "I8", "I4 by 32")
      for bias in (False, True) if shape[1] % 2 or not bias)  # fmt: skip
def swiglu_linear_forward(m: Maker, N: int, O: int, F: int, dtype: str, bias: bool):
    W, w = m.weight(O, F, dtype)
    h, b = m.normal(N, 2 * F), m.normal(O) if bias else None
    gate, up = np.split(h.astype(np.float64), 2, axis=1)
    size = np.abs(gate / (1 + np.exp(-gate)) * up) @ np.abs(w.T) + (np.abs(b) if bias else 0)
    out = m.out(N, O)
    m.ops.swiglu_linear_forward(out, m.out(N, F), h, W, b, N)
    return {"out": (out, sum_error(F, 2 * size))}


@over((*shape, dtype, in_place) for shape in ACTIVATED for dtype in (*DTYPES, "I8", "I4 by 32")
      for in_place in (False, True) if usable(dtype, shape[2 if in_place else 1]))  # fmt: skip
def swiglu_linear_backward(m: Maker, N: int, I: int, F: int, dtype: str, in_place: bool):
    I = F if in_place else I  # noqa: E741, N806
    W, w = m.weight(2 * F, I, dtype)
    h, dact = m.normal(N, 2 * F), m.normal(N, F)
    gate, up = np.split(h.astype(np.float64), 2, axis=1)
    s = 1 / (1 + np.exp(-gate))
    size = np.abs(np.hstack([dact * up * s * (1 + np.abs(gate)), dact * gate * s])) @ np.abs(w)
    dinp = dact if in_place else m.out(N, I)
    m.ops.swiglu_linear_backward(dinp, dact, h, W, N)
    return {"dinp": (dinp, sum_error(2 * F, 2 * size))}


MLPS = [(0, 8, 16), (1, 8, 8), (3, 24, 40), (9, 16, 24), (11, 7, 9), (12, 8, 520), (70, 64, 96)]


def mlp_of(m: Maker, N: int, C: int, F: int, dtype: str, bias: bool):
    """Forward; its arguments, what bounds it needs of h, and what it yields."""
    (U, up), (D, down) = m.weight(2 * F, C, dtype), m.weight(C, F, dtype)
    total, b, weight, eps = m.normal(N, C), m.normal(N, C), m.normal(C), 1e-5
    x = total.astype(np.float64) + b
    ln = x / np.sqrt((x**2).mean(1, keepdims=True) + eps) * weight
    h = ln @ up.T
    off = sum_error(C, 2 * np.abs(ln) @ np.abs(up.T)) + (C + 8) * EPS * np.abs(ln) @ np.abs(up.T)
    added = m.normal(C) if bias else None
    out, rstd, kept = m.out(N, C), m.out(N), m.out(N, 2 * F)
    m.ops.swiglu_mlp_forward(
        out, rstd, total, m.out(N, F), kept, b, weight, U, D, added, N, eps
    )  # fmt: skip
    return (U, up), (D, down), kept, h, off, {"out": out, "rstd": rstd, "sum": total}, added


@over((*shape, dtype, bias) for shape in MLPS for dtype in (*DTYPES, "I8", "I4 by 32")
      for bias in (False, True) if usable(dtype, shape[1]) and usable(dtype, shape[2]))  # fmt: skip
def swiglu_mlp_forward(m: Maker, N: int, C: int, F: int, dtype: str, bias: bool):
    _, (_, down), _, h, off, found, added = mlp_of(m, N, C, F, dtype, bias)
    (gate, up), (gate_off, up_off) = np.split(h, 2, axis=1), np.split(off, 2, axis=1)
    silu = np.abs(gate / (1 + np.exp(-gate)))
    act = silu * np.abs(up)
    act_off = 1.1 * gate_off * np.abs(up) + silu * up_off + 16 * EPS * act
    most = act @ np.abs(down.T) + (np.abs(added) if bias else 0)
    error = sum_error(F, 2 * most) + 2 * act_off @ np.abs(down.T)
    rstd = np.abs(found["rstd"])
    return {
        "out": (found["out"], error),
        "rstd": (found["rstd"], (C + 8) * EPS * rstd),
        "sum": (found["sum"], 2 * EPS * np.abs(found["sum"])),
    }


@over((*shape, dtype) for shape in MLPS for dtype in (*DTYPES, "I8", "I4 by 32")
      if usable(dtype, shape[1]) and usable(dtype, shape[2]))  # fmt: skip
def swiglu_mlp_backward(m: Maker, N: int, C: int, F: int, dtype: str):
    """Of the h that its forward left."""
    (U, u), (D, d), kept, h, off, *_ = mlp_of(m, N, C, F, dtype, False)
    dout, room = m.normal(N, C), m.out(N * F)
    dact = np.abs(dout) @ np.abs(d)
    gate, up = np.split(h, 2, axis=1)
    gate_off, up_off = np.split(off, 2, axis=1)
    s = 1 / (1 + np.exp(-gate))
    dgate, dup = dact * np.abs(up) * s * (1 + np.abs(gate)), dact * np.abs(gate) * s
    dgate_off = dact * (up_off * 1.1 + np.abs(up) * gate_off) + sum_error(C, 2 * dgate)
    dup_off = dact * 1.1 * gate_off + sum_error(C, 2 * dup)
    size = np.abs(u)
    error = np.hstack([dgate_off, dup_off]) @ size * 2
    error += sum_error(2 * F, 2 * np.hstack([dgate, dup]) @ size)
    m.ops.swiglu_mlp_backward(room, kept, dout, U, D, N)
    return {"dinp": (room[: N * C].reshape(N, C), error)}


@over((n, *how) for n in LENGTHS for how in ((1.0, False), (50.0, True)))
def gelu_forward(m: Maker, n: int, scale: float, in_place: bool):
    inp = m.normal(n, scale=scale)
    out = inp if in_place else m.out(n)
    # exp of 2 u is off by as many roundings as its argument, at most 88, counts
    tolerance = 16 * EPS * np.abs(inp) * np.minimum(1 + np.abs(inp) ** 3, 8) + 1e-33
    m.ops.gelu_forward(out, inp, n)
    return {"out": (out, tolerance)}


@over((n, *how) for n in LENGTHS for how in ((1.0, None), (50.0, "inp"), (3.0, "dout")))
def gelu_backward(m: Maker, n: int, scale: float, into: str | None):
    inp, dout = m.normal(n, scale=scale), m.normal(n)
    tolerance = 64 * EPS * np.abs(dout) + 1e-33  # |gelu'| is at most 1.13
    dinp = {"inp": inp, "dout": dout, None: m.out(n)}[into]
    m.ops.gelu_backward(dinp, dout, inp, n)
    return {"dinp": (dinp, tolerance)}


@over((n, *how) for n in LENGTHS for how in ((1.0, False), (50.0, True)))
def tanh_forward(m: Maker, n: int, scale: float, in_place: bool):
    inp = m.normal(n, scale=scale)
    out = inp if in_place else m.out(n)
    m.ops.tanh_forward(out, inp, n)
    return {"out": (out, 8 * EPS)}  # absolute: tanh by way of exp cancels near 0


@over((n, in_place) for n in LENGTHS for in_place in (False, True))
def tanh_backward(m: Maker, n: int, in_place: bool):
    dout, out = m.normal(n), m.put(np.tanh(m.rng.normal(size=n)))
    tolerance = 4 * EPS * np.abs(dout)
    dinp = dout if in_place else m.out(n)
    m.ops.tanh_backward(dinp, dout, out, n)
    return {"dinp": (dinp, tolerance)}


@over((N, C, p, p < 0.3) for N, C in ROWS for p in (0.0, 0.1, 0.5))
def dropout_forward(m: Maker, N: int, C: int, p: float, in_place: bool):
    inp = m.normal(N, C)
    out = inp if in_place else m.out(N, C)
    m.ops.dropout_forward(out, inp, N, C, m.dropout(N, p))
    return {"out": (out, 2 * EPS * np.abs(out))}


@over((N, C, 0.1) for N, C in ROWS)
def dropout_backward(m: Maker, N: int, C: int, p: float):
    dinp, dout = m.normal(N, C), m.normal(N, C)
    tolerance = 4 * EPS * (np.abs(dinp) + np.abs(dout) / (1 - p))
    m.ops.dropout_backward(dinp, dout, N, C, m.dropout(N, p))
    return {"dinp": (dinp, tolerance)}


@over((N, C, size) for N, C in ROWS for size in (0.1, 5.0))
def noise(m: Maker, N: int, C: int, size: float):
    x = m.normal(N, C)
    tolerance = 4 * EPS * (np.abs(x) + size)
    m.ops.noise(x, N, C, size, m.dropout(N, 0))
    return {"x": (x, tolerance)}


@over((more + N, N, C) for N, C in ROWS for more in (4, 0))
def gather(m: Maker, N: int, M: int, C: int):
    rows = np.sort(m.rng.permutation(N)[:M]).astype(np.int32)
    inp, out, dinp, dout = m.normal(N, C), m.out(M, C), m.normal(N, C), m.normal(M, C)
    m.ops.gather_forward(out, inp, rows, M, C)
    m.ops.gather_backward(dinp, dout, rows, M, C)
    return {"out": (out, 0), "dinp": (dinp, EPS * np.abs(dinp))}


@over((N, C, scale) for N, C in ROWS for scale in (1.0, 30.0, 1e4))
def cross_entropy_forward(m: Maker, M: int, V: int, scale: float):
    """The largest ones all negative: a zero from beyond the row would be their maximum."""
    logits = m.put(scale * (m.rng.normal(size=(M, V)) - (4 if scale == 1e4 else 0)))
    target = m.ints(V, M)
    loss, lse = m.out(M), m.out(M)
    m.ops.cross_entropy_forward(loss, lse, logits, target, M, V)
    tolerance = sum_error(V, 1) + 4 * EPS * np.abs(logits).max(initial=0)
    return {"loss": (loss, tolerance), "lse": (lse, tolerance)}


@over((N, C, scale) for N, C in ROWS for scale in (1.0, 30.0, 1e4))
def cross_entropy_backward(m: Maker, M: int, V: int, scale: float):
    logits, target = m.normal(M, V, scale=scale), m.ints(V, M)
    exact = logits.astype(np.float64)
    most = exact.max(1)
    lse = m.put(np.log(np.exp(exact - most[:, None]).sum(1)) + most)
    p = np.exp(exact - lse[:, None])
    p[np.arange(M), target] += 1
    tolerance = (
        0.37 * (16 + 2 * np.abs(exact).max(initial=0)) * EPS * p
    )  # exp of a rounded difference
    m.ops.cross_entropy_backward(logits, lse, target, M, V, 0.37)
    return {"logits": (logits, tolerance + 1e-37)}


@over((n, into) for n in LENGTHS for into in ("a", "b", "out"))
def add(m: Maker, n: int, into: str):
    a, b = m.normal(n), m.normal(n)
    out = {"a": a, "b": b, "out": m.out(n)}[into]
    m.ops.add(out, a, b, n)
    return {"out": (out, EPS * np.abs(out))}


@over((n, into) for into in ("a", "b", "out") for n in LENGTHS)
def scaled_add(m: Maker, n: int, into: str):
    a, b = m.normal(n), m.normal(n)
    out = {"a": a, "b": b, "out": m.out(n)}[into]
    tolerance = 2 * EPS * (7.5 * np.abs(a) + np.abs(b))
    m.ops.scaled_add(out, a, b, n, 7.4833)
    return {"out": (out, tolerance)}


@over((n,) for n in LENGTHS)
def sum_squares(m: Maker, n: int):
    value = np.full(1, np.nan)  # in double whatever the backend: n roundings of 2^-53 at most
    m.ops.sum_squares(value, m.normal(n), n)
    return {"out": (value, n * 2.0**-52 * value)}


@over(
    (N, C, rows, bad)
    for N, C in ROWS
    for rows, bad in (
        ((), 0.0),
        *(((0,), np.nan), ((N - 1,), np.inf), ((1, N - 1), -np.inf), ((2, 1), np.nan)),
    )
    if N > 2 or not rows
)
def first_nonfinite(m: Maker, N: int, C: int, rows: tuple[int, ...], bad: float):
    x, row = m.normal(N, C), c_int(-7)
    for at in rows:
        x[at, m.rng.integers(C)] = bad
    m.ops.first_nonfinite(row, x, N, C)
    return {"row": (np.array(row.value), 0), "expected": (np.array(min(rows, default=-1)), 0)}


@over((N, C, kind) for N, C in ROWS for kind in ("plain", "ties", "bad"))
def choose(m: Maker, M: int, V: int, kind: str):
    x, ids = m.normal(M, V), np.full(M, -7, np.int32)
    if kind == "ties":
        x[:] = np.round(x)
    want = x.argmax(1) if V else ids
    if kind == "bad":
        for row in range(0, M, 2):
            x[row, m.rng.integers(V)] = [np.nan, np.inf, -np.inf][row // 2 % 3]
            want[row] = -1
    m.ops.choose(ids, x, M, V, None, None)
    return {"id": (ids.astype(float), 0), "expected": (want.astype(float), 0)}


def choices_of(
    rng: np.random.Generator, M: int, V: int, temperature: float, top_k: int, top_p: float
) -> tuple[list[Choice], np.ndarray]:
    """How M rows are drawn, every other one with scores that change, and the columns of these."""
    choices, touched = [], np.empty(0, np.int32)
    for row in range(M):
        runs = [rng.permutation(V)[: rng.integers(0, V + 1) // 2] for _ in range(2 * (row % 2))]
        lengths = [len(run) for run in runs] or [0, 0]
        draw = (top_p, int(rng.integers(2**63)), row, 5 * row, temperature, 1.7)
        choices.append(Choice(*draw, top_k, len(touched), *lengths))
        touched = np.concatenate((touched, *runs)).astype(np.int32)
    return choices, touched if len(touched) else np.zeros(1, np.int32)


@over(
    (N, C, temperature, top_k, top_p, ties)
    for N, C in ROWS
    for temperature, top_k, top_p in (
        *((0.0, 0, 1.0), (1.0, 0, 1.0), (0.8, 5, 1.0), (0.95, 0, 0.7), (1.3, 50, 0.8)),
        *((1.0, 1, 1.0), (2.0, 0, 0.0), (1e-40, 3, 0.9)),
    )
    for ties in (False, True)
    if temperature != 1e-40 or not ties  # in double it does not overflow
)
def choose_drawn(
    m: Maker, M: int, V: int, temperature: float, top_k: int, top_p: float, ties: bool | str
):
    x, ids = m.normal(M, V, scale=3), np.full(M, -7, np.int32)
    if ties:
        x[:] = np.round(x)  # -0, too
    if ties == "near":  # one that is as little as possible before its equals
        x[:] = 1
        x[:, : V // 8] += EPS
    choices, touched = choices_of(m.rng, M, V, temperature, top_k, top_p)
    wanted = {}
    if M > 4:  # a row that is not finite, and one where nothing is allowed
        x[1, V // 2] = np.nan
        everything = np.arange(V, dtype=np.int32)
        choices[2].first, choices[2].penalised, choices[2].banned = len(touched), 0, V
        touched = np.concatenate((touched, everything))
        wanted = {1: -1, 2: -2}
    m.ops.choose(ids, x, M, V, choices, touched)
    got = {row: float(ids[row]) for row in wanted}
    return {
        "id": (ids.astype(float), 0),
        "refused": (np.array(list(got.values())), 0),
        "expected": (np.array(list(map(float, wanted.values()))), 0),
    }


@over((n, *how) for n in LENGTHS for how in ((1, 0.0), (1000, 0.1)))
def adamw(m: Maker, n: int, t: int, wd: float):
    p, g, mom, v = m.normal(n), m.normal(n), m.normal(n, scale=0.1), m.put(m.normal(n) ** 2)
    lr, b1, b2, eps, gscale = 1e-3, 0.9, 0.999, 1e-8, 0.125
    m1 = b1 * np.abs(mom) + (1 - b1) * np.abs(gscale * g)
    v1 = b2 * v.astype(np.float64) + (1 - b2) * np.square(gscale * g)
    step = lr * m1 / (1 - b1**t) / (np.sqrt(v1 / (1 - b2**t)) + eps)
    tolerance = 4 * EPS * np.abs(p) + 16 * EPS * step
    m.ops.adamw(p, g, mom, v, n, lr, b1, b2, eps, wd, t, gscale)
    return {"p": (p, tolerance), "m": (mom, 4 * EPS * m1), "v": (v, 4 * EPS * v1)}


@over(
    (*shape, dtype)
    for shape in (
        *((1, 1, 1, True), (3, 17, 8, False), (33, 100, 4, True), (64, 255, 16, False)),
        *((2, 1025, 64, True), (2, 1025, 64, False)),
    )
    for dtype in DTYPES
)
def merge(m: Maker, O: int, I: int, R: int, dora: bool, dtype: str):
    W, w = m.weight(O, I, dtype)
    B, A = m.normal(O, R), m.normal(R, I)
    magnitude, rnorm = m.normal(O), m.normal(O)
    by = [magnitude, rnorm] if dora else [None, None]
    m.ops.merge(W.array, DTYPES[dtype], B, A, *by, O, I, R, 0.5)
    value = unstored(W.array, DTYPES[dtype])
    # a sum near a tie may round to the other neighbour: one unit in the last place
    unit = {"F32": EPS, "F16": 2.0**-10, "BF16": 2.0**-7, "F64": EPS}[dtype]
    size = np.abs(w) + 0.5 * np.abs(B) @ np.abs(A)
    if dora:
        size *= np.abs(magnitude * rnorm)[:, None]
    least = 2.0**-24 if dtype == "F16" else 0
    return {"data": (value, unit * np.abs(value) + sum_error(R, size) + least)}


@over(
    (*shape, dtype)
    for shape in ((1, 2, 1), (3, 18, 8), (33, 100, 4), (65, 254, 16), (2, 5000, 40))
    for dtype in (*DTYPES, *QUANTIZED)
)
def dora_norm(m: Maker, O: int, I: int, R: int, dtype: str):
    W, w = m.weight(O, I, dtype)
    B, A, rnorm = m.normal(O, R), m.normal(R, I), m.out(O)
    m.ops.dora_norm(rnorm, W, B, A, R, 0.5)
    # of a sum of positive squares, whose terms are off by those of R products
    size = np.linalg.norm(np.abs(w) + 0.5 * np.abs(B) @ np.abs(A), axis=1)
    return {"rnorm": (rnorm, sum_error(I + R, np.abs(rnorm) * size * np.abs(rnorm)))}


@over((N, C, *how) for N, C in ROWS for how in ((True, False), (False, True)))
def dora_forward(m: Maker, N: int, O: int, bias: bool, in_place: bool):
    inp, magnitude, rnorm, b = m.normal(N, O), m.normal(O), m.normal(O), m.normal(O)
    size = np.abs(magnitude * rnorm * inp) + np.abs(b)
    out = inp if in_place else m.out(N, O)
    m.ops.dora_forward(out, inp, magnitude, rnorm, b if bias else None, N, O)
    return {"out": (out, 4 * EPS * size)}


@over((N, C, *how) for N, C in ROWS for how in ((True, False), (True, True), (False, True)))
def dora_backward(m: Maker, N: int, O: int, trained: bool, in_place: bool):
    dout, inp, magnitude, rnorm = m.normal(N, O), m.normal(N, O), m.normal(O), m.normal(O)
    dm, dinp = m.normal(O), inp if in_place else m.out(N, O)
    tol_m = sum_error(N, np.abs(dm) + np.abs(rnorm) * np.abs(dout * inp).sum(0))
    m.ops.dora_backward(dinp, dm if trained else None, dout, inp, magnitude, rnorm, N, O)
    return {"dinp": (dinp, 4 * EPS * np.abs(dinp)), "dmagnitude": (dm, tol_m)}


@over((n, a, b) for n in LENGTHS for a in DTYPES for b in DTYPES)
def convert(m: Maker, n: int, out_dtype: str, inp_dtype: str):
    inp = stored(m.rng.normal(size=n).astype(np.float32), DTYPES[inp_dtype])
    out = stored(np.full(n, 3.0, np.float32), DTYPES[out_dtype])
    m.ops.convert(out, DTYPES[out_dtype], inp, DTYPES[inp_dtype], n)
    return {"out": (unstored(out, DTYPES[out_dtype]), 0)}


@over(
    (N, *sizes, dtype, step % 2 > 0)
    for N in (0, 1, 2, 3, 4, 7, 8, 9, 33)
    for step, dtype in enumerate([*DTYPES, *QUANTIZED])
    for sizes in ((33, 64), (40, 130), (64, 260))  # outputs enough for an average in 16 bits
    if usable(dtype, sizes[1])
)
def rmsnorm_swiglu_forward(m: Maker, N: int, F: int, I: int, dtype: str, bias: bool):
    W, w = m.weight(2 * F, I, dtype)
    x, b = m.normal(N, I), m.normal(2 * F) if bias else None
    norm = m.normal(I, scale=0.3)
    out, h, ln, rstd = m.out(N, F), m.out(N, 2 * F), m.out(N, I), m.out(N)
    normed = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-5) * norm
    size = np.abs(normed) @ np.abs(w.T) + (np.abs(b) if bias else 0)
    error = np.broadcast_to(sum_error(I, size), (N, 2 * F)) + 4 * EPS * size
    y = np.abs(normed @ w.T + (b if bias else 0))
    off = 1.1 * y[:, F:] * error[:, :F] + y[:, :F] * error[:, F:] + 8 * EPS * y[:, :F] * y[:, F:]
    m.ops.rmsnorm_swiglu_forward(out, h, ln, rstd, x, norm, W, b, N, 1e-5)
    return {"out": (out, off)}


@over(APPENDED)
def rmsnorm_rope_append(m: Maker, N: int, NH: int, KVH: int, HD: int, rotary_dim: int, dtype: str):
    return linear_rope_append(m, N, NH, KVH, HD, rotary_dim, dtype, normed=True)


# Last, so that others keep their seeds: rows of two tiles
TWO_TILES = ("plain", (150,), (3, 1, 64), 32, 144, 12, "BF16", 0.2)
CASES += [
    (op, *TWO_TILES, which)
    for op in (self_attention_forward, self_attention_backward)
    for which in (False, True)
]


def linear_cases() -> list[tuple[Any, ...]]:
    rng = np.random.default_rng(3)
    shapes = [tuple(int(x) for x in rng.choice(SIZES, 3)) for _ in range(24)]
    # one row and many, both sides of 1024 inputs, and shapes past any register or cache block
    shapes += [(1, 1, 1), (1, 100, 1025), (1, 33, 2500), (9, 17, 2500), (70, 33, 1025)]
    shapes += [(33, 1025, 31), (3, 2500, 9), (131, 67, 130), (1, 1030, 1030)]
    shapes += [(0, 5, 7), (600, 5, 9), (2, 6, 8300), (5, 9, 1060), (1, 7, 62), (4, 3, 98)]
    cases: list[tuple[Any, ...]] = []
    for at, (N, O, I) in enumerate(shapes):
        for step, dtype in enumerate([*DTYPES, *QUANTIZED]):
            if not usable(dtype, I) or (max(N, O, I) > 2000 and step % 2 != at % 2):
                continue
            scale, accumulate = (1.0, 0.5)[(at + step) % 2], (at // 2 + step) % 2
            cases.append((linear_forward, N, O, I, dtype, at % 3 > 0, scale, accumulate))
            cases.append((linear_backward_input, N, O, I, dtype, scale, accumulate))
        cases.append((linear_backward_weight, N, O, I, 0.5, at % 4 < 3, at % 4 != 2))
    for N in (0, 1, 2, 3, 4, 7, 8, 9, 33):
        for step, dtype in enumerate([*DTYPES, *QUANTIZED]):
            for O, I, R in ((1, 8, 1), (33, 64, 8), (7, 130, 16), (64, 260, 40)):
                if usable(dtype, I):
                    cases.append((adapted_forward, N, O, I, R, dtype, step % 2 > 0))
                    cases.append((linear_swiglu_forward, N, O, I, dtype, step % 2 > 0))
    return cases


def quantize_cases() -> list[tuple[Any, ...]]:
    shapes = [(1, 2), (3, 8), (5, 64), (4, 98), (7, 130), (3, 4100), (2, 8300)]
    return [
        (quantize, rows, cols, kind, dtype, size)
        for rows, cols in shapes
        for kind in QUANTIZED
        for dtype in ("F16", "BF16", "F32")
        for size in (0.02, 300.0, 1e-6)
        if size > 1e-3 or not QUANTIZED[kind][1]
    ]


HEADS = [(1, 1, 1), (2, 1, 8), (4, 2, 16), (3, 3, 5), (8, 2, 64), (6, 2, 33), (2, 2, 128)]
HEADS += [(3, 1, 136)]
KINDS = ["plain", "context", "shared", "past", "shared past", "shared past context", "long"]
KINDS += ["shared apart"]


def attention_cases() -> list[tuple[Any, ...]]:
    counts = [(1,), (1, 1, 1), (7,), (3, 0, 9), (5, 17, 1), (33, 2)]
    cases: list[tuple[Any, ...]] = []
    for at, shape in enumerate(HEADS):
        for step, kind in enumerate(KINDS):
            args = (kind, counts[(at + step) % len(counts)], shape)
            cases += [(attention_forward, *args), (attention_backward, *args)]
    for args in (
        ("plain", (130, 65), (2, 1, 16)),
        ("plain", (), (2, 1, 4)),
        ("past", (64,), (4, 2, 32)),
        # several blocks of keys and panels of rows; groups and heads wider than a panel
        ("shared past", (250, 3), (20, 1, 40)),
        ("context", (203,), (2, 1, 64)),
        ("past", (5,), (200, 1, 8)),
        ("plain", (97,), (2, 2, 300)),
        ("long", (33,), (2, 1, 1024)),
        ("shared", (40, 33), (2, 1, 256)),
        ("past", (2, 1), (2, 1, 256)),
        ("far", (4, 1, 2), (2, 1, 8)),
        ("long", (2, 4), (34, 2, 20)),
        ("shared tiles", (5, 7), (2, 1, 16)),
        ("context", (48,), (2, 1, 16)),  # 32 of them, a whole tile
        ("shared apart", (33, 5, 70, 9), (4, 2, 64)),
        ("shared apart", (33, 5, 70, 9), (2, 1, 136)),
        # a token's keys are just those of one, two and four warps, and of a run (cuda/decode.h)
        ("keys 3", (1,), (2, 1, 16)),
        ("keys 7", (1,), (2, 1, 16)),
        ("keys 15", (1,), (2, 1, 16)),
        ("keys 63", (1, 1), (2, 1, 16)),
        ("context keys 63", (4,), (2, 1, 16)),  # one more, of the context
    ):
        cases += [(attention_forward, *args), (attention_backward, *args)]
    return cases


# enough work for several threads
LARGE: list[tuple[Any, ...]] = [
    (linear_forward, 37, 300, 260, "F16", True, 0.5, 1),
    (linear_forward, 1, 1030, 1030, "BF16", False, 1.0, 0),
    (
        linear_forward,
        3,
        5,
        264,
        "F16",
        True,
        1.0,
        0,
    ),  # the end of a row between two words of a lane
    (linear_backward_input, 37, 260, 300, "F16", 0.5, 1),
    (linear_backward_input, 1, 1030, 1030, "F32", 1.0, 0),
    (linear_backward_weight, 61, 200, 130, 0.5, True, True),
    (rmsnorm_forward, 301, 255, 1.0),
    (rmsnorm_backward, 301, 255, True),
    (add_rmsnorm_forward, 301, 255, "a"),
    (choose, 33, 3001, "ties"),
    (choose, 3, 40001, "ties"),
    (rmsnorm_forward, 3, 5001, 1.0),
    (rmsnorm_forward, 1, 4100, 1.0),
    (add_rmsnorm_forward, 2, 5001, "b"),
    (layernorm_forward, 301, 255, 0.0),
    (layernorm_forward, 2, 5001, 100.0),
    (layernorm_forward, 1, 4100, 0.0),
    (layernorm_backward, 301, 255, 1, 1),
    (choose_drawn, 40, 64, 1.0, 0, 0.5, "near"),
    (choose_drawn, 9, 4101, 0.9, 600, 0.9, False),
    (choose_drawn, 3, 4101, 5.0, 0, 0.99, True),
    (choose_drawn, 3, 300, 0.8, 0, 0.7, False),  # a thread's second word begins where the row ends
    (choose_drawn, 1, 1025, 1.0, 0, 0.5, "near"),  # one more than are listed
    (rope_append, 200, 8, 2, 64, 32),
    (embedding_forward, 300, 300, "F16"),
    (embedding_backward, 700, 129),
    (rope, 200, 4, 64, 7, 32, True),
    (attention_forward, "shared past context", (40, 33, 1, 60), (8, 2, 32)),
    (attention_backward, "shared past context", (40, 33, 1, 60), (8, 2, 32)),
    (attention_forward, "long", (1, 1, 1), (8, 2, 32)),
    (kv_append, 300, 4, 2, 64),
    (qkv, 300, 4, 2, 64),
    (prefix_forward, 64, 8, 65, 3, 0.1),
    (prefix_backward, 64, 8, 65, 3, 0.1),
    (swiglu_forward, 200, 300, 1.0),
    (swiglu_backward, 200, 300, 1.0, True),
    (gelu_forward, 70001, 1.0, False),
    (gelu_backward, 70001, 1.0, None),
    (rope_2d, 200, 4, 64, 7, True),
    (qkv_by_head, 300, 4, 64),
    (tanh_forward, 70001, 1.0, False),
    (tanh_backward, 70001, False),
    (dropout_forward, 200, 301, 0.1, False),
    (dropout_backward, 200, 301, 0.1),
    (gather, 400, 300, 129),
    (cross_entropy_forward, 33, 3001, 1.0),
    (cross_entropy_backward, 33, 3001, 1.0),
    (add, 100001, "out"),
    (scaled_add, 100001, "out"),
    (sum_squares, 300001),
    (first_nonfinite, 500, 301, (133, 499), np.nan),
    (adamw, 100001, 3, 0.1),
    (merge, 300, 200, 8, True, "F16"),
    (noise, 200, 301, 0.5),
    (dora_norm, 300, 200, 8, "F16"),
    (dora_norm, 300, 200, 8, "I4 by 32"),
    (dora_forward, 200, 301, True, False),
    (dora_backward, 200, 301, True, True),
]


@lru_cache
def cases_by_op() -> dict[str, list[tuple[int, tuple[Any, ...]]]]:
    grouped: dict[str, list[tuple[int, tuple[Any, ...]]]] = {}
    for seed, case in enumerate(
        linear_cases() + attention_cases() + quantize_cases() + LARGE + CASES
    ):
        grouped.setdefault(case[0].__name__, []).append((seed, case))
    return grouped


def cases_on(backend: str, op: str) -> list[tuple[int, tuple[Any, ...]]]:
    """Those that a backend has kernels for: heads up to 256 on CUDA devices."""
    found = cases_by_op()[op]
    if op.startswith("attention") and not backend.startswith(("cpu", "ref")):
        found = [(seed, case) for seed, case in found if case[3][2] <= 256]
    return found


def compare(case: tuple[Any, ...], backend: str, seed: int) -> str:
    """Empty, or what is wrong with which output, at which arguments."""
    wanted = expected_of(case[0], seed, case[1:])
    got = run(case[0], backend, seed, case[1:])
    for name, (want, tolerance) in wanted.items():
        value = np.asarray(got[name][0], np.float64)
        with np.errstate(invalid="ignore"):
            bad = ~(np.abs(value - want) <= tolerance)
            bad &= ~(np.isnan(value) & np.isnan(want)) & (value != want)
        if bad.any():
            at = tuple(int(i[0]) for i in np.nonzero(bad))
            limit = np.broadcast_to(tolerance, want.shape)[at]
            return (
                f"{case[0].__name__}{case[1:]} seed {seed}: {name}{at} = {value[at]!r}, expected "
                f"{want[at]!r} within {limit:.3g}; {bad.sum()} of {bad.size} elements are wrong"
            )
    return ""


@every_backend
@pytest.mark.parametrize("op", list(cases_by_op()))
def test_op_against_reference(backend: str, op: str) -> None:
    wrong = [compare(case, backend, seed) for seed, case in cases_on(backend, op)]
    wrong = [text for text in wrong if text]
    assert not wrong, f"{len(wrong)} of {len(cases_on(backend, op))} cases:\n" + "\n".join(
        wrong[:5]
    )


# Operands are rounded to 16 bits (2^-12 or 2^-9 of each), sums are float: relative to the largest
# element, since roundings of many terms average out.
NARROW = {"float16": 2e-3, "bfloat16": 1.6e-2, "int8": 3e-2}
NARROW_OPS = (linear_forward, linear_backward_input, linear_backward_weight)
NARROW_OPS += (attention_forward, attention_backward)
NARROW_CASES = [
    (linear_forward, 300, 290, 310, "F16", True, 0.5, 1),
    (linear_forward, 20, 300, 270, "F32", True, 1.0, 0),
    (linear_forward, 20, 300, 270, "I4 by 32", True, 1.0, 0),
    (linear_forward, 3, 40, 384, "I4 by 32", True, 1.0, 0),
    (linear_backward_input, 300, 290, 310, "F16", 0.5, 1),
    (linear_backward_input, 20, 300, 270, "BF16", 0.5, 0),
    (linear_backward_weight, 70, 290, 310, 0.5, True, True),
    (attention_forward, "plain", (70, 33, 5), (4, 2, 128)),
    (attention_forward, "shared past context", (40, 1, 33), (8, 2, 64)),
    (attention_forward, "far", (4, 1), (18, 1, 64)),
    (attention_forward, "long", (2, 4), (34, 2, 128)),
    (attention_backward, "plain", (70, 33, 5), (4, 2, 128)),
    (attention_backward, "shared past context", (40, 1, 33), (8, 2, 64)),
    (attention_backward, "shared 64", (5, 7), (2, 1, 16)),
    (attention_backward, "context", (96,), (2, 1, 16)),  # 64 of them, a whole tile
]
NARROW_CASES += [
    (op, N, 520, 4200, kind, *rest)
    for kind in ("F16", *QUANTIZED)
    for N in (1, 3, 7, 16, 40)
    for op, rest in ((linear_forward, (True, 0.5, 1)), (linear_backward_input, (0.5, 1)))
]
# 63 of them, a tile but one
NARROW_CASES.append((attention_forward, "context", (95,), (2, 1, 64)))
DEVICES = [name for name in backends() if name in ("emu", "cuda")]
SETS = _core.cpu_variants().split(",")
BYTES = [f"cpu:{isa}/int8" for isa in SETS]
FAST = [*(f"cpu:{isa}/bfloat16" for isa in SETS if isa in BFLOAT16_SETS), *BYTES]


@pytest.mark.parametrize("type_", NARROW)
@pytest.mark.parametrize(
    "device",
    [*(pytest.param(d, marks=[pytest.mark.deep] * (d == "emu")) for d in DEVICES), "cpu"],
)
def test_products_in_narrow_types(device: str, type_: str) -> None:
    name = f"{device}/{type_}"
    try:
        ops_of(name)
    except ValueError as error:
        pytest.skip(str(error))
    cases = [(at, case) for at, case in enumerate(NARROW_CASES)]
    cases += [each for op in NARROW_OPS for each in cases_on(device, op.__name__)]
    wrong = []
    for seed, case in cases:
        got = run(case[0], name, seed, case[1:])
        for output, (want, _) in expected_of(case[0], seed, case[1:]).items():
            error = np.abs(got[output][0] - want).max(initial=0)
            # a score's gradient is the difference dout . v - dout . out, which cancels
            limit = NARROW[type_] * (3 if case[0] is attention_backward else 1)
            if not error <= limit * np.abs(want).max(initial=0):
                wrong.append(f"{case[0].__name__}{case[1:]} seed {seed}: {output}: {error:.3g}")
    assert not wrong, f"{len(wrong)} of {len(cases)} cases:\n" + "\n".join(wrong[:9])


@pytest.mark.parametrize("backend", FAST)
def test_adapters_stay_in_float(backend: str) -> None:
    for case in (
        (linear_forward, 40, 300, 8, "F32", False, 2.0, 1),
        (linear_forward, 40, 8, 300, "F32", False, 1.0, 0),
        (linear_backward_input, 40, 300, 8, "F32", 2.0, 0),
        (linear_backward_weight, 40, 8, 300, 1.0, True, False),
    ):
        assert not compare(case, backend, 4)


def bytes_reference(x: np.ndarray, w: np.ndarray, scale: np.ndarray, factor: float) -> np.ndarray:
    """factor * (x W^T) by int8 arithmetic, W = scale * w: runs of 2,048 columns of x have a scale,
    and outliers, at most four, are multiplied apart (csrc/cpu/tmpl_linear.h: quantize_x)."""
    f32 = np.float32

    def squares_below(row: np.ndarray, bound: float) -> tuple:
        kept = np.zeros(-(-len(row) // 16) * 16, f32)
        kept[: len(row)] = np.where(np.abs(row) < bound, np.abs(row), 0)
        lanes = np.zeros(16, f32)
        for part in kept.reshape(-1, 16):
            lanes += part * part
        for width in (8, 4, 2, 1):
            lanes[:width] += lanes[width : 2 * width]
        return lanes[0], kept.max()

    out = np.zeros((len(x), len(w)), f32)
    for n, row in enumerate(x):
        for b in range(0, len(row), 2048):
            run, weights = row[b : b + 2048], w[:, b : b + 2048].astype(np.int64)
            square, rest = squares_below(run, np.inf)
            mean, outliers = np.sqrt(square / f32(len(run))), []
            if rest > f32(6) * mean:
                order = np.argsort(-np.abs(run), kind="stable")[:4]
                outliers = [k for k in order if np.abs(run[k]) > mean]
                square, rest = squares_below(run, np.abs(run[outliers[-1]]))
                limit = f32(6) * np.sqrt(square / f32(len(run)))
                while outliers and np.abs(run[outliers[-1]]) <= limit:
                    rest = np.abs(run[outliers.pop()])
            step = rest / f32(127)
            inverse = f32(127) / rest if rest > 0 and step > 0 else f32(0)
            q = np.clip(np.rint(run * inverse), -127, 127).astype(np.int64)
            q[outliers] = 0
            out[n] += (weights @ q).astype(f32) * step
            for k in outliers:
                out[n] += run[k] * weights[:, k].astype(f32)
    return f32(factor) * (out * scale.astype(f32))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("backend", BYTES)
def test_int8_arithmetic_is_that_of_the_reference_bit_for_bit(backend: str, bits: int) -> None:
    ops, rng, most = ops_of(backend), np.random.default_rng(8), 2 ** (bits - 1)
    shapes = (1, 70, 5000), (5, 33, 2048), (11, 97, 4100), (17, 130, 2100), (40, 200, 302)
    shapes = (*shapes, (49, 30, 130), (107, 210, 4230))  # above 48 rows others multiply
    for rows, O, I in shapes:
        data = rng.integers(-most, most, (O, I)).astype(np.int8)
        data[0], data[-1] = -most, most - 1  # the largest sums, both ways
        scale = rng.uniform(0.001, 0.02, O).astype(np.float16)
        x = rng.normal(size=(rows, I)).astype(np.float32)
        x[:, ::700] *= rng.uniform(5, 300, (rows, -(-I // 700))).astype(np.float32)
        x[0], x[-1, : I // 2] = 3, 0  # every byte 127; a run of zeros
        out = np.empty((rows, O), np.float32)
        pairs = data.reshape(O, -1, 2)
        four = (pairs[..., 0] << 4 | pairs[..., 1] & 15).astype(np.int8)
        W = Mat(data, I8, scale) if bits == 8 else Mat(four, I4, scale)
        ops.linear_forward(out, x, W, None, rows, 0.5, 0)
        expected = bytes_reference(x, data, scale, 0.5)
        assert np.array_equal(out, expected), (rows, O, I)
        ops.linear_forward(out, x, W, None, rows, 0.5, 1)
        assert np.array_equal(out, 2 * expected), (rows, O, I)


@pytest.mark.parametrize("kind", ["I8", "I4"])
@pytest.mark.parametrize("backend", BYTES[1:])
def test_every_set_has_the_same_bytes_on_the_way_back(backend: str, kind: str) -> None:
    rng = np.random.default_rng(9)
    for rows, O, I in ((1, 70, 500), (40, 2500, 300), (107, 2070, 150)):
        W = quantized(rng, O, I, kind)[0]
        dout, found = rng.normal(size=(rows, O)).astype(np.float32), []
        dout[0, 7] = 90
        for name in (BYTES[0], backend):
            dinp = np.empty((rows, I), np.float32)
            ops_of(name).linear_backward_input(dinp, dout, W, rows, 2.0, 0)
            found.append(dinp)
        assert np.array_equal(*found)


@pytest.mark.parametrize("backend", BYTES)
def test_outliers_do_not_coarsen_a_row_of_bytes(backend: str) -> None:
    ops, rng = ops_of(backend), np.random.default_rng(8)
    N, O, I = 30, 260, 4500
    W, w = quantized(rng, O, I, "I8")
    for rows in (1, 5, N):
        x, dout = (rng.normal(size=(rows, n)).astype(np.float32) for n in (I, O))
        x[:, [5, 2047, 2048, 4499]] = rng.uniform(400, 1000, (rows, 4))
        dout[:, [0, 259]] = rng.uniform(-900, -400, (rows, 2))
        out, dinp = np.empty((rows, O), np.float32), np.empty((rows, I), np.float32)
        ops.linear_forward(out, x, W, None, rows, 1.0, 0)
        ops.linear_backward_input(dinp, dout, W, rows, 1.0, 0)
        calm, dcalm = x.copy(), dout.copy()
        calm[:, [5, 2047, 2048, 4499]] = 0
        dcalm[:, [0, 259]] = 0
        for got, want, size in ((out, x @ w.T, calm @ w.T), (dinp, dout @ w, dcalm @ w)):
            # as if they were not there: a few parts in a hundred of the other columns' sum
            assert np.abs(got - want).max() <= 3e-2 * np.abs(size).max(), rows


@pytest.mark.parametrize("backend", [name for name in FAST if name not in BYTES])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_the_last_groups_of_a_row_meet_no_scale_of_another(backend: str, rows: int) -> None:
    ops, rng = ops_of(backend), np.random.default_rng(8)
    bad = quantized(rng, 260, 1024, "I4 by 32")[0]
    bad.scale[...] = np.nan  # what the stack held before
    W, w = quantized(rng, 260, 194, "I4 by 32")
    x, out = rng.normal(size=(rows, 194)).astype(np.float32), np.empty((rows, 260), np.float32)
    for _ in range(4):
        wide = np.ones((rows, 1024), np.float32)
        ops.linear_forward(np.empty((rows, 260), np.float32), wide, bad, None, rows, 1.0, 0)
        ops.linear_forward(out, x, W, None, rows, 1.0, 0)
        assert np.abs(out - x @ w.T).max() <= 1.6e-2 * np.abs(x @ w.T).max()


@pytest.mark.parametrize("backend", FAST)
def test_rows_that_are_not_finite_stay_so(backend: str) -> None:
    ops, rng = ops_of(backend), np.random.default_rng(8)
    for kind in ("F16", "I8"):
        W = (
            quantized(rng, 260, 300, kind)[0]
            if kind == "I8"
            else Mat(np.ones((260, 300), "e"), F16)
        )
        for rows in (1, 40):
            x, dout = np.ones((rows, 300), np.float32), np.ones((rows, 260), np.float32)
            x[0, 7], dout[0, 9] = np.nan, np.inf
            out, dinp = np.empty((rows, 260), np.float32), np.empty((rows, 300), np.float32)
            ops.linear_forward(out, x, W, None, rows, 1.0, 0)
            ops.linear_backward_input(dinp, dout, W, rows, 1.0, 0)
            assert not np.isfinite(out[0]).any() and np.isfinite(out[1:]).all()
            assert not np.isfinite(dinp[0]).any() and np.isfinite(dinp[1:]).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1e-9, 1e-3, 1e6])
def test_gradients_of_any_size_in_float16(device: str, size: float) -> None:
    ops, rng = ops_of(f"{device}/float16"), np.random.default_rng(3)
    N, O, I = 20, 290, 310
    W = rng.normal(size=(O, I)).astype(np.float16)
    dout, inp = rng.normal(size=(N, O)).astype(np.float32), rng.normal(size=(N, I))
    dout *= np.float32(size)
    dinp, dweight = np.zeros((N, I), np.float32), np.zeros((O, I), np.float32)
    ops.linear_backward_input(dinp, dout, Mat(W, F16), N, 1.0, 0)
    ops.linear_backward_weight(dweight, None, dout, inp.astype(np.float32), N, O, I, 1.0)
    for got, want in ((dinp, dout @ W.astype(np.float64)), (dweight, dout.T @ inp)):
        assert np.abs(got - want).max() <= 2e-3 * np.abs(want).max()


@every_backend
def test_nan_and_infinity_propagate(backend: str) -> None:
    ops = ops_of(backend)
    rng = np.random.default_rng(5)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(ops.real)

    for N in (1, 9, 40):
        O, I, at = 33, 100, N // 2
        for dtype in DTYPES.values():
            w = stored(rng.normal(size=(O, I)), dtype)
            x, out = normal(N, I), normal(N, O)
            x[at, 97] = np.nan
            ops.linear_forward(out, x, Mat(w, dtype), None, N, 1.0, 0)
            assert np.array_equal(np.isnan(out).all(1), np.arange(N) == at)
            assert np.isfinite(out[np.arange(N) != at]).all()
            x[at, 97] = np.inf
            ops.linear_forward(out, x, Mat(w, dtype), None, N, 1.0, 0)
            assert np.array_equal(out[at], np.inf * np.sign(unstored(w, dtype)[:, 97]))
            dout, dinp = normal(N, O), normal(N, I)
            dout[at, 31] = np.nan
            ops.linear_backward_input(dinp, dout, Mat(w, dtype), N, 1.0, 0)
            assert np.array_equal(np.isnan(dinp).all(1), np.arange(N) == at)
            assert np.isfinite(dinp[np.arange(N) != at]).all()
            w[7, 3] = {BF16: 0x7FC0}.get(dtype, np.nan)
            x[at, 97] = 1
            ops.linear_forward(out, x, Mat(w, dtype), None, N, 1.0, 0)
            assert np.array_equal(np.isnan(out).all(0), np.arange(O) == 7)

    x, out, rstd = normal(3, 33), normal(3, 33), normal(3)
    x[1, 32] = np.nan
    ops.rmsnorm_forward(out, rstd, x, normal(33), 3, 33, 1e-5)
    assert np.isnan(out[1]).all() and np.isfinite(out[[0, 2]]).all()
    ops.rmsnorm_forward(out, rstd, np.zeros_like(x), normal(33), 3, 33, 1e-5)
    assert (out == 0).all() and np.allclose(rstd, 1e-5**-0.5)

    for place in (0, 8, 32):  # a vector body and its tail
        x, out = normal(1, 66), normal(1, 33)
        x[0, place] = np.nan
        ops.swiglu_forward(out, x, 1, 33)
        assert np.array_equal(np.isnan(out[0]), np.arange(33) == place)
        t = normal(33)
        t[place] = np.nan
        t[(place + 1) % 33], t[(place + 2) % 33] = np.inf, -np.inf
        ops.tanh_forward(t, t, 33)
        assert np.isnan(t[place]) and np.isnan(t).sum() == 1
        assert t[(place + 1) % 33] == 1 and t[(place + 2) % 33] == -1
        logits, loss, lse = normal(2, 33), normal(2), normal(2)
        logits[1, place] = np.nan
        ops.cross_entropy_forward(loss, lse, logits, np.array([1, 1], np.int32), 2, 33)
        assert np.isnan(loss[1]) and np.isnan(lse[1]) and np.isfinite(loss[0])
        logits[1, place] = -np.inf
        ops.cross_entropy_forward(loss, lse, logits, np.array([1, 1], np.int32), 2, 33)
        assert np.isfinite(lse).all()
        total = np.empty(1)
        ops.sum_squares(total, t, 33)
        assert np.isnan(total[0])

    T, heads = 20, Heads(2, 1, 16)
    for what in (40, 50):  # a key element, a value element
        qkv, out, lse = normal(T, 64), normal(T, 32), normal(T, 2)
        qkv[12, what] = np.nan
        ops.attention_forward(out, lse, qkv, None, [Segment(begin=0, count=T)], 1, heads)
        assert np.isfinite(out[:12]).all()
        assert np.isnan(out.reshape(T, 2, 16)[12:]).any(2).all()


@every_backend
def test_large_values_do_not_overflow(backend: str) -> None:
    ops = ops_of(backend)
    logits = np.array([[3e38, -3e38, 0.0], [-3e38, -3e38, -3e38]], ops.real)
    loss, lse = np.empty(2, ops.real), np.empty(2, ops.real)
    ops.cross_entropy_forward(loss, lse, logits, np.array([0, 1], np.int32), 2, 3)
    assert loss[0] == 0 and np.isfinite(lse).all()
    qkv = np.random.default_rng(1).normal(size=(40, 96)).astype(ops.real)
    qkv[:, :64] *= 1e6
    out, lse = np.empty((40, 32), ops.real), np.empty((40, 1), ops.real)
    ops.attention_forward(out, lse, qkv, None, [Segment(begin=0, count=40)], 1, Heads(1, 1, 32))
    assert np.isfinite(out).all() and np.isfinite(lse).all()
    exact = qkv.astype(np.float64)
    scores = np.where(np.tri(40) > 0, exact[:, :32] @ exact[:, 32:64].T, -np.inf)
    assert np.array_equal(out, qkv[scores.argmax(1), 64:])


# ---- invariance, bit for bit ----


def same_bits(a: np.ndarray, b: np.ndarray, what: str) -> None:
    assert a.tobytes() == b.tobytes(), f"{what}: {np.sum(a != b)} of {a.size} elements differ"


def chosen_by_shape(ops: Ops) -> None:
    """Skips where a product's order of summation depends on how many rows it has: cuBLAS picks an
    algorithm by shape, and up to 8 rows have kernels of their own."""
    if isinstance(ops, DeviceOps):
        pytest.skip("products on a device are summed in an order that their shape decides")


@pytest.mark.parametrize("backend", [*TESTED, *FAST])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("columns", [1, 8, 17, 31, 64, 100, 172, 192, 193])
def test_a_row_over_few_columns_has_the_same_bits_in_any_batch(
    backend: str, kind: str, columns: int
) -> None:
    """Many rows are multiplied along the output there, few along the sum (tmpl_short.h)."""
    ops, rng = ops_of(backend), np.random.default_rng(columns)
    chosen_by_shape(ops)
    for rows, added in ((5, 0), (33, 1), (130, 0), (200, 1)):
        w = rng.normal(size=(rows, columns)).astype(np.float32)
        W = Mat(stored(w, DTYPES[kind]), DTYPES[kind])
        bias = rng.normal(size=rows).astype(ops.real) if added else None
        x, dout = (rng.normal(size=(41, n)).astype(ops.real) for n in (columns, rows))
        x[3], x[4], dout[5] = 0, -0.0, -0.0
        whole, dwhole = (rng.normal(size=(41, n)).astype(ops.real) for n in (rows, columns))
        out, dinp = whole.copy(), dwhole.copy()
        ops.linear_forward(out, x, W, bias, 41, 0.5, added)
        ops.linear_backward_input(dinp, dout, W, 41, 1.0, added)
        for a, b in ((0, 1), (3, 5), (6, 9), (20, 37), (2, 41), (40, 41)):
            part, dpart = whole[a:b].copy(), dwhole[a:b].copy()
            ops.linear_forward(part, x[a:b].copy(), W, bias, b - a, 0.5, added)
            ops.linear_backward_input(dpart, dout[a:b].copy(), W, b - a, 1.0, added)
            same_bits(part, out[a:b], f"linear_forward {rows} x {columns}, rows {a}:{b} of 41")
            same_bits(dpart, dinp[a:b], f"linear_backward_input {rows} x {columns}, {a}:{b} of 41")


PARTS = [(0, 1), (5, 6), (39, 40), (3, 7), (9, 14), (2, 10), (11, 27), (8, 25), (1, 40)]  # of 40


@pytest.mark.parametrize("backend", [*TESTED, *FAST])
@pytest.mark.parametrize("kind", list(QUANTIZED))
def test_a_row_over_a_quantized_weight_has_the_same_bits_in_any_batch(
    backend: str, kind: str
) -> None:
    ops, rng = ops_of(backend), np.random.default_rng(9)
    chosen_by_shape(ops)
    # few rows scale a group's sums, many rows have its scale in their bfloat16
    N = 16 if backend in FAST and " by " in kind else 40
    for O, I in ((9, 34), (130, 1060), (5, 8300)):
        W, _ = quantized(rng, O, I, kind)
        x, dout = (rng.normal(size=(N, n)).astype(ops.real) for n in (I, O))
        out, dinp = np.empty((N, O), ops.real), np.empty((N, I), ops.real)
        ops.linear_forward(out, x, W, None, N, 1.0, 0)
        ops.linear_backward_input(dinp, dout, W, N, 1.0, 0)
        for a, b in ((0, 1), (7, 9), (3, 6), (12, 16), (9, 14), (2, 10), (11, 27), (5, 38)):
            if b > N:
                continue
            part, dpart = np.empty((b - a, O), ops.real), np.empty((b - a, I), ops.real)
            ops.linear_forward(part, x[a:b].copy(), W, None, b - a, 1.0, 0)
            ops.linear_backward_input(dpart, dout[a:b].copy(), W, b - a, 1.0, 0)
            same_bits(part, out[a:b], f"linear_forward O={O} I={I} rows {a}:{b} of {N}")
            same_bits(dpart, dinp[a:b], f"linear_backward_input O={O} I={I} rows {a}:{b} of {N}")


@every_backend
@pytest.mark.parametrize("kind", list(QUANTIZED))
def test_weights_that_are_not_finite_get_such_a_scale(backend: str, kind: str) -> None:
    dtype, group = QUANTIZED[kind]
    w = np.ones((4, 98), np.float32)
    w[1, 97], w[2, 0], w[3, 40] = np.nan, -np.inf, 1e30
    data = np.zeros((4, 49 if dtype == I4 else 98), np.int8)
    scale = np.zeros((4, -(-98 // group)) if group else 4, np.float16)
    ops_of(backend).quantize(data, scale, dtype, group, w, F32, 4, 98)
    finite = np.isfinite(scale) if group else np.isfinite(scale)[:, None]
    assert finite[0].all() and not finite[1:].all(1).any()
    if group:  # only the group that holds it
        assert finite[1:].sum() == 3 * (scale.shape[1] - 1)


@pytest.mark.parametrize("backend", [*TESTED, *FAST])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_linear_row_does_not_depend_on_others(backend: str, dtype: str) -> None:
    m = Maker(ops_of(backend), 11)
    chosen_by_shape(m.ops)
    for O, I in ((33, 100), (64, 1025), (100, 31), (7, 2500), (1030, 9), (256, 64)):
        W, _ = m.weight(O, I, dtype)
        x, dout, bias = m.normal(40, I), m.normal(40, O), m.normal(O)
        for accumulate in (0, 1):
            out, dinp = m.normal(40, O), m.normal(40, I)
            start = out.copy(), dinp.copy()
            m.ops.linear_forward(out, x, W, bias, 40, 0.5, accumulate)
            m.ops.linear_backward_input(dinp, dout, W, 40, 0.5, accumulate)
            for a, b in PARTS:
                part, dpart = start[0][a:b].copy(), start[1][a:b].copy()
                m.ops.linear_forward(part, x[a:b].copy(), W, bias, b - a, 0.5, accumulate)
                same_bits(part, out[a:b], f"linear_forward O={O} I={I} rows {a}:{b} of 40")
                m.ops.linear_backward_input(dpart, dout[a:b].copy(), W, b - a, 0.5, accumulate)
                same_bits(dpart, dinp[a:b], f"linear_backward_input O={O} I={I} rows {a}:{b} of 40")


@every_backend
@pytest.mark.parametrize("C", [1, 9, 33, 255])
def test_row_does_not_depend_on_others(backend: str, C: int) -> None:
    m = Maker(ops_of(backend), 12)
    ops, weight = m.ops, m.normal(C)
    x, y, z = m.normal(40, C), m.normal(40, C), m.normal(40, 2 * C)
    target, table = m.ints(C, 40), m.put(rope_table(50, C // 2 * 2))
    position, table_2d = m.ints(50, 40), m.put(rope_table(50, C // 4 * 2))
    moments = m.put(m.normal(40, C) ** 2)

    def results(a: int, b: int) -> dict[str, np.ndarray]:
        N, p, q, gates = b - a, x[a:b].copy(), y[a:b].copy(), z[a:b].copy()
        r = {name: np.zeros((N, C), ops.real) for name in ("norm", "swiglu", "tanh", "sum")}
        r |= {name: np.zeros((N, C), ops.real) for name in ("layernorm", "gelu", "dgelu", "scaled")}
        r |= {name: np.zeros(N, ops.real) for name in ("rstd", "loss", "lse", "mean", "rstd_1")}
        r |= {"dinp_1": q.copy(), "rope_2d": gates.copy()}
        r |= {"dinp": q.copy(), "dgates": gates.copy(), "rope": p.copy(), "dlogits": p.copy()}
        r |= {"dtanh": p.copy(), "p": p.copy(), "m": q.copy(), "v": moments[a:b].copy()}
        ops.rmsnorm_forward(r["norm"], r["rstd"], p, weight, N, C, 1e-5)
        ops.rmsnorm_backward(r["dinp"], None, q, p, weight, r["rstd"], N, C)
        ops.layernorm_forward(r["layernorm"], r["mean"], r["rstd_1"], p, weight, weight, N, C, 1e-5)
        ops.layernorm_backward(r["dinp_1"], None, None, q, p, weight, r["mean"], r["rstd_1"], N, C)
        ops.swiglu_forward(r["swiglu"], gates, N, C)
        ops.swiglu_backward(r["dgates"], q, gates, N, C)
        ops.gelu_forward(r["gelu"], p, N * C)
        ops.gelu_backward(r["dgelu"], q, p, N * C)
        ops.scaled_add(r["scaled"], p, q, N * C, 7.5)
        here = position[a:b].copy()
        ops.rope_2d_forward(r["rope_2d"], table_2d, here, here, N, 1, C // 4 * 4, 2 * C)
        ops.tanh_forward(r["tanh"], p, N * C)
        ops.tanh_backward(r["dtanh"], q, r["tanh"], N * C)
        ops.add(r["sum"], p, q, N * C)
        ops.rope_forward(r["rope"], table, position[a:b].copy(), N, 1, C, C, C // 2 * 2)
        ops.cross_entropy_forward(r["loss"], r["lse"], p, target[a:b].copy(), N, C)
        ops.cross_entropy_backward(r["dlogits"], r["lse"], target[a:b].copy(), N, C, 0.3)
        ops.adamw(r["p"], q, r["m"], r["v"], N * C, 1e-3, 0.9, 0.999, 1e-8, 0.1, 2, 0.5)
        return r

    whole = results(0, 40)
    for a, b in PARTS:
        for name, part in results(a, b).items():
            same_bits(part, whole[name][a:b], f"{name}, rows {a}:{b} of 40, C={C}")


@every_backend
@pytest.mark.parametrize("kind", KINDS)
def test_segment_does_not_depend_on_others(backend: str, kind: str) -> None:
    m = Maker(ops_of(backend), 13)
    counts, shape = (5, 1, 33, 17, 64), (4, 2, 33)
    segments, qkv, cache, heads, N, _, _, _ = attention_inputs(m, kind, counts, shape)
    dout = m.normal(N, 4 * 33)

    def results(tokens: slice, chosen: list[Segment]) -> list[np.ndarray]:
        rows, d = qkv[tokens].copy(), dout[tokens].copy()
        out, lse = np.zeros_like(d), np.zeros((len(d), 4), d.dtype)
        dqkv = np.zeros_like(rows)
        m.ops.attention_forward(out, lse, rows, cache, chosen, len(chosen), heads)
        args = (d, out, lse, rows, cache, chosen, len(chosen), heads)
        m.ops.attention_backward(dqkv, None, *args)
        return [out, lse, dqkv]

    whole = results(slice(0, N), segments)
    for s in segments:
        tokens = slice(s.begin, s.begin + s.count)
        alone = Segment(*(getattr(s, name) for name, _ in Segment._fields_))
        alone.begin = 0
        for got, want in zip(results(tokens, [alone]), whole, strict=True):
            same_bits(got, want[tokens], f"{kind}: segment of {s.count} tokens alone")


@every_backend
@pytest.mark.parametrize("shape", [(4, 2, 16), (3, 1, 48), (2, 2, 33), (12, 1, 16)])
def test_one_token_has_the_bits_of_a_prefill(backend: str, shape: tuple[int, int, int]) -> None:
    """One token whose past is in a cache, over more than a block of keys."""
    if not backend.startswith("cpu"):
        pytest.skip("this is the cpu's promise")
    (NH, KVH, HD), T = shape, 150
    m = Maker(ops_of(backend), 14)
    heads, KV = Heads(*shape), KVH * HD
    qkv = m.normal(T, (NH + 2 * KVH) * HD)
    keys = qkv[:, NH * HD : NH * HD + KV].copy(), qkv[:, NH * HD + KV :].copy()
    out, lse = m.normal(T, NH * HD), m.normal(T, NH)
    m.ops.attention_forward(out, lse, qkv, keys, [Segment(begin=0, count=T)], 1, heads)
    for t in (0, 1, 15, 16, 63, 64, 65, 127, 128, 149):
        one, one_lse, row = m.normal(1, NH * HD), m.normal(1, NH), qkv[t : t + 1].copy()
        segment = Segment(begin=0, count=1, shared_count=t // 3, past_begin=t // 3)
        segment.past_count = t - t // 3
        m.ops.attention_forward(one, one_lse, row, keys, [segment], 1, heads)
        same_bits(one[0], out[t], f"token {t} of {shape}")
        same_bits(one_lse[0], lse[t], f"lse of token {t} of {shape}")


@pytest.fixture
def threads():
    """set_num_threads for the test; restores what was."""
    before = _core.get_num_threads()
    yield _core.set_num_threads
    _core.set_num_threads(before)


@every_backend
@pytest.mark.parametrize("case", LARGE, ids=lambda case: f"{case[0].__name__}-{case[1]}")
def test_threads_do_not_change_a_bit(backend: str, case: tuple[Any, ...], threads: Any) -> None:
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append(run(case[0], backend, 17, case[1:]))
    for n, result in zip((2, 3), results[1:], strict=True):
        for name, (value, _) in results[0].items():
            same_bits(result[name][0], value, f"{case[0].__name__}{case[1:]} {name}, {n} threads")


# ---- draws ----


def drawn(backend: str, x: np.ndarray, touched: Any = (0,), **fields: Any) -> int:
    """The column that is chosen of one row of scores."""
    ops, ids = ops_of(backend), np.zeros(1, np.int32)
    choice = Choice(**{"top_p": 1.0, "temperature": 1.0, "penalty": 1.0, **fields})
    ops.choose(
        ids, x.astype(ops.real)[None], 1, len(x), [choice], np.ascontiguousarray(touched, np.int32)
    )
    return int(ids[0])


@every_backend
def test_draws_are_those_of_the_host(backend: str, rng: np.random.Generator) -> None:
    """_core.sample sorts in double and is what runs where a caller's function sees the scores."""
    settings = [(1.0, 0, 1.0), (0.8, 50, 0.8), (1.5, 7, 1.0), (0.95, 0, 0.7), (3.0, 40, 0.3)]
    for at in range(200):
        x = 3 * rng.standard_normal(301).astype(np.float32)
        x = np.round(x) if at % 3 == 0 else x
        temperature, top_k, top_p = settings[at % len(settings)]
        context = rng.integers(0, 301, 40).astype(np.int32)
        distinct = list(dict.fromkeys(context.tolist()))
        more = {"penalty": 1.3, "penalised": len(distinct)} if at % 2 else {}
        got = drawn(backend, x, distinct, temperature=temperature, top_k=top_k, top_p=top_p,
                    seed=at, stream=3, index=at // 7, **more)  # fmt: skip
        if more:
            _core.adjust_logits(x, context, 1.3)
        assert got == _core.sample(x, temperature, top_k, top_p, at, 3, at // 7), at


@every_backend
def test_a_choice_has_edges(backend: str) -> None:
    x = np.array([1, 5, -2, 5, 0.5, 5], np.float32)
    for seed in range(20):
        # of equals at the edge of top_p the first stay; those at the edge of top_k all do
        assert drawn(backend, x, top_p=0.0, seed=seed) == 1
        assert drawn(backend, x, top_p=0.5, seed=seed) in (1, 3)
        assert drawn(backend, x, top_k=1, seed=seed) in (1, 3, 5)
    assert {drawn(backend, x, top_p=0.5, seed=seed) for seed in range(20)} == {1, 3}
    assert {drawn(backend, x, top_k=1, seed=seed) for seed in range(40)} == {1, 3, 5}
    assert drawn(backend, x, temperature=0.0) == 1
    assert drawn(backend, x, [3, 1, 5], temperature=0.0, penalty=2.0, penalised=1, banned=1) == 5
    assert drawn(backend, x, [0, 1, 2, 3, 4, 5], banned=6) == -2
    if backend != "ref_f64":
        assert drawn(backend, x, [1], penalty=1e-45, penalised=1) == -2  # infinite
    assert drawn(backend, np.array([1, np.inf], np.float32)) == -1


# ---- elementary functions ----


@pytest.mark.parametrize("backend", [name for name in backends() if name.startswith("cpu")])
def test_exp_and_silu_in_ulp(backend: str) -> None:
    """What exp_vector and sigmoid promise (csrc/cpu/tmpl_vector.h), over all their range."""
    ops = ops_of(backend)
    x = np.linspace(-87.3, 88.3, 1_000_001, dtype=np.float32)

    def ulps(got: np.ndarray, want: np.ndarray) -> float:
        unit = np.spacing(np.abs(want.astype(np.float32))).astype(np.float64)
        return float(np.max(np.abs(got - want) / unit))

    y = np.concatenate([x, [0.0]]).astype(np.float32)[None]  # the last is the target
    ops.cross_entropy_backward(
        y, np.zeros(1, np.float32), np.array([x.size], np.int32), 1, y.size, 1.0
    )
    assert ulps(y[0, :-1], np.exp(x.astype(np.float64))) <= 2
    inp, out = np.concatenate([x, np.ones_like(x)])[None], np.empty((1, x.size), np.float32)
    ops.swiglu_forward(out, inp, 1, x.size)
    assert ulps(out[0], x / (1 + np.exp(-x.astype(np.float64)))) <= 4


# ---- Philox and dropout ----


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 (Salmon et al. 2011), written from the paper in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        low = 0xFFFFFFFF
        c = [(b >> 32) ^ c[1] ^ k[0], b & low, (a >> 32) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return tuple(c)


def test_philox_known_answers() -> None:
    """The vectors of the Random123 distribution (kat_vectors, philox4x32 10)."""
    ones = 0xFFFFFFFF
    zero = philox((0, 0, 0, 0), (0, 0))
    assert zero == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    full = philox((ones,) * 4, (ones,) * 2)
    assert full == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = philox((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
    assert pi == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@pytest.mark.parametrize("backend", ["ref_f64", *TESTED])
def test_dropout_words_are_philox(backend: str) -> None:
    """At p = word / 2^32 an element is kept, one unit higher it is dropped: that shows the word."""
    ops = ops_of(backend)
    rng = np.random.default_rng(2)
    calls = [(0, 0, 0, 0, 0)]  # all zero: the first known answer
    calls += [tuple(int(x) for x in rng.integers(0, 2**31, 5)) for _ in range(5)]
    calls += [(2**64 - 1, 2**32 - 1, 2**31 - 1, 2**31 - 1, 2**32 - 1)]
    for seed, step, stream, position, site in calls:
        key = (seed & 0xFFFFFFFF, (seed >> 32) ^ step)
        for C, element in ((1, 0), (4, 1), (7, 6), (4099, 4098), (4099, 4091)):
            word = philox((element // 4, position, stream, site), key)[element % 4]
            for units, kept in ((word, True), (word + 1, False)):
                dropout = Dropout(units / 2**32, [stream], [position], seed, step, site)
                out = np.ones((1, C), ops.real)
                ops.dropout_forward(out, out, 1, C, dropout)
                assert (out[0, element] != 0) == kept, (seed, step, stream, position, site, element)


@pytest.mark.parametrize("backend", ["ref_f64", *TESTED])
def test_dropout_does_not_depend_on_packing(backend: str) -> None:
    ops = ops_of(backend)
    N, C = 60, 37
    stream, position = np.repeat(np.arange(6), 10), np.tile(np.arange(10), 6)
    x = np.ones((N, C), ops.real)

    def mask(rows: np.ndarray, **other: int) -> np.ndarray:
        out = np.empty((len(rows), C), ops.real)
        arguments = {"seed": 5, "step": 1, "site": 3} | other
        dropout = Dropout(0.3, stream[rows], position[rows], **arguments)
        ops.dropout_forward(out, x[rows].copy(), len(rows), C, dropout)
        return out

    whole = mask(np.arange(N))
    shuffled = np.random.default_rng(1).permutation(N)
    assert np.array_equal(mask(shuffled), whole[shuffled])
    assert np.array_equal(mask(np.arange(17, 18)), whole[17:18])
    assert len(np.unique(whole != 0, axis=0)) == N  # no two (stream, position) share a mask
    for other in ({"seed": 6}, {"seed": 5 + 2**32}, {"step": 2}, {"site": 4}):
        assert (mask(np.arange(N), **other) != whole).any()
    assert np.isin(whole, [0, np.asarray(1 / 0.7, ops.real)]).all()


@pytest.mark.parametrize("backend", ["ref_f64", *TESTED])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_dropout_keep_rate(backend: str, p: float) -> None:
    ops = ops_of(backend)
    N, C = 400, 256
    out = np.ones((N, C), ops.real)
    dropout = Dropout(p, np.arange(N) % 7, np.arange(N), seed=1)
    ops.dropout_forward(out, out, N, C, dropout)
    deviation = np.sqrt(p * (1 - p) / out.size)
    assert abs((out != 0).mean() - (1 - p)) <= 4 * deviation


@pytest.mark.parametrize("backend", ["ref_f64", *TESTED])
def test_noise_is_uniform_and_does_not_depend_on_packing(backend: str) -> None:
    """Each element has its own number in [-1, 1), which that of its mask also is."""
    ops = ops_of(backend)
    N, C = 200, 301
    rows, total = np.arange(N), np.zeros((N, C), ops.real)

    def drawn(rows: np.ndarray, **other: int) -> np.ndarray:
        x = np.zeros((len(rows), C), ops.real)
        ops.noise(x, len(rows), C, 2.0, Dropout(0, rows % 7, rows, **{"seed": 5, **other}))
        return x

    total = drawn(rows)
    assert -2 <= total.min() < -1.999 and 1.999 < total.max() < 2
    spread = 2 / 3**0.5
    assert abs(total.mean()) < 4 * spread / total.size**0.5
    assert total.std() == pytest.approx(spread, rel=0.01)
    assert len(np.unique(total)) > 0.99 * total.size
    shuffled = np.random.default_rng(1).permutation(N)
    assert np.array_equal(drawn(shuffled), total[shuffled])
    for other in ({"seed": 6}, {"step": 2}, {"site": 4}):
        assert (drawn(rows, **other) != total).mean() > 0.99
    kept = np.ones((N, C), ops.real)
    ops.dropout_forward(kept, kept, N, C, Dropout(0.25, rows % 7, rows, seed=5))
    assert np.array_equal(kept == 0, total < -1)  # a quarter of [-2, 2)


# ---- stored dtypes ----


@pytest.mark.parametrize("backend", ["ref_f64", *TESTED])
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("wide", [F32, F64])
def test_convert_every_16_bit_pattern(backend: str, dtype: int, wide: int) -> None:
    ops = ops_of(backend)
    bits = np.arange(65536, dtype=np.uint16)
    inp = bits if dtype == BF16 else bits.view(np.float16)
    out, back = np.empty(65536, STORED[wide]), np.empty_like(inp)
    ops.convert(out, wide, inp, dtype, 65536)
    expected = bf16_to_float(bits) if dtype == BF16 else inp.astype(np.float32)
    assert np.array_equal(out, expected, equal_nan=True)
    number = ~np.isnan(expected)
    assert np.array_equal(np.signbit(out[number]), np.signbit(expected[number]))
    ops.convert(back, dtype, out, wide, 65536)
    assert np.array_equal(back.view(np.uint16)[number], bits[number])
    again = bf16_to_float(back) if dtype == BF16 else back.astype(np.float32)
    assert np.isnan(again[~number]).all()


@pytest.mark.parametrize("backend", ["ref_f64", *TESTED])
def test_convert_rounds_to_nearest_even(backend: str) -> None:
    ops = ops_of(backend)
    rng = np.random.default_rng(8)
    patterns = rng.integers(0, 2**32, 200_003, dtype=np.uint32)
    near_half = (rng.normal(size=50_000) * 2.0 ** rng.integers(-30, 18, 50_000)).astype(np.float32)
    halves = np.arange(65535, dtype=np.uint16).view(np.float16).astype(np.float64)
    with np.errstate(invalid="ignore"):
        ties = ((halves[1:] + halves[:-1]) / 2).astype(np.float32)  # exact ties of half
    edges = np.array(
        [65504, 65519.996, 65520, 65536, 2**-24, 2**-25, 1.5 * 2**-25, 0.0], np.float32
    )
    special = np.array([np.inf, np.nan, 3.4028235e38, 1e-45, 3.3961775e38], np.float32)
    x = np.concatenate(
        [patterns.view(np.float32), near_half, ties, edges, -edges, special, -special]
    )
    with np.errstate(invalid="ignore"):
        doubles = x.astype(np.float64)
    for source, given in ((F32, x), (F64, doubles)):
        half, bf16 = np.empty(len(x), np.float16), np.empty(len(x), np.uint16)
        ops.convert(half, F16, given, source, len(x))
        ops.convert(bf16, BF16, given, source, len(x))
        with np.errstate(over="ignore", invalid="ignore"):
            want_half, want_bf16 = given.astype(np.float16), float_to_bf16(x)
        number = ~np.isnan(x)
        same_bits(half[number], want_half[number], "half")
        same_bits(bf16[number], want_bf16[number], "bfloat16")
        assert np.isnan(half[~number]).all() and np.isnan(bf16_to_float(bf16[~number])).all()
    # the other pairs, and lengths around a vector
    wide = rng.normal(size=40)
    for n in (0, 1, 7, 8, 9, 15, 17, 33):
        for a in DTYPES.values():
            given = stored(wide[:n], a)
            for b in DTYPES.values():
                out = np.full(n + 1, 3, STORED[b])
                ops.convert(out[:n], b, given, a, n)
                want = stored(unstored(given, a), b)
                same_bits(out[:n], np.ascontiguousarray(want), f"{a} to {b}, n={n}")
                assert out[n] == 3


@pytest.mark.parametrize("backend", ["ref_f64", *TESTED])
def test_merge_against_numpy(backend: str) -> None:
    """Integers and powers of two: no rounding before the last, so the bits are known."""
    ops = ops_of(backend)
    rng = np.random.default_rng(4)
    O, I, R = 33, 101, 5
    B, A = (rng.integers(-8, 9, shape).astype(ops.real) for shape in ((O, R), (R, I)))
    w = rng.normal(size=(O, I)).astype(np.float16)
    want = w.astype(np.float64) + (B.astype(np.float64) @ A) / 8
    for dtype in (F32, F16, BF16):
        data = stored(w.astype(np.float32), dtype)
        exact = want if dtype != BF16 else unstored(data, BF16) + (B.astype(np.float64) @ A) / 8
        ops.merge(data, dtype, B, A, None, None, O, I, R, 0.125)
        expected = stored(exact.astype(np.float32), dtype)
        # the float sum may round before the last rounding: a tie then goes either way, rarely
        differ = data.view(np.uint16 if dtype != F32 else np.uint32) != expected.view(
            np.uint16 if dtype != F32 else np.uint32
        )
        assert differ.mean() < 0.002, f"dtype {dtype}: {differ.sum()} of {differ.size} differ"
