"""A model with adapters, as PEFT has it: the wrapper `PeftModel`; P-Tuning v2 prefixes as THUDM
saves them.

A prefix directory holds `config.json` with `pre_seq_len` and `pytorch_model.bin` with the tensors
of the prefix encoder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, overload

import numpy as np

from .. import _core
from ..files.checkpoint import load_state_dict, read_json, save_sharded
from ..generation.config import GenerationConfig
from .adapter import (
    Adapter,
    LoraConfig,
    PrefixTuningConfig,
    TaskType,  # noqa: F401  scripts look for it beside LoraConfig
    fresh_adapter,
    read_adapter,
    write_adapter,
)
from .configuration import ChatGLMConfig
from .device import Device
from .modeling import ChatGLMForConditionalGeneration
from .parameters import (
    PEFT_PREFIX,
    Parameter,
    Transformer,
    fresh_prefix,
    is_lora,
    prefix_of,
    prefix_shapes,
)

Base = ChatGLMForConditionalGeneration
P = ParamSpec("P")
T = TypeVar("T")


class _Tuner:
    """`PeftModel.base_model`, which in PEFT wraps the base once more: `.model` is the base."""

    def __init__(self, model: ChatGLMForConditionalGeneration):
        self.model = model

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            return getattr(self.model, name)


class _FromBase(Generic[P, T]):
    """A method of the base as one of the wrapper: `peft_model.chat` is the base's bound `chat`."""

    def __init__(self, method: Callable[Concatenate[Base, P], T]):
        self._method = method
        self.__doc__ = method.__doc__

    @overload
    def __get__(
        self, instance: None, owner: type[PeftModel]
    ) -> Callable[Concatenate[Base, P], T]: ...
    @overload
    def __get__(self, instance: PeftModel, owner: type[PeftModel]) -> Callable[P, T]: ...
    def __get__(self, instance: PeftModel | None, owner: type[PeftModel]) -> Any:
        if instance is None:
            return self._method
        return getattr(instance.get_base_model(), self._method.__name__)


def _chained(
    method: Callable[Concatenate[Base, P], Base],
) -> Callable[Concatenate[PeftModel, P], PeftModel]:
    """A method of the base that returns the model, as one that returns the wrapper."""

    @wraps(method)
    def call(self: PeftModel, /, *args: P.args, **kwargs: P.kwargs) -> PeftModel:
        getattr(self.get_base_model(), method.__name__)(*args, **kwargs)
        return self

    call.__signature__ = signature(method).replace(return_annotation="PeftModel")
    return call


class PeftModel:
    """A model with adapters. Wrapping changes the given base in place; what is not here falls
    through to the base.
    """

    # attributes of the base
    config: ChatGLMConfig
    core: _core.Model
    device: Device
    dtype: str
    compute_dtype: str
    training: bool
    generation_config: GenerationConfig
    transformer: Transformer
    trainable_names: list[str]
    name_or_path: str | None

    def __init__(
        self,
        model: ChatGLMForConditionalGeneration,
        config: LoraConfig | PrefixTuningConfig,
        adapter_name: str = "default",
    ):
        self._base = model
        self._adapters: dict[str, Adapter] = {}
        self.peft_config: dict[str, LoraConfig | PrefixTuningConfig] = {adapter_name: config}
        self.active_adapter = adapter_name

    @property
    def base_model(self) -> _Tuner:
        """`.base_model.model` is the base, as in PEFT."""
        return _Tuner(self._base)

    def get_base_model(self) -> ChatGLMForConditionalGeneration:
        """The base that was wrapped, the adapter still in it."""
        return self._base

    if not TYPE_CHECKING:  # checkers know what is declared here, and refuse the rest

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__") or name == "_base":
                raise AttributeError(name)
            return getattr(self._base, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._base)})

    # Reading and making adapters

    @classmethod
    def from_pretrained(
        cls,
        model: ChatGLMForConditionalGeneration,
        path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
    ) -> PeftModel:
        """Attach the adapter in the directory `path` to `model`, in place.

        is_trainable: continue its training. Raises ValueError for a directory that is no adapter,
        an adapter for another model or of another kind, and tensors that are missing, surplus or
        misshaped, all named; an adapter whose B is all zero gives a warning.
        """
        if isinstance(model, PeftModel):
            model.load_adapter(path, adapter_name, is_trainable)
            model.set_adapter(adapter_name)
            return model
        config = LoraConfig.from_pretrained(path) if config is None else config
        adapter = read_adapter(model, Path(path), config)
        config.inference_mode = not is_trainable
        wrapper = cls(model, config, adapter_name)
        wrapper._adapters[adapter_name] = adapter
        wrapper._attach(adapter_name)
        return wrapper

    def load_adapter(
        self, path: str | os.PathLike[str], adapter_name: str, is_trainable: bool = False
    ) -> None:
        """Read another adapter under a new name; `set_adapter` makes it the active one. Errors as
        above.
        """
        if adapter_name in self._adapters:
            raise ValueError(f"adapter_name: {adapter_name!r} is there already")
        config = LoraConfig.from_pretrained(path)
        adapter = read_adapter(self._base, Path(path), config)
        config.inference_mode = not is_trainable
        self._adapters[adapter_name], self.peft_config[adapter_name] = adapter, config

    def add_adapter(self, adapter_name: str, config: LoraConfig, seed: int | None = None) -> None:
        """A fresh adapter under a new name; `set_adapter` makes it the active one."""
        if adapter_name in self._adapters:
            raise ValueError(f"adapter_name: {adapter_name!r} is there already")
        self._adapters[adapter_name] = fresh_adapter(self._base, config, seed)
        self.peft_config[adapter_name] = config

    def _fetch(self) -> None:
        """Copy the active adapter's tensors out of the core."""
        adapter = self._adapters.get(self.active_adapter)
        if adapter is not None:
            read = self._base.core.read
            adapter.tensors = {
                m: (read(m + ".lora_A.weight"), read(m + ".lora_B.weight")) for m in adapter.targets
            }

    def _attach(self, name: str) -> None:
        adapter, base = self._adapters[name], self._base
        base.set_trainable([])
        base.core.remove_lora()
        for module, (_, scale) in adapter.targets.items():
            A, B = adapter.tensors[module]
            base.core.add_lora(module, A, B, scale, float(adapter.config.lora_dropout))
        base.core.enable_lora(True)
        base.active_adapter_name = self.active_adapter = name
        if not adapter.config.inference_mode:
            base.set_trainable(adapter.names())

    def set_adapter(self, adapter_name: str) -> None:
        """Make another adapter the active one. It is trained if it was loaded for that, with fresh
        moments.
        """
        if adapter_name not in self._adapters:
            raise ValueError(
                f"adapter_name: {adapter_name!r} is not one of {', '.join(self._adapters)}"
            )
        if adapter_name != self.active_adapter:
            self._fetch()
            self._attach(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model computes as the base alone."""
        self._need_lora("disable_adapter")
        self._base.core.enable_lora(False)
        try:
            yield
        finally:
            self._base.core.enable_lora(True)

    def _need_lora(self, what: str) -> None:
        if not self._adapters:
            raise ValueError(f"{what}: this model has a P-Tuning prefix, not a LoRA adapter")

    def merge_and_unload(self) -> ChatGLMForConditionalGeneration:
        """Fold the active adapter into the base weights, W += scale * B A in the type of W; returns
        the base.
        """
        self._need_lora("merge_and_unload")
        modules = list(self._adapters[self.active_adapter].targets)
        self._base.set_trainable([])
        self._base._apply_trainable()
        self._base.core.merge_lora()
        self._base.weights_changed(m + ".weight" for m in modules)
        return self._base

    def unload(self) -> ChatGLMForConditionalGeneration:
        """Take the adapter off; returns the base as it was."""
        self._need_lora("unload")
        self._fetch()
        self._base.set_trainable([])
        self._base.core.remove_lora()
        return self._base

    # The base's methods, with its signatures

    forward = _FromBase(Base.forward)
    backward = _FromBase(Base.backward)
    named_gradients = _FromBase(Base.named_gradients)
    zero_grad = _FromBase(Base.zero_grad)
    generate = _FromBase(Base.generate)
    stream_generate = _FromBase(Base.stream_generate)
    chat = _FromBase(Base.chat)
    batch_chat = _FromBase(Base.batch_chat)
    stream_chat = _FromBase(Base.stream_chat)
    parameters = _FromBase(Base.parameters)
    num_parameters = _FromBase(Base.num_parameters)
    load_state_dict = _FromBase(Base.load_state_dict)
    get_memory_footprint = _FromBase(Base.get_memory_footprint)
    get_input_embeddings = _FromBase(Base.get_input_embeddings)
    get_output_embeddings = _FromBase(Base.get_output_embeddings)
    set_trainable = _FromBase(Base.set_trainable)
    quantize = _FromBase(Base.quantize)
    gradient_checkpointing_enable = _FromBase(Base.gradient_checkpointing_enable)
    gradient_checkpointing_disable = _FromBase(Base.gradient_checkpointing_disable)
    enable_input_require_grads = _FromBase(Base.enable_input_require_grads)
    __call__ = forward

    half = _chained(Base.half)
    bfloat16 = _chained(Base.bfloat16)
    float = _chained(Base.float)
    cuda = _chained(Base.cuda)
    cpu = _chained(Base.cpu)
    to = _chained(Base.to)
    eval = _chained(Base.eval)
    train = _chained(Base.train)
    requires_grad_ = _chained(Base.requires_grad_)

    # What there is

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(name, Parameter) with PEFT's names: `base_model.model.` and the base's."""
        for name, parameter in self._base.named_parameters():
            yield PEFT_PREFIX + name, parameter

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(numbers that are trained, numbers of all weights)."""
        return self._base.num_parameters(only_trainable=True), self._base.num_parameters()

    def print_trainable_parameters(self) -> None:
        """Print one line: trainable and all parameters, and their ratio in percent."""
        print(trainable_line(self._base))

    def state_dict(self) -> dict[str, np.ndarray]:
        """The active adapter's tensors, float32, under the names that its file has."""
        read = self._base.core.read
        if not self._adapters:
            start = prefix_of(self._base.config)
            return {n: read(n) for n in self._base.core.names() if n.startswith(start)}
        return {PEFT_PREFIX + n: read(n) for n in self._adapters[self.active_adapter].names()}

    def save_pretrained(
        self, directory: str | os.PathLike[str], safe_serialization: bool = True
    ) -> None:
        """Write the active adapter (others: in folders of their names) or the prefix, atomically.

        LoRA: `adapter_config.json` and `adapter_model.safetensors`, or `.bin` with
        safe_serialization=False. Prefix: see `save_prefix`. Raises OSError naming the file.
        """
        if not self._adapters:
            save_prefix(self._base, directory)
            return
        directory = Path(directory)
        if directory.exists() and not directory.is_dir():
            raise NotADirectoryError(f"{directory}: is a file, expected a directory")
        self._fetch()
        for name, adapter in self._adapters.items():
            write_adapter(
                directory if name == self.active_adapter else directory / name,
                adapter,
                safe_serialization,
            )

    def __repr__(self) -> str:
        return f"PeftModel({self._base!r}, adapter={self.active_adapter!r})"


PeftModelForCausalLM = PeftModel


def trainable_line(model: ChatGLMForConditionalGeneration) -> str:
    """The line that PEFT's scripts print about a model's parameters."""
    trained, total = model.num_parameters(only_trainable=True), model.num_parameters()
    percent = 100 * trained / total
    return f"trainable params: {trained} || all params: {total} || trainable%: {percent:.4f}"


def get_peft_model(
    model: ChatGLMForConditionalGeneration,
    peft_config: LoraConfig | PrefixTuningConfig,
    adapter_name: str = "default",
    seed: int | None = None,
) -> PeftModel:
    """Attach a fresh LoRA adapter, or a fresh P-Tuning prefix, and make it what is trained.

    A is uniform within 1/sqrt(in) (Kaiming, a = sqrt 5) and B zero, so the model computes what it
    did before. The numbers follow `seed`, or `glmlora.set_seed`. With `inference_mode` nothing is
    trained. Raises ValueError naming the field.
    """
    if isinstance(model, PeftModel):
        raise TypeError(
            "model: expected a base model, got a PeftModel; use add_adapter and set_adapter"
        )
    if isinstance(peft_config, PrefixTuningConfig):
        model.config.pre_seq_len = peft_config.num_virtual_tokens
        model.config.prefix_projection = peft_config.prefix_projection
        arrays = fresh_prefix(prefix_shapes(model.config), seed, float(peft_config.init_std))
        model.set_prefix(arrays, fresh=True)
        if peft_config.inference_mode:
            model.set_trainable([])
        return PeftModel(model, peft_config, adapter_name)
    if not isinstance(peft_config, LoraConfig):
        raise TypeError(f"peft_config: expected a LoraConfig, got {type(peft_config).__name__}")
    if any(is_lora(n) for n in model.core.names()):
        raise ValueError(
            "model: has a LoRA adapter already; unload() or merge_and_unload() it first"
        )
    if peft_config.base_model_name_or_path is None:
        peft_config.base_model_name_or_path = model.config.get("_name_or_path") or None
    wrapper = PeftModel(model, peft_config, adapter_name)
    wrapper._adapters[adapter_name] = fresh_adapter(model, peft_config, seed)
    wrapper._attach(adapter_name)
    return wrapper


# P-Tuning directories


def save_prefix(
    model: ChatGLMForConditionalGeneration | PeftModel, directory: str | os.PathLike[str]
) -> None:
    """Write a P-Tuning prefix as THUDM's scripts do: `pytorch_model.bin` (float32) and
    `config.json`.

    Raises ValueError for a model without prefix, OSError naming the file.
    """
    model = _unwrapped(model)
    if not model.has_prefix:
        raise ValueError("save_prefix: this model has no P-Tuning prefix")
    read = model.core.read
    names = [n for n in model.core.names() if n.startswith(prefix_of(model.config))]
    Path(directory).mkdir(parents=True, exist_ok=True)
    save_sharded(directory, {n: read(n) for n in names}, safetensors=False)
    model.config.save_pretrained(directory)


def load_prefix(
    model: ChatGLMForConditionalGeneration | PeftModel, directory: str | os.PathLike[str]
) -> ChatGLMForConditionalGeneration | PeftModel:
    """Attach the P-Tuning prefix in `directory`; returns the model.

    `pre_seq_len` and `prefix_projection` come from the directory's config.json; a model that was
    built with others, or tensors of other sizes, raise ValueError with both numbers.
    """
    base, directory = _unwrapped(model), Path(directory)
    start = prefix_of(base.config)
    file = directory / "config.json"
    fields = read_json(file, dict) if file.exists() else {}
    arrays = {
        n.removeprefix(start): np.ascontiguousarray(a, np.float32)
        for n, a in load_state_dict(directory).items()
        if n.startswith(start)
    }
    if "embedding.weight" not in arrays:
        raise ValueError(
            f"{directory}: holds no {start}embedding.weight: not a P-Tuning checkpoint"
        )
    length = fields.get("pre_seq_len") or arrays["embedding.weight"].shape[0]
    projection = fields.get("prefix_projection", "trans.0.weight" in arrays)
    if isinstance(projection, list) and len(projection) == 1:
        projection = projection[0]
    config = base.config
    if base.has_prefix and config.pre_seq_len != length:
        raise ValueError(
            f"{file}: pre_seq_len is {length}, the model was built with {config.pre_seq_len}"
        )
    if base.has_prefix and bool(config.prefix_projection) != bool(projection):
        raise ValueError(
            f"{file}: prefix_projection is {bool(projection)}, the model was built with "
            f"{bool(config.prefix_projection)}"
        )
    before = config.pre_seq_len, config.prefix_projection
    config.pre_seq_len, config.prefix_projection = length, bool(projection)
    try:
        if not base.has_prefix:
            base.set_prefix(fresh_prefix(prefix_shapes(config), seed=0), fresh=True)
            added = True
        else:
            added = False
        try:
            base.transformer.prefix_encoder.load_state_dict(arrays)
        except ValueError:
            if added:
                base.core.remove_prefix()
                base.has_prefix, base.prefix_is_fresh = False, False
                base.set_trainable([])
            raise
    except ValueError as error:
        config.pre_seq_len, config.prefix_projection = before
        raise ValueError(f"{directory}: {error}") from None
    return model


def _unwrapped(
    model: ChatGLMForConditionalGeneration | PeftModel,
) -> ChatGLMForConditionalGeneration:
    return model.get_base_model() if isinstance(model, PeftModel) else model
