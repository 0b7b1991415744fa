"""Fine-tune and chat with ChatGLM models on a C core. The public names; each is imported when it is
first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._core import get_num_threads as get_num_threads
    from ._core import set_num_threads as set_num_threads
    from .classifier import LoraClassifier as LoraClassifier
    from .files.checkpoint import load_state_dict as load_state_dict
    from .generation.config import GenerationConfig as GenerationConfig
    from .generation.processors import LogitsProcessor as LogitsProcessor
    from .generation.processors import LogitsProcessorList as LogitsProcessorList
    from .generation.stopping import EosTokenCriteria as EosTokenCriteria
    from .generation.stopping import MaxLengthCriteria as MaxLengthCriteria
    from .generation.stopping import MaxTimeCriteria as MaxTimeCriteria
    from .generation.stopping import StoppingCriteria as StoppingCriteria
    from .generation.stopping import StoppingCriteriaList as StoppingCriteriaList
    from .generation.stopping import StopStringCriteria as StopStringCriteria
    from .generation.streamers import BaseStreamer as BaseStreamer
    from .generation.streamers import TextIteratorStreamer as TextIteratorStreamer
    from .generation.streamers import TextStreamer as TextStreamer
    from .inspection import Report as Report
    from .inspection import inspect as inspect
    from .model.adapter_config import LoraConfig as LoraConfig
    from .model.adapter_config import PeftConfig as PeftConfig
    from .model.adapter_config import PeftType as PeftType
    from .model.adapter_config import PrefixTuningConfig as PrefixTuningConfig
    from .model.adapter_config import TaskType as TaskType
    from .model.auto import AutoModel as AutoModel
    from .model.auto import AutoModelForCausalLM as AutoModelForCausalLM
    from .model.configuration import AutoConfig as AutoConfig
    from .model.configuration import ChatGLMConfig as ChatGLMConfig
    from .model.modeling import ChatGLMForConditionalGeneration as ChatGLMForConditionalGeneration
    from .model.peft import PeftModel as PeftModel
    from .model.peft import get_peft_model as get_peft_model
    from .model.peft_functions import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from .model.peft_functions import get_peft_model_state_dict as get_peft_model_state_dict
    from .model.peft_functions import (
        prepare_model_for_kbit_training as prepare_model_for_kbit_training,
    )
    from .model.peft_functions import set_peft_model_state_dict as set_peft_model_state_dict
    from .model.prefix import load_prefix as load_prefix
    from .model.prefix import save_prefix as save_prefix
    from .seeds import set_seed as set_seed
    from .submission import Submission as Submission
    from .submission import submit as submit
    from .tokenization import AutoTokenizer as AutoTokenizer
    from .training.arguments import TrainingArguments as TrainingArguments
    from .training.optim import AdamW as AdamW
    from .training.trainer import train as train
    from .vote import vote_weight as vote_weight

__version__ = "0.1.0"

_NAMES = {  # module -> its public names; tests/test_packaging.py holds them against those above
    "_core": "get_num_threads set_num_threads",
    "classifier": "LoraClassifier",
    "files.checkpoint": "load_state_dict",
    "generation.config": "GenerationConfig",
    "generation.processors": "LogitsProcessor LogitsProcessorList",
    "generation.stopping": (
        "EosTokenCriteria MaxLengthCriteria MaxTimeCriteria StopStringCriteria StoppingCriteria "
        "StoppingCriteriaList"
    ),
    "generation.streamers": "BaseStreamer TextIteratorStreamer TextStreamer",
    "inspection": "Report inspect",
    "model.adapter_config": "LoraConfig PeftConfig PeftType PrefixTuningConfig TaskType",
    "model.auto": "AutoModel AutoModelForCausalLM",
    "model.configuration": "AutoConfig ChatGLMConfig",
    "model.modeling": "ChatGLMForConditionalGeneration",
    "model.peft": "PeftModel get_peft_model",
    "model.peft_functions": (
        "AutoPeftModelForCausalLM get_peft_model_state_dict prepare_model_for_kbit_training "
        "set_peft_model_state_dict"
    ),
    "model.prefix": "load_prefix save_prefix",
    "seeds": "set_seed",
    "submission": "Submission submit",
    "tokenization": "AutoTokenizer",
    "training.arguments": "TrainingArguments",
    "training.optim": "AdamW",
    "training.trainer": "train",
    "vote": "vote_weight",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
_MOVED = {  # older names of modules that scripts import
    "arguments": "training.arguments",
    "checkpoint": "files.checkpoint",
    "configuration": "model.configuration",
    "data": "training.records",
    "device": "model.device",
    "modeling": "model.auto",
    "optable": "tools.optable",
    "papers": "tools.papers",
    "peft": "model.peft",
    "plan": "tools.plan",
    "project": "tools.project",
    "quantization": "model.quantization",
    "safetensors_file": "files.safetensors",
    "selftest": "tools.selftest",
    "tensor": "files.tensor",
    "trainer": "training.trainer",
}

__all__ = ["__version__", "load_ipython_extension", *_HOME]  # noqa: PLE0604


if not TYPE_CHECKING:  # checkers know the names above, and refuse others

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(_missing("attribute", name))
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value


def _missing(what: str, name: str) -> str:
    from .names import did_you_mean

    return f"module {__name__!r} has no {what} {name!r}{did_you_mean(name, _HOME)}"


def __dir__() -> list[str]:
    return sorted(__all__)


class _MovedModules(MetaPathFinder, Loader):
    """`import glmlora.checkpoint` gives the module that is now `glmlora.files.checkpoint`. Asked
    last, so a misspelt name of `from glmlora import ..` ends here, and is told the nearest one.
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        from .names import is_only_looked_for

        package, _, name = fullname.rpartition(".")
        if package == __name__ and name not in _MOVED and not is_only_looked_for():
            raise ModuleNotFoundError(_missing("name or module", name), name=__name__)
        return ModuleSpec(fullname, self) if package == __name__ and name in _MOVED else None

    def _now(self, fullname: str) -> str:
        return f"{__name__}.{_MOVED[fullname.rpartition('.')[2]]}"

    def exec_module(self, module: Any) -> None:
        sys.modules[module.__name__] = import_module(self._now(module.__name__))

    def get_code(self, fullname: str) -> Any:
        """For `python -m`."""
        code = f"import runpy; runpy.run_module({self._now(fullname)!r}, run_name='__main__')"
        return compile(code, fullname, "exec")


sys.meta_path.append(_MovedModules())


def load_ipython_extension(ipython: Any) -> None:
    """`%load_ext glmlora`: lets `from transformers import ...` and `from peft import ...` find this
    package.
    """
    from . import compat

    compat.load_ipython_extension(ipython)


def unload_ipython_extension(ipython: Any) -> None:
    """`%unload_ext glmlora`."""
    from . import compat

    compat.unload_ipython_extension(ipython)
