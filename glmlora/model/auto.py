"""`AutoModel.from_pretrained(directory)`: from a model directory to a model."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import families
from ..files.checkpoint import load_checkpoint
from ..files.hub import check_keywords, model_directory
from ..files.small import GENERATION
from ..files.write import read_json
from ..generation.config import GenerationConfig
from ..progress import bar
from ..task import task_in
from . import device as devices
from .configuration import DEFAULTS, ChatGLMConfig, is_key
from .keywords import MODEL_NEUTRAL, MODEL_REASONS, ModelKeywords
from .modeling import ChatGLMForConditionalGeneration
from .parameters import parse_dtype
from .quantization import GROUP_SIZE, is_quantized
from .saving import Opened
from .template import read_template

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AutoModel:
    """`AutoModel.from_pretrained(directory)` -> ChatGLMForConditionalGeneration."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        config: ChatGLMConfig | None = None,
        *,
        torch_dtype: Any = None,
        dtype: Any = None,
        device: Any = None,
        device_map: Any = None,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        subfolder: str = "",
        use_safetensors: bool | None = None,
        family: str | None = None,
        rope_mode: str | None = None,
        compute_dtype: str | None = None,
        generation_config: GenerationConfig | None = None,
        **others: Unpack[ModelKeywords],
    ) -> ChatGLMForConditionalGeneration:
        """Map the checkpoint in a local directory (or in `subfolder` of it) and bind it in place,
        in the type it is stored in.

        config: in place of its config.json, e.g. one with `pre_seq_len` set. torch_dtype or
        dtype: cast to it ("float16", "bfloat16", "float32"; "auto" and None: as stored).
        load_in_8bit, load_in_4bit: as `quantize(8)` and `quantize(4, group_size=32)`. device: as
        `to` takes it, or "auto"; device_map: the same, or a dict whose values are one device.
        use_safetensors: True takes no other files, False only torch's. family, rope_mode: see
        ChatGLMConfig. compute_dtype: of the large products, "float32", "bfloat16", "int16" or
        "int8" (over int8 and int4 weights); default "auto", see model/device.py;
        `model.compute_dtype` is the one in use.
        generation_config: in place of its generation_config.json.
        others: keys of config.json to replace (`pre_seq_len=128`), and keywords of transformers
        that mean nothing here: those about downloads and code (NOTHING in files/hub.py), and
        MODEL_NEUTRAL in keywords.py.

        Raises OSError for a directory that is not there, ValueError naming file, tensor or field
        for anything wrong in it, and for a keyword of transformers that is not supported, TypeError
        for an unknown keyword.
        """
        for name, value in (("load_in_8bit", load_in_8bit), ("load_in_4bit", load_in_4bit)):
            if value not in (True, False, None):
                raise ValueError(f"{name}: expected True or False, got {value!r}")
        if use_safetensors not in (True, False, None):
            raise ValueError(f"use_safetensors: expected True or False, got {use_safetensors!r}")
        if load_in_8bit and load_in_4bit:
            raise ValueError("load_in_8bit, load_in_4bit: expected one of them")
        if device_map is not None and device is None:
            device = _one_device(device_map)
        kind = _dtype(torch_dtype, dtype)
        directory = model_directory(pretrained_model_name_or_path, subfolder)
        known = inspect.signature(cls.from_pretrained).parameters
        if not isinstance(config, ChatGLMConfig | None):
            raise TypeError(f"config: expected a ChatGLMConfig, got {type(config).__name__}")
        given = {} if config is None else config.to_dict()
        keys = {
            k: v for k, v in others.items() if k not in MODEL_NEUTRAL and (k in given or is_key(k))
        }
        rest = {k: v for k, v in others.items() if k not in keys}
        if config is None:
            stored = _stored_keys(directory)
            keys |= {k: v for k, v in rest.items() if k in stored and k not in MODEL_REASONS}
            rest = {k: v for k, v in rest.items() if k not in keys}
        check_keywords(
            f"{cls.__name__}.from_pretrained",
            rest,
            [*known, *DEFAULTS],
            MODEL_NEUTRAL,
            MODEL_REASONS,
        )
        if config is None:
            config = ChatGLMConfig.from_pretrained(directory, family=family, **keys)
        else:
            for name, value in keys.items():
                setattr(config, name, value)
        if family is not None:
            config.family = families.of(family).name
        if rope_mode is not None:
            config.rope_mode = rope_mode
        prefer = "bin" if use_safetensors is False else "safetensors"
        tensors = load_checkpoint(directory, prefer, _progress, only=use_safetensors is not None)
        try:
            model = ChatGLMForConditionalGeneration(config, tensors, compute_dtype)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None
        model.name_or_path = os.fspath(Path(pretrained_model_name_or_path, subfolder or ""))
        model.prompt_template = read_template(directory) or "auto"
        model.task = task_in(directory)
        file, stored = directory / GENERATION, {}
        if file.exists():
            said = {n: v for n, v in keys.items() if n in GenerationConfig.__dataclass_fields__}
            model.generation_config = GenerationConfig.from_pretrained(directory, config, **said)
            stored = read_json(file, dict)
        before = model.generation_config
        if generation_config is not None:
            if not isinstance(generation_config, GenerationConfig):
                raise TypeError(f"generation_config: got a {type(generation_config).__name__}")
            model.generation_config = generation_config
        model.opened = Opened(directory, stored, before)
        bits = 8 if load_in_8bit else 4 if load_in_4bit else 0
        if bits and not is_quantized(config, bits):
            model.quantize(bits, group_size=GROUP_SIZE if bits == 4 else None)
        if kind is not None:
            model._cast(kind)
        place = devices.find(device, model.device)
        return model if place == model.device else model._move(place)


class AutoModelForCausalLM(AutoModel):
    """The same as AutoModel."""


def _stored_keys(directory: Path) -> dict[str, Any]:
    """Keys of its config.json; whether it can be read at all is told by who reads it."""
    try:
        return read_json(directory / "config.json", dict)
    except (OSError, ValueError):
        return {}


def _one_device(device_map: Any) -> Any:
    """The one device of a `device_map`. ValueError for a model shared out over several."""
    if device_map in ("balanced", "balanced_low_0", "sequential"):
        return "auto"
    if not isinstance(device_map, Mapping):
        return device_map
    places = {str(place): place for place in device_map.values()}
    if len(places) > 1:
        raise ValueError(
            f"device_map: names {', '.join(places)}; a model is on one device here, e.g. "
            'device_map="auto"'
        )
    return next(iter(places.values()), None)


def _dtype(torch_dtype: Any, dtype: Any) -> str | None:
    """The file type name of the two names of one argument."""
    kinds = [parse_dtype(torch_dtype), parse_dtype(dtype)]
    if None not in (torch_dtype, dtype) and kinds[0] != kinds[1]:
        raise ValueError(f"torch_dtype is {torch_dtype!r}, dtype is {dtype!r}: expected one")
    return kinds[0] or kinds[1]


def _progress(names: list[str]) -> Iterable[str]:
    return bar(names, desc="Loading checkpoint shards")
