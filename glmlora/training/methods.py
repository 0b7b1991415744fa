"""What a run trains: LoRA, P-Tuning v2, freeze or full. How each is set up, written and read back.

method     trained                       files of a save
lora       A, B of the target linears,   adapter_config.json, adapter_model.safetensors (or .bin)
           and what else the adapter has
p_tuning   the prefix encoder            pytorch_model.bin, config.json, tokenizer
freeze     chosen blocks                 pytorch_model.bin (trained tensors), config.json, tokenizer
full       every base weight             a complete model directory
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import families, tell
from ..files.checkpoint import load_state_dict
from ..files.small import REPLACED
from ..files.staging import staged
from ..files.torchfile import write_torch
from ..model.initial import mutates
from ..model.modeling import ChatGLMForConditionalGeneration
from ..model.parameters import PEFT_PREFIX, is_lora, prefix_of
from ..model.peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
    load_prefix,
    save_prefix,
)
from ..model.saving import write_beside
from ..model.template import read_template
from ..names import listed
from ..task import Task, task_in
from .arguments import FinetuningArguments
from .classes import SCORES

Model = ChatGLMForConditionalGeneration | PeftModel
METHODS = ("lora", "p_tuning", "freeze", "full")
EVALUATED = ("loss", *SCORES)


class Trainee:
    """A model ready to be trained.

    kind   one of METHODS
    model  what the user gets back: the base, or the PeftModel around it
    base   the ChatGLMForConditionalGeneration
    names  the core's names of the trained weights, in the order of its flat block
    """

    def __init__(self, kind: str, model: Model, tokenizer: Any, names: Sequence[str]):
        self.kind = kind
        self.model = model
        self.base = unwrapped(model)
        self.tokenizer = tokenizer
        self.names = list(names)
        self.base.set_trainable(self.names)
        self.template_before, self.task_before = self.base.prompt_template, self.base.task

    def save(self, directory: str | os.PathLike, safetensors: bool = True) -> None:
        """Write the trained weights into `directory`, each file atomically.

        safetensors: form of an adapter's or whole model's weights; `.bin` otherwise. Raises OSError
        naming the file.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self.kind == "lora":
            self.model.save_pretrained(directory, safe_serialization=safetensors)
            return
        if self.kind == "full":
            self.base.save_pretrained(directory, safe_serialization=safetensors)
        elif self.kind == "p_tuning":
            save_prefix(self.base, directory)
        else:
            core = self.base.core
            listed = [(n, "F32", core.shape(n), lambda n=n: core.read(n)) for n in self.names]
            with staged(directory, stale=REPLACED) as new:
                write_torch(new / "pytorch_model.bin", listed)
                write_beside(self.base, new, directory)
        self.tokenizer.save_pretrained(directory)

    def set_template(self, template: str) -> None:
        """Say what it is trained with; a warning where it was trained with another before."""
        before = self.template_before
        if before != template:
            if before != "auto":
                tell.warn(
                    f"template: the model was trained with {before!r}, this run has {template!r}"
                )
            if isinstance(self.model, PeftModel):
                self.model.set_prompt_template(template)
            self.base.prompt_template = template

    def set_task(self, task: Task) -> None:
        """Say what it is trained for: saves have it beside them."""
        self.model.task = task

    def note_scores(self, record: Mapping[str, Any]) -> None:
        """Say which scores, of a log record, the weights have as they are."""
        scores = {name: record[f"eval_{name}"] for name in EVALUATED if f"eval_{name}" in record}
        if self.model.task is not None:
            self.set_task(replace(self.model.task, scores=scores))

    def load(self, directory: str | os.PathLike) -> None:
        """Set the trained weights to those that `save` wrote into `directory`.

        Raises ValueError naming a weight that is missing, surplus or misshaped.
        """
        stored = {n.removeprefix(PEFT_PREFIX): a for n, a in load_state_dict(directory).items()}
        core, config = self.base.core, self.base.config
        if self.kind == "lora" and config.tied_head:  # which files have under both of its names
            stored.pop(config.tensor_names["output_layer"] + ".weight", None)
        missing = [n for n in self.names if n not in stored]
        surplus = [n for n in stored if n not in set(self.names)]
        if missing or surplus:
            raise ValueError(
                f"{directory}: does not fit what is trained: missing {', '.join(missing) or 'none'}"
                f"; not expected {', '.join(surplus) or 'none'}"
            )
        for name in self.names:
            if stored[name].shape != core.shape(name):
                raise ValueError(
                    f"{directory}: {name}: expected shape {core.shape(name)}, "
                    f"got {stored[name].shape}"
                )
        for name in self.names:
            core.write(name, np.ascontiguousarray(stored[name], np.float32))

    def release(self) -> None:
        """End training: give gradients and moments back, dropout off. The trained values stay."""
        self.base.set_trainable([])
        self.base._apply_trainable()
        self.base.cached_row = None  # of a chat with other weights
        self.model.eval()

    def detach(self) -> None:
        """Take a LoRA adapter or prefix off again, after `release`: the base is as it was."""
        if self.kind == "lora":
            self.model.unload()
        elif self.kind == "p_tuning":
            self.base.core.remove_prefix()
            self.base.has_prefix, self.base.config.pre_seq_len = False, None
            self.base.prompt_template, self.base.task = self.template_before, self.task_before

    def describe(self) -> dict[str, Any]:
        """What of the method decides the result of a run; compared when a run is resumed."""
        facts: dict[str, Any] = {"finetuning_type": self.kind, "model_dtype": self.base.dtype}
        core = self.base.core
        if self.kind == "lora":
            config = self.model.peft_config[self.model.active_adapter]
            facts["lora_rank"] = config.r
            facts["lora_alpha"] = float(config.lora_alpha)
            facts["lora_dropout"] = float(config.lora_dropout)
            linears = {n.rpartition(".lora_")[0] for n in self.names if is_lora(n)}
            facts["lora_target"] = sorted(linears)
            # None is what checkpoints have that were saved before there were these
            facts["use_dora"] = config.use_dora or None
            facts["init_lora_weights"] = config.init_lora_weights if mutates(config) else None
        elif self.kind == "p_tuning":
            facts["pre_seq_len"] = self.base.config.pre_seq_len
            facts["prefix_projection"] = bool(self.base.config.prefix_projection)
        if self.kind != "full":
            facts["base_sha256"] = _fingerprint(self.base)
        facts["trained_shapes"] = [[n, list(core.shape(n))] for n in self.names]
        return facts


def unwrapped(model: Model) -> ChatGLMForConditionalGeneration:
    """The base model of a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _fingerprint(base: ChatGLMForConditionalGeneration) -> str:
    """SHA-256 of the norm weights: tells one base from another without reading gigabytes."""
    import hashlib

    digest = hashlib.sha256()
    for name in base.base_names():
        if name.endswith("layernorm.weight"):
            digest.update(base.core.read(name).tobytes())
    return digest.hexdigest()


def frozen_but(model: ChatGLMForConditionalGeneration, n_layers: int, part: str) -> list[str]:
    """Names that freeze tuning trains: `part` ("mlp", "qkv") of the last n blocks, or first |n|.

    By block index, whatever the number of blocks. Raises ValueError for more blocks than there are.
    """
    total = model.config.num_layers
    if n_layers == 0 or abs(n_layers) > total:
        raise ValueError(
            f"num_layer_trainable: expected from 1 to {total} (or negative, from the front), "
            f"got {n_layers}"
        )
    blocks = range(total - n_layers, total) if n_layers > 0 else range(-n_layers)
    names = model.config.tensor_names
    if part == "qkv":
        kinds = ("query_key_value", "query", "key", "value")
        inside = [names[kind] for kind in kinds if kind in names]
    else:
        inside = [names["dense_h_to_4h"].split(".")[0]]
    starts = tuple(f"{names['layer'].format(i)}.{module}." for i in blocks for module in inside)
    return [n for n in model.base_names() if n.startswith(starts)]


def prepare(
    model: Model,
    tokenizer: Any,
    finetuning: FinetuningArguments,
    kind: str | None = None,
    checkpoints: Sequence[str] = (),
    resume_lora_training: bool = True,
    seed: int | None = None,
) -> Trainee:
    """Make `model` ready for training by `kind`.

    kind None: what the model brings (its adapter, prefix or trainable weights), else
    `finetuning.finetuning_type`. checkpoints: directories of earlier training. LoRA: all but the
    last are merged into the base and the last is trained further, with its own rank, alpha, dropout
    and targets; without `resume_lora_training` all are merged and a fresh adapter is made. Other
    methods take one and go on from its weights. seed: of fresh adapters and prefixes. Raises
    ValueError naming field and value.
    """
    base = unwrapped(model)
    chosen = base.trainable_names if kind is None else []
    if kind is None:
        kind = prepared_for(model) or finetuning.finetuning_type
    if kind not in METHODS:
        raise ValueError(f"finetuning_type: expected one of {', '.join(METHODS)}, got {kind!r}")
    if isinstance(model, PeftModel) and kind != prepared_for(model):
        raise ValueError(
            f"finetuning_type: the model has {prepared_for(model)!r} in it, got {kind!r}; "
            "merge_and_unload() or unload() it first"
        )
    if kind != "p_tuning" and base.has_prefix:
        raise ValueError(
            f"finetuning_type: the model has a P-Tuning prefix (pre_seq_len), got {kind!r}; "
            "load it without pre_seq_len"
        )
    if kind == "lora":
        if not isinstance(model, PeftModel):
            model = _with_lora(base, finetuning, checkpoints, resume_lora_training, seed)
        elif checkpoints:
            raise ValueError("checkpoint_dir: the model has an adapter already")
        return Trainee(kind, model, tokenizer, model.adapter_names)
    if len(checkpoints) > 1:
        raise ValueError(
            f"checkpoint_dir: expected one directory for {kind}, got {', '.join(checkpoints)}"
        )
    if kind == "p_tuning":
        if not base.has_prefix:
            if checkpoints:
                load_prefix(base, checkpoints[0])
            else:
                config = PrefixTuningConfig(
                    num_virtual_tokens=finetuning.pre_seq_len,
                    prefix_projection=finetuning.prefix_projection,
                )
                get_peft_model(base, config, seed=seed)
        elif checkpoints:
            load_prefix(base, checkpoints[0])
        base.prefix_is_fresh = False
        names = [n for n in base.core.names() if n.startswith(prefix_of(base.config))]
        return Trainee(kind, model, tokenizer, names)
    if checkpoints:
        load_base_weights(base, checkpoints[0], whole=kind == "full")
    if kind == "full":
        return Trainee(kind, base, tokenizer, base.base_names())
    names = chosen or frozen_but(
        base, finetuning.num_layer_trainable, finetuning.name_module_trainable
    )
    return Trainee(kind, base, tokenizer, names)


def prepared_for(model: Model) -> str | None:
    """The method that a model was made ready for by its user, None for a plain base."""
    base = unwrapped(model)
    if base.has_prefix:
        return "p_tuning"
    if isinstance(model, PeftModel):
        return "lora"
    names = set(base.trainable_names)
    if not names:
        return None
    return "full" if names == set(base.base_names()) else "freeze"


def _with_lora(
    base: ChatGLMForConditionalGeneration,
    finetuning: FinetuningArguments,
    checkpoints: Sequence[str],
    resume: bool,
    seed: int | None,
) -> PeftModel:
    merged = checkpoints[:-1] if resume else checkpoints
    merge_adapters(base, merged)
    if checkpoints and resume:
        return PeftModel.from_pretrained(base, checkpoints[-1], is_trainable=True)
    begin = finetuning.init_lora_weights
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=finetuning.lora_rank,
        lora_alpha=finetuning.lora_alpha,
        lora_dropout=finetuning.lora_dropout,
        target_modules=_targets(finetuning.lora_target, families.of(base.config.family).linears),
        base_model_name_or_path=getattr(base, "name_or_path", None),
        use_dora=finetuning.use_dora,
        init_lora_weights=True if begin == "true" else begin,
        modules_to_save=finetuning.modules_to_save,
    )
    return get_peft_model(base, config, seed=seed)


def _targets(words: str | list[str], linears: Sequence[str]) -> str | list[str] | None:
    """Names; or one word that is none, which is a regular expression as PEFT has it; None, the
    model's own, for the flag's default in a model whose linears have other names.
    """
    one = words[0] if isinstance(words, list) and len(words) == 1 else words
    if one == FinetuningArguments().lora_target[0] and one not in linears:
        return None
    return one if isinstance(one, str) and not re.fullmatch(r"[\w.]+", one) else words


def merge_adapters(base: ChatGLMForConditionalGeneration, directories: Sequence[str]) -> None:
    """Fold adapters into the base weights, one after another."""
    for directory in directories:
        PeftModel.from_pretrained(base, directory).merge_and_unload()


def load_base_weights(
    base: ChatGLMForConditionalGeneration, directory: str, whole: bool = False
) -> None:
    """Set base weights to those in `directory`: all of them, or (freeze) those that it holds."""
    if os.path.exists(os.path.join(directory, "adapter_config.json")):
        raise ValueError(
            f"{directory}: expected weights of the model, found an adapter: train it on with "
            "finetuning_type lora, or merge it into its base first"
        )
    try:
        found = base.load_state_dict(load_state_dict(directory), strict=whole)
        if found.unexpected_keys:
            raise ValueError(f"not of this model: {listed(found.unexpected_keys)}")
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    base.prompt_template = read_template(directory) or base.prompt_template
    base.task = task_in(directory) or base.task


def attach(base: ChatGLMForConditionalGeneration, kind: str, checkpoints: Sequence[str]) -> Model:
    """The model with earlier training in it, for evaluation: adapters but the last are merged."""
    if not checkpoints:
        return base
    if kind == "lora":
        merge_adapters(base, checkpoints[:-1])
        return PeftModel.from_pretrained(base, checkpoints[-1])
    if len(checkpoints) > 1:
        raise ValueError(
            f"checkpoint_dir: expected one directory for {kind}, got {', '.join(checkpoints)}"
        )
    if kind == "p_tuning":
        load_prefix(base, checkpoints[0])
    else:
        load_base_weights(base, checkpoints[0], whole=kind == "full")
    base.set_trainable([])
    return base
