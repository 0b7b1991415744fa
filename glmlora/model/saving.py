"""What a model directory has beside its weights, written together with them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..files.checkpoint import save_sharded
from ..files.hub import check_keywords
from ..files.owner import owned
from ..files.small import GENERATION, copy_small_files
from ..files.tensor import Source, Tensors
from ..files.write import write_json
from ..generation.config import GenerationConfig
from ..task import Task, write_task
from ..tell import warn
from .configuration import ChatGLMConfig
from .keywords import SAVE_NEUTRAL, SAVE_REASONS
from .parameters import prefix_of
from .quantization import SCALE, QuantizedTensor
from .template import write_template


class Opened:
    """Where a model came from, and its generation_config.json as it was there.

    directory: absolute; None for a model that was not read from one. fields: of the file, {}
    without one. loaded: what became of them, so that a later change shows.
    """

    def __init__(
        self,
        directory: Path | None,
        fields: dict[str, Any],
        loaded: GenerationConfig,
    ):
        self.directory = None if directory is None else directory.absolute()
        self.fields = dict(fields)
        self.loaded = _plain(loaded)


class _Model(Protocol):
    config: ChatGLMConfig
    generation_config: GenerationConfig
    opened: Opened

    @property
    def dtype(self) -> str: ...

    prompt_template: str
    task: Task | None


_SAVE = ("save_directory", "is_main_process", "max_shard_size", "safe_serialization")


def check_saving(what: str, given: Mapping[str, Any]) -> None:
    """ValueError for a keyword of transformers' `save_pretrained` that is not supported, TypeError
    for an unknown one.
    """
    check_keywords(what, given, _SAVE, SAVE_NEUTRAL, SAVE_REASONS)


def weight_sources(model: Any) -> list[Source]:
    """The base weights of a model and its prefix as they are written, read when they are due."""
    listed = []
    for name in model.base_names():
        tensor = model._stored.get(name)
        if isinstance(tensor, QuantizedTensor):
            for key, part in ((name, tensor.integers), (name + SCALE, tensor.scale)):
                listed.append(Source(key, part.dtype, part.shape, lambda part=part: part))
            continue
        dtype, shape = model.stored_dtype(name), model.core.shape(name)
        listed.append(Source(name, dtype, shape, partial(model._tensor, name)))
    for name in model.core.names():
        if name.startswith(prefix_of(model.config)):
            get = partial(model.core.read, name)
            listed.append(Source(name, "F32", model.core.shape(name), get))
    return listed


def write_model(
    model: _Model,
    directory: str | os.PathLike[str],
    weights: Tensors,
    max_shard_size: int | str = "10GB",
    safetensors: bool = True,
) -> None:
    """Write `weights` and what stands beside them as a whole model directory, all of it or nothing.
    The directory is made where it is not there. Raises OSError naming the file.
    """
    os.makedirs(directory, exist_ok=True)
    with owned(directory, shared=True):
        save_sharded(
            directory,
            weights,
            max_shard_size,
            safetensors=safetensors,
            beside=lambda new: write_beside(model, new, Path(directory)),
        )


def write_beside(model: _Model, new: Path, target: Path) -> None:
    """Write into `new`, whose files will be put into `target`: config.json, generation_config.json
    with what was changed in memory, the prompt template, and the base's small files (see
    files/small.py).
    """
    source = model.opened.directory
    if source is not None and not source.is_dir():
        warn(f"{target}: saved without the tokenizer's files and code: {source} is no longer there")
    elif source is not None and not (target.exists() and os.path.samefile(source, target)):
        copy_small_files(source, new, target)
    model.config.torch_dtype = model.dtype
    if model.config.get("dtype") is not None:  # the key's newer name
        model.config.dtype = model.dtype
    write_json(new / "config.json", model.config.file_fields(new, target))
    fields = generation_fields(model)
    if fields:
        write_json(new / GENERATION, fields)
    write_template(new, model.prompt_template, usual="auto")
    write_task(new, model.task, target)


def generation_fields(model: _Model) -> dict[str, Any]:
    """generation_config.json as it was read, with what has changed since."""
    fields, before = dict(model.opened.fields), model.opened.loaded
    for name, value in _plain(model.generation_config).items():
        if value != before.get(name):
            fields[name] = value
            if value is None:
                del fields[name]
    return fields


def _plain(config: GenerationConfig) -> dict[str, Any]:
    """Its fields, in a form that JSON has."""
    return {
        name: value.tolist() if isinstance(value, np.ndarray | np.generic) else value
        for name, value in config.to_dict().items()
    }
