"""Arguments of training: one table of flags; the dataclasses and the parser are made from it.

Names and defaults follow transformers 4.30.2 and the original train_bash.py, except that
`save_safetensors` is true.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import operator
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Flag(NamedTuple):
    """One flag. Marks: W in the workflow's script, D its default matters there, S supported, A
    accepted without effect (noticed once), R refused unless it has its default (`help` then says
    what to do instead).
    """

    name: str
    kind: str  # str, int, float, bool; list: split on commas; words: one or more words
    default: Any  # None: optional; REQUIRED: must be given
    mark: str
    help: str
    choices: tuple[str, ...] = ()
    bound: str = ""  # a key of BOUNDS


REQUIRED = dataclasses.MISSING

BOUNDS = {
    ">=1": (lambda v: v >= 1, "at least 1"),
    ">=2": (lambda v: v >= 2, "at least 2"),
    ">=3": (lambda v: v >= 3, "at least 3"),
    ">=0": (lambda v: v >= 0, "0 or more"),
    ">0": (lambda v: v > 0, "more than 0"),
    "!=0": (lambda v: v != 0, "other than 0"),
    "[0,1]": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    "[0,1)": (lambda v: 0 <= v < 1, "from 0 to below 1"),
    "seed": (lambda v: 0 <= v < 2**63, "from 0 to 2^63 - 1"),
    "4,8": (lambda v: v in (4, 8), "4 or 8"),
}

SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
STRATEGIES = ("no", "steps", "epoch")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical", "passive")

_OTHER_HARDWARE = "runs on the CPU, or on one CUDA device, only; leave it out"
_ONE_DEVICE = (
    "one process on one device trains here; leave it out, "
    "and raise gradient_accumulation_steps instead"
)
_HUB = "nothing is uploaded; copy output_dir to the hub with its own tools"

# fmt: off
_MODEL = (
    Flag("model_name_or_path", "str", "THUDM/chatglm-6b", "W", "directory of the base model"),
    Flag("use_v2", "bool", False, "W",
         "the base is ChatGLM2; the family is detected, a contradiction warns"),
    Flag("config_name", "str", None, "S", "another directory for config.json"),
    Flag("tokenizer_name", "str", None, "S", "another directory for the tokenizer"),
    Flag("cache_dir", "str", None, "A", "nothing is downloaded"),
    Flag("use_fast_tokenizer", "bool", True, "A", "there is one tokenizer"),
    Flag("model_revision", "str", "main", "A", "nothing is downloaded"),
    Flag("use_auth_token", "bool", False, "A", "nothing is downloaded"),
    Flag("quantization_bit", "int", None, "S", "quantize the frozen base", bound="4,8"),
    Flag("quantization_type", "str", "nf4", "A", "4 bits are integers in groups of 32",
         ("fp4", "nf4")),
    Flag("double_quantization", "bool", True, "A", "the scales of a 4-bit base are float16"),
    Flag("compute_dtype", "str", None, "S", "type of the large products; int8: over an int8 base",
         ("auto", "float32", "bfloat16", "int8")),
    Flag("checkpoint_dir", "list", None, "S", "trained checkpoints, separated by commas"),
    Flag("reward_model", "str", None, "R", "belongs to the ppo stage; use --stage sft without it"),
    Flag("resume_lora_training", "bool", True, "S",
         "train the last adapter on; otherwise merge all, add a new one"),
    Flag("plot_loss", "bool", False, "S", "draw the loss curves into output_dir"),
    Flag("family", "str", "auto", "S",
         "model family of the base", ("auto", "chatglm2", "chatglm3")),
    Flag("threads", "int", None, "S",
         "processor threads (default: OMP_NUM_THREADS, else all cores)", bound=">=1"),
)

_DATA = (
    Flag("dataset", "str", "alpaca_zh", "W", "names in dataset_info.json, separated by commas"),
    Flag("dataset_dir", "str", "data", "D", "folder with dataset_info.json"),
    Flag("split", "str", "train", "A", "only hub data sets have splits"),
    Flag("overwrite_cache", "bool", False, "A", "nothing is cached"),
    Flag("preprocessing_num_workers", "int", None, "A", "encoding runs in one process"),
    Flag("max_source_length", "int", 512, "D",
         "ids of the prompt with its 2 special ids", bound=">=3"),
    Flag("max_target_length", "int", 512, "D", "ids of the answer with its end id", bound=">=2"),
    Flag("max_samples", "int", None, "S", "first rows taken from each data set", bound=">=1"),
    Flag("eval_num_beams", "int", None, "S", "beams while predicting", bound=">=1"),
    Flag("ignore_pad_token_for_loss", "bool", True, "D",
         "leave labels equal to the pad id out of the loss"),
    Flag("source_prefix", "str", None, "S", "text put before every prompt"),
    Flag("dev_ratio", "float", 0.0, "S", "part of the data held out for evaluation", bound="[0,1)"),
    Flag("truncation", "str", "template", "S",
         "long prompts: cut the query inside the template, or the end of all as the original",
         ("template", "vendored")),
    Flag("template", "str", "auto", "S",
         "prompt: the family's own, or the original's", ("auto", "vendored")),
)

_FINETUNING = (
    Flag("stage", "str", "sft", "W", "only sft is supported", ("sft", "rm", "ppo")),
    Flag("finetuning_type", "str", "lora", "W",
         "what is trained", ("none", "freeze", "p_tuning", "lora", "full")),
    Flag("num_layer_trainable", "int", 3, "S",
         "freeze: last n blocks, or first n if negative", bound="!=0"),
    Flag("name_module_trainable", "str", "mlp", "S", "freeze: part of the blocks", ("mlp", "qkv")),
    Flag("pre_seq_len", "int", 64, "S", "p_tuning: prefix length", bound=">=1"),
    Flag("prefix_projection", "bool", False, "S", "p_tuning: two linear layers over the prefix"),
    Flag("lora_rank", "int", 8, "W", "rank of the adapter", bound=">=1"),
    Flag("lora_alpha", "float", 32.0, "D", "scale of the adapter, divided by its rank", bound=">0"),
    Flag("lora_dropout", "float", 0.1, "D", "dropout on the adapter's input", bound="[0,1)"),
    Flag("lora_target", "list", "query_key_value", "D",
         "ends of module names, separated by commas"),
)

_TRAINING = (
    Flag("output_dir", "str", REQUIRED, "W", "folder for everything that training writes"),
    Flag("overwrite_output_dir", "bool", False, "A", "an existing output_dir is always reused"),
    Flag("do_train", "bool", False, "W", "train"),
    Flag("do_eval", "bool", False, "S", "evaluate"),
    Flag("do_predict", "bool", False, "S", "write predictions"),
    Flag("evaluation_strategy", "str", "no", "S", "when to evaluate while training", STRATEGIES),
    Flag("eval_strategy", "str", None, "S", "later name of evaluation_strategy", STRATEGIES),
    Flag("eval_steps", "float", None, "S",
         "updates between evaluations; below 1: part of all", bound=">0"),
    Flag("eval_delay", "float", 0.0, "S",
         "epochs or steps before the first evaluation", bound=">=0"),
    Flag("prediction_loss_only", "bool", False, "S", "evaluate the loss alone"),
    Flag("per_device_train_batch_size", "int", 8, "W", "rows per micro-batch", bound=">=1"),
    Flag("per_device_eval_batch_size", "int", 8, "S", "rows per batch of evaluation", bound=">=1"),
    Flag("per_gpu_train_batch_size", "int", None, "A", "use per_device_train_batch_size"),
    Flag("per_gpu_eval_batch_size", "int", None, "A", "use per_device_eval_batch_size"),
    Flag("gradient_accumulation_steps", "int", 1, "W", "micro-batches per update", bound=">=1"),
    Flag("eval_accumulation_steps", "int", None, "A", "nothing is accumulated on a device"),
    Flag("learning_rate", "float", 5e-5, "W", "peak rate of AdamW", bound=">=0"),
    Flag("weight_decay", "float", 0.0, "D",
         "decoupled decay, not on biases and norms", bound=">=0"),
    Flag("adam_beta1", "float", 0.9, "D", "decay of the first moment", bound="[0,1)"),
    Flag("adam_beta2", "float", 0.999, "D", "decay of the second moment", bound="[0,1)"),
    Flag("adam_epsilon", "float", 1e-8, "D", "added to the root of the second moment", bound=">0"),
    Flag("max_grad_norm", "float", 1.0, "D",
         "clip the global gradient norm; 0: no clipping", bound=">=0"),
    Flag("num_train_epochs", "float", 3.0, "W", "passes over the data", bound=">0"),
    Flag("max_steps", "int", -1, "S", "updates in all if above 0, in place of the epochs"),
    Flag("lr_scheduler_type", "str", "linear", "W", "course of the learning rate", SCHEDULERS),
    Flag("warmup_ratio", "float", 0.0, "S", "part of all updates that warms up", bound="[0,1]"),
    Flag("warmup_steps", "int", 0, "S",
         "updates that warm up; wins over warmup_ratio", bound=">=0"),
    Flag("log_level", "str", "passive", "A", "there is no logger to set", LOG_LEVELS),
    Flag("log_level_replica", "str", "warning", "A", "there are no replicas", LOG_LEVELS),
    Flag("log_on_each_node", "bool", True, "A", "there is one node"),
    Flag("logging_dir", "str", None, "A", "logs stand in output_dir"),
    Flag("logging_strategy", "str", "steps", "S", "when to log", STRATEGIES),
    Flag("logging_first_step", "bool", False, "S", "log the first update too"),
    Flag("logging_steps", "float", 500, "W", "updates between logs; below 1: part of all"),
    Flag("logging_nan_inf_filter", "bool", True, "D",
         "keep NaN and infinite losses out of the log"),
    Flag("save_strategy", "str", "steps", "S", "when to save checkpoints", STRATEGIES),
    Flag("save_steps", "float", 500, "W", "updates between checkpoints; below 1: part of all"),
    Flag("save_total_limit", "int", None, "S", "keep the newest n checkpoints", bound=">=1"),
    Flag("save_safetensors", "bool", True, "S", "write .safetensors; otherwise .bin"),
    Flag("save_on_each_node", "bool", False, "A", "there is one node"),
    Flag("no_cuda", "bool", False, "S", "stay on the CPU"),
    Flag("use_cpu", "bool", False, "S", "later name of no_cuda"),
    Flag("use_mps_device", "bool", False, "R", _OTHER_HARDWARE),
    Flag("use_ipex", "bool", False, "R", _OTHER_HARDWARE),
    Flag("jit_mode_eval", "bool", False, "R", _OTHER_HARDWARE),
    Flag("xpu_backend", "str", None, "R", _OTHER_HARDWARE),
    Flag("tpu_num_cores", "int", None, "R", _OTHER_HARDWARE),
    Flag("tpu_metrics_debug", "bool", False, "R", _OTHER_HARDWARE),
    Flag("seed", "int", 42, "D", "parameters, dropout and order", bound="seed"),
    Flag("data_seed", "int", None, "S", "order only", bound="seed"),
    Flag("fp16", "bool", False, "W", "mixed precision with float16"),
    Flag("bf16", "bool", False, "S", "mixed precision with bfloat16"),
    Flag("fp16_opt_level", "str", "O1", "A", "mixed precision has one form"),
    Flag("half_precision_backend", "str", "auto", "A", "mixed precision has one form"),
    Flag("fp16_backend", "str", "auto", "A", "mixed precision has one form"),
    Flag("fp16_full_eval", "bool", False, "S", "evaluate in float16"),
    Flag("bf16_full_eval", "bool", False, "S", "evaluate in bfloat16"),
    Flag("tf32", "bool", None, "S", "allow TF32 products on a CUDA device"),
    Flag("local_rank", "int", -1, "R", _ONE_DEVICE),
    Flag("ddp_backend", "str", None, "R", _ONE_DEVICE),
    Flag("ddp_find_unused_parameters", "bool", None, "R", _ONE_DEVICE),
    Flag("ddp_bucket_cap_mb", "int", None, "R", _ONE_DEVICE),
    Flag("ddp_timeout", "int", 1800, "R", _ONE_DEVICE),
    Flag("sharded_ddp", "str", "", "R", _ONE_DEVICE),
    Flag("fsdp", "str", "", "R", _ONE_DEVICE),
    Flag("fsdp_min_num_params", "int", 0, "R", _ONE_DEVICE),
    Flag("fsdp_config", "str", None, "R", _ONE_DEVICE),
    Flag("fsdp_transformer_layer_cls_to_wrap", "str", None, "R", _ONE_DEVICE),
    Flag("deepspeed", "str", None, "R", _ONE_DEVICE),
    Flag("mp_parameters", "str", "", "R", _ONE_DEVICE),
    Flag("debug", "str", "", "A", "there are no debug modes"),
    Flag("past_index", "int", -1, "A", "the models here keep no such state"),
    Flag("skip_memory_metrics", "bool", True, "A", "memory is told before the first step"),
    Flag("use_legacy_prediction_loop", "bool", False, "A", "there is one loop"),
    Flag("include_inputs_for_metrics", "bool", False, "A", "the metrics are fixed"),
    Flag("ray_scope", "str", "last", "A", "there is no parameter search"),
    Flag("label_names", "words", None, "A", "the labels are the answers"),
    Flag("remove_unused_columns", "bool", True, "A",
         "only the columns of the data set's entry are read"),
    Flag("dataloader_drop_last", "bool", False, "S", "leave out the last short micro-batch"),
    Flag("dataloader_num_workers", "int", 0, "A", "batches are made in the training process"),
    Flag("dataloader_pin_memory", "bool", True, "A", "batches are made in the training process"),
    Flag("disable_tqdm", "bool", None, "S", "no progress bar"),
    Flag("load_best_model_at_end", "bool", False, "S", "end with the best checkpoint's weights"),
    Flag("metric_for_best_model", "str", None, "S", "what is best (default: loss)"),
    Flag("greater_is_better", "bool", None, "S", "direction of that (default: by its name)"),
    Flag("ignore_data_skip", "bool", False, "S", "resume at the start of the epoch's data"),
    Flag("label_smoothing_factor", "float", 0.0, "R",
         "the loss is plain cross-entropy; leave it at 0"),
    Flag("optim", "str", "adamw_torch", "D",
         "the optimizer is AdamW: adamw_torch, or its old name adamw_hf"),
    Flag("optim_args", "str", None, "R",
         "set adam_beta1, adam_beta2, adam_epsilon and weight_decay instead"),
    Flag("adafactor", "bool", False, "R", "the optimizer is AdamW; leave it out"),
    Flag("group_by_length", "bool", False, "S", "put rows of like length into one batch"),
    Flag("length_column_name", "str", "length", "S", "unused: lengths are counted in ids"),
    Flag("report_to", "words", None, "A", "logs go to trainer_log.jsonl and trainer_state.json"),
    Flag("run_name", "str", None, "A", "there are no external loggers"),
    Flag("push_to_hub", "bool", False, "R", _HUB),
    Flag("hub_model_id", "str", None, "R", _HUB),
    Flag("hub_strategy", "str", "every_save", "R", _HUB),
    Flag("hub_token", "str", None, "R", _HUB),
    Flag("hub_private_repo", "bool", False, "R", _HUB),
    Flag("push_to_hub_model_id", "str", None, "R", _HUB),
    Flag("push_to_hub_organization", "str", None, "R", _HUB),
    Flag("push_to_hub_token", "str", None, "R", _HUB),
    Flag("resume_from_checkpoint", "str", None, "S",
         "a checkpoint-N folder to go on from, exactly"),
    Flag("gradient_checkpointing", "bool", False, "S",
         "keep 1 GiB of activations at most; without it, what fits into memory"),
    Flag("auto_find_batch_size", "bool", False, "R",
         "memory is told before the first step; set the batch size"),
    Flag("full_determinism", "bool", False, "S", "runs are bit-equal on the CPU anyway"),
    Flag("torchdynamo", "str", None, "A", "there is nothing to compile"),
    Flag("torch_compile", "bool", False, "A", "there is nothing to compile"),
    Flag("torch_compile_backend", "str", None, "A", "there is nothing to compile"),
    Flag("torch_compile_mode", "str", None, "A", "there is nothing to compile"),
    Flag("sortish_sampler", "bool", False, "A", "use group_by_length"),
    Flag("predict_with_generate", "bool", False, "S", "evaluate by generated answers"),
    Flag("generation_max_length", "int", None, "A", "max_target_length decides"),
    Flag("generation_num_beams", "int", None, "S",
         "beams while predicting, if eval_num_beams is not set", bound=">=1"),
    Flag("generation_config", "str", None, "A", "evaluation uses the original's settings"),
)

# fmt: on

#: All flags of training by group.
FLAGS = {"model": _MODEL, "data": _DATA, "finetuning": _FINETUNING, "training": _TRAINING}

#: Flags of `chat` and `predict`, named in the error when training is given one.
GENERATING = (
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "num_beams",
    "max_length",
    "max_new_tokens",
    "repetition_penalty",
)

_TRUE = ("true", "yes", "t", "y", "1")
_FALSE = ("false", "no", "f", "n", "0")
_TYPES = {
    "str": "str",
    "int": "int",
    "float": "float",
    "bool": "bool",
    "list": "list[str]",
    "words": "list[str]",
}


def _convert(flag: Flag, value: Any) -> Any:
    """The value in the flag's type; text is read as on the command line. Raises ValueError."""
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None:
        if flag.default is None:
            return None
        raise ValueError(f"{flag.name}: expected {_expected(flag)}, got None")
    try:
        result = _CONVERTERS[flag.kind](value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{flag.name}: expected {_expected(flag)}, got {value!r}") from None
    if flag.choices and result not in flag.choices:
        raise ValueError(f"{flag.name}: expected one of {', '.join(flag.choices)}, got {value!r}")
    return result


def _refuse_unless_default(flag: Flag, value: Any) -> None:
    try:
        is_default = _convert(flag, value) == flag.default
    except ValueError:  # of another type, such as a DeepSpeed configuration given as a dict
        is_default = False
    if not is_default:
        shown = "a token" if "token" in flag.name else repr(value)
        raise ValueError(f"{flag.name}: not supported, got {shown}: {flag.help}")


def _to_bool(value: Any) -> bool:
    if isinstance(value, str):
        text = value.strip().lower()
        if text in _TRUE or text in _FALSE:
            return text in _TRUE
    elif type(value).__name__ in ("bool", "bool_") or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise ValueError


def _to_int(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, str):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return operator.index(value)


def _to_float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    result = float(value)
    if not math.isfinite(result):
        raise ValueError
    return result


def _to_str(value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise TypeError
    return value


def _to_list(value: Any) -> list[str]:
    if isinstance(value, (str, os.PathLike)):
        value = _to_str(value).split(",")
    items = [_to_str(item).strip() for item in value]
    if not items or "" in items:
        raise ValueError
    return items


def _to_words(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [_to_str(item) for item in value]


_CONVERTERS = {
    "str": _to_str,
    "int": _to_int,
    "float": _to_float,
    "bool": _to_bool,
    "list": _to_list,
    "words": _to_words,
}


def _expected(flag: Flag) -> str:
    kind = {
        "str": "text",
        "int": "an integer",
        "float": "a finite number",
        "bool": "true or false",
        "list": "one or more names separated by commas",
        "words": "a list of names",
    }[flag.kind]
    return f"{kind} {BOUNDS[flag.bound][1]}" if flag.bound else kind


class _Group:
    """What the argument groups share: types and bounds by the table, refusals, notices and the JSON
    form.
    """

    _group: str
    _hidden: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.notices: list[str] = []
        for flag in FLAGS[self._group]:
            value = getattr(self, flag.name)
            if flag.mark == "R":
                _refuse_unless_default(flag, value)
                continue
            value = _convert(flag, value)
            setattr(self, flag.name, value)
            if flag.mark == "A" and value != flag.default and value not in (["none"], "none"):
                self.notices.append(f"{flag.name} has no effect: {flag.help}")
            if flag.bound and value is not None and not BOUNDS[flag.bound][0](value):
                raise ValueError(f"{flag.name}: expected {_expected(flag)}, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; `Class(**d)` makes an equal object."""
        return {
            flag.name: getattr(self, flag.name)
            for flag in FLAGS[self._group]
            if flag.name not in self._hidden
        }

    def to_json_string(self) -> str:
        """The text of `finetuning_args.json` and `training_args.bin`: indent 2, sorted keys, final
        newline.
        """
        import json

        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"


def _fields(group: str) -> type:
    """A dataclass with the fields of one group of the table."""
    fields: list[tuple[str, str] | tuple[str, str, Any]] = []
    for flag in FLAGS[group]:
        hint = _TYPES[flag.kind] + (" | None" if flag.default is None else "")
        if flag.default is REQUIRED:
            fields.append((flag.name, hint))
        else:
            fields.append((flag.name, hint, dataclasses.field(default=flag.default)))
    return dataclasses.make_dataclass(
        f"{group.capitalize()}Arguments", fields, bases=(_Group,), namespace={"_group": group}
    )


class ModelArguments(_fields("model")):
    """Which base model, in which form, with which checkpoints. `checkpoint_dir` becomes a list.

    `notices` lists what was accepted without effect. Raises ValueError naming the field, its value
    and what was expected; TypeError for an unknown keyword.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_v2 and self.model_name_or_path == "THUDM/chatglm-6b":
            self.model_name_or_path = "THUDM/chatglm2-6b"


class DataArguments(_fields("data")):
    """Which data sets, and how records become ids. Errors and `notices` as in ModelArguments."""

    @property
    def dataset_names(self) -> list[str]:
        """The names in `dataset`, in order."""
        return [name.strip() for name in self.dataset.split(",") if name.strip()]


class FinetuningArguments(_fields("finetuning")):
    """What is trained. `lora_target` becomes a list. Errors and `notices` as in ModelArguments."""

    # The original keeps the stage outside this group: its loader would not know the key.
    _hidden = ("stage",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage != "sft":
            raise ValueError(
                f"stage: {self.stage!r} (reward model and PPO) is not supported; use --stage sft, "
                "or train that stage with the original program"
            )


class TrainingArguments(_fields("training")):
    """How to train: the arguments of transformers 4.30.2 by keyword, `output_dir` first.

    Later names (`eval_strategy`, `use_cpu`) are kept equal to the old ones. Where
    `load_best_model_at_end` is set, `metric_for_best_model` and `greater_is_better` are filled in.
    Errors and `notices` as in ModelArguments.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optim == "adamw_hf":
            self.optim = "adamw_torch"
        if self.optim != "adamw_torch":
            raise ValueError(f"optim: expected adamw_torch (or adamw_hf), got {self.optim!r}")
        if self.fp16 and self.bf16:
            raise ValueError("fp16 and bf16: expected at most one of them, got both")
        if self.fp16_full_eval and self.bf16_full_eval:
            raise ValueError(
                "fp16_full_eval and bf16_full_eval: expected at most one of them, got both"
            )
        self.no_cuda = self.use_cpu = self.no_cuda or self.use_cpu
        self._settle_intervals()
        self._settle_best_model()

    @property
    def order_seed(self) -> int:
        """The seed of the order of the records."""
        return self.seed if self.data_seed is None else self.data_seed

    def _settle_intervals(self) -> None:
        if self.eval_strategy is None:
            self.eval_strategy = self.evaluation_strategy
        elif self.evaluation_strategy not in ("no", self.eval_strategy):
            raise ValueError(
                f"eval_strategy: expected the value of evaluation_strategy "
                f"({self.evaluation_strategy!r}) "
                f"or none, got {self.eval_strategy!r}"
            )
        self.evaluation_strategy = self.eval_strategy
        if self.eval_strategy != "no":
            self.do_eval = True
        for name in ("logging", "save", "eval"):
            field = f"{name}_steps"
            value = getattr(self, field)
            in_steps = getattr(self, f"{name}_strategy") == "steps"
            if value is None and in_steps:
                value = self.logging_steps
            if in_steps and value <= 0:
                raise ValueError(
                    f"{field}: expected a number above 0 (below 1: part of all updates), got "
                    f"{value!r}"
                )
            if value is not None and value >= 1:
                if not float(value).is_integer():
                    raise ValueError(
                        f"{field}: expected a whole number, or a part below 1, got {value!r}"
                    )
                value = int(value)
            setattr(self, field, value)

    def _settle_best_model(self) -> None:
        if not self.load_best_model_at_end:
            return
        if self.eval_strategy == "no" or self.eval_strategy != self.save_strategy:
            raise ValueError(
                "load_best_model_at_end: expected evaluation_strategy and save_strategy to "
                "be the same and not "
                f"'no', got {self.eval_strategy!r} and {self.save_strategy!r}"
            )
        if self.eval_strategy == "steps":
            saves, evals = self.save_steps, self.eval_steps
            # In decimals, since 0.2 % 0.1 is not 0 in binary.
            if (
                (saves < 1) != (evals < 1)
                or abs(saves / evals - round(saves / evals)) > 1e-9
                or saves < evals
            ):
                raise ValueError(
                    "load_best_model_at_end: expected save_steps to be a multiple of eval_steps, "
                    f"got {saves!r} and {evals!r}"
                )
        if self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if self.greater_is_better is None:
            self.greater_is_better = self.metric_for_best_model not in ("loss", "eval_loss")


_CLASSES = {
    "model": ModelArguments,
    "data": DataArguments,
    "training": TrainingArguments,
    "finetuning": FinetuningArguments,
}


class Arguments(NamedTuple):
    """All arguments of one run; `notices` lists what was accepted without effect."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    finetuning: FinetuningArguments
    notices: list[str]


def parse_train_arguments(
    source: Sequence[str] | Mapping[str, Any] | str | os.PathLike | None = None,
    prog: str = "glmlora train",
) -> Arguments:
    """Reads all arguments of training.

    `source`: a command line (list of words; default `sys.argv[1:]`), which may be one path ending
    in .json or .yaml; such a path; or a dict of flags. On the command line booleans are `--flag`,
    `--flag true|false|yes|no|1|0|t|f|y|n` or, where the default is true, `--no_flag`; unambiguous
    beginnings, `--a=b` and dashes are understood.

    `notices` of the result are sentences to print once. Raises ValueError naming field, value and
    what was expected, or all unknown flags; SystemExit with code 2 and the usage on standard error
    for a command line with a value of the wrong type or outside its choices.
    """
    if source is None:
        source = sys.argv[1:]
    if isinstance(source, (str, os.PathLike)):
        values = _read_config(os.fspath(source))
    elif isinstance(source, Mapping):
        values = dict(source)
    elif len(source) == 1 and _is_config(source[0]):
        values = _read_config(source[0])
    else:
        values = _parse_words(list(source), prog)
    _refuse_unknown([name for name in values if name not in _all_flags()])
    if "output_dir" not in values:
        raise ValueError(
            "output_dir: expected the folder for everything that training writes, got nothing"
        )
    groups = {}
    for name, flags in FLAGS.items():
        given = {flag.name: values[flag.name] for flag in flags if flag.name in values}
        groups[name] = _CLASSES[name](**given)
    notices = [notice for group in groups.values() for notice in group.notices]
    model, data, training, finetuning = (
        groups[g] for g in ("model", "data", "training", "finetuning")
    )
    notices += _check_together(model, data, training, finetuning)
    return Arguments(model, data, training, finetuning, notices)


def call_arguments(
    args: TrainingArguments | Mapping[str, Any] | None, overrides: Mapping[str, Any]
) -> tuple[Arguments, set[str]]:
    """Arguments of `train(..., args, **overrides)`, and the names that were given.

    Raises TypeError for a name of no group, ValueError for what cannot be while training.
    """
    values: dict[str, Any] = {}
    if isinstance(args, TrainingArguments):
        values = args.to_dict()
        if {"evaluation_strategy", "eval_strategy"} & set(overrides):
            del values["evaluation_strategy"], values["eval_strategy"]
        if {"no_cuda", "use_cpu"} & set(overrides):
            del values["no_cuda"], values["use_cpu"]
    elif isinstance(args, Mapping):
        values = dict(args)
    elif args is not None:
        raise TypeError(f"args: expected TrainingArguments or a dict, got {type(args).__name__}")
    given = set(overrides) | (set(args) if isinstance(args, Mapping) else set())
    values.update(overrides)
    if values.get("resume_from_checkpoint") is True:
        values["resume_from_checkpoint"] = "last"
    elif values.get("resume_from_checkpoint") is False:
        values["resume_from_checkpoint"] = None
    flags = _all_flags()
    unknown = [name for name in values if name not in flags or name == "model_name_or_path"]
    if unknown:
        import difflib

        shown = []
        for name in unknown:
            near = difflib.get_close_matches(name, flags, n=1)
            shown.append(f"{name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
        raise TypeError(f"train: unknown arguments: {', '.join(shown)}")
    if "output_dir" not in values:
        raise TypeError(
            "train: output_dir is missing: the folder for everything that training writes"
        )
    model, data, training, finetuning = (
        _CLASSES[group](**{f.name: values[f.name] for f in FLAGS[group] if f.name in values})
        for group in ("model", "data", "training", "finetuning")
    )
    if model.quantization_bit is not None:
        check_quantization(model.quantization_bit, training, finetuning)
    for name in ("do_predict", "predict_with_generate"):
        if getattr(training, name):
            raise ValueError(f"{name}: cannot be used while training; use the model's chat")
    if finetuning.finetuning_type == "none":
        raise ValueError(
            "finetuning_type: expected lora, p_tuning, freeze or full while training, got 'none'"
        )
    notices = [n for group in (model, data, training, finetuning) for n in group.notices]
    return Arguments(model, data, training, finetuning, notices), given


def _check_together(
    model: ModelArguments,
    data: DataArguments,
    training: TrainingArguments,
    finetuning: FinetuningArguments,
) -> list[str]:
    """The original's rules between groups. Returns notices."""
    if training.do_train and training.predict_with_generate:
        raise ValueError(
            "predict_with_generate: cannot be used together with do_train; predict in a second run"
        )
    if training.do_predict and not training.predict_with_generate:
        raise ValueError("do_predict: needs predict_with_generate")
    if training.do_train and finetuning.finetuning_type == "none":
        raise ValueError(
            "finetuning_type: expected lora, p_tuning, freeze or full while training, got 'none'"
        )
    if not data.dataset_names:
        raise ValueError(f"dataset: expected names separated by commas, got {data.dataset!r}")
    held_out = data.dev_ratio > 1e-6
    if training.do_train and training.do_eval and not held_out:
        raise ValueError(
            f"dev_ratio: evaluation while training needs a part of the data held out, e.g. "
            f"0.1; got {data.dev_ratio!r}"
        )
    if model.quantization_bit is not None:
        check_quantization(model.quantization_bit, training, finetuning)
    notices = []
    if model.quantization_bit is not None and not training.do_train:
        notices.append(f"quantization_bit: an int{model.quantization_bit} base scores lower")
    if not (training.do_train or training.do_eval or training.do_predict):
        notices.append("none of do_train, do_eval and do_predict is set: there is nothing to do")
    if training.do_train and held_out and not training.do_eval:
        notices.append(
            "dev_ratio holds data out, but neither evaluation_strategy nor do_eval evaluates them"
        )
    return notices


def check_quantization(
    bits: int, training: TrainingArguments, finetuning: FinetuningArguments
) -> None:
    """ValueError for a quantized base with a method that trains its weights, or with p_tuning in
    fp16.
    """
    if finetuning.finetuning_type in ("full", "freeze"):
        raise ValueError(
            f"quantization_bit: {bits} is incompatible with finetuning_type "
            f"{finetuning.finetuning_type!r}; "
            "use lora or p_tuning"
        )
    if finetuning.finetuning_type == "p_tuning" and training.fp16:
        raise ValueError(
            f"quantization_bit: {bits} with finetuning_type 'p_tuning' conflicts with fp16"
        )


def _all_flags() -> dict[str, Flag]:
    return {flag.name: flag for flags in FLAGS.values() for flag in flags}


def _refuse_unknown(unknown: Sequence[Any]) -> None:
    """Raises ValueError that lists all unknown names, each with the nearest known one."""
    if not unknown:
        return
    import difflib

    known = list(_all_flags())
    parts = []
    for name in unknown:
        plain = str(name).lstrip("-").split("=")[0]
        near = difflib.get_close_matches(plain, known, n=1, cutoff=0.8)
        if plain in GENERATING:
            parts.append(f"{name} (belongs to generation, not to training)")
        else:
            parts.append(f"{name} (did you mean {near[0]}?)" if near else str(name))
    raise ValueError(f"unknown arguments: {', '.join(parts)}")


def _is_config(word: str) -> bool:
    return word.endswith((".json", ".yaml", ".yml"))


def _read_config(path: str) -> dict[str, Any]:
    """Flags from a .json or .yaml file, whose top must be an object."""
    if not _is_config(path):
        raise ValueError(f"{path}: expected a file ending in .json or .yaml")
    if path.endswith(".json"):
        from ..files.write import read_json

        return read_json(path, dict)
    try:
        import yaml
    except ImportError:
        raise ValueError(
            f"{path}: reading YAML needs PyYAML (pip install pyyaml); or use a .json file"
        ) from None
    try:
        with open(path, encoding="utf-8-sig") as file:
            values = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(
            f"{path}: expected a mapping of flags to values, got {type(values).__name__}"
        )
    return values


def _parse_words(words: list[str], prog: str) -> dict[str, Any]:
    """Only the given flags, converted."""
    import argparse

    def reader(flag: Flag):
        def read(text: str) -> Any:
            try:
                return _convert(
                    flag._replace(kind="str") if flag.kind in ("list", "words") else flag, text
                )
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None

        return read

    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} --flag value ...   or   {prog} FILE.json|FILE.yaml   (--help: all flags)",
        argument_default=argparse.SUPPRESS,
    )
    for group, flags in FLAGS.items():
        section = parser.add_argument_group(group)
        for flag in flags:
            text = (
                "refused: " if flag.mark == "R" else "no effect: " if flag.mark == "A" else ""
            ) + flag.help
            if flag.choices:
                text += f" ({', '.join(flag.choices)})"
            if flag.default is not REQUIRED and flag.default is not None:
                text += f" [{flag.default}]"
            options: dict[str, Any] = {"type": reader(flag), "help": text.replace("%", "%%")}
            if flag.kind == "bool":
                section.add_argument(
                    f"--{flag.name}", nargs="?", const=True, metavar="BOOL", **options
                )
                if flag.default is True:
                    section.add_argument(
                        f"--no_{flag.name}",
                        dest=flag.name,
                        action="store_false",
                        default=argparse.SUPPRESS,
                        help=argparse.SUPPRESS,
                    )
            else:
                nargs = "+" if flag.kind == "words" else None
                section.add_argument(
                    f"--{flag.name}", nargs=nargs, metavar=flag.kind.upper(), **options
                )
    plain = []
    for word in words:
        if word.startswith("--") and word != "--":
            name, equals, value = word.partition("=")
            word = "--" + name[2:].replace("-", "_") + equals + value
        plain.append(word)
    known, unknown = parser.parse_known_args(plain)
    _refuse_unknown(unknown)
    if "output_dir" not in known:
        parser.error("the following arguments are required: --output_dir")
    return vars(known)
