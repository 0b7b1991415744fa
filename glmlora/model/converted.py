"""Adapters of PiSSA and OLoRA as plain LoRA over the base that they began with.

With W' = W - s B0 A0 beneath the adapter, W' + s B A = W + s (B A - B0 A0): the rank is doubled.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import numpy as np

from ..files.checkpoint import read_weights
from .adapter import Adapter, adapter_file, fitting, plain_names
from .initial import mutates
from .modeling import ChatGLMForConditionalGeneration


def converted(
    model: ChatGLMForConditionalGeneration, adapter: Adapter, initial: str | os.PathLike[str]
) -> Adapter:
    """The adapter as plain LoRA; initial: the folder of the same one, saved before its training.

    Raises ValueError where it is no adapter of PiSSA or OLoRA, or the folder's is another one.
    """
    config = adapter.config
    if not mutates(config):
        raise ValueError(
            "path_initial_model_for_weight_conversion: is for adapters of 'pissa' and 'olora', "
            f"this one has init_lora_weights {config.init_lora_weights!r}"
        )
    if config.use_dora:
        raise ValueError(
            "path_initial_model_for_weight_conversion: a DoRA adapter has no such form"
        )
    file = adapter_file(Path(initial))
    first = copy.copy(adapter)
    first.take(fitting(file, model, adapter, plain_names(file, read_weights(file))))
    plain = copy.copy(config)
    plain.init_lora_weights = True
    grown = 2**0.5 if config.use_rslora else 2  # of alpha: the scale stays
    plain.r, plain.lora_alpha = 2 * config.r, grown * config.lora_alpha
    plain.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    plain.alpha_pattern = {name: grown * alpha for name, alpha in config.alpha_pattern.items()}
    result = copy.copy(adapter)
    result.config, result.beneath = plain, {}
    result.targets = {m: (2 * rank, scale) for m, (rank, scale) in adapter.targets.items()}
    result.tensors = dict(adapter.tensors)
    for module in adapter.targets:
        a, b = (f"{module}.lora_{part}.weight" for part in "AB")
        result.tensors[a] = np.concatenate([adapter.tensors[a], first.tensors[a]])
        result.tensors[b] = np.concatenate([adapter.tensors[b], -first.tensors[b]], axis=1)
    return result
