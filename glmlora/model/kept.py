"""Several adapters over one base at once: each of them is put aside in the core under a number, by
which a row of a cache has it. `glmlora serve` answers with all of them in one batch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..generation.config import GenerationConfig
from ..names import did_you_mean
from ..task import Task
from .adapter import read_adapter
from .adapter_config import LoraConfig, PeftConfig
from .configuration import ChatGLMConfig
from .modeling import ChatGLMForConditionalGeneration


@dataclass(frozen=True)
class Kept:
    """A model as callers name it: the base (number 0), or the base with an adapter. It has what
    prompts and settings need of a model; `base.core` computes.
    """

    name: str
    number: int
    base: ChatGLMForConditionalGeneration
    prompt_template: str
    task: Task | None

    @property
    def config(self) -> ChatGLMConfig:
        """The base's."""
        return self.base.config

    @property
    def generation_config(self) -> GenerationConfig:
        """The base's."""
        return self.base.generation_config


def keep_adapters(
    base: ChatGLMForConditionalGeneration,
    name: str,
    adapters: Mapping[str, str | os.PathLike[str]],
) -> dict[str, Kept]:
    """The base as `name`, and adapters by their names, from directories. The base is on its device
    already, and stays there. ValueError naming an adapter that is no LoRA adapter of it, has base
    weights of its own, or a name that is taken.
    """
    base._apply_trainable()
    found = {name: Kept(name, 0, base, base.prompt_template, base.task)}
    for adapter_name, directory in adapters.items():
        if adapter_name in found:
            raise ValueError(f"adapter {adapter_name!r}: the name is the base model's already")
        path = Path(directory)
        config = PeftConfig.from_pretrained(path)
        if not isinstance(config, LoraConfig):
            raise ValueError(
                f"adapter {adapter_name!r}: {path} has peft_type {config.peft_type!r}, expected "
                "'LORA'"
            )
        adapter = read_adapter(base, path, config)
        if adapter.replaced():
            raise ValueError(
                f"adapter {adapter_name!r}: {path} has base weights of its own (modules_to_save, "
                "or init_lora_weights), which no other adapter could be beside: serve it merged "
                "(glmlora merge)"
            )
        adapter.attach(base.core)
        number = base.core.keep_lora()
        template = adapter.template or base.prompt_template
        found[adapter_name] = Kept(adapter_name, number, base, template, adapter.task)
    return found


def chosen(kept: Mapping[str, Kept], name: str) -> Kept:
    """The model of a name. LookupError naming the nearest that there is."""
    if name not in kept:
        near = did_you_mean(name, kept)
        raise LookupError(f"model: there is no {name!r:.80}{near}; there are {', '.join(kept)}")
    return kept[name]
