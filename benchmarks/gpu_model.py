"""A MODEL of what tokens, prefill and LoRA steps take on GPUs: no GPU is asked. Counts are exact,
since the library's own host code runs at the shapes of published models, on the emulator, with
kernels left out; times follow from them by the assumptions that are printed, and nothing else.

    python benchmarks/gpu_model.py [--gpu H100 ..] [--model GLM-4-9B ..] [--kernels] [--dropout P]

First what the model says of an H100 beside what one measured (gpu_h100.json), of the code of that
day (gpu_h100_counts.json). Then what today's code does, each model on each GPU: launches, products
of cuBLAS, blocks, waves (times that all multiprocessors get a block), bytes that kernels move,
FLOPs, bytes live at most, the modelled time, and its share of what the card does: of a copy's
bandwidth for tokens (weights and cache read once), of the products' rate elsewhere. Goals: tokens
at least 80 % of bandwidth, a LoRA step of 4 x 512 at most 1.25 times what its FLOPs take, prefill
at most 1.15 times. --kernels adds a line a kernel; --dropout 0.1 is the trainer's default, where
steps have none otherwise.

A kernel takes as long as its bytes or its FLOPs, whichever is longer, and a launch besides.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
sys.path.insert(0, str(ROOT))

from sides import NINE_B, SIX_B  # noqa: E402

MODELS = {"ChatGLM2-6B": SIX_B, "GLM-4-9B": NINE_B}
LABELS = 8  # labelled tokens at a row's end, as in gpu.py


@dataclass(frozen=True)
class GPU:
    """Nominal figures of NVIDIA's data sheets: bytes a second, dense FLOP/s in 16 bits."""

    name: str
    capability: int
    multiprocessors: int
    shared_kb: int
    memory: float
    bandwidth: float
    flops: float
    type: str = "bfloat16"
    rate: str = "products"  # the assumption for its products

    @property
    def copy(self) -> float:
        """Bytes a second of a copy, as modelled."""
        return self.bandwidth * ASSUMED["copy"][0]

    @property
    def products(self) -> float:
        """FLOP/s of large products, as modelled."""
        return self.flops * ASSUMED[self.rate][0]

    @property
    def launch(self) -> float:
        """Seconds of a launch, as modelled."""
        alone = 0 if self.capability >= 90 else ASSUMED["no overlap"][0]
        return ASSUMED["launch"][0] + alone


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("H100", 90, 132, 227, 80e9, 3.35e12, 989e12),
        GPU("A100", 80, 108, 163, 80e9, 2.039e12, 312e12, rate="products of an A100"),
        GPU("L4", 89, 58, 99, 24e9, 0.300e12, 121e12),
        GPU("T4", 75, 40, 64, 16e9, 0.320e12, 65e12, "float16"),
    )
}

# What is assumed: (value, unit, why, and what it was checked against)
ASSUMED: dict[str, tuple[float, str, str]] = {
    "copy": (
        0.889,
        "of nominal bandwidth",
        "an H100's copy: 2.98 of 3.35 TB/s (gpu_h100.json, ceilings); not checked on others",
    ),
    "products": (
        0.789,
        "of nominal FLOP/s",
        "an H100's products: 780 of 989 TFLOP/s (gpu_h100.json, ceilings); of shapes that were "
        "searched for an H100 SXM reached 794.5 in bfloat16 (github.com/stas00/ml-engineering, "
        "compute/accelerator, Maximum Achievable Matmul FLOPS); not checked on an L4 and a T4",
    ),
    "products of an A100": (
        0.853,
        "of nominal FLOP/s",
        "271.2 of 312 TFLOP/s on an A100 SXM in the same table, times 780 / 794.5: ours are not "
        "the shapes that it found",
    ),
    "launch": (
        4.6e-6,
        "s a launch in a row of launches",
        "from one row of gpu_h100.json, a token in bfloat16 at 1,024; checked on the rows below",
    ),
    "no overlap": (
        1e-6,
        "s more a launch below capability 9.0",
        "kernels there do not begin while the one before ends; not checked",
    ),
    "integers": (
        0.67,
        "of a copy's bandwidth where int4 is multiplied as it lies",
        "from one row of gpu_h100.json, a token over int4 at 1,024; checked at 8,192",
    ),
    "adapters": (
        0.62,
        "of a copy's bandwidth where a side is a rank",
        "k_thin_* of gpu_h100.json: 4 x 512 and 16 uneven rows",
    ),
    "attention": (
        0.17,
        "of nominal FLOP/s in tiles of 64 queries",
        "k_attention_forward of gpu_h100.json: 4 x 512 and 1 x 1,024",
    ),
    "tall attention": (
        0.28,
        "of nominal FLOP/s in tiles of 128 queries",
        "k_attention_forward_tall of gpu_h100.json at 8,192",
    ),
    "attention backward": (
        0.12,
        "of nominal FLOP/s",
        "k_attention_gradients of gpu_h100.json: 4 x 512 and 16 uneven rows",
    ),
}
GOALS = {"token": 0.80, "step": 1.25, "prefill": 1.15}
BAND = 0.16  # of the measured time, for rows whose figures no assumption was made from


# ---- what the library does: a line of the emulator a launch


@dataclass
class Batch:
    """What attention's cost lies in: tokens of each row, and cache rows that each sees."""

    lengths: Sequence[int]
    past: int = 0

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def pairs(self) -> float:
        """Pairs of query and key of one head."""
        return sum(n * self.past + n * (n + 1) / 2 for n in self.lengths)


@dataclass
class Launch:
    """Of a kernel or a product: blocks, bytes that it asks memory for, FLOPs, and the name of the
    assumption for each."""

    name: str
    blocks: int = 0
    bytes: float = 0
    flops: float = 0
    bandwidth: str = ""
    rate: str = "products"

    def seconds(self, gpu: GPU) -> float:
        """Modelled; fills and products are launches, too."""
        memory = gpu.copy * (ASSUMED[self.bandwidth][0] if self.bandwidth else 1)
        rate = gpu.rate if self.rate == "products" else self.rate
        return gpu.launch + max(self.bytes / memory, self.flops / (gpu.flops * ASSUMED[rate][0]))


SIZES = {0: 4, 1: 2, 2: 2, 3: 8, 4: 1, 5: 0.5}  # bytes of enum glm_dtype
Words = list[str]


def _structure(words: str, form: str, skip: int) -> tuple[Any, ...]:
    return struct.unpack_from(form, bytes.fromhex(words), skip)


def _matrix(words: str, at: int) -> float:
    """Bytes of a stored_matrix (launch.cuh) at a place of a struct."""
    _, scale, dtype, rows, cols, group, scale_cols = _structure(words, "PPiiiii", at)
    return rows * (cols * SIZES[dtype] + (2 * scale_cols if scale else 0))


def _few(words: Words, blocks: int, batch: Batch) -> dict[str, Any]:
    """struct few_rows, or quantized_rows, which begins with one."""
    *_, dtype, rows, cols, _, _ = _structure(words[0], "PPiiiii", 24)
    n, accumulate = _structure(words[0], "ii", 64)
    size = _matrix(words[0], 24) + 4 * n * (rows * (1 + accumulate) + cols)
    of = {"name": "products of few rows", "bytes": size}
    return of | ({"bandwidth": "integers"} if dtype == 5 else {})


def _normed(words: Words, blocks: int, batch: Batch) -> dict[str, Any]:
    """struct normed_rows begins with a few_rows; the norm's weight is read besides."""
    *_, cols, _, _ = _structure(words[0], "PPiiiii", 24)
    of = _few(words, blocks, batch)
    return of | {"bytes": of["bytes"] + 4 * cols}


def _turned(words: Words, blocks: int, batch: Batch) -> dict[str, Any]:
    """struct turned_rows ends with a norm_of_rows, which may be empty."""
    (norm,) = _structure(words[0], "P", len(words[0]) // 2 - 16)
    return (_normed if norm else _few)(words, blocks, batch)


def _thin(name: str, words: Words, blocks: int, batch: Batch) -> dict[str, Any]:
    """struct thin: the wide operand is what is written, or read in a type."""
    n, wide, _, _, accumulate, _, dtype = _structure(words[0], "iiiiifi", 40)
    size = 4 if name == "k_thin_out" else SIZES[dtype]
    return {"name": name, "bytes": size * n * wide * (1 + accumulate), "bandwidth": "adapters"}


def _parts(n: int, wide: int, rank: int) -> float:
    """Of a gradient, a part for 128 rows, there and back, and what they are added to."""
    return 4 * wide * (2 * -(-n // 128) * -(-rank // 8) * 8 + 2 * rank)


def _adapter_b(words: Words, blocks: int, batch: Batch) -> dict[str, Any]:
    """struct backward_b: dqkv, gradients of B, and that of what B multiplied, a part a strip."""
    n, wide, rank, dtype = _structure(words[0], "iiii", 72)
    of_u = 4 * n * rank * (2 * -(-wide // 128) + 2)
    nbytes = SIZES[dtype] * n * wide + _parts(n, wide, rank) + of_u
    return {"name": "k_adapter_b", "bytes": nbytes, "bandwidth": "adapters"}


def _adapter_a(words: Words, blocks: int, batch: Batch) -> dict[str, Any]:
    """struct backward_a: the norm's input for gradients of A, and what A yields."""
    dA, dinp = _structure(words[0], "PP", 0)  # noqa: N806
    n, wide, rank = _structure(words[0], "iii", 72)
    nbytes = 4 * n * (wide * (bool(dA) + bool(dinp)) + rank) + bool(dA) * _parts(n, wide, rank)
    return {"name": "k_adapter_a", "bytes": nbytes, "bandwidth": "adapters"}


def _turn(words: Words, blocks: int, batch: Batch) -> dict[str, Any]:
    """struct turning: qkv in 16 bits there and back, keys and values into the cache."""
    (slot,) = _structure(words[0], "P", 48)
    _, n, NH, KVH, HD, _, _ = _structure(words[0], "iiiiiii", 72)  # noqa: N806
    return {"bytes": n * HD * (4 * (NH + 2 * KVH) + (8 * KVH if slot else 0))}


def _dropout(words: Words, blocks: int, batch: Batch) -> dict[str, Any]:
    columns, across, added = map(int, words[2:5])
    return {"bytes": blocks / across * columns * 4 * (2 + added)}


def _attention(words: Words, blocks: int, batch: Batch) -> tuple[int, int, int]:
    return _structure(words[0], "iii", 36)  # NH, KVH, HD


def _decode(words: Words, blocks: int, batch: Batch) -> dict[str, Any]:
    """Segments of a few tokens read their keys and values; longer ones find nothing to do."""
    NH, KVH, HD = _attention(words, blocks, batch)  # noqa: N806
    if max(batch.lengths) > 4:
        return {"name": "attention of few tokens"}
    nbytes = len(batch.lengths) * (batch.past + 1) * KVH * HD * 2 * 4
    return {"name": "attention of few tokens", "bytes": nbytes + 8 * batch.tokens * NH * HD}


def _sizes(words: Words) -> list[int]:
    """Of an element of qkv, dout, out and dqkv, which are 16 bits where such a pointer is there."""
    return [2 if p else 4 for p in _structure(words[0], "PPPP", 128)]


def _tiles(words: Words, blocks: int, batch: Batch) -> dict[str, Any]:
    NH, KVH, HD = _attention(words, blocks, batch)  # noqa: N806
    tall = max(batch.lengths) > 1024
    return {
        "name": "attention in tiles",
        "bytes": (_sizes(words)[0] + _sizes(words)[2]) * batch.tokens * NH * HD,
        "flops": 4 * batch.pairs * NH * HD,
        "rate": "tall attention" if tall else "attention",
    }


def _gradients(words: Words, blocks: int, batch: Batch) -> dict[str, Any]:
    NH, KVH, HD = _attention(words, blocks, batch)  # noqa: N806
    flops = 10 * batch.pairs * NH * HD
    return {"name": "attention's gradients", "flops": flops, "rate": "attention backward"}


def _narrow(words: Words, blocks: int, batch: Batch) -> dict[str, Any]:
    NH, KVH, HD = _attention(words, blocks, batch)  # noqa: N806
    qkv, dout, out, _ = _sizes(words)
    wide = qkv * (NH + 2 * KVH) + (dout + out) * NH + 2 * (2 * NH + 2 * KVH)
    return {"bytes": batch.tokens * HD * wide}


def _pairs(words: Words, blocks: int, batch: Batch) -> dict[str, Any]:
    _, KVH, HD = _attention(words, blocks, batch)  # noqa: N806
    own = _sizes(words)[0] + 2
    return {"bytes": (batch.tokens * own + batch.past * 6) * 2 * KVH * HD}


def _sums(words: Words, blocks: int, batch: Batch) -> dict[str, Any]:
    _, KVH, HD = _attention(words, blocks, batch)  # noqa: N806
    slots, _, _, shares = _structure(words[0], "iiii", len(words[0]) // 2 - 88 + 4)
    return {"bytes": slots * 2 * KVH * HD * (4 * shares + _sizes(words)[3])}


def _join(words: Words, blocks: int, batch: Batch) -> dict[str, Any]:
    _, KVH, HD = _attention(words, blocks, batch)  # noqa: N806
    if max(batch.lengths) > 4:
        return {}
    return {"bytes": blocks * (batch.past // 64 + 1) * HD * 4}


def _by_variable(words: Words, blocks: int, batch: Batch) -> dict[str, Any]:
    """`kernel` is a variable of two launchers: the larger struct is backward's."""
    backward = len(words[0]) // 2 > 240
    return (_gradients if backward else _decode)(words, blocks, batch)


def _number(value: Callable[..., float]) -> Callable[..., dict[str, Any]]:
    """A kernel whose bytes follow from its numbers: `value(blocks, *arguments)`."""

    def cost(words: Words, blocks: int, batch: Batch) -> dict[str, Any]:
        return {"bytes": value(blocks, *map(float, words))}

    return cost


# Bytes that a kernel asks memory for, its parameters in their order; see cuda/*.cu.
COSTS: dict[str, Callable[..., dict[str, Any]]] = {
    "k_embedding_forward": _number(lambda b, o, w, dtype, ids, C: b * C * (4 + SIZES[dtype])),
    "k_rmsnorm_forward": _number(lambda b, *a: b * a[-2] * 8),
    "k_add_rmsnorm_forward": _number(lambda b, *a: b * a[-2] * 16),
    "k_add_rmsnorm_narrow": _number(
        lambda b, o, to, r, x, added, w, C, eps: b * C * (14 if added else 6)
    ),
    "k_rmsnorm_backward": _number(lambda b, *a: b * a[-1] * 16),
    "k_bias": _number(lambda b, o, bias, outs, across, add: b / across * outs * 4 * (1 + add)),
    "k_convert": _number(lambda b, o, to, i, of, n, f: n * (SIZES[to] + SIZES[of])),
    "k_columns": _number(
        lambda b, o, to, i, outs, first, count, across, f: b / across * count * (4 + SIZES[to])
    ),
    "k_rope": _number(lambda b, x, t, p, N, heads, HD, stride, d, sign: N * heads * d * 8),
    "k_rope_append": _number(
        lambda b, k, v, x, t, p, s, N, NH, KVH, HD, d: N * ((NH + KVH) * d * 8 + KVH * HD * 16)
    ),
    "k_swiglu_forward": _number(lambda b, o, i, F, across: b / across * F * 12),
    "k_swiglu_backward": _number(lambda b, o, d, i, F, across: b / across * F * 20),
    "k_swiglu_narrow": _number(
        lambda b, o, to, h, of, F, across: b / across * F * (2 * SIZES[of] + 2)
    ),
    "k_swiglu_backward_narrow": _number(lambda b, h, to, d, F, f: b * F * (12 + 4)),
    "k_swiglu_backward_16": _number(
        lambda b, h, to, d, of, F, across, f: b / across * F * (8 + SIZES[of])
    ),
    "k_swiglu_largest": _number(lambda b, o, d, h, of, N, F: N * F * (4 + 2 * SIZES[of])),
    "k_gather_forward": _number(lambda b, *a: b * a[-1] * 8),
    "k_gather_backward": _number(lambda b, *a: b * a[-1] * 12),
    "k_first_nonfinite": _number(lambda b, o, x, N, C, rows: N * C * 4),
    "k_argmax": _number(lambda b, o, x, V: b * V * 4),
    "k_cross_entropy_forward": _number(lambda b, *a: b * a[-1] * 4),
    "k_cross_entropy_backward": _number(lambda b, x, s, t, V, across, f: b / across * V * 8),
    "k_sum_squares": _number(lambda b, o, x, n: 4 * n),
    "k_sum_partials": _number(lambda b, *a: 0),
    "k_largest": _number(lambda b, o, x, n: 4 * n),
    "k_factor": _number(lambda b, *a: 0),
    "k_thin_sum": _number(lambda b, o, p, n, parts, s: 4 * n * (parts + 2)),
    "k_adamw": lambda words, blocks, batch: {"bytes": 28 * float(words[4])},
    "k_dropout": _dropout,
    "k_widen": lambda words, blocks, batch: {"bytes": _widened(words)},
    "memset": lambda words, blocks, batch: {"bytes": blocks},
    "k_rope_narrow": _number(
        lambda b, x, to, t, p, N, heads, HD, stride, d, sign: N * heads * d * 2 * SIZES[to]
    ),
    "k_turn": _turn,
    "k_in": partial(_thin, "k_thin_in"),
    "k_thin_out": partial(_thin, "k_thin_out"),
    "k_thin_gradient": partial(_thin, "k_thin_gradient"),
    "k_adapter": _adapter_b,
    "k_norm": _adapter_a,
    "k_few": _few,
    "k_gated": _few,
    "k_normed": _normed,
    "k_turned": _turned,
    "narrow": _narrow,
    "k_pairs": _pairs,
    "k_forward": _tiles,
    "k_attention_decode_join": _join,
    "k_attention_sum": _sums,
    "kernel": _by_variable,
}


def _widened(words: Words) -> float:
    _, _, dtype, _, cols, _, scale_cols = _structure(words[2], "PPiiiii", 0)
    rows = float(words[4])
    return rows * (cols * (SIZES[int(words[1])] + SIZES[dtype]) + 2 * scale_cols)


def launch_of(line: str, batch: Batch) -> Launch:
    """What a line of the emulator costs; KeyError where no cost is known of a kernel."""
    name, *words = line.split()
    if name == "gemm":
        m, n, k, operand, out, added = map(int, words)
        nbytes = (m * k + n * k) * operand + m * n * out * (1 + added)
        return Launch("cuBLAS", 0, nbytes, 2.0 * m * n * k)
    blocks, arguments = int(words[0]), words[2:]
    if name not in COSTS:
        raise KeyError(f"{name}: benchmarks/gpu_model.py does not say what it costs")
    return Launch(**({"name": name, "blocks": blocks} | COSTS[name](arguments, blocks, batch)))


# ---- the library at the model's shapes


TRACED = """
import ctypes, json, sys
import numpy as np
runtime = ctypes.CDLL(sys.argv[2])
runtime.emu_log.restype = ctypes.c_char_p
runtime.emu_mode(1, 0, 0, 0)  # kernels are counted and left out
from glmlora.model import peft
from glmlora.model.configuration import ChatGLMConfig
from glmlora.tools import plan
asked = json.loads(sys.argv[1])
config = ChatGLMConfig.from_pretrained(asked["directory"])
stored = {"bfloat16": "BF16", "float16": "F16"}[asked["type"]]
bits = asked["bits"]
model, _ = plan._build(config, stored, bits, 32 if bits == 4 else 0, "emu/" + asked["type"])
core, found = model.core, {}

def log(name=None):
    lines = runtime.emu_log(1).decode().splitlines()
    if name:
        found[name] = {"lines": lines, "live": core.counts()["peak"]}
    core.counts()

one = np.ones(1, np.int32)
for rows, context in asked["contexts"]:
    before = None if rows == 1 else before
    cache = core.cache(rows, context + 40, 0)
    log()
    for row in range(rows):
        core.extend(cache, [row], np.ones(context, np.int32), one * context)
        if rows == 1:
            log(f"prefill, {context} tokens")
    log()
    every = list(range(rows))
    core.next(cache, every, np.ones(rows, np.int32), np.ones(rows, np.int32))
    log(f"token of {rows} row{'s' * (rows > 1)} at {context}")
    before = cache  # as gpu.py, which holds the last of one row
before = cache = None
lora = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_dropout=asked.get("dropout", 0.0))
peft.get_peft_model(model, lora)
model.prepare_training()
for name, lengths in asked["steps"].items():
    lengths = np.array(lengths, np.int32)
    ends = np.cumsum(lengths)[:, None]
    rows = (ends - 1 - np.arange(asked["labels"], 0, -1)).ravel().astype(np.int32)
    ids = np.ones(int(lengths.sum()), np.int32)
    room = max(1, int(asked["memory"] - core.counts()["live"] - plan.RESERVE - (1 << 30)))
    core.reserve(len(ids), len(lengths), len(rows), True, room)
    log()
    core.backward(ids, lengths, rows, ids[rows])
    core.step(1e-4, 0.9, 0.999, 1e-8, 0.0, 1.0)
    log(f"LoRA step, {name} rows")
print(json.dumps(found))
"""


def traced(model: str, gpu: GPU, library: Path, bits: int = 0, **asked: Any) -> dict[str, Any]:
    """{item: lines of the emulator and bytes live at most} of the library with that GPU's number of
    multiprocessors and shared memory. asked: contexts [(rows, tokens)], steps {name: lengths},
    dropout (of the steps' adapters, or none)."""
    with tempfile.TemporaryDirectory() as directory:
        tiny = json.loads((ROOT / "glmlora/tiny/config.json").read_text())
        Path(directory, "config.json").write_text(json.dumps(tiny | MODELS[model]))
        words = asked | {"directory": directory, "type": gpu.type, "bits": bits}
        words |= {"memory": gpu.memory, "labels": LABELS}
        done = subprocess.run(
            [sys.executable, "-c", TRACED, json.dumps(words), library.parent / "libcuda_emu.so"],
            env=os.environ
            | {
                "GLMLORA_CUDA_LIBRARY": str(library),
                "EMU_CAPABILITY": str(gpu.capability),
                "EMU_MULTIPROCESSORS": str(gpu.multiprocessors),
                "EMU_SMEM_KB": str(gpu.shared_kb),
                "EMU_PIECE": str(1 << 24),
                "PYTHONPATH": str(ROOT),
            },
            capture_output=True,
            text=True,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{model} on {gpu.name}: {done.stderr.strip()[-400:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- what follows


@dataclass
class Cost:
    """Of one item: exact counts, and modelled seconds."""

    item: str
    launches: list[Launch]
    live: float
    gpu: GPU

    @property
    def seconds(self) -> float:
        return sum(each.seconds(self.gpu) for each in self.launches)

    @property
    def bytes(self) -> float:
        return sum(each.bytes for each in self.launches)

    @property
    def flops(self) -> float:
        return sum(each.flops for each in self.launches)

    @property
    def floor(self) -> float:
        """Seconds of the FLOPs alone, at the rate of large products."""
        return self.flops / self.gpu.products

    def counts(self) -> dict[str, float]:
        """Launches of kernels, products, blocks, waves."""
        kernels = [e for e in self.launches if e.name not in ("cuBLAS", "memset")]
        products = sum(e.name == "cuBLAS" for e in self.launches)
        waves = sum(-(-e.blocks // self.gpu.multiprocessors) for e in kernels)
        blocks = sum(e.blocks for e in kernels)
        return {"launches": len(kernels), "products": products, "blocks": blocks, "waves": waves}

    def kernels(self) -> list[tuple[str, int, float, float]]:
        """(name, launches, seconds, bytes) of each kernel, the dearest first."""
        found: dict[str, list[Launch]] = collections.defaultdict(list)
        for each in self.launches:
            found[each.name].append(each)
        rows = [
            (name, len(of), sum(e.seconds(self.gpu) for e in of), sum(e.bytes for e in of))
            for name, of in found.items()
        ]
        return sorted(rows, key=lambda row: -row[2])


def batch_of(item: str, steps: dict[str, Sequence[int]]) -> Batch:
    """The batch of an item by its name."""
    words = item.split()
    if words[0] == "token":
        return Batch([1] * int(words[2]), int(words[-1]))
    return Batch([int(words[1])]) if words[0] == "prefill," else Batch(steps[words[2]])


def costs(model: str, gpu: GPU, library: Path, bits: int = 0, **asked: Any) -> dict[str, Cost]:
    """{item: cost}; see `traced`."""
    found = {}
    for item, of in traced(model, gpu, library, bits, **asked).items():
        batch = batch_of(item, asked["steps"])
        launches = [launch_of(line, batch) for line in of["lines"]]
        found[item] = Cost(item, launches, of["live"], gpu)
    return found


def read_at_least(model: str, item: str) -> float:
    """Bytes of weights in 16 bits and keys and values in float32 that a token reads once."""
    sizes, rows, context = MODELS[model], int(item.split()[2]), int(item.split()[-1])
    heads = sizes["num_attention_heads"] + 2 * sizes["multi_query_group_num"]
    hidden, ffn, HD = sizes["hidden_size"], sizes["ffn_hidden_size"], sizes["kv_channels"]  # noqa: N806
    attended = sizes["num_attention_heads"] * HD
    linears = heads * HD * hidden + attended * hidden + 3 * hidden * ffn
    cached = 2 * sizes["multi_query_group_num"] * HD * 4
    layers = sizes["num_layers"] * (2 * linears + rows * context * cached)
    return layers + sizes["padded_vocab_size"] * hidden * 2


def share_of(model: str, cost: Cost) -> tuple[float, str]:
    """(what the goals are about, in words)."""
    if cost.item.startswith("token"):
        share = read_at_least(model, cost.item) / cost.seconds / cost.gpu.copy
        return share, f"{share:.0%} of bandwidth"
    times = cost.seconds / cost.floor
    return times, f"{times:.2f} x its FLOPs"


def verdict(item: str, value: float) -> str:
    """By the goals, which are about 16 bits, one row of tokens and even rows of a step."""
    kind = item.split()[0]
    goal = GOALS["token" if kind == "token" else "step" if kind == "LoRA" else "prefill"]
    met = value >= goal if kind == "token" else value <= goal
    return "met" if met else f"NOT MET ({goal})"


SIDES = {"chat": 0, "train": 0, "chat int8": 8, "chat int4": 4, "train int4": 4}  # bits
CONTEXTS = [(1, 1024), (1, 8192), (16, 1024)]
EVEN = {"even": [512] * 4}


def uneven() -> list[int]:
    """The lengths of gpu.py's uneven rows."""
    import gpu

    return [int(n) for n in gpu.Shapes(False).steps["uneven"]]


# Rows of gpu_h100.json from which an assumption was made.
FITTED = {("chat", "token of 1 row at 1024"), ("chat int4", "token of 1 row at 1024")}


def counted(library: Path) -> dict[str, dict[str, Cost]]:
    """{side: {item: cost}} of the rows of gpu_h100.json."""
    found = {}
    for side, bits in SIDES.items():
        chat = side.startswith("chat")
        steps = {} if chat else EVEN | {"uneven": uneven()}
        contexts = CONTEXTS if chat else []
        found[side] = costs(
            "ChatGLM2-6B", GPUS["H100"], library, bits, contexts=contexts, steps=steps
        )
    return found


def record(library: Path, file: Path) -> None:
    """Keeps what this code does, for the day on which a GPU is asked how long that takes."""
    told: dict[str, Any] = {}
    for side, of in counted(library).items():
        for item, cost in of.items():
            launches = collections.Counter(dataclasses.astuple(each) for each in cost.launches)
            rows = [[n, *fields] for fields, n in launches.items()]
            told.setdefault(side, {})[item] = {"live": cost.live, "launches": rows}
    file.write_text(json.dumps(told).replace("], [", "],\n["))


def checked() -> list[tuple[str, str, Cost, float]]:
    """(side, item, cost, measured seconds) of the rows of gpu_h100.json, of that day's code."""
    measured = json.loads((FOLDER / "gpu_h100.json").read_text())["sides"]
    found = []
    for side, of in json.loads((FOLDER / "gpu_h100_counts.json").read_text()).items():
        for item, kept in of.items():
            launches = [Launch(*fields) for n, *fields in kept["launches"] for _ in range(n)]
            cost = Cost(item, launches, kept["live"], GPUS["H100"])
            found.append((side, item, cost, measured[side]["items"][item]["seconds"]))
    return found


def show_checked(rows: list[tuple[str, str, Cost, float]]) -> None:
    print("| measured on an H100 | ms | modelled, ms | off by | GB | counted, GB |")
    print("| --- | --- | --- | --- | --- | --- |")
    measured = json.loads((FOLDER / "gpu_h100.json").read_text())["sides"]
    for side, item, cost, seconds in rows:
        peak = measured[side]["items"][item].get("peak")
        fitted = " (an assumption is from it)" if (side, item) in FITTED else ""
        memory = f"{peak / 1e9:.3f} | {cost.live / 1e9:.3f}" if peak else " | "
        print(
            f"| {side}, {item}{fitted} | {1e3 * seconds:.2f} | {1e3 * cost.seconds:.2f} "
            f"| {cost.seconds / seconds - 1:+.0%} | {memory} |"
        )


def show(model: str, gpu: GPU, found: dict[str, Cost], kernels: bool) -> None:
    for item, cost in found.items():
        value, words = share_of(model, cost)
        fits = "" if cost.live < gpu.memory else "does not fit"
        counts = cost.counts()
        cells = [model, gpu.name, item, *(f"{n:,}" for n in counts.values())]
        cells += [f"{cost.bytes / 1e9:.2f}", f"{cost.flops / 1e12:.2f}", f"{cost.live / 1e9:.1f}"]
        cells += [f"{1e3 * cost.seconds:.2f}", words, fits or verdict(item, value)]
        print(f"| {' | '.join(cells)} |")
        for name, n, seconds, nbytes in cost.kernels() if kernels else ():
            print(f"    {name}: {n}, {1e3 * seconds:.3f} ms, {nbytes / 1e9:.3f} GB")


def library() -> Path:
    """The emulated library, built where it is not there yet."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "cuda/build.py"), "emu"], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-1000:])
    return Path(done.stdout.split()[-1])


def main() -> None:
    """The check, the assumptions, the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", nargs="*", default=list(GPUS), choices=list(GPUS))
    parser.add_argument("--model", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--kernels", action="store_true", help="a line a kernel, too")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="of the adapters")
    parser.add_argument("--record", metavar="FILE", help="only counts, as gpu_h100_counts.json has")
    args = parser.parse_args()
    emulated = library()
    if args.record:
        record(emulated, Path(args.record))
        return
    print("A MODEL: no GPU was asked. Assumptions:\n")
    for name, (value, unit, why) in ASSUMED.items():
        print(f"  {name}: {value:g} {unit}: {why}")
    for gpu in GPUS.values():
        print(
            f"  {gpu.name}: {gpu.bandwidth / 1e12:g} TB/s, {gpu.flops / 1e12:g} TFLOP/s, "
            f"{gpu.multiprocessors} multiprocessors, {gpu.memory / 1e9:g} GB, {gpu.type}: "
            "NVIDIA's data sheet"
        )
    print()
    show_checked(checked())
    print("\n| model | GPU | | launches | cuBLAS | blocks | waves | GB moved | TFLOP | GB live "
          "| ms, a model | of what the card does | goal |")  # fmt: skip
    print("| --- " * 13 + "|")
    for model in args.model:
        for name in args.gpu:
            asked: dict[str, Any] = {"contexts": [(1, 1024), (1, 8192)], "steps": EVEN}
            asked["dropout"] = args.dropout
            found = costs(model, GPUS[name], emulated, **asked)
            show(model, GPUS[name], found, args.kernels)


if __name__ == "__main__":
    main()
