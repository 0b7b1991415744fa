"""`AutoModel.from_pretrained(directory)`: from a model directory to a model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from .. import families
from ..files.checkpoint import load_checkpoint
from ..files.small import GENERATION
from ..files.write import model_directory, read_json
from ..generation.config import GenerationConfig
from . import device as devices
from .configuration import ChatGLMConfig
from .modeling import ChatGLMForConditionalGeneration
from .parameters import parse_dtype
from .quantization import GROUP_SIZE, is_quantized
from .saving import Opened
from .template import read_template


class AutoModel:
    """`AutoModel.from_pretrained(directory)` -> ChatGLMForConditionalGeneration."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        config: ChatGLMConfig | None = None,
        trust_remote_code: bool = False,
        torch_dtype: Any = None,
        dtype: Any = None,
        device: Any = None,
        device_map: Any = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        empty_init: bool = True,
        low_cpu_mem_usage: bool = True,
        family: str | None = None,
        rope_mode: str | None = None,
        compute_dtype: str | None = None,
    ) -> ChatGLMForConditionalGeneration:
        """Map the checkpoint in the local directory `path` and bind it in place, in the type it is
        stored in.

        config: in place of `path/config.json`, e.g. one with `pre_seq_len` set. torch_dtype or
        dtype: cast to it ("float16", "bfloat16", "float32"). load_in_8bit, load_in_4bit: as
        `quantize(8)` and `quantize(4, group_size=32)`. device: as `to` takes it, or
        "auto". family, rope_mode: see ChatGLMConfig.
        compute_dtype: of the large products, "float32", "bfloat16" or "int8" (over int8 weights);
        default "auto", see model/device.py; `model.compute_dtype` is the one in use.
        `trust_remote_code`, `revision`, `cache_dir`, `empty_init` and `low_cpu_mem_usage` are
        accepted and mean nothing: nothing is downloaded and no code of a model directory is
        executed.

        Raises OSError for a directory that is not there, ValueError naming file, tensor or field
        for anything wrong in it, TypeError for an unknown keyword.
        """
        if load_in_8bit and load_in_4bit:
            raise ValueError("load_in_8bit, load_in_4bit: expected one of them")
        if device_map is not None and device is None:
            device = (
                next(iter(device_map.values()), None)
                if isinstance(device_map, dict)
                else device_map
            )
        directory = model_directory(path)
        kind = parse_dtype(torch_dtype if dtype is None else dtype)
        if config is None:
            config = ChatGLMConfig.from_pretrained(directory, family=family)
        elif not isinstance(config, ChatGLMConfig):
            raise TypeError(f"config: expected a ChatGLMConfig, got {type(config).__name__}")
        if family is not None:
            config.family = families.of(family).name
        if rope_mode is not None:
            config.rope_mode = rope_mode
        tensors = load_checkpoint(directory, wrap=_progress)
        try:
            model = ChatGLMForConditionalGeneration(config, tensors, compute_dtype)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None
        model.name_or_path = os.fspath(path)
        model.prompt_template = read_template(directory) or "auto"
        file, stored = directory / GENERATION, {}
        if file.exists():
            model.generation_config = GenerationConfig.from_pretrained(directory, config)
            stored = read_json(file, dict)
        model.opened = Opened(directory, stored, model.generation_config)
        bits = 8 if load_in_8bit else 4 if load_in_4bit else 0
        if bits and not is_quantized(config, bits):
            model.quantize(bits, group_size=GROUP_SIZE if bits == 4 else None)
        if kind is not None:
            model._cast(kind)
        place = devices.find(device, model.device)
        return model if place == model.device else model._move(place)


class AutoModelForCausalLM(AutoModel):
    """The same as AutoModel."""


def _progress(names: list[str]) -> Iterable[str]:
    from tqdm import tqdm

    return tqdm(names, desc="Loading checkpoint shards")
