"""P-Tuning v2 prefixes in directories, as THUDM's scripts save them: `config.json` with
`pre_seq_len`, and `pytorch_model.bin` with the tensors of the prefix encoder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from ..families.recognition import OWN_KEY, check_adapter
from ..files.checkpoint import load_state_dict, read_json
from ..task import check_asked, task_in
from .configuration import innermost
from .modeling import ChatGLMForConditionalGeneration
from .parameters import fresh_prefix, prefix_of, prefix_shapes, without_wrappers
from .saving import write_model
from .template import read_template


class HasBase(Protocol):
    """A wrapper of a model."""

    def get_base_model(self) -> ChatGLMForConditionalGeneration: ...


M = TypeVar("M", bound=ChatGLMForConditionalGeneration | HasBase)


def save_prefix(
    model: ChatGLMForConditionalGeneration | HasBase, directory: str | os.PathLike[str]
) -> None:
    """Write a P-Tuning prefix as THUDM's scripts do: `pytorch_model.bin` (float32) and
    `config.json`.

    Raises ValueError for a model without prefix, OSError naming the file.
    """
    model = _base_of(model)
    if not model.has_prefix:
        raise ValueError("save_prefix: this model has no P-Tuning prefix")
    read = model.core.read
    names = [n for n in model.core.names() if n.startswith(prefix_of(model.config))]
    write_model(model, directory, {n: read(n) for n in names}, safetensors=False)


def load_prefix(model: M, directory: str | os.PathLike[str]) -> M:
    """Attach the P-Tuning prefix in `directory`; returns the model.

    `pre_seq_len` and `prefix_projection` come from the directory's config.json; a model that was
    built with others, or tensors of other sizes, raise ValueError with both numbers.
    """
    base, directory = _base_of(model), Path(directory)
    start = prefix_of(base.config)
    file = directory / "config.json"
    fields = read_json(file, dict) if file.exists() else {}
    arrays = {
        plain.removeprefix(start): np.ascontiguousarray(a, np.float32)
        for n, a in load_state_dict(directory).items()
        if (plain := without_wrappers(n)).startswith(start)
    }
    if "embedding.weight" not in arrays:
        raise ValueError(
            f"{directory}: holds no {start}embedding.weight: not a P-Tuning checkpoint"
        )
    length = fields.get("pre_seq_len") or arrays["embedding.weight"].shape[0]
    projection = fields.get("prefix_projection", "trans.0.weight" in arrays)
    projection = innermost(projection)
    config = base.config
    check_adapter(directory, fields.get("_name_or_path"), config.family, fields.get(OWN_KEY))
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
    base.prompt_template = read_template(directory) or base.prompt_template
    base.task = task_in(directory)
    check_asked(base.task, base=base.opened.directory)
    return model


def _base_of(model: ChatGLMForConditionalGeneration | HasBase) -> ChatGLMForConditionalGeneration:
    if isinstance(model, ChatGLMForConditionalGeneration):
        return model
    return model.get_base_model()
