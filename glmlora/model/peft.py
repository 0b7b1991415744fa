"""A model with adapters, as PEFT has it: the wrapper `PeftModel`, and `get_peft_model`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, overload

import numpy as np

from .. import _core, tell
from ..families.vendored import TEMPLATES
from ..files.owner import owned
from ..files.tensor import Tensor
from ..generation.config import GenerationConfig
from ..generation.labels import AT_ONCE, Classification, mean_of, queries_of
from ..names import did_you_mean
from ..tables.job import predict_table
from ..task import Task
from .adapter import (
    Adapter,
    checked_merge,
    fitting,
    fresh_adapter,
    read_adapter,
    write_adapter,
)
from .adapter_config import (
    HUB,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    TaskType,  # noqa: F401  scripts look for it beside LoraConfig
    unknown_argument,
)
from .configuration import ChatGLMConfig
from .converted import converted
from .device import Device
from .initial import PARTS
from .keywords import NOT_IN_WRAPPER
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
from .prefix import load_prefix as load_prefix
from .prefix import save_prefix as save_prefix
from .replaced import exchange, keep, put_back, replace

# Keywords with which adapters are loaded elsewhere.
_LOADING = frozenset(
    """torch_device torch_dtype dtype device_map max_memory offload_dir offload_folder offload_index
    offload_buffers use_safetensors trust_remote_code""".split()
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

    call.__signature__ = inspect.signature(method).replace(return_annotation="PeftModel")
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
    transformer: Transformer
    trainable_names: list[str]
    name_or_path: str | None

    def __init__(
        self,
        model: ChatGLMForConditionalGeneration,
        peft_config: LoraConfig | PrefixTuningConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        seed: int | None = None,
    ):
        """See `get_peft_model`."""
        _check_base(model)
        _check_config(peft_config)
        self._wrap(model, peft_config, adapter_name)
        if isinstance(peft_config, PrefixTuningConfig):
            _attach_prefix(model, peft_config, seed)
            return
        if any(is_lora(n) for n in model.core.names()):
            raise ValueError(
                "model: has a LoRA adapter already; unload() or merge_and_unload() it first"
            )
        if peft_config.base_model_name_or_path is None:
            named = model.name_or_path or model.config.get("_name_or_path")
            peft_config.base_model_name_or_path = named or None
        self._adapters[adapter_name] = fresh_adapter(model, peft_config, seed)
        self._attach(adapter_name)

    def _wrap(
        self,
        model: ChatGLMForConditionalGeneration,
        config: LoraConfig | PrefixTuningConfig,
        adapter_name: str,
    ) -> None:
        _check_adapter_name(adapter_name)
        self._base = model
        self._base_template, self._base_task = model.prompt_template, model.task
        self._adapters: dict[str, Adapter] = {}
        self._aside: dict[str, Any] = {}  # of the active adapter while it is disabled
        self.peft_config: dict[str, LoraConfig | PrefixTuningConfig] = {adapter_name: config}
        self._active = adapter_name

    @property
    def active_adapter(self) -> str:
        """The name of the adapter that computes; `set_adapter` chooses it."""
        return self._active

    @property
    def base_model(self) -> _Tuner:
        """`.base_model.model` is the base, as in PEFT."""
        return _Tuner(self._base)

    @property
    def generation_config(self) -> GenerationConfig:
        """The base's; setting it sets the base's."""
        return self._base.generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        self._base.generation_config = config

    def get_base_model(self) -> ChatGLMForConditionalGeneration:
        """The base that was wrapped, the adapter still in it."""
        return self._base

    if not TYPE_CHECKING:  # checkers know what is declared here, and refuse the rest

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__") or name == "_base":
                raise AttributeError(name)
            if name in NOT_IN_WRAPPER:
                raise AttributeError(
                    f"PeftModel.{name} is not supported by this release{NOT_IN_WRAPPER[name]}"
                )
            try:
                return getattr(self._base, name)
            except AttributeError as error:
                raise AttributeError(f"{error}{did_you_mean(name, dir(self))}") from None

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._base)})

    # Reading and making adapters

    @classmethod
    def from_pretrained(
        cls,
        model: ChatGLMForConditionalGeneration,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Attach the adapter in the directory `model_id` (or its `subfolder`) to `model`, in place.

        is_trainable: continue its training. config: in place of the directory's. Names of tensors
        may have the parts that wrappers put in (`_orig_mod`, `module`) and any adapter's name.
        An adapter is float32, where its model is, and in the model's memory; so
        `autocast_adapter_dtype`, `ephemeral_gpu_offload`, `low_cpu_mem_usage`, `torch_device`,
        `torch_dtype`, `dtype`, `device_map` and keywords of downloads are accepted and mean nothing
        (the first two of the base: give them to AutoModel). key_mapping is refused.

        Raises ValueError for a directory that is no adapter, an adapter for another model or of
        another kind, and tensors that are missing, surplus or misshaped; an adapter whose B is all
        zero gives a warning.
        """
        if isinstance(model, PeftModel):
            model.load_adapter(
                model_id, adapter_name, is_trainable, key_mapping=key_mapping, subfolder=subfolder
            )
            model.set_adapter(adapter_name)
            return model
        _check_base(model)
        _check_loading("PeftModel.from_pretrained", key_mapping, kwargs)
        _check_flag("is_trainable", is_trainable)
        path = Path(model_id, subfolder or "")
        config = _lora_config(path) if config is None else config
        if not isinstance(config, LoraConfig):
            raise TypeError(f"config: expected a LoraConfig, got {type(config).__name__}")
        adapter = read_adapter(model, path, config)
        config = adapter.config
        config.inference_mode = not is_trainable
        if any(is_lora(n) for n in model.core.names()):
            tell.warn(
                "model: has an adapter already, whose place the new one takes; load_adapter and "
                "set_adapter of its PeftModel keep both"
            )
        wrapper = cls.__new__(cls)
        wrapper._wrap(model, config, adapter_name)
        wrapper._adapters[adapter_name] = adapter
        wrapper._attach(adapter_name)
        return wrapper

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: Any = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Read another adapter under a new name; `set_adapter` makes it the active one. Arguments
        and errors as above.
        """
        self._check_new(adapter_name)
        _check_loading("load_adapter", key_mapping, kwargs)
        _check_flag("is_trainable", is_trainable)
        path = Path(model_id, subfolder or "")
        config = _lora_config(path)
        adapter = read_adapter(self._base, path, config)
        adapter.config.inference_mode = not is_trainable
        self._adapters[adapter_name], self.peft_config[adapter_name] = adapter, adapter.config

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        seed: int | None = None,
    ) -> None:
        """A fresh adapter under a new name; `set_adapter` makes it the active one.
        `low_cpu_mem_usage` and `autocast_adapter_dtype` are accepted and mean nothing.
        """
        self._check_new(adapter_name)
        _check_config(peft_config)
        if not isinstance(peft_config, LoraConfig):
            raise TypeError(f"peft_config: expected a LoraConfig, got {type(peft_config).__name__}")
        self._adapters[adapter_name] = fresh_adapter(self._base, peft_config, seed)
        self.peft_config[adapter_name] = peft_config

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; where it was the active one, the first of the others is, with a
        warning. ValueError for the only one: `unload()` takes that off.
        """
        self._check_known(adapter_name)
        others = [name for name in self._adapters if name != adapter_name]
        if not others:
            raise ValueError(
                f"adapter_name: {adapter_name!r} is the only adapter; unload() takes it off"
            )
        if adapter_name == self.active_adapter:
            tell.warn(f"delete_adapter: {adapter_name!r} was active, {others[0]!r} is now")
            self._attach(others[0])
        del self._adapters[adapter_name], self.peft_config[adapter_name]

    def _check_new(self, adapter_name: str) -> None:
        _check_adapter_name(adapter_name)
        if adapter_name in self._adapters:
            raise ValueError(f"adapter_name: {adapter_name!r} is there already")

    def _check_known(self, adapter_name: str) -> None:
        if adapter_name not in self._adapters:
            raise ValueError(
                f"adapter_name: {adapter_name!r} is not one of {', '.join(self._adapters)}"
                f"{did_you_mean(str(adapter_name), self._adapters)}"
            )

    @property
    def active_adapters(self) -> list[str]:
        """The active adapter's name, in a list as in PEFT."""
        return [self.active_adapter]

    @property
    def active_peft_config(self) -> LoraConfig | PrefixTuningConfig:
        """The settings of the active adapter."""
        return self.peft_config[self.active_adapter]

    def _fetch(self) -> None:
        """Copy the active adapter's tensors out of the core."""
        adapter = self._adapters.get(self.active_adapter)
        if adapter is not None:
            if not any(is_lora(n) for n in self._base.core.names()):
                raise ValueError(
                    "the adapter was merged or unloaded: use the model that merge_and_unload() or "
                    "unload() returned"
                )
            adapter.tensors = {n: self._read(n) for n in adapter.names()}

    def _read(self, name: str) -> np.ndarray:
        """A tensor of the active adapter."""
        if name in self._aside:
            return np.array(self._aside[name].numpy(), np.float32)
        return self._base.core.read(name)

    def _attach(self, name: str) -> None:
        adapter, base = self._adapters[name], self._base
        base.set_trainable([])
        base._apply_trainable()
        base.core.remove_lora()
        replace(base, adapter.replaced())
        self._aside = {}
        for module, (_, scale) in adapter.targets.items():
            parts = [adapter.tensors.get(f"{module}.{part}") for part in PARTS]
            A, B, *more = parts
            base.core.add_lora(module, A, B, scale, float(adapter.config.lora_dropout), *more)
        base.core.enable_lora(True)
        base.active_adapter_name = self._active = name
        base.prompt_template, base.task = adapter.template or self._base_template, adapter.task
        if not adapter.config.inference_mode:
            base.set_trainable(adapter.names())

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make another adapter the active one: a name, or a list with one. It is trained if it was
        loaded for that, with fresh moments; not with `inference_mode`.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) != 1:
            raise ValueError(
                f"adapter_name: {names}: one adapter is active at a time in this release"
            )
        [name] = names
        self._check_known(name)
        if inference_mode:
            self._adapters[name].config.inference_mode = True
        if name != self.active_adapter:
            self._fetch()
            self._attach(name)
        elif inference_mode:
            self._base.set_trainable([])

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model computes as the base alone."""
        self.disable_adapter_layers()
        try:
            yield
        finally:
            self.enable_adapter_layers()

    def disable_adapter_layers(self) -> None:
        """Compute as the base alone until `enable_adapter_layers`."""
        self._need_lora("disable_adapter")
        self._base.core.enable_lora(False)
        self._aside = self._aside or exchange(self._base, self._base.replaced)
        self._base.prompt_template, self._base.task = self._base_template, self._base_task

    def enable_adapter_layers(self) -> None:
        """Compute with the active adapter again."""
        self._need_lora("enable_adapter_layers")
        self._base.core.enable_lora(True)
        exchange(self._base, self._aside)
        self._aside = {}
        adapter, base = self._adapters[self.active_adapter], self._base
        base.prompt_template, base.task = adapter.template or self._base_template, adapter.task

    def _need_lora(self, what: str) -> None:
        if not self._adapters:
            raise ValueError(f"{what}: this model has a P-Tuning prefix, not a LoRA adapter")

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> ChatGLMForConditionalGeneration:
        """Fold the active adapter (or those of `adapter_names`, one after another) into the base
        weights, W += scale * B A in the type of W (with DoRA each row times magnitude / norm, what
        is saved whole in its place); returns the base.

        safe_merge: ValueError, before anything is changed, where a merged weight would not be
        finite. `progressbar` is accepted and means nothing.
        """
        self._need_lora("merge_and_unload")
        _check_flag("safe_merge", safe_merge)
        names = (
            [self.active_adapter] if adapter_names is None else list(dict.fromkeys(adapter_names))
        )
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names: expected a list of names, got {adapter_names!r}")
        for name in names:
            self._check_known(name)
        self._fetch()
        if len(names) > 1:
            for name in names:
                if self._adapters[name].replaced():
                    raise ValueError(
                        f"adapter_names: {name!r} has base weights of its own (modules_to_save, or "
                        "init_lora_weights), which cannot be merged beside others"
                    )
        if safe_merge:
            checked_merge(self._base, [self._adapters[name] for name in names])
        for name in names:
            modules = list(self._adapters[name].targets)
            if name != self.active_adapter:
                self._attach(name)
            self._base.set_trainable([])
            self._base._apply_trainable()
            self.enable_adapter_layers()
            self._base.core.merge_lora()
            ends = ("weight", "bias") if self._adapters[name].config.lora_bias else ("weight",)
            self._base.weights_changed(f"{m}.{end}" for m in modules for end in ends)
        keep(self._base)
        return self._base

    def unload(self) -> ChatGLMForConditionalGeneration:
        """Take the adapter off; returns the base as it was."""
        self._need_lora("unload")
        self._fetch()
        self._base.set_trainable([])
        self._base._apply_trainable()
        self._base.core.remove_lora()
        put_back(self._base)
        self._base.prompt_template, self._base.task = self._base_template, self._base_task
        return self._base

    def classify(
        self,
        tokenizer: Any,
        table_or_texts: Any,
        labels: Sequence[Any] | None = None,
        at_once: int = AT_ONCE,
        *,
        template: str | None = None,
        role: str = "user",
        strict: bool = False,
        adapters: Sequence[str] | None = None,
    ) -> Classification:
        """The probability of each label as the answer to each row: see the base's `classify`.

        adapters: names of adapters, say of the folds of a training, whose probabilities are
        averaged, in place of the active one, which is active again afterwards.
        """
        if adapters is None:
            asked = {"template": template, "role": role, "strict": strict}
            return self._base.classify(tokenizer, table_or_texts, labels, at_once, **asked)
        if isinstance(adapters, str) or not adapters:
            raise TypeError(f"adapters: expected a list of names, got {adapters!r}")
        for name in adapters:
            self._check_known(name)
        before, found = self.active_adapter, []
        form = self.task, tokenizer, self._base.prompt_template
        queries = queries_of(table_or_texts, template, *form, strict)
        try:
            for name in adapters:
                self.set_adapter(name)
                one = self._base.classify(
                    tokenizer, queries, labels, at_once, role=role, strict=strict
                )
                found.append(one)
        finally:
            self.set_adapter(before)
        return mean_of(found)

    # The base's methods, with its signatures

    forward = _FromBase(Base.forward)
    backward = _FromBase(Base.backward)
    named_gradients = _FromBase(Base.named_gradients)
    zero_grad = _FromBase(Base.zero_grad)
    generate = _FromBase(Base.generate)
    stream_generate = _FromBase(Base.stream_generate)
    chat = _FromBase(Base.chat)
    batch_chat = _FromBase(Base.batch_chat)
    features = _FromBase(Base.features)
    predict_table = predict_table
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

    def set_prompt_template(self, template: str) -> None:
        """Say what the active adapter (or the prefix) is trained with, "auto" or "vendored": chats
        take it, and it is saved.
        """
        if template not in TEMPLATES:
            raise ValueError(f"template: expected one of {', '.join(TEMPLATES)}, got {template!r}")
        self._base.prompt_template = template
        if self._adapters:
            self._adapters[self.active_adapter].template = template

    @property
    def task(self) -> Task | None:
        """What the active adapter (or the prefix) was trained for, None where that is not known:
        chats and predictions take it, and it is saved.
        """
        return self._base.task

    @task.setter
    def task(self, task: Task | None) -> None:
        self._base.task = task
        if self._adapters:
            self._adapters[self.active_adapter].task = task

    def state_dict(self) -> dict[str, np.ndarray]:
        """The active adapter's tensors, float32, under the names that its file has."""
        read = self._base.core.read
        if not self._adapters:
            start = prefix_of(self._base.config)
            return {n: read(n) for n in self._base.core.names() if n.startswith(start)}
        adapter = self._adapters[self.active_adapter]
        return {f: self._read(n) for n in adapter.names() for f in adapter.file_names(n)}

    @property
    def adapter_names(self) -> list[str]:
        """The core's names of the active adapter's weights, in the order in which they train."""
        return self._adapters[self.active_adapter].names() if self._adapters else []

    @property
    def is_lora(self) -> bool:
        """Whether it has LoRA adapters, not a prefix."""
        return bool(self._adapters)

    def adapter_state(self, adapter_name: str) -> dict[str, np.ndarray]:
        """An adapter's tensors, float32, under the names that its file has."""
        self._need_lora("adapter_state")
        self._check_known(adapter_name)
        self._fetch()
        return self._adapters[adapter_name].state()

    def set_adapter_state(self, adapter_name: str, tensors: Mapping[str, Any]) -> None:
        """Set all tensors of an adapter, named as in its file. ValueError naming those that do not
        fit, with nothing changed.
        """
        self._need_lora("set_adapter_state")
        self._check_known(adapter_name)
        adapter, core = self._adapters[adapter_name], self._base.core
        adapter.take(fitting("state_dict", self._base, adapter, tensors))
        if adapter_name == self.active_adapter:
            saved = {name: Tensor(adapter.tensors[name]) for name in adapter.saved}
            if self._aside:
                self._aside |= saved
            else:
                exchange(self._base, saved)
            for name in adapter.names():
                if name not in saved:
                    core.write(name, adapter.tensors[name])

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
        **hub: Any,
    ) -> None:
        """Write the active adapter (others: in folders of their names) or the prefix, atomically.

        LoRA: `adapter_config.json` and `adapter_model.safetensors`, or `.bin` with
        safe_serialization=False. Prefix: see `save_prefix`. selected_adapters: only these.
        path_initial_model_for_weight_conversion: the folder of an adapter of "pissa" or "olora" as
        it began: it is then written as plain LoRA of twice the rank over the base as it was.
        is_main_process=False writes nothing. `max_shard_size` and keywords of uploads mean nothing,
        save_embedding_layers=True and push_to_hub=True are refused. Raises OSError naming the file.
        """
        for name, value in {"save_embedding_layers": save_embedding_layers is True, **hub}.items():
            if name in ("save_embedding_layers", "push_to_hub") and value:
                raise ValueError(f"{name}: is not supported by this release")
            if name not in {*HUB, "save_embedding_layers", "push_to_hub", "max_shard_size"}:
                known = inspect.signature(PeftModel.save_pretrained).parameters
                raise unknown_argument("PeftModel.save_pretrained", name, known)
        _check_flag("safe_serialization", safe_serialization)
        _check_flag("is_main_process", is_main_process)
        if not is_main_process:
            return
        if not self._adapters:
            save_prefix(self._base, save_directory)
            return
        names = list(self._adapters) if selected_adapters is None else list(selected_adapters)
        for name in names:
            self._check_known(name)
        directory = Path(save_directory)
        if directory.exists() and not directory.is_dir():
            raise NotADirectoryError(f"{directory}: is a file, expected a directory")
        self._fetch()
        directory.mkdir(parents=True, exist_ok=True)
        with owned(directory, shared=True):
            for name in names:
                adapter, initial = self._adapters[name], path_initial_model_for_weight_conversion
                write_adapter(
                    directory if name == self.active_adapter else directory / name,
                    adapter if initial is None else converted(self._base, adapter, initial),
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
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    *,
    seed: int | None = None,
) -> PeftModel:
    """Attach a fresh LoRA adapter, or a fresh P-Tuning prefix, and make it what is trained.

    A is uniform within 1/sqrt(in) (Kaiming, a = sqrt 5) and B zero, so the model computes what it
    did before. The numbers follow `seed`, or `glmlora.set_seed`. With `inference_mode` nothing is
    trained. revision: kept in the settings. `autocast_adapter_dtype` and `low_cpu_mem_usage` are
    accepted and mean nothing, mixed=True is refused. Raises ValueError naming the field.
    """
    if isinstance(model, PeftModel):
        raise TypeError(
            "model: expected a base model, got a PeftModel; use add_adapter and set_adapter"
        )
    if mixed:
        raise ValueError("mixed: adapters of several kinds are not supported by this release")
    _check_config(peft_config)
    if revision is not None and isinstance(peft_config, LoraConfig):
        peft_config.revision = revision
    return PeftModel(model, peft_config, adapter_name, seed=seed)


def _attach_prefix(
    model: ChatGLMForConditionalGeneration, config: PrefixTuningConfig, seed: int | None
) -> None:
    model.config.pre_seq_len = config.num_virtual_tokens
    model.config.prefix_projection = config.prefix_projection
    arrays = fresh_prefix(prefix_shapes(model.config), seed, float(config.init_std))
    model.set_prefix(arrays, fresh=True)
    if config.inference_mode:
        model.set_trainable([])


def _check_base(model: Any) -> None:
    if not isinstance(model, ChatGLMForConditionalGeneration):
        raise TypeError(
            "model: expected a model of glmlora.AutoModel.from_pretrained, got "
            f"{type(model).__name__}"
        )


def _check_config(config: Any) -> None:
    if not isinstance(config, LoraConfig | PrefixTuningConfig):
        raise TypeError(f"peft_config: expected a LoraConfig, got {type(config).__name__}")


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def _check_adapter_name(name: Any) -> None:
    if not isinstance(name, str) or not name or "." in name or "/" in name or os.sep in name:
        raise ValueError(f"adapter_name: expected a word without dots and slashes, got {name!r}")


def _check_loading(function: str, key_mapping: Any, keywords: Mapping[str, Any]) -> None:
    """Errors for keywords of reading an adapter that there are not."""
    if key_mapping:
        raise ValueError("key_mapping: is not supported by this release")
    for name in keywords:
        if name not in HUB | _LOADING:
            known = inspect.signature(PeftModel.from_pretrained).parameters
            raise unknown_argument(function, name, [*known, *_LOADING])


def _lora_config(path: Path) -> LoraConfig:
    config = PeftConfig.from_pretrained(path)
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"{path}: peft_type {config.peft_type!r} is not supported by this release as PEFT "
            "stores it, only 'LORA'; glmlora.load_prefix reads P-Tuning prefixes as THUDM does"
        )
    return config
