"""LoRA adapters apart from a model: their tensors, and the directories that hold them.

A directory has `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .. import tell
from ..families.recognition import check_adapter
from ..files.checkpoint import read_weights, write_json, write_safetensors, write_torch
from ..files.staging import staged
from ..seeds import generator
from ..task import FILE as TASK
from ..task import Task, check_asked, task_in, write_task
from .adapter_config import ALL_LINEAR, CONFIG, INITIALISATIONS, LoraConfig
from .adapter_config import PrefixTuningConfig as PrefixTuningConfig
from .adapter_config import TaskType as TaskType
from .modeling import ChatGLMForConditionalGeneration
from .parameters import PEFT_PREFIX, float_array, weight_of, without_wrappers
from .relayout import in_layout
from .template import FILE as TEMPLATE
from .template import read_template, write_template

T = TypeVar("T")
SAFETENSORS = "adapter_model.safetensors"
TORCH = "adapter_model.bin"
_ADAPTER_NAME = re.compile(r"(\.lora_[AB])\.[^.]+\.weight$")
_SHOWN = 6  # names in a message


class Adapter:
    """One LoRA adapter: its config and, while it is not the active one, its tensors.

    tensors  {module: (A (r, in), B (out, r))} float32
    template  what it was trained with, None: not known, so the base's
    task  what it was trained for, None: not known
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
        self.template: str | None = None
        self.task: Task | None = None

    def names(self) -> list[str]:
        """The core's names of its tensors, A before B, in the order of the modules."""
        return [f"{m}.lora_{part}.weight" for m in self.targets for part in "AB"]

    def state(self) -> dict[str, np.ndarray]:
        """The tensors by the names of a file."""
        parts = {m: dict(zip("AB", pair, strict=True)) for m, pair in self.tensors.items()}
        return {
            f"{PEFT_PREFIX}{m}.lora_{part}.weight": array
            for m, pair in parts.items()
            for part, array in pair.items()
        }

    def take(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Set the tensors to those of `state`."""
        for module in self.targets:
            name = f"{PEFT_PREFIX}{module}.lora_"
            self.tensors[module] = (arrays[name + "A.weight"], arrays[name + "B.weight"])


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
        out, width = model.core.shape(weight_of(model.config, module))
        if config.init_lora_weights == "gaussian":
            A = rng.standard_normal((rank, width)) / rank
        else:
            A = rng.uniform(-(width**-0.5), width**-0.5, (rank, width))
        B = np.zeros((out, rank))
        if config.init_lora_weights is False:
            B = rng.uniform(-(rank**-0.5), rank**-0.5, (out, rank))
        tensors[module] = (A.astype(np.float32), B.astype(np.float32))
    return Adapter(config, targets, tensors)


def checked_merge(model: ChatGLMForConditionalGeneration, adapters: Sequence[Adapter]) -> None:
    """ValueError naming a module whose weight would not be finite with these adapters merged."""
    for module in sorted({m for adapter in adapters for m in adapter.targets}):
        name = weight_of(model.config, module)
        weight = model.read_weight(name)
        with np.errstate(over="ignore", invalid="ignore"):
            for adapter in adapters:
                if module in adapter.targets:
                    A, B = adapter.tensors[module]
                    weight = weight + np.float32(adapter.targets[module][1]) * (B @ A)
            if model.stored_dtype(name) == "F16":
                weight = weight.astype(np.float16)
        if not np.isfinite(weight).all():
            raise ValueError(
                f"safe_merge: {name} would hold values that are not finite; nothing is merged"
            )


# Adapter files


def read_adapter(
    model: ChatGLMForConditionalGeneration, directory: Path, config: LoraConfig
) -> Adapter:
    files = [directory / name for name in (SAFETENSORS, TORCH) if (directory / name).exists()]
    if not files:
        raise ValueError(f"{directory}: found neither {SAFETENSORS} nor {TORCH}")
    given = plain_names(files[0], read_weights(files[0]))
    own, stored = in_layout(files[0], model, config, given)
    try:
        targets = own.targets(model)
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from None
    if own is config:
        check_adapter(directory, config.base_model_name_or_path, model.config.family)
    adapter = Adapter(own, targets, {})
    arrays = fitting(files[0], model, targets, stored)
    zero = [n for n in arrays if n.endswith(".lora_B.weight") and not arrays[n].any()]
    if zero:
        tell.warn(
            f"{files[0]}: B is all zero in {len(zero)} of {len(targets)} modules (the first is "
            f"{zero[0]}): "
            "there the adapter changes nothing, as before its first training step"
        )
    adapter.take(arrays)
    adapter.template = read_template(directory)
    adapter.task = task_in(directory)
    check_asked(adapter.task, base=model.opened.directory)
    return adapter


def plain_names(source: Any, stored: Mapping[str, T]) -> dict[str, T]:
    """Tensors under the names that PEFT writes: without the parts that wrappers put into them, and
    without the adapter's name. ValueError, that begins with `source`, where two that differ get one
    name.
    """
    found: dict[str, T] = {}
    given: dict[str, str] = {}
    for name, tensor in stored.items():
        plain = _ADAPTER_NAME.sub(r"\1.weight", without_wrappers(name))
        if ".lora_" in plain:  # once, where it is missing or two wrappers gave it
            while plain.startswith(PEFT_PREFIX):
                plain = plain.removeprefix(PEFT_PREFIX)
            plain = PEFT_PREFIX + plain
        if plain in found and not np.array_equal(
            float_array(name, found[plain]), float_array(name, tensor)
        ):
            raise ValueError(
                f"{source}: {given[plain]} and {name} are the same tensor of two adapters; "
                "expected one adapter"
            )
        found[plain], given[plain] = tensor, name
    return found


def _listed(names: Sequence[str], between: str = ", ") -> str:
    """The first names of a list that may have hundreds, and how many more there are."""
    more = f"{between}and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return between.join(names[:_SHOWN]) + more


def fitting(
    source: Any,
    model: ChatGLMForConditionalGeneration,
    targets: Mapping[str, tuple[int, float]],
    stored: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """Tensors, float32, that are all of an adapter's. ValueError, that begins with `source`, naming
    those that are missing, surplus, misshaped or not finite.
    """
    expected = {}
    for module, (rank, _) in targets.items():
        out, width = model.core.shape(weight_of(model.config, module))
        expected[f"{PEFT_PREFIX}{module}.lora_A.weight"] = (rank, width)
        expected[f"{PEFT_PREFIX}{module}.lora_B.weight"] = (out, rank)
    missing = [n for n in expected if n not in stored]
    surplus = [n for n in stored if n not in expected]
    wrong = [
        f"{n}: the model and {CONFIG} need {shape}, here it is {tuple(stored[n].shape)}"
        for n, shape in expected.items()
        if n in stored and tuple(stored[n].shape) != shape
    ]
    if missing or surplus or wrong:
        faults = [f"missing {_listed(missing)}"] * bool(missing)
        faults += [f"not expected {_listed(surplus)}"] * bool(surplus)
        faults += [_listed(wrong, "; ")] * bool(wrong)
        raise ValueError(f"{source}: does not fit this model: {'; '.join(faults)}")
    arrays = {}
    for name in expected:
        try:
            arrays[name] = float_array(name, stored[name])
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{source}: {name}: holds values that are not finite")
    return arrays


def write_adapter(directory: Path, adapter: Adapter, safe_serialization: bool) -> None:
    """The two files of an adapter."""
    directory.mkdir(parents=True, exist_ok=True)
    fields = {**adapter.config.to_dict(), "inference_mode": True}
    if fields["target_modules"] in (None, ALL_LINEAR):  # older PEFT does not know the word
        fields["target_modules"] = sorted({m.rpartition(".")[2] for m in adapter.targets})
    write = write_safetensors if safe_serialization else write_torch
    file, other = (SAFETENSORS, TORCH) if safe_serialization else (TORCH, SAFETENSORS)
    # Together or not at all; readers would find an older one of the other form first.
    stale = re.compile("|".join(map(re.escape, (other, TEMPLATE, TASK))))
    with staged(directory, stale=stale) as new:
        write(new / file, adapter.state())
        write_json(new / CONFIG, fields)
        write_template(new, adapter.template)
        write_task(new, adapter.task, directory)
