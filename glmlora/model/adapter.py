"""LoRA adapters apart from a model: their tensors, and the directories that hold them.

A directory has `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..files.checkpoint import read_weights, write_json, write_safetensors, write_torch
from ..files.tensor import Tensor
from ..seeds import generator
from .adapter_config import ALL_LINEAR, CONFIG, INITIALISATIONS, LoraConfig
from .adapter_config import PrefixTuningConfig as PrefixTuningConfig
from .adapter_config import TaskType as TaskType
from .modeling import ChatGLMForConditionalGeneration
from .parameters import PEFT_PREFIX

SAFETENSORS = "adapter_model.safetensors"
TORCH = "adapter_model.bin"
# Parts of names that torch.compile, DataParallel, FSDP and activation checkpointing put in.
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_ADAPTER_NAME = re.compile(r"(\.lora_[AB])\.[^.]+\.weight$")
_SHOWN = 6  # names in a message


class Adapter:
    """One LoRA adapter: its config and, while it is not the active one, its tensors.

    tensors  {module: (A (r, in), B (out, r))} float32
    """

    def __init__(
        self,
        config: LoraConfig,
        targets: dict[str, tuple[int, float]],
        tensors: dict[str, tuple[np.ndarray, np.ndarray]],
    ):
        self.config = config
        self.targets = targets
        self.tensors = tensors

    def names(self) -> list[str]:
        """The core's names of its tensors, A before B, in the order of the modules."""
        return [f"{m}.lora_{part}.weight" for m in self.targets for part in "AB"]


def fresh_adapter(
    model: ChatGLMForConditionalGeneration, config: LoraConfig, seed: int | None
) -> Adapter:
    if config.init_lora_weights not in INITIALISATIONS:
        raise ValueError(
            f"init_lora_weights {config.init_lora_weights!r} is not supported by this release for "
            "fresh adapters, only true, false and 'gaussian'"
        )
    targets = config.targets(model)
    rng = generator(seed)
    tensors = {}
    for module, (rank, _) in targets.items():
        out, width = model.core.shape(module + ".weight")
        if config.init_lora_weights == "gaussian":
            A = rng.standard_normal((rank, width)) / rank
        else:
            A = rng.uniform(-(width**-0.5), width**-0.5, (rank, width))
        B = np.zeros((out, rank))
        if config.init_lora_weights is False:
            B = rng.uniform(-(rank**-0.5), rank**-0.5, (out, rank))
        tensors[module] = (A.astype(np.float32), B.astype(np.float32))
    return Adapter(config, targets, tensors)


# Adapter files


def read_adapter(
    model: ChatGLMForConditionalGeneration, directory: Path, config: LoraConfig
) -> Adapter:
    files = [directory / name for name in (SAFETENSORS, TORCH) if (directory / name).is_file()]
    if not files:
        raise ValueError(f"{directory}: found neither {SAFETENSORS} nor {TORCH}")
    try:
        targets = config.targets(model)
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from None
    adapter = Adapter(config, targets, {})
    stored = _by_plain_names(files[0], read_weights(files[0]))
    expected = {}
    for module, (rank, _) in targets.items():
        out, width = model.core.shape(module + ".weight")
        expected[f"{PEFT_PREFIX}{module}.lora_A.weight"] = (rank, width)
        expected[f"{PEFT_PREFIX}{module}.lora_B.weight"] = (out, rank)
    missing = [n for n in expected if n not in stored]
    surplus = [n for n in stored if n not in expected]
    wrong = [
        f"{n}: the model and {CONFIG} need {shape}, the file has {stored[n].shape}"
        for n, shape in expected.items()
        if n in stored and stored[n].shape != shape
    ]
    if missing or surplus or wrong:
        faults = [f"missing {_listed(missing)}"] * bool(missing)
        faults += [f"not expected {_listed(surplus)}"] * bool(surplus)
        faults += [_listed(wrong, "; ")] * bool(wrong)
        raise ValueError(f"{files[0]}: does not fit this model: {'; '.join(faults)}")
    arrays = {}
    for name in expected:
        array = stored[name].numpy()
        if array.dtype.kind != "f":
            raise ValueError(
                f"{files[0]}: {name}: expected floating point numbers, got {array.dtype}"
            )
        if not np.isfinite(array).all():
            raise ValueError(f"{files[0]}: {name}: holds values that are not finite")
        arrays[name] = np.ascontiguousarray(array, np.float32)
    zero = [n for n in arrays if n.endswith(".lora_B.weight") and not arrays[n].any()]
    if zero:
        warnings.warn(
            f"{files[0]}: B is all zero in {len(zero)} of {len(targets)} modules (the first is "
            f"{zero[0]}): "
            "there the adapter changes nothing, as before its first training step",
            stacklevel=4,
        )
    for module in targets:
        name = f"{PEFT_PREFIX}{module}.lora_"
        adapter.tensors[module] = (arrays[name + "A.weight"], arrays[name + "B.weight"])
    return adapter


def _by_plain_names(file: Path, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that PEFT writes: without the parts that wrappers put into them, and
    without the adapter's name. ValueError where two that differ get one name.
    """
    found: dict[str, Tensor] = {}
    given: dict[str, str] = {}
    for name, tensor in stored.items():
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        plain = _ADAPTER_NAME.sub(r"\1.weight", plain)
        if plain in found and not _equal(found[plain], tensor):
            raise ValueError(
                f"{file}: {given[plain]} and {name} are the same tensor of two adapters; expected "
                "one adapter in a file"
            )
        found[plain], given[plain] = tensor, name
    return found


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and np.array_equal(one.numpy(), other.numpy())


def _listed(names: Sequence[str], between: str = ", ") -> str:
    """The first names of a list that may have hundreds, and how many more there are."""
    more = f"{between}and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return between.join(names[:_SHOWN]) + more


def write_adapter(directory: Path, adapter: Adapter, safe_serialization: bool) -> None:
    """The two files of an adapter. The tensors come first: a config without its tensors is never
    left by a failure.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (A, B) in adapter.tensors.items():
        tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = A
        tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = B
    fields = {**adapter.config.to_dict(), "inference_mode": True}
    if fields["target_modules"] in (None, ALL_LINEAR):  # older PEFT does not know the word
        fields["target_modules"] = sorted({m.rpartition(".")[2] for m in adapter.targets})
    write = write_safetensors if safe_serialization else write_torch
    file, other = (SAFETENSORS, TORCH) if safe_serialization else (TORCH, SAFETENSORS)
    write(directory / file, tensors)
    write_json(directory / CONFIG, fields)
    (directory / other).unlink(missing_ok=True)  # readers would find an older one first
