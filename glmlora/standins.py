"""Stand-ins named `transformers` and `peft`: modules that hold glmlora's names and nothing else.

What they lack is an ImportError that says what they are, what they offer and what does that work
here; `import torch` and the like, where they are not installed, are told the same.
"""

from __future__ import annotations

import logging
import sys
from functools import cache
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any

from . import old_pandas
from .families import default
from .names import did_you_mean, is_only_looked_for

STAND_INS = ("transformers", "peft")

_GENERATION = (
    "BaseStreamer EosTokenCriteria GenerationConfig LogitsProcessor LogitsProcessorList "
    "MaxLengthCriteria MaxTimeCriteria StoppingCriteria StoppingCriteriaList StopStringCriteria "
    "TextIteratorStreamer TextStreamer"
)
_STATES = "get_peft_model_state_dict set_peft_model_state_dict"
_KBIT = "prepare_model_for_int8_training prepare_model_for_kbit_training"
_TARGETS = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
_CONFIGS = "LoraConfig PeftConfig PrefixTuningConfig"
# Module -> the names that it offers where glmlora has them.
MODULES = {
    "transformers": (
        "AutoConfig AutoModel AutoModelForCausalLM AutoTokenizer PreTrainedModel "
        "PreTrainedTokenizer PreTrainedTokenizerBase PreTrainedTokenizerFast TrainingArguments "
        f"set_seed {_GENERATION}"
    ),
    "transformers.generation": _GENERATION,
    "transformers.generation.configuration_utils": "GenerationConfig",
    "transformers.generation.logits_process": "LogitsProcessor LogitsProcessorList",
    "transformers.generation.stopping_criteria": (
        "EosTokenCriteria MaxLengthCriteria MaxTimeCriteria StoppingCriteria StoppingCriteriaList "
        "StopStringCriteria"
    ),
    "transformers.generation.streamers": "BaseStreamer TextIteratorStreamer TextStreamer",
    "transformers.generation.utils": _GENERATION,
    "transformers.generation_utils": _GENERATION,
    "transformers.modeling_utils": "PreTrainedModel",
    "transformers.models": "",
    "transformers.models.auto": "AutoConfig AutoModel AutoModelForCausalLM AutoTokenizer",
    "transformers.tokenization_utils": "PreTrainedTokenizer",
    "transformers.tokenization_utils_base": "PreTrainedTokenizerBase",
    "transformers.trainer_utils": "set_seed",
    "transformers.training_args": "TrainingArguments",
    "transformers.utils": "",
    "transformers.utils.logging": "",
    "transformers.logging": "",
    "peft": (
        "AutoPeftModel AutoPeftModelForCausalLM PeftModel PeftModelForCausalLM PeftType TaskType "
        f"get_peft_model {_CONFIGS} {_KBIT} {_STATES}"
    ),
    "peft.auto": "AutoPeftModel AutoPeftModelForCausalLM",
    "peft.config": "PeftConfig",
    "peft.mapping": "get_peft_model",
    "peft.peft_model": "PeftModel PeftModelForCausalLM",
    "peft.tuners": "LoraConfig PrefixTuningConfig",
    "peft.tuners.lora": "LoraConfig",
    "peft.tuners.prefix_tuning": "PrefixTuningConfig",
    "peft.utils": f"PeftType TaskType {_STATES} {_KBIT} {_TARGETS}",
    "peft.utils.constants": _TARGETS,
    "peft.utils.other": f"{_KBIT} {_TARGETS}",
    "peft.utils.peft_types": "PeftType TaskType",
    "peft.utils.save_and_load": _STATES,
}
# Names that glmlora calls otherwise, or has further inside.
_ELSEWHERE = {
    "AutoPeftModel": "model.peft_functions.AutoPeftModel",
    "PeftModelForCausalLM": "model.peft.PeftModel",
    "PreTrainedModel": "model.modeling.ChatGLMForConditionalGeneration",
    "PreTrainedTokenizer": "tokenization.ChatGLMTokenizer",
    "PreTrainedTokenizerBase": "tokenization.ChatGLMTokenizer",
    "PreTrainedTokenizerFast": "tokenization.ChatGLMTokenizer",
    "prepare_model_for_int8_training": "model.peft_functions.prepare_model_for_kbit_training",
}
_TRAINS = "glmlora.train(model, data, TrainingArguments(..)) trains"
_SAME_KIND = "LoraConfig and PrefixTuningConfig are the kinds of adapters that there are"
# What does the work of names that are not offered.
HINTS = {
    "AdamW": "glmlora.AdamW(model, lr=..) is one for a model",
    "AutoModelForSeq2SeqLM": "AutoModel loads these models",
    "BitsAndBytesConfig": "AutoModel.from_pretrained(.., load_in_4bit=True) or model.quantize(4)",
    "DataCollatorForLanguageModeling": _TRAINS,
    "DataCollatorForSeq2Seq": _TRAINS,
    "DataCollatorWithPadding": _TRAINS,
    "EarlyStoppingCallback": "glmlora.train(.., callbacks=[..]) takes functions and objects",
    "HfArgumentParser": "`glmlora train` has the flags, glmlora.train(..) the keywords",
    "Seq2SeqTrainer": _TRAINS,
    "Seq2SeqTrainingArguments": "TrainingArguments has the settings of a training",
    "Trainer": _TRAINS,
    "TrainerCallback": "glmlora.train(.., callbacks=[..]) takes any object with its methods",
    "default_data_collator": _TRAINS,
    "get_cosine_schedule_with_warmup": "TrainingArguments(lr_scheduler_type=..)",
    "get_linear_schedule_with_warmup": "TrainingArguments(lr_scheduler_type=..)",
    "get_scheduler": "TrainingArguments(lr_scheduler_type=..)",
    "LoraModel": "PeftModel has its methods",
    "trainer": _TRAINS,
    "trainer_callback": "glmlora.train(.., callbacks=[..]) takes functions and objects",
    "trainer_seq2seq": _TRAINS,
    "pipeline": "model.chat(tokenizer, query) and model.generate(..) answer",
    **dict.fromkeys(
        """AdaLoraConfig IA3Config LoHaConfig LoKrConfig MultitaskPromptTuningConfig OFTConfig
        PromptEncoderConfig PromptTuningConfig VeraConfig""".split(),
        _SAME_KIND,
    ),
}
# Packages that such scripts import besides, where they are not installed.
_PACKAGES = {
    "torch": (
        'arrays are NumPy\'s, types of numbers are names ("float16"), '
        "glmlora.load_state_dict(file) reads .bin files"
    ),
    "accelerate": "glmlora.train needs no launcher",
    "bitsandbytes": "AutoModel.from_pretrained(.., load_in_4bit=True) or model.quantize(4)",
    "datasets": "glmlora.train takes a DataFrame, a list of dicts or a file",
    "deepspeed": "glmlora.train needs no launcher",
    "huggingface_hub": "AutoModel.from_pretrained(directory) loads what is on this machine",
    "modelscope": "AutoModel.from_pretrained(directory) loads what is on this machine",
    "trl": _TRAINS,
}


def _get_logger(name: str | None = None) -> logging.Logger:
    return logging.getLogger(name or "glmlora")


def _nothing(*ignored: Any, **also: Any) -> None:
    """For settings of messages and bars that are not written here anyway."""


_LOGGING = {
    "get_logger": _get_logger,
    **{name: getattr(logging, name) for name in "CRITICAL DEBUG ERROR FATAL INFO WARNING".split()},
    "get_verbosity": lambda: _get_logger().getEffectiveLevel(),
    "set_verbosity": lambda level: _get_logger().setLevel(level),
    **{
        f"set_verbosity_{level.lower()}": lambda level=level: _get_logger().setLevel(level)
        for level in ("DEBUG", "ERROR", "INFO", "WARNING")
    },
    **dict.fromkeys(
        """disable_default_handler disable_progress_bar enable_default_handler
        enable_explicit_format enable_progress_bar enable_propagation reset_format""".split(),
        _nothing,
    ),
}


@cache
def _offered(module: str) -> tuple[str, ...]:
    """The names of a stand-in, sorted."""
    import glmlora

    if module.endswith(".logging"):
        return tuple(sorted(_LOGGING))
    here = {*dir(glmlora), *_ELSEWHERE, _TARGETS}
    below = {n.rpartition(".")[2] for n in MODULES if n.rpartition(".")[0] == module}
    return tuple(sorted(below | {n for n in MODULES[module].split() if n in here}))


def _missing(module: str, name: str) -> str:
    """The sentence about a name that a stand-in lacks."""
    offered = _offered(module)
    names = [n for n in offered if f"{module}.{n}" not in MODULES]
    hint = f"; {HINTS[name]}" if name in HINTS else ""
    near = "" if hint else did_you_mean(name, names)
    what = f"offers {', '.join(offered)}" if offered else "offers nothing"
    return f"glmlora's stand-in for {module} has no {name!r}{near}{hint}; it {what}"


class _StandIn(ModuleType):
    """A module whose names are glmlora's, looked up when they are used."""

    def __init__(self, name: str):
        super().__init__(name, f"glmlora's stand-in for {name}: {', '.join(_offered(name))}.")
        self.__all__ = list(_offered(name))
        # the release whose names these are: notebooks ask for at least one near it
        self.__version__ = ("0.4.0" if name.startswith("peft") else "4.30.2") + "+glmlora"
        self.__file__ = __file__

    def __getattr__(self, name: str) -> Any:
        import glmlora

        module = self.__name__
        if name not in _offered(module):
            raise AttributeError(_missing(module, name))
        if f"{module}.{name}" in MODULES:
            return import_module(f"{module}.{name}")
        if module.endswith(".logging"):
            return _LOGGING[name]
        if name == _TARGETS:  # where notebooks look up the targets of these models
            return {"chatglm": list(default().targets)}
        if name in _ELSEWHERE:
            place, _, own = _ELSEWHERE[name].rpartition(".")
            return getattr(import_module(f"glmlora.{place}"), own)
        return getattr(glmlora, name)

    def __dir__(self) -> list[str]:
        return [*self.__all__]


class _StandInFinder(MetaPathFinder, Loader):
    """Finds the stand-ins and their modules, in front of packages that are installed. A name that
    a stand-in lacks is looked for as a module of it, so the error of `from .. import ..` is here.
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if fullname in MODULES:
            return ModuleSpec(fullname, self, origin="glmlora", is_package=True)
        if fullname.partition(".")[0] not in STAND_INS or is_only_looked_for():
            return None
        while package not in MODULES:
            package, _, below = package.rpartition(".")
            name = f"{below}.{name}"
        # Not named `fullname`: `from .. import ..` would take that for nothing found, and go on.
        raise ModuleNotFoundError(_missing(package, name), name=package)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _HintFinder(MetaPathFinder):
    """Asked last: says what to do without packages that are not installed."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname in _PACKAGES and not is_only_looked_for():
            raise ModuleNotFoundError(
                f"{fullname} is not installed, and glmlora needs none: {_PACKAGES[fullname]}. "
                f"Leave the import out, or install {fullname}",
                name=fullname,
            )
        return None


_FINDERS: tuple[MetaPathFinder, ...] = (_StandInFinder(), _HintFinder())


def install() -> None:
    """Make `from transformers import ...` and `from peft import ...` give glmlora's names, and the
    rows of pandas what notebooks of its older releases expect.

    Raises RuntimeError when the real package has been imported already.
    """
    for name in STAND_INS:
        if name in sys.modules and not isinstance(sys.modules[name], _StandIn):
            raise RuntimeError(
                f"{name} is imported already: restart Python (the kernel) and load glmlora first"
            )
    old_pandas.install()
    first, last = _FINDERS
    if first not in sys.meta_path:
        sys.meta_path.insert(0, first)
    if last not in sys.meta_path:
        sys.meta_path.append(last)
    for name in STAND_INS:
        spec = first.find_spec(name, None)
        if name not in sys.modules and spec is not None:
            sys.modules[name] = module_from_spec(spec)


def uninstall() -> None:
    """Take the stand-ins away; what was imported from them stays usable."""
    old_pandas.uninstall()
    for finder in _FINDERS:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
    for name in [n for n, module in sys.modules.items() if isinstance(module, _StandIn)]:
        del sys.modules[name]
