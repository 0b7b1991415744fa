"""Fine-tune and chat with ChatGLM models on a C core. The public names; each is imported when it is
first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "AutoConfig": "configuration",
    "ChatGLMConfig": "configuration",
    "AutoModel": "modeling",
    "AutoModelForCausalLM": "modeling",
    "ChatGLMForConditionalGeneration": "modeling",
    "AutoTokenizer": "tokenization",
    "GenerationConfig": "generation",
    "set_seed": "generation",
    "LoraConfig": "peft",
    "PeftModel": "peft",
    "PrefixTuningConfig": "peft",
    "TaskType": "peft",
    "get_peft_model": "peft",
    "load_prefix": "peft",
    "save_prefix": "peft",
    "AdamW": "optim",
    "load_state_dict": "checkpoint",
    "TrainingArguments": "arguments",
    "train": "trainer",
    "get_num_threads": "_core",
    "set_num_threads": "_core",
}

__all__ = [
    "__version__",
    "load_ipython_extension",
    "AutoConfig",
    "ChatGLMConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "ChatGLMForConditionalGeneration",
    "AutoTokenizer",
    "GenerationConfig",
    "set_seed",
    "LoraConfig",
    "PeftModel",
    "PrefixTuningConfig",
    "TaskType",
    "get_peft_model",
    "load_prefix",
    "save_prefix",
    "AdamW",
    "load_state_dict",
    "TrainingArguments",
    "train",
    "get_num_threads",
    "set_num_threads",
]

if TYPE_CHECKING:
    from ._core import get_num_threads, set_num_threads
    from .arguments import TrainingArguments
    from .checkpoint import load_state_dict
    from .configuration import AutoConfig, ChatGLMConfig
    from .generation import GenerationConfig, set_seed
    from .modeling import AutoModel, AutoModelForCausalLM, ChatGLMForConditionalGeneration
    from .optim import AdamW
    from .peft import (
        LoraConfig,
        PeftModel,
        PrefixTuningConfig,
        TaskType,
        get_peft_model,
        load_prefix,
        save_prefix,
    )
    from .tokenization import AutoTokenizer
    from .trainer import train


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


def load_ipython_extension(ipython: Any) -> None:
    """`%load_ext glmlora`: lets `from transformers import ...` and `from peft import ...` find this
    package.
    """
    from .compat import install

    install()
