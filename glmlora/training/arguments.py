"""Arguments of training: four dataclasses, whose fields are the flags of the command line.

Names and defaults follow transformers 4.30.2 and the original train_bash.py, except that
`save_safetensors` is true.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from .. import families
from ..names import did_you_mean
from .config_file import is_config, read_config
from .flags import (
    REQUIRED,
    Flag,
    Group,
    StrPath,
    about,
    convert,
    flags_of,
    given_twice,
    names_unknown_flags,
    option,
)

SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
TRACKERS = ("tensorboard", "mlflow", "swanlab")
STRATEGIES = ("no", "steps", "epoch")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical", "passive")

_OTHER_HARDWARE = "runs on the CPU, or on one CUDA device, only; leave it out"
_ONE_DEVICE = (
    "one process on one device trains here; leave it out, "
    "and raise gradient_accumulation_steps instead"
)
_HUB = "nothing is uploaded; copy output_dir to the hub with its own tools"

# What other programs call a flag.
_OTHER_NAMES = {
    "adapter_name_or_path": "checkpoint_dir",
    "batch_size": "per_device_train_batch_size",
    "cutoff_len": "max_source_length",
    "epochs": "num_train_epochs",
    "freeze_trainable_layers": "num_layer_trainable",
    "freeze_trainable_modules": "name_module_trainable",
    "lora_r": "lora_rank",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "num_epochs": "num_train_epochs",
    "num_virtual_tokens": "pre_seq_len",
    "r": "lora_rank",
    "target_modules": "lora_target",
    "val_size": "dev_ratio",
}

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


@names_unknown_flags
@dataclasses.dataclass
class ModelArguments(Group):
    """Which base model, in which form, with which checkpoints. `checkpoint_dir` becomes a list.

    `notices` lists what was accepted without effect. Raises ValueError naming the field, its value
    and what was expected; TypeError for an unknown keyword.
    """

    # fmt: off
    model_name_or_path: StrPath = option(families.UNNAMED, "W", "directory of the base model")
    use_v2: bool = option(False, "W",
        f"the base is {families.default().title}; the family is detected, a contradiction warns")
    config_name: StrPath | None = option(None, "S", "another directory for config.json")
    tokenizer_name: StrPath | None = option(None, "S", "another directory for the tokenizer")
    cache_dir: StrPath | None = option(None, "A", "nothing is downloaded")
    use_fast_tokenizer: bool = option(True, "A", "there is one tokenizer")
    model_revision: str = option("main", "A", "nothing is downloaded")
    use_auth_token: bool = option(False, "A", "nothing is downloaded")
    quantization_bit: int | None = option(None, "S", "quantize the frozen base", bound="4,8")
    quantization_type: str = option("nf4", "A",
        "4 bits are integers in groups of 32", ("fp4", "nf4"))
    double_quantization: bool = option(True, "A", "the scales of a 4-bit base are float16")
    compute_dtype: str | None = option(None, "S",
        "type of the large products; int8: over an int8 or int4 base",
        ("auto", "float32", "bfloat16", "int16", "int8"))
    checkpoint_dir: str | list[str] | None = option(None, "S",
        "trained checkpoints, separated by commas")
    reward_model: str | None = option(None, "R",
        "belongs to the ppo stage; use --stage sft without it")
    resume_lora_training: bool = option(True, "S",
        "train the last adapter on; otherwise merge all, add a new one")
    plot_loss: bool = option(False, "S", "draw the loss curves into output_dir")
    family: str = option("auto", "S", "model family of the base", families.choices())
    threads: int | None = option(None, "S",
        "processor threads (default: OMP_NUM_THREADS, else all cores)", bound="[1,1024]")
    # fmt: on

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_v2 and self.model_name_or_path == families.UNNAMED:
            self.model_name_or_path = families.default().checkpoint


@names_unknown_flags
@dataclasses.dataclass
class DataArguments(Group):
    """Which data sets, and how records become ids. Errors and `notices` as in ModelArguments."""

    # fmt: off
    dataset: str = option("alpaca_zh", "W", "names in dataset_info.json, separated by commas")
    dataset_dir: StrPath = option("data", "D", "folder with dataset_info.json")
    split: str = option("train", "A", "only hub data sets have splits")
    overwrite_cache: bool = option(False, "A", "nothing is cached")
    preprocessing_num_workers: int | None = option(None, "A", "encoding runs in one process")
    max_source_length: int = option(512, "D",
        "ids of the prompt with its 2 special ids", bound=">=3")
    max_target_length: int = option(512, "D", "ids of the answer with its end id", bound=">=2")
    max_samples: int | None = option(None, "S", "first rows taken from each data set", bound=">=1")
    eval_num_beams: int | None = option(None, "S", "beams while predicting", bound=">=1")
    ignore_pad_token_for_loss: bool = option(True, "D",
        "leave labels equal to the pad id out of the loss")
    source_prefix: str | None = option(None, "S", "text put before every prompt")
    dev_ratio: float = option(0.0, "S", "part of the data held out for evaluation", bound="[0,1)")
    truncation: str = option("template", "S",
        "long prompts: cut the query inside the template, or the end of all as the original",
        ("template", "vendored"))
    template: str = option("auto", "S",
        "prompt: the family's own, or the original's", ("auto", "vendored"))
    # fmt: on

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source_prefix:
            self.notices.append(
                "source_prefix is put before the prompts of this run only: chats with what it "
                "trains do not add it, so begin your questions with it"
            )

    @property
    def dataset_names(self) -> list[str]:
        """The names in `dataset`, in order."""
        return [name.strip() for name in self.dataset.split(",") if name.strip()]


@names_unknown_flags
@dataclasses.dataclass
class FinetuningArguments(Group):
    """What is trained. `lora_target` becomes a list. Errors and `notices` as in ModelArguments."""

    # The original keeps the stage outside this group: its loader would not know the key.
    _hidden: ClassVar[tuple[str, ...]] = ("stage",)
    _newer: ClassVar[tuple[str, ...]] = ("use_dora", "init_lora_weights", "modules_to_save")

    # fmt: off
    stage: str = option("sft", "W", "only sft is supported", ("sft", "rm", "ppo"))
    finetuning_type: str = option("lora", "W",
        "what is trained", ("none", "freeze", "p_tuning", "lora", "full"))
    num_layer_trainable: int = option(3, "S",
        "freeze: last n blocks, or first n if negative", bound="!=0")
    name_module_trainable: str = option("mlp", "S", "freeze: part of the blocks", ("mlp", "qkv"))
    pre_seq_len: int = option(64, "S", "p_tuning: prefix length", bound=">=1")
    prefix_projection: bool = option(False, "S", "p_tuning: two linear layers over the prefix")
    lora_rank: int = option(8, "W", "rank of the adapter", bound=">=1")
    lora_alpha: float = option(32.0, "D", "scale of the adapter, divided by its rank", bound=">0")
    lora_dropout: float = option(0.1, "D", "dropout on the adapter's input", bound="[0,1)")
    lora_target: str | list[str] = option("query_key_value", "D",
        "ends of module names, separated by commas; all-linear; or a regular expression")
    use_dora: bool = option(False, "S", "DoRA: outputs have magnitudes of their own")
    init_lora_weights: str = option("true", "S", "what the adapter begins with, as in LoraConfig",
        ("true", "gaussian", "pissa", "olora"))
    modules_to_save: str | list[str] | None = option(None, "S",
        "modules that are trained whole beside the adapter, e.g. output_layer")
    # fmt: on
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage != "sft":
            raise ValueError(
                f"stage: {self.stage!r} (reward model and PPO) is not supported; use --stage sft, "
                "or train that stage with the original program"
            )


@names_unknown_flags
@dataclasses.dataclass
class TrainingArguments(Group):
    """How to train: the arguments of transformers 4.30.2 by keyword, `output_dir` first.

    Later names (`eval_strategy`, `use_cpu`) are kept equal to the old ones. Where
    `load_best_model_at_end` is set, `metric_for_best_model` and `greater_is_better` are filled in.
    Errors and `notices` as in ModelArguments.
    """

    # fmt: off
    output_dir: StrPath = dataclasses.field(
        metadata=about("W", "folder for everything that training writes"))
    overwrite_output_dir: bool = option(False, "A", "an existing output_dir is always reused")
    do_train: bool = option(False, "W", "train")
    do_eval: bool = option(False, "S", "evaluate")
    do_predict: bool = option(False, "S", "write predictions")
    evaluation_strategy: str = option("no", "S", "when to evaluate while training", STRATEGIES)
    eval_strategy: str | None = option(None, "S", "later name of evaluation_strategy", STRATEGIES)
    eval_steps: float | None = option(None, "S",
        "updates between evaluations; below 1: part of all", bound=">0")
    eval_delay: float = option(0.0, "S", "epochs or steps before the first evaluation", bound=">=0")
    prediction_loss_only: bool = option(False, "S", "evaluate the loss alone")
    per_device_train_batch_size: int = option(8, "W", "rows per micro-batch", bound=">=1")
    per_device_eval_batch_size: int = option(8, "S", "rows per batch of evaluation", bound=">=1")
    per_gpu_train_batch_size: int | None = option(None, "A", "use per_device_train_batch_size")
    per_gpu_eval_batch_size: int | None = option(None, "A", "use per_device_eval_batch_size")
    gradient_accumulation_steps: int = option(1, "W", "micro-batches per update", bound=">=1")
    eval_accumulation_steps: int | None = option(None, "A", "nothing is accumulated on a device")
    learning_rate: float = option(5e-5, "W", "peak rate of AdamW", bound=">=0")
    loraplus_lr_ratio: float = option(1.0, "S", "lora_B has so many times the rate", bound=">0")
    neftune_noise_alpha: float | None = option(None, "S",
        "NEFTune: size of the noise on the embeddings", bound=">=0")
    weight_decay: float = option(0.0, "D", "decoupled decay, not on biases and norms", bound=">=0")
    adam_beta1: float = option(0.9, "D", "decay of the first moment", bound="[0,1)")
    adam_beta2: float = option(0.999, "D", "decay of the second moment", bound="[0,1)")
    adam_epsilon: float = option(1e-8, "D", "added to the root of the second moment", bound=">0")
    max_grad_norm: float = option(1.0, "D",
        "clip the global gradient norm; 0: no clipping", bound=">=0")
    num_train_epochs: float = option(3.0, "W", "passes over the data", bound=">0")
    max_steps: int = option(-1, "S", "updates in all if above 0, in place of the epochs")
    lr_scheduler_type: str = option("linear", "W", "course of the learning rate", SCHEDULERS)
    warmup_ratio: float = option(0.0, "S", "part of all updates that warms up", bound="[0,1]")
    warmup_steps: int = option(0, "S", "updates that warm up; wins over warmup_ratio", bound=">=0")
    log_level: str = option("passive", "A", "there is no logger to set", LOG_LEVELS)
    log_level_replica: str = option("warning", "A", "there are no replicas", LOG_LEVELS)
    log_on_each_node: bool = option(True, "A", "there is one node")
    logging_dir: StrPath | None = option(None, "S", "tensorboard's folder (default: runs)")
    logging_strategy: str = option("steps", "S", "when to log", STRATEGIES)
    logging_first_step: bool = option(False, "S", "log the first update too")
    logging_steps: float = option(500, "W", "updates between logs; below 1: part of all")
    logging_nan_inf_filter: bool = option(True, "A", "a loss that is not finite ends the run")
    save_strategy: str = option("steps", "S", "when to save checkpoints", STRATEGIES)
    save_steps: float = option(500, "W", "updates between checkpoints; below 1: part of all")
    save_total_limit: int | None = option(None, "S", "keep the newest n checkpoints", bound=">=1")
    save_safetensors: bool = option(True, "S", "write .safetensors; otherwise .bin")
    save_on_each_node: bool = option(False, "A", "there is one node")
    no_cuda: bool = option(False, "S", "stay on the CPU")
    use_cpu: bool = option(False, "S", "later name of no_cuda")
    use_mps_device: bool = option(False, "R", _OTHER_HARDWARE)
    use_ipex: bool = option(False, "R", _OTHER_HARDWARE)
    jit_mode_eval: bool = option(False, "R", _OTHER_HARDWARE)
    xpu_backend: str | None = option(None, "R", _OTHER_HARDWARE)
    tpu_num_cores: int | None = option(None, "R", _OTHER_HARDWARE)
    tpu_metrics_debug: bool = option(False, "R", _OTHER_HARDWARE)
    seed: int = option(42, "D", "parameters, dropout and order", bound="seed")
    data_seed: int | None = option(None, "S", "order only", bound="seed")
    fp16: bool = option(False, "W", "mixed precision with float16")
    bf16: bool = option(False, "S", "mixed precision with bfloat16")
    fp16_opt_level: str = option("O1", "A", "mixed precision has one form")
    half_precision_backend: str = option("auto", "A", "mixed precision has one form")
    fp16_backend: str = option("auto", "A", "mixed precision has one form")
    fp16_full_eval: bool = option(False, "A", "evaluation is in the type that training was in")
    bf16_full_eval: bool = option(False, "A", "evaluation is in the type that training was in")
    tf32: bool | None = option(None, "A", "fp16, bf16 and compute_dtype decide")
    local_rank: int = option(-1, "R", _ONE_DEVICE)
    ddp_backend: str | None = option(None, "R", _ONE_DEVICE)
    ddp_find_unused_parameters: bool | None = option(None, "R", _ONE_DEVICE)
    ddp_bucket_cap_mb: int | None = option(None, "R", _ONE_DEVICE)
    ddp_timeout: int = option(1800, "R", _ONE_DEVICE)
    sharded_ddp: str = option("", "R", _ONE_DEVICE)
    fsdp: str = option("", "R", _ONE_DEVICE)
    fsdp_min_num_params: int = option(0, "R", _ONE_DEVICE)
    fsdp_config: str | None = option(None, "R", _ONE_DEVICE)
    fsdp_transformer_layer_cls_to_wrap: str | None = option(None, "R", _ONE_DEVICE)
    deepspeed: str | None = option(None, "R", _ONE_DEVICE)
    mp_parameters: str = option("", "R", _ONE_DEVICE)
    debug: str = option("", "A", "there are no debug modes")
    past_index: int = option(-1, "A", "the models here keep no such state")
    skip_memory_metrics: bool = option(True, "A", "memory is checked before the first step")
    use_legacy_prediction_loop: bool = option(False, "A", "there is one loop")
    include_inputs_for_metrics: bool = option(False, "A", "the metrics are fixed")
    ray_scope: str = option("last", "A", "there is no parameter search")
    label_names: str | list[str] | None = option(None, "A",
        "the labels are the answers", kind="words")
    remove_unused_columns: bool = option(True, "A",
        "only the columns of the data set's entry are read")
    dataloader_drop_last: bool = option(False, "S", "leave out the last short micro-batch")
    dataloader_num_workers: int = option(0, "A", "batches are made in the training process")
    dataloader_pin_memory: bool = option(True, "A", "batches are made in the training process")
    disable_tqdm: bool | None = option(None, "S", "no progress bar")
    load_best_model_at_end: bool = option(False, "S", "end with the best checkpoint's weights")
    metric_for_best_model: str | None = option(None, "S", "what is best (default: loss)")
    greater_is_better: bool | None = option(None, "S", "direction of that (default: by its name)")
    label_metrics: bool = option(False, "S",
        "evaluations tell accuracy, macro_f1 and log_loss: the answers are labels")
    early_stopping_patience: int | None = option(None, "S",
        "end after n evaluations without a better model", bound=">=1")
    ignore_data_skip: bool = option(False, "S", "resume at the start of the epoch's data")
    label_smoothing_factor: float = option(0.0, "R",
        "the loss is plain cross-entropy; leave it at 0")
    optim: str = option("adamw_torch", "D",
        "the optimizer is AdamW: adamw_torch, or its old name adamw_hf")
    optim_args: str | None = option(None, "R",
        "set adam_beta1, adam_beta2, adam_epsilon and weight_decay instead")
    adafactor: bool = option(False, "R", "the optimizer is AdamW; leave it out")
    group_by_length: bool = option(False, "S", "put rows of like length into one batch")
    length_column_name: str = option("length", "A", "lengths are counted in ids")
    report_to: str | list[str] | None = option(None, "S",
        "tell tensorboard, mlflow or swanlab what is logged, too", kind="words")
    run_name: str | None = option(None, "S", "what trackers call the run (default: output_dir's)")
    push_to_hub: bool = option(False, "R", _HUB)
    hub_model_id: str | None = option(None, "R", _HUB)
    hub_strategy: str = option("every_save", "R", _HUB)
    hub_token: str | None = option(None, "R", _HUB)
    hub_private_repo: bool = option(False, "R", _HUB)
    push_to_hub_model_id: str | None = option(None, "R", _HUB)
    push_to_hub_organization: str | None = option(None, "R", _HUB)
    push_to_hub_token: str | None = option(None, "R", _HUB)
    resume_from_checkpoint: StrPath | None = option(None, "S",
        "a checkpoint-N folder to go on from, exactly")
    gradient_checkpointing: bool = option(False, "S",
        "keep 1 GiB of activations at most; without it, what fits into memory")
    auto_find_batch_size: bool = option(False, "R",
        "memory is checked before the first step; set the batch size")
    full_determinism: bool = option(False, "A",
        "runs are bit-equal on the CPU anyway; deterministic: with any number of MPI ranks, too")
    deterministic: bool = option(False, "S",
        "the same bits with any number of MPI ranks: micro-batches are added up in pairs")
    torchdynamo: str | None = option(None, "A", "there is nothing to compile")
    torch_compile: bool = option(False, "A", "there is nothing to compile")
    torch_compile_backend: str | None = option(None, "A", "there is nothing to compile")
    torch_compile_mode: str | None = option(None, "A", "there is nothing to compile")
    sortish_sampler: bool = option(False, "A", "use group_by_length")
    predict_with_generate: bool = option(False, "S", "evaluate by generated answers")
    generation_max_length: int | None = option(None, "A", "max_target_length decides")
    generation_num_beams: int | None = option(None, "S",
        "beams while predicting, if eval_num_beams is not set", bound=">=1")
    generation_config: str | None = option(None, "A", "evaluation uses the original's settings")
    # fmt: on

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
    def trackers(self) -> list[str]:
        """Of `report_to` those that there are."""
        return [name for name in self.report_to or () if name in TRACKERS]

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
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")


#: The groups of arguments, in the order of `--help`, and their flags.
GROUPS: dict[str, Any] = {
    "model": ModelArguments,
    "data": DataArguments,
    "finetuning": FinetuningArguments,
    "training": TrainingArguments,
}
FLAGS = {name: flags_of(group) for name, group in GROUPS.items()}
_ALL = {flag.name: flag for flags in FLAGS.values() for flag in flags}
#: What `glmlora.train` takes by keyword: all but the directory of the model, by name.
CALL_FLAGS = {name: flag for name, flag in _ALL.items() if name != "model_name_or_path"}


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
    `--flag true|false|yes|no|1|0|t|f|y|n` or, where the default is true, `--no_flag`; `--a=b` and
    dashes are understood; the beginning of a flag is not one.

    `notices` of the result are sentences to print once. Raises ValueError naming field, value and
    what was expected, or all unknown flags; SystemExit with code 2 and the usage on standard error
    for a command line with a value of the wrong type or outside its choices.
    """
    if source is None:
        source = sys.argv[1:]
    told: list[str] = []
    if isinstance(source, (str, os.PathLike)):
        values = read_config(os.fspath(source))
    elif isinstance(source, Mapping):
        values = dict(source)
    elif len(source) == 1 and is_config(source[0]):
        values = read_config(source[0])
    else:
        values, told = _parse_words(list(source), prog)
    _refuse_unknown([name for name in values if name not in _ALL])
    _settle_resume(values)
    if "output_dir" not in values:
        raise ValueError(
            "output_dir: expected the folder for everything that training writes, got nothing"
        )
    groups = {}
    for name, flags in FLAGS.items():
        given = {flag.name: values[flag.name] for flag in flags if flag.name in values}
        groups[name] = GROUPS[name](**given)
    notices = told + [notice for group in groups.values() for notice in group.notices]
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
    _settle_resume(values)
    unknown = [name for name in values if name not in CALL_FLAGS]
    if unknown:
        shown = (f"{name!r}{_near(str(name), CALL_FLAGS)}" for name in unknown)
        raise TypeError(f"train: unknown arguments: {', '.join(shown)}")
    if "output_dir" not in values:
        raise TypeError(
            "train: output_dir is missing: the folder for everything that training writes"
        )
    model, data, training, finetuning = (
        GROUPS[group](**{f.name: values[f.name] for f in FLAGS[group] if f.name in values})
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
    notices += without_effect(model, data, training, finetuning)
    notices += [
        f"{name} has no effect: the data are those that are given"
        for name in ("dataset", "dataset_dir")
        if name in given
    ]
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
    if training.do_predict and training.prediction_loss_only:
        raise ValueError("do_predict: needs answers, and prediction_loss_only says there are none")
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
    notices = without_effect(model, data, training, finetuning)
    if model.quantization_bit is not None and not training.do_train:
        notices.append(f"quantization_bit: an int{model.quantization_bit} base scores lower")
    if not (training.do_train or training.do_eval or training.do_predict):
        notices.append("none of do_train, do_eval and do_predict is set: there is nothing to do")
    if held_out and not training.do_train:
        notices.append("dev_ratio has no effect: without do_train all data are evaluated")
    if training.predict_with_generate and not (training.do_eval or training.do_predict):
        notices.append("predict_with_generate has no effect: neither do_eval nor do_predict is set")
    if training.resume_from_checkpoint is not None and not training.do_train:
        notices.append("resume_from_checkpoint has no effect: do_train is not set")
    if training.do_train and held_out and not training.do_eval:
        notices.append(
            "dev_ratio holds data out, but neither evaluation_strategy nor do_eval evaluates them"
        )
    return notices


def without_effect(
    model: ModelArguments,
    data: DataArguments,
    training: TrainingArguments,
    finetuning: FinetuningArguments,
) -> list[str]:
    """Sentences about values that mean nothing beside the others, where they are not defaults."""
    groups = (model, data, training, finetuning)
    values = {flag.name: getattr(g, flag.name) for g in groups for flag in flags_of(type(g))}
    t, kind = training, finetuning.finetuning_type
    lora = " ".join(f.name for f in flags_of(FinetuningArguments) if f.name.startswith("lora_"))
    lora += " " + " ".join(FinetuningArguments._newer)
    continued = kind == "lora" and model.checkpoint_dir and model.resume_lora_training
    # Names; whether they mean nothing now; because of this flag's value, or the reason in words.
    rules: tuple[tuple[str, Any, str], ...] = (
        ("num_layer_trainable name_module_trainable", kind != "freeze", "finetuning_type"),
        ("pre_seq_len prefix_projection", kind != "p_tuning", "finetuning_type"),
        (f"{lora} loraplus_lr_ratio resume_lora_training", kind != "lora", "finetuning_type"),
        (lora, continued, "the adapter in checkpoint_dir has its own"),
        (
            "pre_seq_len prefix_projection",
            kind == "p_tuning" and model.checkpoint_dir,
            "the prefix in checkpoint_dir has its own",
        ),
        ("resume_lora_training", not model.checkpoint_dir, "checkpoint_dir"),
        ("eval_steps", t.eval_strategy != "steps", "evaluation_strategy"),
        ("eval_delay", t.eval_strategy == "no", "evaluation_strategy"),
        ("label_metrics", not t.do_eval, "do_eval"),
        ("save_steps", t.save_strategy != "steps", "save_strategy"),
        ("save_total_limit", t.save_strategy == "no", "save_strategy"),
        ("logging_steps", t.logging_strategy != "steps", "logging_strategy"),
        (
            "metric_for_best_model greater_is_better early_stopping_patience",
            not t.load_best_model_at_end,
            "load_best_model_at_end",
        ),
        ("warmup_ratio", t.warmup_steps > 0, "warmup_steps"),
        ("warmup_ratio warmup_steps", t.lr_scheduler_type == "constant", "lr_scheduler_type"),
        ("num_train_epochs", t.max_steps > 0, "max_steps"),
        (
            "report_to",
            set(t.report_to or ()) - {*TRACKERS, "none"},
            f"{' '.join(t.report_to or ())}: expected some of {', '.join(TRACKERS)}",
        ),
        ("run_name", not t.trackers, "report_to names no tracker"),
        ("logging_dir", "tensorboard" not in t.trackers, "report_to does not name tensorboard"),
        ("max_steps", t.max_steps < 1, "updates are counted from 1, num_train_epochs decides"),
        ("ignore_data_skip", t.resume_from_checkpoint is None, "resume_from_checkpoint"),
        (
            "eval_num_beams generation_num_beams",
            not t.predict_with_generate,
            "predict_with_generate",
        ),
        ("generation_num_beams", data.eval_num_beams is not None, "eval_num_beams"),
    )
    told: dict[str, str] = {}
    for names, applies, why in rules:
        for name in names.split() if applies else ():
            default = _ALL[name].default
            if values[name] != ([default] if isinstance(values[name], list) else default):
                reason = f"{why} is {values[why]!r}" if why in values else why
                told.setdefault(name, f"{name} has no effect: {reason}")
    return list(told.values())


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


def _refuse_unknown(unknown: Sequence[Any]) -> None:
    """Raises ValueError that lists all unknown names, each with the nearest known one."""
    if not unknown:
        return
    parts = []
    for name in unknown:
        plain = str(name).lstrip("-").split("=")[0]
        near = " (belongs to generation, not to training)"
        parts.append(f"{name}{near if plain in GENERATING else _near(plain, _ALL)}")
    raise ValueError(f"unknown arguments: {', '.join(parts)}")


def _near(name: str, known: Iterable[str]) -> str:
    """`did_you_mean`, which also knows what other programs call a flag."""
    return did_you_mean(_OTHER_NAMES.get(name, name), known)


def _settle_resume(values: dict[str, Any]) -> None:
    """true of a config file, a dict or a call: from the newest checkpoint."""
    value = values.get("resume_from_checkpoint")
    if isinstance(value, bool):
        values["resume_from_checkpoint"] = "last" if value else None


def _parse_words(words: list[str], prog: str) -> tuple[dict[str, Any], list[str]]:
    """(only the given flags, converted; sentences about flags given twice)."""
    import argparse

    def reader(flag: Flag):
        def read(text: str) -> Any:
            try:
                return convert(
                    flag._replace(kind="str") if flag.kind in ("list", "words") else flag, text
                )
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None

        return read

    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} --flag value ...   or   {prog} FILE.json|FILE.yaml   (--help: all flags)",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
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
    flags_there = [word for word in unknown if word.startswith("--")]
    _refuse_unknown(flags_there or unknown)
    if "output_dir" not in known:
        parser.error("the following arguments are required: --output_dir")
    single = {f"--{name}": name for name, flag in _ALL.items() if flag.kind != "words"}
    single |= {f"--no_{name}": name for name, flag in _ALL.items() if flag.default is True}
    return vars(known), given_twice(plain, single)
