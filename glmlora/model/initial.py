"""What a LoRA adapter has and begins with, and what PiSSA and OLoRA take out of the base for it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .. import _core
from ..files.tensor import Tensor
from .adapter_config import INITIALISATIONS, MUTATING, LoraConfig
from .modeling import ChatGLMForConditionalGeneration
from .parameters import weight_of
from .quantization import QuantizedTensor

# How the names of a module's tensors end, in the order of _core.Model.add_lora.
MAGNITUDE = "lora_magnitude_vector"
PARTS = ("lora_A.weight", "lora_B.weight", "lora_B.bias", MAGNITUDE)


def parts_of(config: LoraConfig) -> list[str]:
    """Those of PARTS that such an adapter has."""
    there = (True, True, config.lora_bias, config.use_dora)
    return [part for part, has in zip(PARTS, there, strict=True) if has]


def fresh_tensors(
    model: ChatGLMForConditionalGeneration,
    config: LoraConfig,
    targets: Mapping[str, tuple[int, float]],
    rng: np.random.Generator,
) -> tuple[dict[str, np.ndarray], dict[str, Tensor]]:
    """The tensors of a fresh adapter by their names, float32, and the base weights that are other
    ones beneath it. ValueError for a way that this release does not have.
    """
    how = config.init_lora_weights
    takes = mutates(config)
    if how not in INITIALISATIONS and not takes:
        raise ValueError(
            f"init_lora_weights {how!r} is not supported by this release for fresh adapters, only "
            "true, false, 'gaussian', 'pissa', 'pissa_niter_<n>' and 'olora'"
        )
    tensors: dict[str, np.ndarray] = {}
    beneath: dict[str, Tensor] = {}
    for module, (rank, scale) in targets.items():
        name = weight_of(model.config, module)
        out, width = model.core.shape(name)
        if takes:
            A, B = _taken(model, name, config, rank, scale, rng)
            beneath[name] = without(model, name, A, B, scale)
        else:
            if how == "gaussian":
                A = rng.standard_normal((rank, width)) / rank
            else:
                A = rng.uniform(-(width**-0.5), width**-0.5, (rank, width))
            B = np.zeros((out, rank))
            if how is False:
                B = rng.uniform(-(rank**-0.5), rank**-0.5, (out, rank))
        A, B = (np.ascontiguousarray(a, np.float32) for a in (A, B))
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = A, B
        if config.lora_bias:
            bound = rank**-0.5 if how is False else 0.0  # as torch begins a linear with r inputs
            tensors[f"{module}.lora_B.bias"] = rng.uniform(-bound, bound, out).astype(np.float32)
        if config.use_dora:
            weight = beneath[name].numpy() if takes else model.read_weight(name)
            with np.errstate(over="ignore", invalid="ignore"):  # a plan reads what is not there
                whole = weight.astype(np.float32) + np.float32(scale) * (B @ A)
                tensors[f"{module}.{MAGNITUDE}"] = row_norms(whole)
    return tensors, beneath


def row_norms(weight: np.ndarray) -> np.ndarray:
    """Of W + scale B A (out, in), float32 (out,): what DoRA's magnitudes begin with."""
    return np.linalg.norm(weight, axis=1).astype(np.float32)


def mutates(config: LoraConfig) -> bool:
    """Whether the base is without what the adapter began with."""
    return MUTATING.fullmatch(str(config.init_lora_weights).lower()) is not None


def beneath_adapter(
    model: ChatGLMForConditionalGeneration,
    config: LoraConfig,
    targets: Mapping[str, tuple[int, float]],
    rng: np.random.Generator,
) -> dict[str, Tensor]:
    """The base weights beneath an adapter of PiSSA or OLoRA that was not converted: found anew from
    the base, as PEFT does.
    """
    found = {}
    for module, (rank, scale) in targets.items():
        name = weight_of(model.config, module)
        found[name] = without(model, name, *_taken(model, name, config, rank, scale, rng), scale)
    return found


def _taken(
    model: ChatGLMForConditionalGeneration,
    name: str,
    config: LoraConfig,
    rank: int,
    scale: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """A and B, of which scale B A is taken out of a weight. PiSSA, Meng et al. 2024, eq. 2 to 4;
    OLoRA, Buyukakyuz 2024, alg. 1.
    """
    if isinstance(model._tensor(name), QuantizedTensor):
        raise ValueError(
            f"init_lora_weights {config.init_lora_weights!r}: {name} is quantized, and such an "
            "adapter begins with a part of the float weight; convert it to plain LoRA "
            "(path_initial_model_for_weight_conversion) over a float base"
        )
    weight = model.read_weight(name).astype(np.float32)
    if rank > min(weight.shape):
        raise ValueError(f"r: {name}: expected at most {min(weight.shape)}, got {rank}")
    found = MUTATING.fullmatch(str(config.init_lora_weights).lower())
    rounds = found[2] if found else None
    if str(config.init_lora_weights).lower() == "olora":
        Q, R = np.linalg.qr(weight)
        return R[:rank], Q[:, :rank]
    if rounds is None:
        U, S, V = np.linalg.svd(weight, full_matrices=False)
    else:
        U, S, V = _low_rank(weight, rank, int(rounds), rng)
    root = np.sqrt(S[:rank] / np.float32(scale))
    return root[:, None] * V[:rank], U[:, :rank] * root


def _low_rank(
    weight: np.ndarray, rank: int, rounds: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest singular values nearly: Halko et al. 2011, alg. 4.4 and 5.1."""
    draw = rng.standard_normal((weight.shape[1], rank)).astype(np.float32)
    Q = np.linalg.qr(weight @ draw)[0]
    for _ in range(rounds):
        Q = np.linalg.qr(weight @ np.linalg.qr(weight.T @ Q)[0])[0]
    U, S, V = np.linalg.svd(Q.T @ weight, full_matrices=False)
    return Q @ U, S, V


def without(
    model: ChatGLMForConditionalGeneration,
    name: str,
    A: np.ndarray,  # noqa: N803
    B: np.ndarray,  # noqa: N803
    scale: float,
) -> Tensor:
    """A weight less scale B A, in the type that it is stored in."""
    rest = model.read_weight(name).astype(np.float32) - np.float32(scale) * (B @ A)
    dtype = model.stored_dtype(name)
    if dtype == "F32":
        return Tensor(np.ascontiguousarray(rest, np.float32))
    return Tensor(_core.convert(np.ascontiguousarray(rest, np.float32), "F32", dtype), dtype)
