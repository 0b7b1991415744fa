"""What a run would take: bytes by lifetime and products, counted on the real code, before any of
it is allocated.

The model is built on the core's backend "plan", which hands out address space that nobody fills and
counts what is asked of it; weights are zeros that are never touched, so a 6B model plans in a
second.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import _core, methods
from .arguments import FinetuningArguments
from .configuration import ChatGLMConfig, model_directory
from .generation import CHUNK
from .modeling import ChatGLMForConditionalGeneration, parse_dtype
from .quantization import GROUP_SIZE, QuantizedTensor, check_form
from .tensor import Tensor

METHODS = (*methods.METHODS, "chat")
_THREAD_SCRATCH = 1 << 20  # GLM_SCRATCH in csrc/cpu/pool.h


class _PlanModel(ChatGLMForConditionalGeneration):
    backend = "plan"


@dataclass
class Plan:
    """Bytes of a run by lifetime.

    mapped: weights read from their files, whose pages the system may drop; process: the interpreter
    and its libraries; weights: in memory (quantized ones, norms and biases); trained: parameters,
    gradients and two moments; activations: of the largest step, `kept_layers` of `layers` kept and
    the others computed twice; cache: keys and values of a chat; scratch: of the threads. flops: of
    the products and the attention of one step (of what a chat feeds at a time).
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

    @property
    def total(self) -> int:
        """Bytes that must be there at once, mapped files apart."""
        parts = (self.process, self.weights, self.trained, self.activations, self.cache)
        return sum(parts) + self.scratch

    def __str__(self) -> str:
        lines = [
            (self.mapped, "weights, mapped from their files (the system may drop these pages)"),
            (self.process, "interpreter and libraries"),
            (self.weights, "weights in memory"),
            (self.trained, f"{self.n_trained:,} trained parameters, gradients, two moments"),
            (self.activations, self._activations()),
            (self.cache, "keys and values"),
            (self.scratch, "scratch of the threads"),
            (self.total, "in memory at once, beside the mapped files"),
        ]
        text = [f"{_size(n):>10}  {what}" for n, what in lines if n]
        what = f"{self.tokens:,} tokens" if self.method == "chat" else "a step"
        text.append(f"{self.flops / 1e12:>6.2f} TFLOP  in the products of {what}")
        return "\n".join(text)

    def _activations(self) -> str:
        if self.method == "chat":
            return f"activations of {self.tokens:,} tokens at once"
        twice = self.layers - self.kept_layers
        recomputed = f", {twice} of {self.layers} layers computed twice" if twice else ""
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
    **finetuning: Any,
) -> Plan:
    """Plan a training step of `batch` rows of `seq` tokens, or (method "chat") a cache of `batch`
    rows that hold `seq` tokens.

    model: a directory with config.json; no weights are read. labels: labelled tokens of a row.
    quantization_bit: 4 or 8, as in training. dtype: the float weights are stored in, default
    config.json's torch_dtype. budget: bytes of activations beyond which layers are computed twice;
    None: what training would take of the memory that is free now, or 1 GiB with
    `gradient_checkpointing`. finetuning: lora_rank, lora_target, pre_seq_len and other arguments of
    `train`.
    Raises OSError for a directory that is not there, ValueError naming an argument.
    """
    for name, value in (("batch", batch), ("seq", seq), ("labels", labels)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value!r}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    config = ChatGLMConfig.from_pretrained(model_directory(model))
    if seq > config.seq_length:
        raise ValueError(f"seq: the model has {config.seq_length} positions, got {seq}")
    stored = config.quantization_bit
    bits, group = check_form(quantization_bit or stored, config.quantization_group_size)
    if bits == 4 and not stored and method == "lora":
        group = GROUP_SIZE
    planned, quantized = _build(config, dtype, bits, group)
    result = Plan(method, batch * seq, layers=config.num_layers, process=_process())
    result.scratch = _core.get_num_threads() * _THREAD_SCRATCH
    result.weights = 0 if stored else quantized
    if method == "chat":
        _chat(result, planned, batch, seq)
    else:
        arguments = FinetuningArguments(finetuning_type=method, **finetuning)
        trainee = methods.prepare(planned, None, arguments, method, seed=0)
        trainee.base.prepare_training()
        if budget is None:
            trained = trainee.base.core.plan(1, 1, 1, True)["trainable"]
            taken = -(result.weights + trained)  # by then
            budget = trainee.base.activation_budget(gradient_checkpointing, taken)
        _train(result, trainee, batch, seq, min(labels, seq - 1), budget)
    sizes = planned.core.plan(1, 1, 1, False)
    result.mapped = sizes["weights"] - result.weights
    result.weights += sizes["owned"]
    return result


def _build(
    config: ChatGLMConfig, dtype: str | None, bits: int, group: int
) -> tuple[_PlanModel, int]:
    """The model with weights of zeros that nobody touches, and the bytes of its quantized ones."""
    kind = parse_dtype(dtype or config.get("torch_dtype") or "float16") or "F16"
    form = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[kind]
    config.quantization_bit, config.pre_seq_len = 0, None
    shapes = _core.Model(config.arch(), "plan").shapes()
    model = _PlanModel(config, {n: Tensor(np.zeros(s, form), kind) for n, s in shapes.items()})
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


def _chat(result: Plan, model: _PlanModel, rows: int, tokens: int) -> None:
    cache = model.core.cache(rows, tokens, 0)
    result.cache = cache.nbytes
    step = min(rows * tokens, CHUNK)  # what is fed at a time, rows together
    lengths = [min(tokens, step - start) for start in range(0, step, tokens)]
    ids = np.zeros(step, np.int32)
    before = model.core.counts()["live"]
    model.core.extend(cache, list(range(len(lengths))), ids, np.array(lengths, np.int32))
    counted = model.core.counts()
    result.tokens = step
    result.activations = counted["peak"] - before
    result.flops, result.calls = counted["flops"], counted["calls"]


def _train(
    result: Plan, trainee: methods.Trainee, batch: int, seq: int, labels: int, budget: int
) -> None:
    core, tokens = trainee.base.core, batch * seq
    sizes = core.plan(tokens, batch, batch * labels, True, budget)
    result.trained, result.kept_layers = sizes["trainable"], sizes["kept_layers"]
    result.n_trained = trainee.base.num_parameters(only_trainable=True)
    result.activations = sizes["activations"]
    core.reserve(tokens, batch, batch * labels, True, budget)
    core.counts()
    last = np.arange(1, batch + 1)[:, None] * seq - 1  # of each row: it predicts nothing
    rows = (last - np.arange(labels, 0, -1)).ravel()
    core.backward(
        np.zeros(tokens, np.int32),
        np.full(batch, seq, np.int32),
        rows=rows.astype(np.int32),
        targets=np.zeros(len(rows), np.int32),
    )
    counted = core.counts()
    result.flops, result.calls = counted["flops"], counted["calls"]


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
