"""Functions that scripts import from PEFT beside the classes: a model from an adapter's directory
alone, tensors in and out, a base made ready for training.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .adapter import plain_names
from .adapter_config import CONFIG, LoraConfig, PeftConfig
from .auto import AutoModel
from .modeling import ChatGLMForConditionalGeneration
from .parameters import IncompatibleKeys, float_array
from .peft import PeftModel


class AutoPeftModel:
    """`AutoPeftModelForCausalLM.from_pretrained(adapter directory)` -> PeftModel."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base that the adapter's config names (`base_model_name_or_path`, a directory of
        this machine) and attach the adapter. Further keywords are those of
        `AutoModel.from_pretrained`. `revision` and `import_allowlist` are accepted and mean
        nothing: nothing is downloaded or imported.

        Raises ValueError for a directory without adapter, and one that names no base, OSError for a
        base that is not there.
        """
        path = Path(pretrained_model_name_or_path, subfolder or "")
        found = PeftConfig.from_pretrained(path) if config is None else config
        base = getattr(found, "base_model_name_or_path", None)
        if not base:
            raise ValueError(
                f"{path / CONFIG}: base_model_name_or_path: expected the base model's directory, "
                f"got {base!r}"
            )
        if not os.path.isdir(base):
            raise FileNotFoundError(
                f"{path / CONFIG}: base_model_name_or_path {base!r}: there is no such directory "
                "here, and nothing is downloaded; load the base with AutoModel.from_pretrained and "
                "the adapter with PeftModel.from_pretrained"
            )
        model = AutoModel.from_pretrained(base, **kwargs)
        return PeftModel.from_pretrained(
            model, path, adapter_name, is_trainable=is_trainable, config=config
        )


class AutoPeftModelForCausalLM(AutoPeftModel):
    """The same as AutoPeftModel."""


def prepare_model_for_kbit_training(
    model: ChatGLMForConditionalGeneration,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> ChatGLMForConditionalGeneration:
    """Freeze every weight, with activations recomputed where asked; returns the model. Norms and
    the output layer need no cast: what is computed from them is float32 already.
    `gradient_checkpointing_kwargs` and `auto_clear_cache` are accepted and mean nothing.
    """
    model.requires_grad_(False)
    if use_gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)
    return model


def get_peft_model_state_dict(
    model: PeftModel,
    state_dict: Mapping[str, Any] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, np.ndarray]:
    """The tensors of an adapter (of a prefix, where the model has one), float32, under the names
    that its file has. state_dict: take them out of this one. `unwrap_compiled` is accepted and
    means nothing; save_embedding_layers=True is refused. ValueError for a name that there is not.
    """
    _check_wrapper(model)
    if save_embedding_layers is True:
        raise ValueError("save_embedding_layers: is not supported by this release")
    if not model.is_lora:
        return model.state_dict()
    own = model.adapter_state(adapter_name)
    if state_dict is None:
        return own
    given = _own(state_dict, adapter_name)
    missing = [n for n in own if n not in given]
    if missing:
        raise ValueError(f"state_dict: has no {missing[0]} ({len(missing)} of {len(own)} missing)")
    return {n: float_array(n, given[n]) for n in own}


def set_peft_model_state_dict(
    model: PeftModel,
    peft_model_state_dict: Mapping[str, Any],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> IncompatibleKeys:
    """Set an adapter's tensors, named as in its file (a wrapper's and the adapter's name in them
    are read over). `low_cpu_mem_usage` is accepted and means nothing.

    Stricter than PEFT: ValueError naming tensors that are missing, surplus or misshaped, with
    nothing changed; ignore_mismatched_sizes=True is refused. So the result lists none.
    """
    _check_wrapper(model)
    if ignore_mismatched_sizes:
        raise ValueError("ignore_mismatched_sizes: is not supported by this release")
    model.set_adapter_state(adapter_name, _own(peft_model_state_dict, adapter_name))
    return IncompatibleKeys([], [])


def _check_wrapper(model: Any) -> None:
    if not isinstance(model, PeftModel):
        raise TypeError(f"model: expected a PeftModel, got {type(model).__name__}")


def _own(state: Mapping[str, Any], adapter_name: str) -> dict[str, Any]:
    """By the names that files have; LoRA tensors of other adapters are left out."""
    others = {n for n in state if ".lora_" in n and _adapter_of(n) not in (None, adapter_name)}
    return plain_names("state_dict", {n: v for n, v in state.items() if n not in others})


def _adapter_of(name: str) -> str | None:
    """The adapter that a tensor's name names, if one."""
    part = name.rpartition(".lora_")[2].split(".")[1:-1]
    return part[0] if part else None
