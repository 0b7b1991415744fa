# ruff: noqa: E741 - N, O, I are the sizes of ops.h
"""Products of 16-bit integers of x with weights of 8 and 4 bits, the default over them where the
processor has no products of bfloat16; and of bytes of x with groups of 4 bits (int8)."""

from typing import NamedTuple

import numpy as np
import pytest
from ops import F16, I4, I8, Mat, ops_of

from glmlora import AutoModel, _core
from glmlora.model.device import compute_dtype
from glmlora.tools.project import tiny_directory

SETS = _core.cpu_variants().split(",")
KINDS = {"I8": (8, 0), "I4": (4, 0), "I4 by 32": (4, 32), "I4 by 96": (4, 96)}  # bits, group
every_set = pytest.mark.parametrize("isa", SETS)
LARGEST = {"int16": 32767, "int8": 127}  # of the integers of x
every_kind = pytest.mark.parametrize("kind", KINDS)
every_type_and_kind = pytest.mark.parametrize(
    ("type_", "kind"),
    [*(("int16", kind) for kind in KINDS), *(("int8", kind) for kind in KINDS if "by" in kind)],
)


class Stored(NamedTuple):
    data: np.ndarray  # integers, (O, I)
    scale: np.ndarray
    group: int


def weight(rng: np.random.Generator, O: int, I: int, kind: str) -> tuple[Mat, Stored]:
    """A matrix, the smallest and the largest integers in whole rows, and what it is made of."""
    bits, group = KINDS[kind]
    most = 2 ** (bits - 1)
    data = rng.integers(-most, most, (O, I)).astype(np.int8)
    data[0], data[-1] = -most, most - 1
    shape = (O, -(-I // group)) if group else (O,)
    scale = rng.uniform(0.001, 0.02, shape).astype(np.float16)
    if bits == 8:
        return Mat(data, I8, scale), Stored(data, scale, group)
    pairs = data.reshape(O, -1, 2)
    four = (pairs[..., 0] << 4 | pairs[..., 1] & 15).astype(np.int8)
    return Mat(four, I4, scale, group), Stored(data, scale, group)


def values(w: Stored) -> np.ndarray:
    """float64, (O, I)"""
    scale = w.scale.astype(np.float64)
    scale = np.repeat(scale, w.group, axis=1)[:, : w.data.shape[1]] if w.group else scale[:, None]
    return w.data * scale


def reference(x: np.ndarray, w: Stored, largest: int) -> np.ndarray:
    """x W^T as csrc/cpu/tmpl_words.h defines it, x in integers of at most `largest`."""
    f32, run = np.float32, 32 if w.group else 256
    (N, K), O = x.shape, len(w.data)
    runs = -(-K // run)
    x_runs, w_runs = np.zeros((N, runs * run), f32), np.zeros((O, runs * run), np.int64)
    x_runs[:, :K], w_runs[:, :K] = x, w.data
    x_runs, w_runs = x_runs.reshape(N, runs, run), w_runs.reshape(O, runs, run)
    most = np.abs(x_runs).max(2)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = f32(largest) / most
    inverse[np.isinf(inverse)] = 0
    q = np.rint(x_runs * inverse[..., None]).astype(np.int64)
    sums = np.einsum("nrk,ork->nor", q, w_runs)
    assert np.abs(sums).max() < 2**31
    sums, of_x, out = sums.astype(f32), most / f32(largest), np.zeros((N, O), f32)
    if not w.group:
        for r in range(runs):
            out += sums[:, :, r] * of_x[:, None, r]
        return out * w.scale.astype(f32)
    of_w = np.repeat(w.scale.astype(f32), w.group // 32, axis=1)
    for block in range(0, runs, 32):
        part = np.zeros((4, N, O), f32)
        for g in range(block, min(block + 32, runs)):
            part[g % 4] += sums[:, :, g] * (of_x[:, None, g] * of_w[None, :, g])
        out += (part[0] + part[1]) + (part[2] + part[3])
    return out


@every_type_and_kind
@every_set
def test_every_set_has_the_bits_of_the_definition(isa: str, type_: str, kind: str) -> None:
    """Few rows read W where it lies, more than 16 pack it; every kind of end of a row."""
    ops, rng = ops_of(f"cpu:{isa}/{type_}"), np.random.default_rng(8)
    shapes = (1, 70, 5000), (1, 9, 34), (1, 9, 1792), (5, 33, 2048), (17, 130, 2100), (40, 200, 302)
    for N, O, I in shapes:
        W, w = weight(rng, O, I, kind)
        x = rng.normal(size=(N, I)).astype(np.float32)
        x[0], x[-1, : I // 2], x[:, ::700] = 3, 0, 50  # the largest sums; a run of zeros
        out = np.empty((N, O), np.float32)
        ops.linear_forward(out, x, W, None, N, 1.0, 0)
        want = reference(x, w, LARGEST[type_])
        assert np.array_equal(out, want), (N, O, I)
        bias, more = rng.normal(size=O).astype(np.float32), out.copy()
        ops.linear_forward(more, x, W, bias, N, 0.5, 1)
        assert np.array_equal(more, want + (np.float32(0.5) * want + bias)), (N, O, I)


@every_type_and_kind
@every_set
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_threads(
    isa: str, type_: str, kind: str
) -> None:
    ops, rng = ops_of(f"cpu:{isa}/{type_}"), np.random.default_rng(9)
    W, _ = weight(rng, 300, 1100, kind)
    x = rng.normal(size=(40, 1100)).astype(np.float32)
    threads, found = _core.get_num_threads(), []
    try:
        for n in (1, 3):
            _core.set_num_threads(n)
            found.append(np.empty((40, 300), np.float32))
            ops.linear_forward(found[-1], x, W, None, 40, 1.0, 0)
    finally:
        _core.set_num_threads(threads)
    assert np.array_equal(*found)
    for first, end in ((0, 1), (7, 9), (3, 8), (20, 36), (5, 38)):
        part = np.empty((end - first, 300), np.float32)
        ops.linear_forward(part, x[first:end].copy(), W, None, end - first, 1.0, 0)
        assert np.array_equal(part, found[0][first:end]), (first, end)


@every_type_and_kind
@pytest.mark.parametrize(("outliers", "most"), [(1, 3e-5), (60, 1.5e-4)])
def test_it_is_near_to_float32(type_: str, kind: str, outliers: float, most: float) -> None:
    """Words are nearer than x rounded to float16 would be, which is 2e-4 away."""
    ops, rng = ops_of(f"cpu:{SETS[0]}/{type_}"), np.random.default_rng(1)
    W, w = weight(rng, 256, 4096, kind)
    x, out = rng.normal(size=(2, 4096)).astype(np.float32), np.empty((2, 256), np.float32)
    x[:, 77::1024] *= outliers
    ops.linear_forward(out, x, W, None, 2, 1.0, 0)
    want = (x.astype(np.float64) @ values(w).T)[:, 1:-1]  # without the rows of one integer
    error = np.sqrt(np.mean((out[:, 1:-1] - want) ** 2) / np.mean(want**2))
    assert 0 < error < most * 32767 / LARGEST[type_]


@every_type_and_kind
@every_set
def test_rows_that_are_not_finite_stay_so_and_tiny_ones_are_zero(
    isa: str, type_: str, kind: str
) -> None:
    ops, rng = ops_of(f"cpu:{isa}/{type_}"), np.random.default_rng(2)
    W, w = weight(rng, 40, 300, kind)
    for rows in (1, 6, 30):
        x, out = rng.normal(size=(rows, 300)).astype(np.float32), np.empty((rows, 40), np.float32)
        for bad in (np.nan, np.inf):
            x[0, 7] = bad
            ops.linear_forward(out, x, W, None, rows, 1.0, 0)
            assert np.isnan(out[0]).all() and np.isfinite(out[1:]).all()
        for tiny in (1e-30, 1e-37, 0.0):
            x[0] = tiny
            ops.linear_forward(out, x, W, None, rows, 1.0, 0)
            want = tiny * values(w).sum(1) if tiny > 1e-34 else 0
            assert np.allclose(out[0], want, rtol=1e-4, atol=0)


@every_set
def test_nothing_else_is_rounded(isa: str) -> None:
    """Over float weights, and on the way back, int16 has the bits of float32."""
    rng = np.random.default_rng(3)
    W, _ = weight(rng, 70, 300, "I8")
    wide = Mat(rng.normal(size=(70, 300)).astype(np.float16), F16)
    x = rng.normal(size=(5, 300)).astype(np.float32)
    dout = rng.normal(size=(5, 70)).astype(np.float32)
    found = {}
    for name in ("int16", "float32"):
        ops = ops_of(f"cpu:{isa}/{name}")
        out, dinp, over = (np.empty((5, n), np.float32) for n in (70, 300, 70))
        ops.linear_forward(out, x, wide, None, 5, 1.0, 0)
        ops.linear_backward_input(dinp, dout, W, 5, 1.0, 0)
        ops.linear_forward(over, x, W, None, 5, 1.0, 0)
        found[name] = out, dinp, over
    (out, dinp, over), (want, dwant, exact) = found["int16"], found["float32"]
    assert np.array_equal(out, want) and np.array_equal(dinp, dwant)
    assert not np.array_equal(over, exact)  # float32 stays what it was


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 32)])
def test_it_is_what_a_quantized_model_takes_by_itself(bits, group, monkeypatch, capsys):
    """From `quantize` on, until a cast to float32 products is asked for."""
    monkeypatch.delenv("GLMLORA_COMPUTE_DTYPE")
    monkeypatch.setenv("GLMLORA_ISA", "generic")
    monkeypatch.setattr("glmlora.model.device._announced", set())
    assert compute_dtype(None, {"F16"}) == "float32" and compute_dtype(None, {"I4"}) == "int16"
    model = AutoModel.from_pretrained(tiny_directory())
    assert model.compute_dtype == "float32"
    model.quantize(bits, group_size=group or None)
    assert model.compute_dtype == "int16" and model.core.backend == "cpu:generic/int16"
    exact = AutoModel.from_pretrained(tiny_directory(), compute_dtype="float32")
    exact.quantize(bits, group_size=group or None)
    assert exact.compute_dtype == "float32" and exact.core.backend == "cpu:generic"
    assert "products in int16" in capsys.readouterr().err
    ids = np.arange(3, 60)[None]
    near, want = model(input_ids=ids).logits, exact(input_ids=ids).logits
    error = np.sqrt(np.mean((near - want) ** 2) / np.mean(want**2))
    assert 0 < error < 3e-4
    alone = model(input_ids=ids[:, :9]).logits[0]
    assert (alone == near[0, :9]).all()  # few rows and many


@pytest.mark.parametrize("compute", ["int16", "int8"])
@pytest.mark.parametrize("group", [0, 32])
def test_no_rows_at_all(compute: str, group: int) -> None:
    scale = np.ones((5, 10) if group else 5, np.float16)
    W = Mat(np.zeros((5, 160), np.int8), I4, scale, group)
    out, x = np.empty((0, 5), np.float32), np.empty((0, 320), np.float32)
    ops_of(f"cpu/{compute}").linear_forward(out, x, W, None, 0, 1.0, 0)
