"""Ops and models on a CUDA backend against the cpu: emulated, or a device where there is one.

The golden tests and all others that load models run there too: GLMLORA_TEST_BACKEND=emu."""

import csv
import io
import json
import os

import numpy as np
import pytest
import test_ops
import tiny
from emulator import emulator
from ops import BF16, F16, STORED, Mat, backends, ops_of, stored, unstored

import glmlora
from glmlora import _core, cli
from glmlora.model.modeling import ChatGLMForConditionalGeneration as Model
from glmlora.tools import project

DEVICES = [name for name in backends() if name in ("emu", "cuda")]
pytestmark = pytest.mark.skipif(not DEVICES, reason="GLMLORA_CUDA_LIBRARY names no CUDA library")
on_devices = pytest.mark.parametrize("device", DEVICES)


# ---- every op

# Where a result is a difference of numbers nearly equal, or was rounded to 16 bits or to integers,
# the error is what test_ops.py derives for it, not 1e-5 of the result.
BY_CASE = ("cross_entropy_backward", "merge", "quantize")
SEEDS = (0, *(pytest.param(seed, marks=pytest.mark.deep) for seed in (1, 2)))


@pytest.fixture
def order(request):
    """On the emulator the seed is an order of threads too, and streams are late."""
    seed, emu = request.param, emulator()
    if emu:
        emu.mode(seed=seed, lazy=seed > 0)
    yield seed
    if emu:
        emu.mode()


class Narrow(test_ops.Maker):
    """Inputs that a 16-bit type holds, in memory of float32 all the same."""

    dtype = F16

    def put(self, values):
        return super().put(unstored(stored(np.asarray(values, np.float32), self.dtype), self.dtype))

    def weight(self, rows, cols, dtype):
        if dtype not in ("F32", "F64"):
            return super().weight(rows, cols, dtype)
        kind = test_ops.DTYPES[dtype]
        values = stored(self.rng.normal(size=(rows, cols)).astype(np.float32), self.dtype)
        values = unstored(values, self.dtype).astype(STORED[kind])
        return Mat(values, kind), values.astype(np.float64)


class NarrowBF16(Narrow):
    dtype = BF16


MAKERS = {"float32": test_ops.Maker, "float16": Narrow, "bfloat16": NarrowBF16}


def factor_barriers(n):
    """Those of the blocks that look for the largest of n gradients, and of the one after them."""
    return min(-(-n // 8192), 512) + 1


def barriers(op, kind, counts, shape, type_):
    """Barriers that blocks pass in an attention op: two for a tile of keys or rows, one in backward
    in 16 bits. So it tells that no tile is gone over in vain, which no result does."""
    segments, _ = test_ops.segments_of(kind, counts)
    NH, KVH, HD = shape
    G, T = NH // KVH, 32 if HD <= 64 else 16 if HD <= 128 else 8
    narrow = type_ != "float32" and HD <= 128

    def over(n, tile):
        return 2 * -(-n // tile)

    def seen(s, row):
        return s.shared_count + s.past_count + max(row // G + 1, min(s.context, s.count))

    def queries(s, block, keys, before):
        ends = [min(row + block, s.count * G) for row in range(0, s.count * G, block)]
        return KVH * sum(before + over(seen(s, end - 1), keys) for end in ends)

    def keys_and_values(i, s, keys, block, heads):
        """Rows are the tokens of so many query heads together."""
        found = 0
        for key in range(0, s.count, keys):
            start = key if key >= min(s.context, s.count) else 0
            found += over((s.count - start) * heads, block)
        end = s.shared_begin + s.shared_count
        same = any((q.shared_begin, q.shared_count) == (s.shared_begin, s.shared_count)
                   for q in segments[:i])  # fmt: skip
        for key in range(s.shared_begin, end if "shared" in kind and not same else 0, keys):
            for q in segments[i:]:
                if key < q.shared_begin + q.shared_count and key + keys > q.shared_begin:
                    found += over(q.count * heads, block)
        return KVH * found

    if op == "attention_forward":
        sizes = (64, 64, 0) if narrow else (T, T, 0)
        return sum(
            queries(s, *sizes) if s.count > 4 else 2 * s.count * NH for s in segments if s.count
        )
    if narrow:
        count = factor_barriers(sum(counts) * NH * HD) if segments and type_ == "float16" else 0
        for i, s in enumerate(segments):
            count += queries(s, 64, 32, 0) // 2
            count += G * keys_and_values(i, s, 64, 32, 1) // 2
        return count
    return sum(
        queries(s, T, T // 2, 0) + keys_and_values(i, s, T, T // 2, G)
        for i, s in enumerate(segments)
    )


class Check:
    """A case of an op on a device against the cpu, which gets the same numbers."""

    def __init__(self, case, seed, type_):
        self.case, self.seed, self.type = case, seed, type_
        numbers = [n for n in case[1:] if isinstance(n, (int, float, tuple))]
        sizes = [sum(n) if isinstance(n, tuple) else n for n in numbers]
        self.largest = max(sizes, default=0)
        self.cost = np.prod([float(n) for n in sizes if n > 0]) * (1 + (type_ != "float32"))

    def __repr__(self):
        return f"{self.case[0].__name__}{self.case[1:]} {self.type} seed {self.seed}"

    def run(self, device):
        """Relative errors (norms) of its outputs that have elements enough for an average."""
        op, args = self.case[0], self.case[1:]
        ops, found = (ops_of("cpu"), ops_of(f"{device}/{self.type}")), []
        maker, emu = MAKERS[self.type](ops[1], self.seed), emulator()
        if emu:
            emu.metrics(False)
        got = op(maker, *args)
        maker.check()
        if emu and op.__name__.startswith("attention"):
            count = sum(kernel["barriers"] for kernel in emu.traffic().values())
            wanted = barriers(op.__name__, *args, self.type)
            assert count == wanted, f"{self}: {count} barriers, expected {wanted}"
        wanted = op(MAKERS[self.type](ops[0], self.seed), *args)
        for name, (want, tolerance) in wanted.items():
            with np.errstate(invalid="ignore"):
                off = np.subtract(got[name][0], want, dtype=np.float64)
                off = np.where(got[name][0] == want, 0, np.abs(off))
            error = np.linalg.norm(off) / (np.linalg.norm(want) or 1)
            if self.type == "float32":
                limit = 1e-5 * np.abs(want).max(initial=0) + 1e-30
                if op.__name__ in BY_CASE:
                    limit = np.maximum(limit, 2 * np.asarray(tolerance))
                assert (off <= limit).all(), f"{self}: {name} off by {off.max(initial=0)}"
            else:
                limit = 2e-3 if self.type == "float16" else 2e-2
                assert error <= limit, f"{self}: {name}: {error}"
            found += [error] if np.size(want) >= 64 else []
        return found


def checks(op, type_="float32"):
    """The cases of an op."""
    found = [Check(case, seed, type_) for seed, case in test_ops.cases_on("cuda", op)]
    if type_ != "float32":
        cold = [(test_ops.attention_backward, "cold", (33, 2), (2, 1, 64))]
        narrow = [c for c in test_ops.NARROW_CASES + cold if c[0].__name__ == op]
        found += [Check(case, seed, type_) for seed, case in enumerate(narrow)]
    return found


NARROW_OPS = (
    *test_ops.NARROW_OPS,
    test_ops.adapted_forward,
    test_ops.linear_swiglu_forward,
)


def under(seed, found):
    """The checks with other numbers; the largest ones under the first seed only."""
    for check in found:
        if not seed or check.largest <= 310:
            yield Check(check.case, check.seed + 7919 * seed, check.type)


@on_devices
@pytest.mark.deep  # test_ops.py has these ops against the reference
@pytest.mark.parametrize("order", SEEDS, indirect=True)
@pytest.mark.parametrize("op", test_ops.cases_by_op())
def test_op_equals_the_cpu(device, op, order):
    for check in under(order, checks(op)):
        check.run(device)


@on_devices
@pytest.mark.parametrize("order", SEEDS, indirect=True)
@pytest.mark.parametrize("type_", ["float16", pytest.param("bfloat16", marks=pytest.mark.deep)])
@pytest.mark.parametrize("op", [op.__name__ for op in NARROW_OPS])
def test_16_bit_op_equals_the_cpu(device, op, type_, order):
    """The cpu gets the same 16-bit numbers; what is left is the rounding of softmax and of its
    gradient, and of weights that are stored in another type. bfloat16 has 2^-9 for each of these,
    so 2e-3 holds for what has enough elements, over all cases (root mean square)."""
    errors = [error for check in under(order, checks(op, type_)) for error in check.run(device)]
    assert np.sqrt(np.mean(np.square(errors))) <= 2e-3


@on_devices
@pytest.mark.parametrize("kind", test_ops.QUANTIZED)
def test_a_row_over_a_quantized_weight_has_the_same_bits_in_few_rows(device, kind):
    """Whatever the kernel and the piece of inp: columns are summed in the same order."""
    m = test_ops.Maker(ops_of(f"{device}/bfloat16"), 5)
    W, _ = m.weight(40, 1128, kind)
    x, bias, out = m.normal(70, 1128), m.normal(40), m.out(70, 40)
    for a in (0, 64):  # at most 64 rows have kernels of ours
        b = min(a + 64, 70)
        m.ops.linear_forward(out[a:b], x[a:b], W, bias, b - a, 0.5, 0)
    for a, b in ((0, 1), (5, 13), (3, 12), (20, 37), (6, 70)):
        part = m.out(b - a, 40)
        m.ops.linear_forward(part, x[a:b], W, bias, b - a, 0.5, 0)
        test_ops.same_bits(part, out[a:b], f"rows {a}:{b}")
