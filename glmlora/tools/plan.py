"""What a run would take: bytes by lifetime and products, counted on the real code, before any of
it is allocated.

The model is built on the core's backend "plan", which hands out address space that nobody fills and
counts what is asked of it; weights are zeros that are never touched, so a 6B model plans in a
second.

For a GPU the backend "plan:cuda.." counts as the CUDA library does: launches, products, waits and
transfers beside the bytes. All of them are counts; how long they take is not among them.
"""

from __future__ import annotations

import copy
import gc
import os
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import _core, families
from ..files.hub import model_directory
from ..files.tensor import Tensor
from ..generation.cache import CHUNK
from ..model.configuration import ChatGLMConfig
from ..model.device import compute_dtype
from ..model.modeling import ChatGLMForConditionalGeneration
from ..model.parameters import parse_dtype
from ..model.quantization import GROUP_SIZE, QuantizedTensor, check_form, is_quantized
from ..training import methods
from ..training.arguments import FinetuningArguments

METHODS = (*methods.METHODS, "chat")
RESERVE = 3 << 28  # 0.75 GiB of a GPU for its context and for what cuBLAS keeps: an estimate
_THREAD_SCRATCH = 2 << 20  # GLM_SCRATCH in csrc/cpu/pool.h, on a huge page
_counting = threading.Lock()  # the backend that counts is one for the process
_PACKED = 32 << 20  # PACKED in csrc/cpu/kernels.h: operands of products, touched where it is used


class _PlanModel(ChatGLMForConditionalGeneration):
    backend = "plan"


@dataclass
class Work:
    """What a call of a model has the GPU do: kernels launched, products (cuBLAS), recorded
    sequences launched (graphs), times that the host waits (syncs), transfers and their bytes.
    """

    launches: int = 0
    products: int = 0
    graphs: int = 0
    syncs: int = 0
    uploads: int = 0
    uploaded: int = 0
    downloads: int = 0
    downloaded: int = 0

    @classmethod
    def of(cls, counted: dict[str, Any]) -> Work:
        """The part of `core.counts()` that is of a call."""
        return cls(**{name: counted[name] for name in cls.__dataclass_fields__})

    def __str__(self) -> str:
        parts = [f"{self.launches} launches", f"{self.products} products", f"{self.graphs} graphs"]
        up = f"{self.uploaded:,} bytes up in {self.uploads} copies"
        return ", ".join([*parts, f"{self.syncs} waits", up, f"{self.downloaded:,} back"])


@dataclass
class Plan:
    """Bytes of a run by lifetime.

    mapped: weights read from their files, whose pages the system may drop; process: the interpreter
    and its libraries; weights: in memory (quantized ones, norms and biases); trained: parameters,
    gradients and two moments; activations: of the largest step, `kept_layers` of `layers` kept and
    the others recomputed; cache: keys and values of a chat; scratch: of the threads, or of a
    GPU's products; library: what a GPU needs for any model. flops: of the products and the
    attention of one step (of what a chat feeds at a time). work: what a GPU does in a step, or for
    a token.
    """

    method: str
    tokens: int
    mapped: int = 0
    process: int = 0
    weights: int = 0
    trained: int = 0
    activations: int = 0
    cache: int = 0
    scratch: int = 0
    kept_layers: int = 0
    layers: int = 0
    flops: float = 0.0
    n_trained: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    device: str = "cpu"
    library: int = 0
    work: dict[str, Work] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes that must be there at once, mapped files apart."""
        parts = (self.process, self.weights, self.trained, self.activations, self.cache)
        return sum(parts) + self.scratch + self.library

    def __str__(self) -> str:
        lines = [
            (self.mapped, "weights, mapped from their files (the system may drop these pages)"),
            (self.process, "interpreter and libraries"),
            (self.weights, "weights in memory"),
            (self.trained, f"{self.n_trained:,} trained parameters, gradients, two moments"),
            (self.activations, self._activations()),
            (self.cache, "keys and values"),
        ]
        if self.device == "cpu":
            lines.append((self.scratch, "operands of products"))
            lines.append((self.total, "in memory at once, beside the mapped files"))
        else:
            lines.append((self.scratch, "converted operands of products"))
            lines.append((self.library, "rotary table, workspace of cuBLAS"))
            lines.append((self.total, "on the GPU at once, and beside it"))
            lines.append((RESERVE, "for its context and what cuBLAS keeps: an estimate"))
        text = [f"{_size(n):>10}  {what}" for n, what in lines if n]
        what = f"{self.tokens:,} tokens" if self.method == "chat" else "a step"
        text.append(f"{self.flops / 1e12:>6.2f} TFLOP  in the products of {what}")
        text += [f"{name}: {work}" for name, work in self.work.items()]
        return "\n".join(text)

    def _activations(self) -> str:
        if self.method == "chat":
            return f"activations of {self.tokens:,} tokens at once"
        twice = self.layers - self.kept_layers
        recomputed = f", {twice} of {self.layers} layers recomputed" if twice else ""
        return f"activations of {self.tokens:,} tokens{recomputed}"


def plan(
    model: str | os.PathLike,
    batch: int = 1,
    seq: int = 512,
    method: str = "lora",
    labels: int = 3,
    quantization_bit: int | None = None,
    dtype: str | None = None,
    budget: int | None = None,
    gradient_checkpointing: bool = False,
    device: str = "cpu",
    memory: int | str | None = None,
    **finetuning: Any,
) -> Plan:
    """Plan a training step of `batch` rows of `seq` tokens, or (method "chat") a cache of `batch`
    rows that hold `seq` tokens.

    model: a directory with config.json; no weights are read. labels: labelled tokens of a row.
    quantization_bit: 4 or 8, as in training. dtype: the float weights are stored in, default
    config.json's torch_dtype. budget: bytes of activations beyond which layers are recomputed;
    None: what training would take of the memory that is free now, or 1 GiB with
    `gradient_checkpointing` and for a GPU. device: "cpu" or "cuda", whose products are in `dtype`.
    memory: what the GPU has, bytes or "16GB"; RESERVE of it is left alone, what is not needed
    otherwise is the budget. finetuning: lora_rank, lora_target, pre_seq_len and other arguments of
    `train`. Raises OSError for a directory that is not there, ValueError naming an argument,
    MemoryError for what does not fit into `memory`.
    """
    for name, value in (("batch", batch), ("seq", seq), ("labels", labels)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value!r}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device!r}")
    if memory is not None and device == "cpu":
        raise ValueError("memory: what a GPU has; say device cuda, too")
    config = ChatGLMConfig.from_pretrained(model_directory(model))
    if seq > config.seq_length:
        raise ValueError(f"seq: the model has {config.seq_length} positions, got {seq}")
    stored = config.quantization_bit
    if quantization_bit:
        is_quantized(config, quantization_bit)
    bits, group = check_form(quantization_bit or stored, config.quantization_group_size)
    if bits == 4 and not stored and method == "lora":
        group = GROUP_SIZE
    kind = parse_dtype(dtype or config.get("torch_dtype") or "float16") or "F16"
    backend = f"plan:cuda/{_COMPUTE[kind]}"
    if device == "cpu":
        products = compute_dtype(None, [f"I{bits}" if bits else kind])
        backend = "plan" if products == "float32" else f"plan/{products}"

    def planned(limit: int | None) -> Plan:
        gc.collect()  # a model planned before is gone, and the backend's scratch with it
        model, quantized = _build(config, kind, bits, group, backend)
        result = Plan(method, batch * seq, layers=config.num_layers, device=device)
        before = model.core.counts()["live"]
        if method == "chat":
            _chat(result, model, batch, seq)
        else:
            arguments = FinetuningArguments(finetuning_type=method, **finetuning)
            trainee = methods.prepare(model, None, arguments, method, seed=0)
            trainee.base.prepare_training()
            if limit is None:
                checkpointing = gradient_checkpointing or device != "cpu"
                taken = trainee.base.core.plan(1, 1, 1, True)["trainable"]
                taken += 0 if stored else quantized
                limit = trainee.base.activation_budget(checkpointing, -taken)
            _train(result, trainee, batch, seq, min(labels, seq - 1), limit)
        sizes = model.core.plan(1, 1, 1, False)
        result.weights = sizes["weights"] + sizes["owned"]
        if device == "cpu":
            result.process = _process()
            form = compute_dtype(None, [f"I{bits}" if bits else kind])
            columns = max(max(shape) for shape in model._linear_shapes().values())
            widest = result.tokens * columns * (4 if form in ("float32", "int16") else 2)
            result.scratch = _core.get_num_threads() * _THREAD_SCRATCH + min(_PACKED, widest)
            result.mapped = sizes["weights"] - (0 if stored else quantized)
            result.weights -= result.mapped
        else:
            result.library = before - result.weights
        return result

    with _counting:
        if memory is None:
            return planned(budget)
        room, least = parse_bytes(memory) - RESERVE, planned(1)
        if least.total <= room:
            return planned(least.activations + room - least.total)
    raise MemoryError(
        f"memory: {least.total:,} bytes are needed on the GPU, and {max(0, room):,} are there "
        f"beside {RESERVE:,} for its context; take {_SMALLER[method]}"
    )


def products_per_second(
    model: str | os.PathLike, method: str = "chat", seconds: float = 0.5
) -> float:
    """Floating-point operations a second of this machine's CPU at the model's shapes, as `plan`
    counts them, over a prompt (method "chat") or in a training step: one layer with made-up
    weights, timed for about `seconds` beside whatever else runs. Errors as in `plan`.
    """
    config = copy.copy(ChatGLMConfig.from_pretrained(model_directory(model)))
    tokens = min(256, config.seq_length)
    flops = plan(model, 1, tokens, method, labels=1).flops / config.num_layers
    config.num_layers = 1
    families.of(config.family).cut_vocabulary(config, min(256, config.padded_vocab_size))
    kind = parse_dtype(config.get("torch_dtype") or "float16") or "F16"
    products = compute_dtype(None, [kind])
    backend = "cpu" if products == "float32" else f"cpu/{products}"
    built, _ = _build(config, kind, 0, 0, backend, filled=True)
    lengths = np.array([tokens], np.int32)
    ids = _made_up(config, lengths)
    if method == "chat":
        cache = built.core.cache(1, tokens, 0)

        def once() -> None:
            cache.rewind(0, 0)
            built.core.extend(cache, [0], ids, lengths)
    else:
        arguments = FinetuningArguments(finetuning_type=method)
        trainee = methods.prepare(built, None, arguments, method, seed=0)
        trainee.base.prepare_training()
        rows, targets = np.array([tokens - 2], np.int32), np.zeros(1, np.int32)

        def once() -> None:
            trainee.base.core.backward(ids, lengths, rows=rows, targets=targets)

    times = []
    while len(times) < 3 or times[-1] - times[0] < seconds:
        once()  # the first touches its memory for the first time
        times.append(time.perf_counter())
    return flops * (len(times) - 1) / (times[-1] - times[0])


_COMPUTE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SMALLER = {
    "lora": "quantization_bit 8 or 4, or fewer or shorter rows",
    "p_tuning": "quantization_bit 8 or 4, or fewer or shorter rows",
    "freeze": "method lora, fewer num_layer_trainable, or fewer or shorter rows",
    "full": "method lora, or fewer or shorter rows",
    "chat": "quantization_bit 8 or 4, or fewer or shorter rows",
}


def parse_bytes(value: int | str) -> int:
    """A number of bytes: itself, "16GB" (16e9) or "15.5GiB". ValueError for anything else."""
    units = {"": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)", str(value).strip())
    if not found or found.group(2).upper() not in units:
        raise ValueError(f"memory: expected bytes, or e.g. 16GB or 15.5GiB, got {value!r}")
    return int(float(found.group(1)) * units[found.group(2).upper()])


def _build(
    config: ChatGLMConfig, kind: str, bits: int, group: int, backend: str, filled: bool = False
) -> tuple[_PlanModel, int]:
    """The model with weights of zeros that nobody touches, and the bytes of its quantized ones.
    filled: with weights of a small number in memory of their own, to compute with.
    """
    form = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[kind]
    config = copy.copy(config)
    config.quantization_bit = config.quantization_group_size = 0
    config.pre_seq_len = None
    shapes = _core.Model(config.arch(), backend, names=config.tensor_names).shapes()
    on_backend = type("_PlanModel", (_PlanModel,), {"backend": backend})
    made = {n: np.zeros(s, form) for n, s in shapes.items()}
    for array in made.values() if filled else ():
        array.view(f"u{array.itemsize}").fill({"F32": 0x3C000000, "F16": 0x2000}.get(kind, 0x3C00))
    model = on_backend(config, {n: Tensor(array, kind) for n, array in made.items()})
    nbytes = 0
    for name, (rows, columns) in model._linear_shapes().items() if bits else ():
        scales = (rows, -(-columns // group)) if group else (rows,)
        quantized = QuantizedTensor(
            Tensor(np.zeros((rows, columns * bits // 8), np.int8)),
            Tensor(np.zeros(scales, np.float16)),
            bits,
            group,
        )
        model._bind(name, quantized)
        nbytes += quantized.nbytes
    return model, nbytes


def _made_up(
    config: ChatGLMConfig, lengths: Sequence[int] | np.ndarray, answer: int = 3
) -> np.ndarray:
    """Ids int32 of rows: zeros, and where a model reads a prompt in both directions what ends one,
    before the last `answer` ids.
    """
    ids, context = np.zeros(sum(lengths), np.int32), config.context
    if context is not None:
        for end, length in zip(np.cumsum(lengths), lengths, strict=True):
            at = end - length + max(1, length - answer - 1)
            ids[at - 1 : min(at + 1, end)] = [context.gmask, context.sop][: min(2, length)]
    return ids


def _chat(result: Plan, model: _PlanModel, rows: int, tokens: int) -> None:
    core = model.core
    cache = core.cache(rows, tokens, 0)
    result.cache = cache.nbytes
    chunk = CHUNK if model.config.context is None else max(CHUNK, tokens)
    step = min(rows * tokens, chunk)  # what is fed at a time, rows together
    lengths = [min(tokens, step - start) for start in range(0, step, tokens)]
    ids = _made_up(model.config, lengths)
    before = core.counts()["live"]
    core.extend(cache, list(range(len(lengths))), ids, np.array(lengths, np.int32))
    counted = core.counts()
    result.tokens = step
    result.activations = counted["peak"] - before - counted["scratch"]
    result.flops, result.calls = counted["flops"], counted["calls"]
    if result.device == "cpu":
        return
    result.scratch = counted["scratch"]
    cache.rewind(0, min(lengths[0], tokens - 3))
    for name in ("a token", "", "a token, recorded"):  # it is recorded the second time
        core.next(cache, [0], ids[:1], np.ones(1, np.int32))
        work = Work.of(core.counts())
        if name:
            result.work[name] = work


def _train(
    result: Plan, trainee: methods.Trainee, batch: int, seq: int, labels: int, budget: int
) -> None:
    core, tokens = trainee.base.core, batch * seq
    sizes = core.plan(tokens, batch, batch * labels, True, budget)
    result.trained, result.kept_layers = sizes["trainable"], sizes["kept_layers"]
    result.n_trained = trainee.base.num_parameters(only_trainable=True)
    result.activations = sizes["activations"]
    before = core.counts()["live"]
    core.reserve(tokens, batch, batch * labels, True, budget)
    if result.device != "cpu":
        result.activations = core.counts()["live"] - before
    last = np.arange(1, batch + 1)[:, None] * seq - 1  # of each row: it predicts nothing
    rows = (last - np.arange(labels, 0, -1)).ravel()
    for _ in range(1 if result.device == "cpu" else 2):  # the first step also takes scratch
        core.counts()
        core.backward(
            _made_up(trainee.base.config, [seq] * batch, labels),
            np.full(batch, seq, np.int32),
            rows=rows.astype(np.int32),
            targets=np.zeros(len(rows), np.int32),
        )
        if result.device != "cpu":
            core.step(1e-4, 0.9, 0.999, 1e-8, 0.0, 1.0)
        counted = core.counts()
    result.flops, result.calls = counted["flops"], counted["calls"]
    if result.device != "cpu":
        result.scratch = counted["scratch"]
        result.work["a step"] = Work.of(counted)


def _process() -> int:
    """Anonymous memory of this process in bytes; 0 where the system does not say."""
    try:
        with open("/proc/self/status") as f:
            found = re.search(r"RssAnon:\s+(\d+) kB", f.read())
    except OSError:
        return 0
    return int(found.group(1)) * 1024 if found else 0


def _size(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"
