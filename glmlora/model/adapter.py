"""Adapters apart from a model: their settings as PEFT has them, LoRA tensors, and the directories
that hold them.

A directory has `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).
"""

from __future__ import annotations

import inspect
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any
from typing import NoReturn as Never  # typing.Never came with Python 3.11

import numpy as np

from .. import families
from ..files.checkpoint import (
    read_json,
    read_weights,
    write_json,
    write_safetensors,
    write_torch,
)
from ..files.staging import staged
from ..seeds import generator
from .modeling import ChatGLMForConditionalGeneration
from .parameters import PEFT_PREFIX, layers_of

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
TORCH = "adapter_model.bin"
ALL_LINEAR = "all-linear"


class TaskType(str, Enum):
    """What a model is for. Only CAUSAL_LM is of use here; the others are refused where they are
    given.
    """

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"


# Fields of adapter_config.json that PEFT 0.4 knows: a config that holds more cannot be read by it.
_WRITTEN = (
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "revision",
    "target_modules",
    "task_type",
)
# Written when they are not default; any PEFT that can use them knows them.
_WRITTEN_IF_SET = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
# Values of fields of later versions that mean "not used", beside null, false and empty ones.
_UNUSED = {"megatron_core": "megatron.core", "qalora_group_size": 16, "lora_bias": False}
_IGNORED = ("peft_version", "auto_mapping", "revision", "base_model_name_or_path", "task_type")


class LoraConfig:
    """Settings of a LoRA adapter: y = W x + b + scale * B A x.

    r: rank; lora_alpha: scale is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora;
    lora_dropout on the input of A in training; target_modules: list of module names or endings
    ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), a regular expression over the
    whole dotted name, or "all-linear"; default query_key_value. rank_pattern, alpha_pattern:
    overrides by module name or ending; layers_to_transform: only these layers. init_lora_weights:
    True (A uniform, B zero), "gaussian" (A normal, B zero) or False (both random).

    Raises ValueError naming a field that is out of range, or of an adapter kind that is not
    supported.
    """

    peft_type = "LORA"

    def __init__(
        self,
        task_type: str | TaskType | None = None,
        inference_mode: bool = False,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        target_modules: Sequence[str] | str | None = None,
        bias: str = "none",
        fan_in_fan_out: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        layers_to_transform: int | Sequence[int] | None = None,
        layers_pattern: str | Sequence[str] | None = None,
        use_rslora: bool = False,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        base_model_name_or_path: str | None = None,
        revision: str | None = None,
        auto_mapping: Any = None,
        **later: Never,  # of later PEFT versions: refused, unless they say "not used"
    ):
        self.task_type = task_type.value if isinstance(task_type, TaskType) else task_type
        self.inference_mode = bool(inference_mode)
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        if isinstance(target_modules, str | None):
            self.target_modules = target_modules
        else:
            self.target_modules = sorted(target_modules)
        self.bias = bias
        self.fan_in_fan_out = fan_in_fan_out
        self.modules_to_save = modules_to_save
        self.init_lora_weights = init_lora_weights
        self.layers_to_transform = layers_to_transform
        self.layers_pattern = layers_pattern
        self.use_rslora = bool(use_rslora)
        self.rank_pattern = dict(rank_pattern or {})
        self.alpha_pattern = dict(alpha_pattern or {})
        self.base_model_name_or_path = base_model_name_or_path
        self.revision = revision
        self.auto_mapping = auto_mapping
        self._check(later)

    def _check(self, later: Mapping[str, Any]) -> None:
        if later.pop("peft_type", "LORA") != "LORA":
            raise ValueError("peft_type: a LoraConfig is LORA")
        _check_task(self.task_type)
        _check_rank("r", self.r)
        for name, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{name!r}]", rank)
        _check_alpha("lora_alpha", self.lora_alpha)
        for name, alpha in self.alpha_pattern.items():
            _check_alpha(f"alpha_pattern[{name!r}]", alpha)
        p = self.lora_dropout
        if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p < 1:
            raise ValueError(f"lora_dropout: expected from 0 to below 1, got {p!r}")
        targets = self.target_modules
        if isinstance(targets, list) and not (targets and all(isinstance(t, str) for t in targets)):
            raise ValueError(f"target_modules: expected names, got {targets!r}")
        if isinstance(targets, str):
            if self.layers_to_transform is not None and targets != ALL_LINEAR:
                raise ValueError("layers_to_transform: needs target_modules to be a list of names")
            _compiled("target_modules", targets)
        if self.bias != "none":
            raise ValueError(f"bias {self.bias!r} is not supported by this release, only 'none'")
        if self.fan_in_fan_out:
            raise ValueError(
                "fan_in_fan_out true is not supported: these models store no transposed weights"
            )
        if self.modules_to_save:
            raise ValueError(
                f"modules_to_save {self.modules_to_save!r} is not supported by this release"
            )
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"init_lora_weights {self.init_lora_weights!r} is not supported by this release, "
                "only true, false and 'gaussian'"
            )
        layers = self.layers_to_transform
        for layer in [layers] if isinstance(layers, int) else layers or []:
            if type(layer) is not int or layer < 0:
                raise ValueError(f"layers_to_transform: expected layer numbers, got {layers!r}")
        if later.pop("use_dora", False):
            raise ValueError("use_dora true (DoRA) is not supported by this release")
        for name, value in later.items():
            if name not in _IGNORED and value and value != _UNUSED.get(name):
                raise ValueError(f"{name} {value!r} is not supported by this release")

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> LoraConfig:
        """Read `path/adapter_config.json`. ValueError naming a field that is not supported."""
        file = Path(path) / CONFIG
        if not file.exists():
            raise ValueError(
                f"Can't find {CONFIG!r} at {os.fspath(path)!r}: {_what_is_there(Path(path))}"
            )
        fields = read_json(file, dict)
        kind = fields.pop("peft_type", None)
        if kind != "LORA":
            raise ValueError(
                f"{file}: peft_type {kind!r} is not supported by this release, only 'LORA'"
            )
        known = set(inspect.signature(cls.__init__).parameters)
        try:
            # A key with null means the default, as for PEFT's optional fields.
            return cls(**{k: v for k, v in fields.items() if v is not None or k not in known})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The fields that are written: those of PEFT 0.4, and newer ones that are not default."""
        fields = {name: getattr(self, name) for name in _WRITTEN}
        for name, default in _WRITTEN_IF_SET.items():
            if getattr(self, name) != default:
                fields[name] = getattr(self, name)
        return fields

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `directory/adapter_config.json`."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        write_json(Path(directory) / CONFIG, self.to_dict())

    def targets(self, model: ChatGLMForConditionalGeneration) -> dict[str, tuple[int, float]]:
        """{module: (rank, scale)} of the linears of a model that this adapter changes.

        Raises ValueError naming targets that match nothing, or modules other than the four linears
        of a layer.
        """
        family = families.of(model.config.family)
        wanted = self.target_modules or list(family.targets)
        weights = [n.removesuffix(".weight") for n in model.base_names() if n.endswith(".weight")]
        start = layers_of(model.config)
        linear = {n for n in weights if n.startswith(start) and _leaf(n) in family.linears}
        if wanted == ALL_LINEAR:
            matched = [n for n in weights if n in linear]
        elif isinstance(wanted, str):
            pattern = _compiled("target_modules", wanted)
            matched = [n for n in weights if pattern.fullmatch(n)]
        else:
            ends = {t: [n for n in weights if n == t or n.endswith("." + t)] for t in wanted}
            unmatched = [t for t, found in ends.items() if not found]
            if unmatched and len(unmatched) < len(ends):
                warnings.warn(
                    f"target_modules: no module of this model is named {unmatched}", stacklevel=4
                )
            found = {n for names in ends.values() for n in names}
            matched = [n for n in weights if n in found]
        if self.layers_to_transform is not None:
            wanted_layers = self.layers_to_transform
            numbers = {wanted_layers} if isinstance(wanted_layers, int) else set(wanted_layers)
            matched = [n for n in matched if _layer(n, start) in numbers]
        if not matched:
            layers_too = (
                "" if self.layers_to_transform is None else f" in layers {self.layers_to_transform}"
            )
            raise ValueError(
                f"target_modules {wanted!r}: no module of this model matches{layers_too}; "
                f"expected some of {', '.join(family.linears)}"
            )
        other = [n for n in matched if n not in linear]
        if other:
            raise ValueError(
                f"target_modules: {', '.join(other)}: adapters on this module are not supported "
                "by this release, "
                f"only on {', '.join(family.linears)}"
            )
        found = {}
        for name in matched:
            rank = _pattern(self.rank_pattern, name, self.r)
            alpha = _pattern(self.alpha_pattern, name, self.lora_alpha)
            found[name] = (rank, alpha / (math.sqrt(rank) if self.use_rslora else rank))
        return found

    def __repr__(self) -> str:
        fields = {k: v for k, v in self.to_dict().items() if v is not None}
        return f"LoraConfig({', '.join(f'{k}={v!r}' for k, v in fields.items())})"


class PrefixTuningConfig:
    """Settings of a P-Tuning v2 prefix.

    num_virtual_tokens: its length P; prefix_projection: with the two-layer encoder; init_std: of
    the fresh embedding.
    """

    peft_type = "PREFIX_TUNING"

    def __init__(
        self,
        task_type: str | TaskType | None = None,
        num_virtual_tokens: int | None = None,
        prefix_projection: bool = False,
        inference_mode: bool = False,
        init_std: float = 1.0,
    ):
        self.task_type = task_type.value if isinstance(task_type, TaskType) else task_type
        _check_task(self.task_type)
        _check_rank("num_virtual_tokens", num_virtual_tokens)
        if not isinstance(init_std, int | float) or not 0 <= init_std < math.inf:
            raise ValueError(f"init_std: expected a number from 0, got {init_std!r}")
        self.num_virtual_tokens = num_virtual_tokens
        self.prefix_projection = bool(prefix_projection)
        self.inference_mode = bool(inference_mode)
        self.init_std = init_std

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return {"peft_type": self.peft_type, **self.__dict__}

    def __repr__(self) -> str:
        return f"PrefixTuningConfig({', '.join(f'{k}={v!r}' for k, v in self.__dict__.items())})"


def _check_task(task: Any) -> None:
    if task not in (None, "CAUSAL_LM"):
        raise ValueError(f"task_type {task!r} is not supported by this release, only 'CAUSAL_LM'")


def _check_rank(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}: expected a whole number from 1, got {value!r}")


def _check_alpha(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a number, got {value!r}")


def _compiled(name: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is no regular expression: {error}") from None


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _layer(module: str, start: str) -> int | None:
    found = re.match(re.escape(start) + r"(\d+)\.", module)
    return int(found[1]) if found else None


def _pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key that is the module's name, its ending, or a regular expression for
    one of these.
    """
    for key, value in patterns.items():
        if _compiled("rank_pattern", rf"(.*\.)?({key})").fullmatch(module):
            return value
    return default


def _what_is_there(path: Path) -> str:
    if not path.is_dir():
        return "there is no such directory"
    if (path / "config.json").is_file() and (path / "pytorch_model.bin").is_file():
        return "it is a model or a P-Tuning directory (glmlora.load_prefix), not an adapter's"
    return "it is not an adapter directory"


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
    files = [directory / name for name in (SAFETENSORS, TORCH) if (directory / name).exists()]
    if not files:
        raise ValueError(f"{directory}: found neither {SAFETENSORS} nor {TORCH}")
    try:
        targets = config.targets(model)
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from None
    adapter = Adapter(config, targets, {})
    stored = read_weights(files[0])
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
        faults = [f"missing {', '.join(missing)}"] * bool(missing)
        faults += [f"not expected {', '.join(surplus)}"] * bool(surplus)
        raise ValueError(f"{files[0]}: does not fit this model: {'; '.join(faults + wrong)}")
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


def write_adapter(directory: Path, adapter: Adapter, safe_serialization: bool) -> None:
    """The two files of an adapter."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (A, B) in adapter.tensors.items():
        tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = A
        tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = B
    fields = {**adapter.config.to_dict(), "inference_mode": True}
    if fields["target_modules"] in (None, ALL_LINEAR):  # older PEFT does not know the word
        fields["target_modules"] = sorted({_leaf(m) for m in adapter.targets})
    write = write_safetensors if safe_serialization else write_torch
    file, other = (SAFETENSORS, TORCH) if safe_serialization else (TORCH, SAFETENSORS)
    # Together or not at all; readers would find an older one of the other form first.
    with staged(directory, stale=re.compile(re.escape(other))) as new:
        write(new / file, tensors)
        write_json(new / CONFIG, fields)
