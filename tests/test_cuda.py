"""Ops and models on a CUDA backend against the cpu: emulated, or a device where there is one.

The golden tests and all others that load models run there too: GLMLORA_TEST_BACKEND=emu."""

import csv
import io
import json
import os

import numpy as np
import pytest
import test_model_gradient as model_gradient
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
BY_CASE = (
    *("cross_entropy_forward", "cross_entropy_backward", "merge", "quantize"),
    *("rmsnorm_backward", "layernorm_backward"),
)
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


def barriers(op, kind, counts, shape, type_, aligned):
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

    def decode(s):
        found, tiles = 0, KVH * -(-G // (8 if HD > 128 else 16))
        for t in range(s.count):
            keys = 64 * -(-seen(s, t * G) // 4096)
            runs = -(-seen(s, t * G) // keys)
            found += tiles * runs * (1 + (narrow and aligned and HD % 4 == 0))
            found += NH if runs > 1 else 0
        return found

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
        return sum(queries(s, *sizes) if s.count > 4 else decode(s) for s in segments if s.count)
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
            aligned = ops[1]._calls % 2 == 0  # optable.DeviceOps
            wanted = barriers(op.__name__, *args, self.type, aligned)
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
        if op in ON_GRID:  # every other call's arrays are on the 16-byte grid
            found = [Check(c.case, c.seed, type_) for c in found for _ in range(2)]
    return found


# Whose kernels of 16-byte words are for such arrays.
ON_GRID = ("attention_forward", "swiglu_linear_forward", "swiglu_linear_backward")
NARROW_OPS = (
    *test_ops.NARROW_OPS,
    test_ops.adapted_forward,
    test_ops.linear_swiglu_forward,
    test_ops.rmsnorm_swiglu_forward,
    test_ops.linear_rope_append,
    test_ops.rmsnorm_rope_append,
    test_ops.swiglu_linear_forward,
    test_ops.swiglu_linear_backward,
    test_ops.swiglu_mlp_forward,
    test_ops.swiglu_mlp_backward,
    test_ops.self_attention_forward,
    test_ops.self_attention_backward,
)
# Root mean square in bfloat16 where it is not that of one product: the norm, h and the activation
# are rounded one after the other, and then gradients of the last two; before them queries, keys and
# values, what attention yields of them, and then gradients of all.
SEVERAL = dict.fromkeys(
    ("swiglu_mlp_forward", "swiglu_mlp_backward", "self_attention_backward"), 4e-3
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
    bound = SEVERAL.get(op, 2e-3) if type_ == "bfloat16" else 2e-3
    assert np.sqrt(np.mean(np.square(errors))) <= bound


@on_devices
def test_height_of_tiles_changes_no_bit(device):
    """A block has twice the rows where segments are long, which the caller tells."""
    NH = 1 if device == "emu" else 64
    counts, shape, found = (1030, 40), (NH, 1, 64), []
    for longest in (0, 1030):
        maker = test_ops.Maker(ops_of(f"{device}/float16"), 3)
        segments, qkv, cache, _, N, *_ = test_ops.attention_inputs(maker, "shared", counts, shape)
        out, lse = maker.out(N, NH * 64), maker.out(N, NH)
        heads = test_ops.Heads(*shape, longest)
        maker.ops.attention_forward(out, lse, qkv, cache, segments, len(segments), heads)
        maker.check()
        found.append((out, lse))
    for one, other in zip(*found, strict=True):
        test_ops.same_bits(one, other, "tiles of 64 and of 128 rows")


@on_devices
@pytest.mark.parametrize("type_", ["float16", "bfloat16"])
def test_order_of_blocks_changes_no_bit_of_an_adapter(device, type_):
    """Whichever block comes last adds what all have left, in one order; and a gradient that is not
    asked for changes no other."""
    case = ("plain", (270, 1), (3, 1, 64), 32, 144, 12, "BF16", 0.2)
    m, emu, found = test_ops.Maker(ops_of(f"{device}/{type_}"), 3), emulator(), []
    h, dout = test_ops.Half(m, case, True), m.normal(271, 144)
    h.forward(m)
    for seed, wanted in enumerate(("dA dB dinp", "dA dB dinp", "dA dB", "dB dinp", "dA dinp")):
        work, dinp = m.out(271 * 192), m.out(271, 144)
        dA, dB = np.zeros((12, 144), np.float32), np.zeros((320, 12), np.float32)
        asked = {"dA": dA, "dB": dB, "dinp": dinp}
        if emu:
            emu.mode(seed=seed)
        m.ops.self_attention_backward(
            *(asked[n] if n in wanted.split() else None for n in ("dinp", "dA", "dB")),
            *(work, m.out(271, 320), m.out(271, 12), h.rstd, dout, h.att, h.lse, h.qkv, h.xa),
            *(h.sum, h.of, h.N),
        )
        if emu:
            emu.mode()
        found.append({n: asked[n] for n in wanted.split()})
    for other in found[1:]:
        for name, values in other.items():
            test_ops.same_bits(values, found[0][name], f"{name} of {', '.join(other)}")
        assert np.abs(other["dA" if "dA" in other else "dB"]).max() > 0


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


@on_devices
@pytest.mark.parametrize("kind", ["wide heads", pytest.param("fused", marks=pytest.mark.deep)])
def test_layers_that_are_recomputed_from_rounded_inputs(device, kind):
    """In bfloat16 a layer is recomputed of its input in 16 bits, in memory that others share:
    gradients differ by the rounding alone."""
    arch, family = model_gradient.KINDS[kind]
    found = []
    for budget in (1 << 30, 1):
        rng, sizes = np.random.default_rng(5), {**model_gradient.ARCH, **arch, "layers": 4}
        model = _core.Model(sizes, f"{device}/bfloat16", names=family.tensor_names)
        for name, shape in model.shapes().items():
            mean, deviation = (0.3, 1) if len(shape) == 1 else (0, 1.5 / np.sqrt(shape[1]))
            model.bind(name, rng.normal(mean, deviation, shape).astype(np.float32), "F32")
        names = [n for n in model.shapes() if "norm" in n or ".mlp." in n]
        model.set_trainable(names)
        model.reserve(12, 3, 5, True, budget)
        batch = [model_gradient.IDS, model_gradient.LENGTHS]
        model.backward(*batch, model_gradient.ROWS, model_gradient.TARGETS)
        found.append([model.read(name, "grad") for name in names])
    for kept, again in zip(*found, strict=True):
        assert np.abs(kept - again).max() <= 0.06 * np.abs(kept).max()


# ---- memory

# What a kernel moves over what it asks for, in a model (see the test).
STREAMING = [
    (test_ops.rmsnorm_forward, 64, 256, 1.0), (test_ops.rmsnorm_backward, 64, 256, True),
    (test_ops.layernorm_forward, 64, 256, 0.0), (test_ops.layernorm_backward, 64, 256, 1, 1),
    (test_ops.rope_2d, 64, 4, 64, 256, True), (test_ops.rope_2d, 64, 2, 128, 0, False),
    (test_ops.gelu_forward, 65536, 1.0, False), (test_ops.gelu_backward, 65536, 1.0, None),
    (test_ops.qkv_by_head, 64, 4, 64), (test_ops.scaled_add, 65536, "out"),
    (test_ops.embedding_forward, 64, 256, "F16"), (test_ops.embedding_forward, 64, 256, "F32"),
    (test_ops.rope, 64, 4, 64, 0, 32, True), (test_ops.rope, 64, 2, 128, 256, 64, False),
    (test_ops.swiglu_forward, 64, 512, 1.0), (test_ops.swiglu_backward, 64, 512, 1.0, False),
    (test_ops.tanh_forward, 65536, 1.0, False), (test_ops.tanh_backward, 65536, False),
    (test_ops.dropout_forward, 64, 256, 0.1, False), (test_ops.dropout_backward, 64, 256, 0.1),
    (test_ops.noise, 64, 256, 0.5), (test_ops.dora_forward, 64, 256, True, False),
    (test_ops.dora_backward, 64, 256, True, False),
    (test_ops.gather, 80, 64, 256), (test_ops.kv_append, 64, 4, 2, 64),
    (test_ops.qkv, 64, 4, 2, 64),
    (test_ops.cross_entropy_forward, 64, 1024, 1.0),
    (test_ops.cross_entropy_backward, 64, 1024, 1.0),
    (test_ops.add, 65536, "out"), (test_ops.sum_squares, 65536), (test_ops.adamw, 65536, 3, 0.1),
    (test_ops.first_nonfinite, 128, 256, (100,), np.nan),
    (test_ops.prefix_forward, 64, 8, 64, 2, 0.1), (test_ops.prefix_backward, 64, 8, 64, 2, 0.1),
    *((test_ops.convert, 65536, a, b) for a in test_ops.DTYPES for b in test_ops.DTYPES),
    *((test_ops.linear_forward, n, 512, 512, kind, True, 1.0, 1) for n in (1, 8)
      for kind in ("F32", "F16", "I8", "I4", "I4 by 32")),
    *((test_ops.linear_backward_input, 64, 256, 384, kind, 1.0, 1)
      for kind in ("F16", "BF16", "I8", "I4", "I4 by 32")),
    (test_ops.linear_forward, 64, 256, 384, "I8", True, 1.0, 1),
    *((test_ops.adapted_forward, n, 512, 512, 8, kind, True) for n, kind in ((1, "F16"),
      (8, "F16"), (8, "I4 by 32"))),
    *((test_ops.linear_swiglu_forward, n, 256, 512, kind, False) for n in (1, 8)
      for kind in ("F16", "I4 by 32")),
    *((test_ops.rmsnorm_swiglu_forward, n, 256, 512, kind, False) for n in (1, 4, 8)
      for kind in ("F16", "I4 by 32")),
    *((op, n, 4, 2, 64, 32, kind) for n in (1, 4)
      for op in (test_ops.linear_rope_append, test_ops.rmsnorm_rope_append)
      for kind in ("F16", "I4 by 32")),
    (test_ops.choose, 8, 4096, "plain"), (test_ops.choose_drawn, 4, 4096, 0.8, 50, 0.8, False),
    (test_ops.linear_backward_weight, 64, 288, 384, 1.0, True, True),
]  # fmt: skip
OTHERS = [
    (test_ops.embedding_backward, 64, 256),
    # scales of 256 columns are half a sector: the other half is a neighbouring warp's
    (test_ops.adapted_forward, 1, 512, 512, 8, "I4 by 32", True),
    *((test_ops.merge, 64, 256, 8, True, kind) for kind in test_ops.DTYPES),
    *((test_ops.dora_norm, 64, 256, 8, kind) for kind in (*test_ops.DTYPES, "I8", "I4")),
    *((test_ops.quantize, 64, 256, kind, "F16", 0.02) for kind in test_ops.QUANTIZED),
    *((op, kind, counts, (4, 2, HD)) for op in (test_ops.attention_forward,
      test_ops.attention_backward) for kind, counts in (("plain", (64, 70)), ("shared", (64, 33)),
      ("long", (1,) * 64)) for HD in (64, 128)),
]  # fmt: skip


@pytest.mark.skipif(
    not emulator() or "checked" not in os.environ["GLMLORA_CUDA_LIBRARY"],
    reason="addresses are known to the emulator's checked build",
)
@pytest.mark.parametrize("limit", [1.1, 1.5])
@pytest.mark.parametrize("type_", ["float32", "float16"])
def test_sectors_moved_over_bytes_asked(type_, limit):
    """A model of the memory system, not a measurement: an instruction of a warp moves the 32-byte
    sectors that its lanes touch, over the distinct bytes that they ask for; a load finds those of
    the warp's four loads before it in the first cache. Kernels that ask for less than 1 KiB (the
    last step of a reduction) are left out."""
    ops, emu, worst = ops_of(f"emu/{type_}"), emulator(), {}
    ops.aligned = True
    for case in STREAMING if limit == 1.1 else OTHERS:
        emu.metrics(True)
        case[0](test_ops.Maker(ops, 1), *case[1:])
        for kernel, count in emu.traffic().items():
            if count["asked"] >= 1024:
                ratio = 32 * count["sectors"] / count["asked"]
                worst[kernel] = max(
                    worst.get(kernel, (0,)), (ratio, f"{case[0].__name__}{case[1:]}")
                )
    emu.metrics(False)
    ops.aligned = False
    print(*(f"model: {k} {r:.2f} {case}" for k, (r, case) in sorted(worst.items())), sep="\n")
    assert len(worst) > 4 and max(worst.values())[0] <= limit, max(
        worst.items(), key=lambda w: w[1]
    )


# ---- models


def load(directory, backend, monkeypatch, **kwargs):
    monkeypatch.setattr(Model, "backend", backend)
    return glmlora.AutoModel.from_pretrained(directory, **kwargs)


EVERY_LINEAR = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "output_layer"]


def lora(model, dropout=0.0, targets=EVERY_LINEAR):
    config = glmlora.LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=32, lora_dropout=dropout, target_modules=targets
    )
    return glmlora.get_peft_model(model, config)


def batch(rng, rows=3, length=21):
    ids = rng.integers(3, 90, (rows, length))
    labels = ids.copy()
    labels[:, : length // 2] = -100
    mask = np.ones_like(ids)
    mask[1, : length // 3] = 0
    labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def losses_of(model, steps=20):
    """Losses of a few LoRA steps on two batches, from the same adapter every time."""
    rng = np.random.default_rng(1)
    batches = [batch(rng), batch(rng)]
    model.backward(**batches[0])  # takes the adapter into training
    model.zero_grad()
    for name in model.core.trainable():
        shape = model.core.read(name).shape
        size = 0.2 if ".lora_A." in name else 0.02
        model.core.write(name, (size * rng.normal(size=shape)).astype(np.float32))
    optimizer, losses = glmlora.AdamW(model, lr=1e-3, max_grad_norm=1.0), []
    for step in range(steps):
        losses.append(model.backward(**batches[step % 2]))
        optimizer.step()
    return np.array(losses)


# Relative error of each loss of 20 steps; heads of 8 take the 16-bit kernels too.
TYPES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}


@on_devices
@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
def test_twenty_lora_steps(device, type_, stored, tmp_path, monkeypatch):
    directory = tiny.tiny_model_dir(tmp_path, dtype=stored)
    want = losses_of(lora(load(directory, "cpu", monkeypatch)))
    got = losses_of(lora(load(directory, f"{device}/{type_}", monkeypatch)))
    assert want[-1] < 0.8 * want[0]  # it learns
    assert np.abs(got / want - 1).max() <= TYPES[type_], (got, want)


@on_devices
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("type_", TYPES)
def test_steps_of_layers_that_are_two_ops(device, type_, dropout, tmp_path, monkeypatch):
    """With an adapter of query_key_value alone, what is kept in 16 bits has half the room."""
    directory, targets = tiny.tiny_model_dir(tmp_path, dtype="F16"), ["query_key_value"]
    want = losses_of(lora(load(directory, "cpu", monkeypatch), dropout, targets), 8)
    got = losses_of(lora(load(directory, f"{device}/{type_}", monkeypatch), dropout, targets), 8)
    assert np.abs(got / want - 1).max() <= TYPES[type_], (got, want)


@on_devices
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights(device, bits, tmp_path, monkeypatch):
    directory = tiny.tiny_model_dir(tmp_path, dtype="F16")
    results = []
    for backend in ("cpu", device):
        model = load(directory, backend, monkeypatch).quantize(bits)
        inputs = batch(np.random.default_rng(2))
        results.append((model(**inputs).logits, losses_of(lora(model), 5)))
    assert np.abs(results[1][0] - results[0][0]).max() <= 1e-4
    assert np.abs(results[1][1] / results[0][1] - 1).max() <= 1e-4


@on_devices
def test_greedy_answers_are_the_same(device, tmp_path, monkeypatch):
    directory = tiny.tiny_model_dir(tmp_path)
    ids = np.random.default_rng(3).integers(3, 90, (2, 11))
    answers = [
        load(directory, backend, monkeypatch).generate(ids, max_new_tokens=12, eos_token_id=[])
        for backend in ("cpu", device)
    ]
    assert np.array_equal(*answers)


DRAWN = dict(do_sample=True, temperature=1.2, top_k=0, top_p=0.9, eos_token_id=[5, 6], seed=4)


@on_devices
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"top_k": 7, "top_p": 1.0},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_length": 25},
        {"temperature": 0, "repetition_penalty": 1.4},
    ],
)
def test_drawn_answers_are_the_same(device, more, tmp_path, monkeypatch):
    """And the device draws them: a token is a wait and 4 bytes back, from the fourth on it is one
    recorded sequence."""
    directory = tiny.tiny_model_dir(tmp_path)
    ids = np.random.default_rng(3).integers(3, 90, (3, 11))
    models = [load(directory, backend, monkeypatch) for backend in ("cpu", device)]
    answers = [model.generate(ids, max_new_tokens=30, **DRAWN | more) for model in models]
    assert np.array_equal(*answers)
    endless = DRAWN | more | {"eos_token_id": []}
    tokens = models[1].stream_generate(ids[:1], max_new_tokens=9, **endless)
    for place in range(9):
        models[1].core.counts()
        next(tokens)
        counts = models[1].core.counts()
        assert (counts["syncs"], counts["downloaded"]) == (1, 4)
        assert place < 3 or (counts["graphs"], counts["launches"], counts["products"]) == (1, 0, 0)


@on_devices
def test_what_allows_no_token_is_refused(device, tmp_path, monkeypatch):
    model = load(tiny.tiny_model_dir(tmp_path), device, monkeypatch)
    vocabulary = model.config.padded_vocab_size
    with pytest.raises(ValueError, match="row 0: no token is allowed after 3"):
        model.generate(
            [[4, 5, 6]], max_new_tokens=2, min_length=9, eos_token_id=list(range(vocabulary))
        )
    assert model.generate([[4, 5, 6]], max_new_tokens=2, eos_token_id=[]).shape == (1, 5)


@on_devices
def test_a_repeated_step_allocates_nothing_and_has_the_same_bits(device, tmp_path, monkeypatch):
    model = lora(load(tiny.tiny_model_dir(tmp_path), f"{device}/float16", monkeypatch))
    inputs = batch(np.random.default_rng(4))
    gradients, taken = [], []
    for _ in range(3):
        model.zero_grad()
        model.backward(**inputs)
        gradients.append(model.named_gradients())
        taken.append(model.core.allocations)
    assert taken[1:] == taken[:1] * 2
    for name, gradient in gradients[0].items():
        assert gradient.tobytes() == gradients[2][name].tobytes(), name


@on_devices
def test_names(device):
    assert _core.op_table(device)["cx"] == _core.op_table(f"{device}:0/float32")["cx"]
    assert _core.op_table(device)["cx"] != _core.op_table(f"{device}/float16")["cx"]
    for name, text in {
        f"{device}:99": "CUDA devices",
        f"{device}:x": "expected cpu",
        f"{device}/int8": "expected cpu",
    }.items():
        with pytest.raises(ValueError, match=text):
            _core.op_table(name)


# ---- the workflow


def shorten(path, rows):
    """The first rows of a table, with texts of a few words; returns them."""
    with open(path, encoding="utf-8", newline="") as f:
        found = [{k: " ".join(v.split()[:6]) for k, v in r.items()} for r in csv.DictReader(f)]
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, found[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found[:rows])
    return found[:rows]


def workflow(device, folder, monkeypatch, capsys):
    """A project from init to submit.csv in this process: (losses, answer, submission)."""
    monkeypatch.setattr(Model, "backend", device)
    home, base, adapter = project.init(folder / "xfg"), "../chatglm2-6b", "output/label_xfg"
    monkeypatch.chdir(home)
    rows = shorten("csv_data/train.csv", 16)
    shorten("csv_data/testB.csv", 6)
    data = [
        {"instruction": "Is it medicine? --> ", "input": r["title"], "output": r["label"]}
        for r in rows
    ]
    with open("data/paper_label.json", "w", encoding="utf-8") as f:
        json.dump(data, f)
    flags = "--stage sft --use_v2 --do_train --dataset paper_label --finetuning_type lora --fp16"
    flags += " --lora_rank 8 --per_device_train_batch_size 4 --gradient_accumulation_steps 2"
    flags += f" --logging_steps 1 --learning_rate 5e-3 --num_train_epochs 3 --output_dir {adapter}"
    assert cli.main(["train", "--model_name_or_path", base, *flags.split()]) == 0
    with open(f"{adapter}/trainer_log.jsonl", encoding="utf-8") as f:
        losses = [log["loss"] for log in map(json.loads, f) if log.get("loss") is not None]
    model = ["--model", base, "--adapter", adapter, "--temperature", "0"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nstop\n"))
    capsys.readouterr()
    assert cli.main(["chat", *model]) == 0
    answer = capsys.readouterr().out
    words = "--input csv_data/testB.csv --output submit.csv --choices 0,1 --fallback 0"
    words += " --columns uuid,Keywords --add Keywords=tmp"
    assert cli.main(["predict", *model, *words.split()]) == 0
    with open("submit.csv", encoding="utf-8") as f:
        return np.array(losses), answer, f.read()


@on_devices
def test_the_workflow(device, tmp_path, monkeypatch, capsys):
    """init, train, chat, predict, submit: the losses within 1e-3 of the cpu's, the same answers."""
    emu = emulator()
    if emu:
        emu.metrics(False)
    got = workflow(device, tmp_path / "device", monkeypatch, capsys)
    if emu:
        assert emu.traffic()["k_attention_sum"]["launches"] >= 6 * 2 * 4  # it did run there
    want = workflow("cpu", tmp_path / "cpu", monkeypatch, capsys)
    assert len(got[0]) == 6 and got[0][-1] < got[0][0]
    assert np.abs(got[0] - want[0]).max() <= 1e-3
    assert got[1] == want[1] and got[1].strip()
    assert got[2] == want[2] and got[2].startswith("uuid,Keywords,label\n")
    assert got[2].count("\n") == 7
