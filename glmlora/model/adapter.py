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
from ..files.tensor import Tensor
from ..seeds import generator
from ..task import FILE as TASK
from ..task import Task, check_asked, task_in, write_task
from .adapter_config import ALL_LINEAR, CONFIG, LoraConfig
from .adapter_config import PrefixTuningConfig as PrefixTuningConfig
from .adapter_config import TaskType as TaskType
from .initial import MAGNITUDE, beneath_adapter, fresh_tensors, mutates, parts_of, row_norms
from .modeling import ChatGLMForConditionalGeneration
from .parameters import (
    PEFT_PREFIX,
    embedding_of,
    float_array,
    output_layer_of,
    weight_of,
    without_wrappers,
)
from .relayout import in_layout
from .template import FILE as TEMPLATE
from .template import read_template, write_template

T = TypeVar("T")
SAFETENSORS = "adapter_model.safetensors"
TORCH = "adapter_model.bin"
# The adapter's name within a tensor's, which files leave out
_ADAPTER_NAME = re.compile(r"(\.lora_[AB])\.[^.]+(\.weight|\.bias)$")
_MAGNITUDE_NAME = re.compile(r"(\.lora_magnitude_vector)(\.[^.]+)?\.weight$")
_SAVED_NAME = re.compile(r"\.modules_to_save(\.[^.]+)?(\.weight|\.bias)$")
_SHOWN = 6  # names in a message


class Adapter:
    """One LoRA adapter: its config and, while it is not the active one, its tensors.

    targets  {module: (rank, scale)} of the linears that it changes
    saved    base weights that it has whole (modules_to_save)
    tensors  {name in the core: array} float32, in the order in which they are trained
    beneath  base weights that are other ones beneath it (PiSSA, OLoRA)
    template  what it was trained with, None: not known, so the base's
    task  what it was trained for, None: not known
    """

    def __init__(
        self,
        config: LoraConfig,
        targets: dict[str, tuple[int, float]],
        model: ChatGLMForConditionalGeneration,
        tensors: dict[str, np.ndarray],
    ):
        self.config = config
        self.targets = targets
        self.saved = config.saved(model)
        self.tensors = tensors
        self.beneath: dict[str, Tensor] = {}
        self.template: str | None = None
        self.task: Task | None = None
        head, embedding = model.config.tensor_names["output_layer"], embedding_of(model.config)
        # A weight that files have under two names
        self._twice = {embedding: head + ".weight"} if model.config.tied_head else {}

    def names(self) -> list[str]:
        """The core's names of its tensors: module by module, then what is saved whole."""
        parts = parts_of(self.config)
        return [f"{m}.{part}" for m in self.targets for part in parts] + self.saved

    def file_names(self, name: str) -> list[str]:
        """Of a tensor, in an adapter's file."""
        names = [name, self._twice[name]] if name in self._twice else [name]
        return [PEFT_PREFIX + n for n in names]

    def state(self) -> dict[str, np.ndarray]:
        """The tensors by the names of a file."""
        return {f: self.tensors[n] for n in self.names() for f in self.file_names(n)}

    def take(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Set the tensors to those of `state`."""
        self.tensors = {n: arrays[self.file_names(n)[0]] for n in self.names()}

    def replaced(self) -> dict[str, Tensor]:
        """The base weights that are other ones while it is attached."""
        return self.beneath | {n: Tensor(self.tensors[n]) for n in self.saved}


def fresh_adapter(
    model: ChatGLMForConditionalGeneration, config: LoraConfig, seed: int | None
) -> Adapter:
    targets = config.targets(model)
    adapter = Adapter(config, targets, model, {})
    adapter.tensors, adapter.beneath = fresh_tensors(model, config, targets, generator(seed))
    for name in adapter.saved:
        adapter.tensors[name] = np.ascontiguousarray(model.read_weight(name), np.float32)
    return adapter


def checked_merge(model: ChatGLMForConditionalGeneration, adapters: Sequence[Adapter]) -> None:
    """ValueError naming a module whose weight would not be finite with these adapters merged."""
    for module in sorted({m for adapter in adapters for m in adapter.targets}):
        name = weight_of(model.config, module)
        weight = model.read_weight(name)
        with np.errstate(over="ignore", invalid="ignore"):
            for adapter in adapters:
                if module in adapter.targets:
                    A, B = (adapter.tensors[f"{module}.lora_{p}.weight"] for p in "AB")
                    scale = adapter.targets[module][1]
                    weight = weight + np.float32(scale) * (B @ A)
                    if adapter.config.use_dora:
                        magnitude = adapter.tensors[f"{module}.{MAGNITUDE}"]
                        weight = weight * (magnitude / row_norms(weight))[:, None]
            if model.stored_dtype(name) == "F16":
                weight = weight.astype(np.float16)
        if not np.isfinite(weight).all():
            raise ValueError(
                f"safe_merge: {name} would hold values that are not finite; nothing is merged"
            )


# Adapter files


def adapter_file(directory: Path) -> Path:
    """The file of an adapter's tensors; ValueError where there is none."""
    for name in (SAFETENSORS, TORCH):
        if (directory / name).exists():
            return directory / name
    raise ValueError(f"{directory}: found neither {SAFETENSORS} nor {TORCH}")


def read_adapter(
    model: ChatGLMForConditionalGeneration, directory: Path, config: LoraConfig
) -> Adapter:
    file = adapter_file(directory)
    given = plain_names(file, read_weights(file))
    own, stored = in_layout(file, model, config, given)
    try:
        targets = own.targets(model)
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from None
    if own is config:
        check_adapter(directory, config.base_model_name_or_path, model.config.family)
    adapter = Adapter(own, targets, model, {})
    arrays = fitting(file, model, adapter, stored)
    zero = [n for n in arrays if n.endswith(".lora_B.weight") and not arrays[n].any()]
    if zero:
        tell.warn(
            f"{file}: B is all zero in {len(zero)} of {len(targets)} modules (the first is "
            f"{zero[0]}): "
            "there the adapter changes nothing, as before its first training step"
        )
    adapter.take(arrays)
    if mutates(own):
        if "niter" in str(own.init_lora_weights):
            tell.warn(
                f"{directory / CONFIG}: init_lora_weights {own.init_lora_weights!r}: what a "
                "randomised method took out of the base is found again only nearly; PEFT's "
                "path_initial_model_for_weight_conversion saves such an adapter exactly"
            )
        adapter.beneath = beneath_adapter(model, own, targets, generator(0))
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
        plain = _ADAPTER_NAME.sub(r"\1\2", without_wrappers(name))
        plain = _SAVED_NAME.sub(r"\2", _MAGNITUDE_NAME.sub(r"\1", plain))
        if ".original_module." in plain:  # what modules_to_save stands for
            continue
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
    adapter: Adapter,
    stored: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """Tensors, float32, that are all of an adapter's. ValueError, that begins with `source`, naming
    those that are missing, surplus, misshaped or not finite.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for module, (rank, _) in adapter.targets.items():
        out, width = model.core.shape(weight_of(model.config, module))
        shapes = {"lora_A.weight": (rank, width), "lora_B.weight": (out, rank)}
        for part in parts_of(adapter.config):
            expected[f"{PEFT_PREFIX}{module}.{part}"] = shapes.get(part, (out,))
    for name in adapter.saved:
        for file_name in adapter.file_names(name):
            expected[file_name] = model.core.shape(name)
    stored = _without_the_bases(source, model, expected, stored)
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
    for name in adapter.saved:
        first, *others = adapter.file_names(name)
        if any(not np.array_equal(arrays[first], arrays[other]) for other in others):
            raise ValueError(
                f"{source}: {first} and {others[0]} differ, but they are one weight of this model "
                "(tie_word_embeddings)"
            )
    return arrays


def _without_the_bases(
    source: Any,
    model: ChatGLMForConditionalGeneration,
    expected: Mapping[str, Any],
    stored: Mapping[str, Any],
) -> Mapping[str, Any]:
    """The tensors without the embeddings and the output layer of the base, which PEFT writes beside
    an adapter of one of these (save_embedding_layers). ValueError where they are not the model's.
    """
    kept = {}
    for name, tensor in stored.items():
        module = name.removeprefix(PEFT_PREFIX).removesuffix(".weight").removesuffix(".base_layer")
        own = weight_of(model.config, module)
        ends = (embedding_of(model.config), output_layer_of(model.config))
        if name in expected or own not in ends or ".lora_" in name:
            kept[name] = tensor
            continue
        values, there = model.read_weight(own), float_array(name, tensor)
        near = 0.01 * np.abs(values).max() if values.shape == there.shape else 0
        if values.shape != there.shape or np.abs(values - there).max() > near:
            raise ValueError(
                f"{source}: {name} is a weight of the base that it was trained on, {there.shape}, "
                f"and not that of this model, {values.shape}; expected that base"
            )
    return kept


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
