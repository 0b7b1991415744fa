"""`glmlora.train(model, data, ...)` and the command behind `glmlora train`.

Both come down to the same steps: records, model, what is trained (methods.py), ids, the loop
(loop.py), files of the end. This page has the order of things and what is said about them.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import _core, families
from ..batch import IGNORED, Encoded, split_dev
from ..files.write import write_text
from ..model.configuration import ChatGLMConfig
from ..model.modeling import AutoModel, ChatGLMForConditionalGeneration
from ..model.peft import PeftModel, trainable_line
from ..model.quantization import GROUP_SIZE
from ..seeds import set_seed
from ..tokenization import AutoTokenizer
from . import methods
from .arguments import (
    FLAGS,
    DataArguments,
    FinetuningArguments,
    ModelArguments,
    TrainingArguments,
    check_quantization,
    parse_train_arguments,
)
from .evaluation import (
    evaluate_loss,
    metrics_block,
    predict,
    save_metrics,
    write_predictions,
)
from .loop import Loop, TrainState, find_checkpoint
from .plot import plot_loss
from .records import encode_records, load_datasets, read_rows, records_from

__all__ = ["TrainResult", "TrainState", "run_train", "train"]


@dataclass
class TrainResult:
    """What `train` did.

    model: ready for `chat`, dropout off (a PeftModel for lora); metrics: the summary record, and
    `eval_loss` where evaluation data were given; log_history: all records, with `step`; rows: used
    for training; rows_skipped: without prompt or answer; rows_cut: whose prompt was longer than
    max_source_length; stopped_early: by a callback.
    """

    model: Any
    tokenizer: Any
    output_dir: str
    global_step: int
    metrics: dict[str, float] = field(default_factory=dict)
    log_history: list[dict[str, Any]] = field(default_factory=list)
    rows: int = 0
    rows_skipped: int = 0
    rows_cut: int = 0
    stopped_early: bool = False
    best_metric: float | None = None
    best_model_checkpoint: str | None = None

    def __repr__(self) -> str:
        loss = self.metrics.get("train_loss", float("nan"))
        return (
            f"TrainResult(output_dir={self.output_dir!r}, steps={self.global_step}, "
            f"rows={self.rows}, rows_skipped={self.rows_skipped}, rows_cut={self.rows_cut}, "
            f"train_loss={loss:.4f})"
        )


def train(
    model_or_path: Any,
    data: Any,
    args: TrainingArguments | Mapping[str, Any] | None = None,
    *,
    tokenizer: Any = None,
    eval_data: Any = None,
    callbacks: Sequence[Any] = (),
    **overrides: Any,
) -> TrainResult:
    """Fine-tune a model on records; what it learns is written into `output_dir`.

    model_or_path: a model directory, a model, or a PeftModel (whose adapter is then trained
    further). data, eval_data: a DataFrame, a list of dicts, or a csv, json or jsonl file with the
    columns `instruction` (or `prompt`), `input` (or `query`), `output` (or `response`), `history`.
    args: TrainingArguments or a dict; overrides: any argument of `glmlora train` by name, whatever
    its group, e.g.

        glmlora.train("../chatglm2-6b", df, output_dir="out", lora_rank=8, num_train_epochs=1)

    callbacks: functions that get each log record, or objects with some of on_train_begin,
    on_step_end, on_log, on_save, on_train_end, each called with the TrainState, whose `should_stop`
    they may set. `resume_from_checkpoint="last"` (or a checkpoint-N folder) goes on exactly where
    that checkpoint was written.

    Raises TypeError for an unknown argument, ValueError naming argument, value and what was
    expected, OSError for an output_dir that cannot be written (before training), MemoryError with
    the bytes needed and available (before the first step), FloatingPointError naming update, layer
    and records. Ctrl-C leaves a checkpoint of what was done and raises KeyboardInterrupt.
    """
    model_args, data_args, training, finetuning, given = _arguments(args, overrides)
    _say_notices(model_args, data_args, training, finetuning)
    kind = finetuning.finetuning_type if "finetuning_type" in given else None
    check_output_dir(training.output_dir)
    resume = find_checkpoint(training.resume_from_checkpoint, Path(training.output_dir))
    if not isinstance(data, (str, os.PathLike)) and not hasattr(data, "columns"):
        data = list(data)
    records = records_from(data)
    n_given = len(read_rows(data)) if isinstance(data, (str, os.PathLike)) else len(data)
    if model_args.threads:
        _core.set_num_threads(model_args.threads)
    set_seed(training.seed)
    model, tokenizer = _load(model_or_path, tokenizer, model_args)
    _quantize(methods.unwrapped(model), model_args.quantization_bit, finetuning.finetuning_type)
    _place(methods.unwrapped(model), training)
    brought = methods.unwrapped(model).core.names()
    trainee = methods.prepare(
        model,
        tokenizer,
        finetuning,
        kind,
        model_args.checkpoint_dir or (),
        model_args.resume_lora_training,
        seed=training.seed,
    )
    print(trainable_line(trainee.base))
    held_out: list[dict[str, Any]] = []
    if eval_data is not None:
        held_out = records_from(eval_data)
    else:
        records, held_out = _split(records, data_args.dev_ratio, training)
    plot = model_args.plot_loss if "plot_loss" in given else None
    try:
        result = _run(
            trainee, records, held_out, training, data_args, finetuning, plot, callbacks, resume
        )
    except BaseException:
        trainee.release()
        if trainee.base.core.names() != brought:  # the model is the caller's: leave it as it was
            trainee.detach()
        raise
    result.rows_skipped = n_given - len(records) - (len(held_out) if eval_data is None else 0)
    return result


def run_train(argv: Sequence[str] | Mapping[str, Any] | str | None = None) -> TrainResult | None:
    """What `glmlora train ...` does: parse the flags, then train, evaluate and predict as they say.

    argv: words of a command line (default: the process's), a .json or .yaml file of flags, or a
    dict. Prints, in this order: the resolved arguments, notices of the data sets, the trainable
    parameters, the first encoded example, one dict per log, the metrics. Returns the TrainResult,
    None where nothing was trained. Raises as `train` does.
    """
    model_args, data_args, args, finetuning, notices = parse_train_arguments(argv)
    groups = (model_args, data_args, finetuning, args)
    names = ("Model", "Data", "Finetuning", "Training/evaluation")
    for name, group in zip(names, groups, strict=True):
        print(f"{name} parameters: {group.to_dict()}")
    for notice in notices:
        print(f"Notice: {notice}")
    check_output_dir(args.output_dir)
    output_dir = Path(args.output_dir)
    resume = find_checkpoint(args.resume_from_checkpoint, output_dir)
    if model_args.threads:
        _core.set_num_threads(model_args.threads)
    records = _load_records(data_args)
    set_seed(args.seed)
    base, tokenizer = _load(model_args.model_name_or_path, None, model_args)
    checkpoints = model_args.checkpoint_dir or []
    kind = finetuning.finetuning_type
    _quantize(base, model_args.quantization_bit, kind)
    _place(base, args)
    result = None
    if args.do_train:
        trainee = methods.prepare(
            base,
            tokenizer,
            finetuning,
            kind,
            checkpoints,
            model_args.resume_lora_training,
            seed=args.seed,
        )
        model: Any = trainee.model
    else:
        if not checkpoints:
            warnings.warn("no checkpoint_dir is given: the base model is evaluated", stacklevel=2)
        model = methods.attach(base, kind, checkpoints).eval()
    print(trainable_line(methods.unwrapped(model)))
    held_out = records
    if args.do_train:
        records, held_out = _split(records, data_args.dev_ratio, args)
        result = _run(
            trainee,
            records,
            held_out,
            args,
            data_args,
            finetuning,
            model_args.plot_loss,
            (),
            resume,
            verbose=True,
        )
    elif args.do_eval or args.do_predict:
        encoded = _encode(held_out, tokenizer, data_args, verbose=True)
        _check_lengths(encoded, methods.unwrapped(model).config, "dataset")
        if args.predict_with_generate:
            _predict(model, tokenizer, encoded, args, data_args)
        else:
            metrics = evaluate_loss(
                methods.unwrapped(model).core,
                encoded,
                args.per_device_eval_batch_size,
                _ignored_id(tokenizer, data_args),
                args.disable_tqdm,
            )
            _tell_metrics(output_dir, "eval", metrics)
    return result


# Steps of both


def _run(
    trainee: methods.Trainee,
    records: list[dict[str, Any]],
    held_out: list[dict[str, Any]],
    args: TrainingArguments,
    data_args: DataArguments,
    finetuning: FinetuningArguments,
    plot: bool | None,
    callbacks: Sequence[Any],
    resume: Path | None,
    verbose: bool = False,
) -> TrainResult:
    """Encode, train, write the end state; the model comes back released, with dropout off.

    plot: draw the curves; None: those that have points. verbose: print what a command line shows.
    """
    tokenizer, output_dir = trainee.tokenizer, Path(args.output_dir)
    encoded = _encode(records, tokenizer, data_args, verbose)
    _check_lengths(encoded, trainee.base.config, "data")
    eval_encoded = None
    if held_out and (args.do_eval or args.eval_strategy != "no"):
        eval_encoded = _encode(held_out, tokenizer, data_args, verbose=False)
        _check_lengths(eval_encoded, trainee.base.config, "eval_data")
    if args.eval_strategy != "no" and eval_encoded is None:
        raise ValueError(
            f"evaluation_strategy: {args.eval_strategy!r} needs evaluation data: give eval_data, "
            "or dev_ratio to hold some out"
        )
    if args.load_best_model_at_end and args.metric_for_best_model not in ("loss", "eval_loss"):
        raise ValueError(
            f"metric_for_best_model: expected 'loss', the only metric while training, got "
            f"{args.metric_for_best_model!r}"
        )
    arguments = {
        "training_args.bin": args.to_json_string(),
        "finetuning_args.json": finetuning.to_json_string(),
    }

    def write_arguments(directory: Path) -> None:
        for name, text in arguments.items():
            write_text(directory / name, text)

    loop = Loop(
        trainee,
        encoded,
        args,
        _ignored_id(tokenizer, data_args),
        eval_encoded,
        callbacks,
        {"base_layers": trainee.base.config.num_layers},
        write_arguments,
    )
    try:
        metrics = loop.run(resume)
        loop.finish()
        if verbose:
            print(metrics_block("train", metrics))
        save_metrics(output_dir, "train", metrics)
        keys = ["loss"] + ["eval_loss"] * (args.eval_strategy != "no")
        if plot is None:  # nobody asked: draw what there is
            keys = [key for key in keys if any(key in r for r in loop.state.log_history)]
        if plot or (plot is None and keys):
            plot_loss(output_dir, loop.state.log_history, keys)
        if args.do_eval and eval_encoded is not None:
            trainee.model.eval()
            scores = evaluate_loss(
                loop.core,
                eval_encoded,
                args.per_device_eval_batch_size,
                loop.ignored_id,
                args.disable_tqdm,
            )
            scores["epoch"] = metrics["epoch"]
            _tell_metrics(output_dir, "eval", scores, verbose)
            metrics = {**metrics, **scores}
    finally:
        trainee.release()
    state = loop.state
    return TrainResult(
        model=trainee.model,
        tokenizer=tokenizer,
        output_dir=str(output_dir),
        global_step=state.global_step,
        metrics=metrics,
        log_history=state.log_history,
        rows=len(encoded),
        rows_cut=encoded.n_cut,
        stopped_early=state.global_step < state.max_steps,
        best_metric=state.best_metric,
        best_model_checkpoint=state.best_model_checkpoint,
    )


def check_output_dir(output_dir: str) -> None:
    """Make the folder and try to write into it. OSError naming it: now, not after hours."""
    try:
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir) as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(
            error.errno, f"output_dir: cannot be written: {error.strerror}", output_dir
        ) from None


def _arguments(
    args: TrainingArguments | Mapping[str, Any] | None, overrides: Mapping[str, Any]
) -> tuple[ModelArguments, DataArguments, TrainingArguments, FinetuningArguments, set[str]]:
    """The four groups, and the names that were given. TypeError for a name of no group."""
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
    flags = {flag.name for group in FLAGS.values() for flag in group}
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
    groups = []
    for name, cls in (
        ("model", ModelArguments),
        ("data", DataArguments),
        ("training", TrainingArguments),
        ("finetuning", FinetuningArguments),
    ):
        own = {flag.name for flag in FLAGS[name]}
        groups.append(cls(**{k: v for k, v in values.items() if k in own}))
    model_args, data_args, training, finetuning = groups
    if model_args.quantization_bit is not None:
        check_quantization(model_args.quantization_bit, training, finetuning)
    for name in ("do_predict", "predict_with_generate"):
        if getattr(training, name):
            raise ValueError(f"{name}: cannot be used while training; use the model's chat")
    if finetuning.finetuning_type == "none":
        raise ValueError(
            "finetuning_type: expected lora, p_tuning, freeze or full while training, got 'none'"
        )
    return model_args, data_args, training, finetuning, given


def _say_notices(*groups: Any) -> None:
    for group in groups:
        for notice in group.notices:
            warnings.warn(notice, stacklevel=3)


def _place(base: ChatGLMForConditionalGeneration, args: TrainingArguments) -> None:
    """On a GPU where there is one and `no_cuda` does not say otherwise. One that is somewhere
    stays there. With fp16 or bf16 a GPU's large products are in that type from now on, whatever the
    weights are stored in, unless `compute_dtype` names one.
    """
    base.products = "float16" if args.fp16 else "bfloat16" if args.bf16 else None
    place = "cpu" if args.no_cuda else "auto"
    base.to(device=place if base.device == "cpu" else base.device)
    _warn_of_precision(args, base.device)


def _warn_of_precision(args: TrainingArguments, device: str) -> None:
    """Decision 3 of the project: without a GPU one warning, and on with the CPU."""
    for name in ("fp16", "bf16"):
        if getattr(args, name) and device == "cpu":
            text = (
                f"{name}: no GPU is used, the CPU computes: the base stays in the type it is "
                "stored in, compute_dtype says what products are in, and no loss scale is needed"
            )
            if os.environ.get("GLMLORA_STRICT_DEVICE") == "1":
                raise RuntimeError(f"{text} (GLMLORA_STRICT_DEVICE=1 makes this an error)")
            warnings.warn(text, stacklevel=3)


def _load(model_or_path: Any, tokenizer: Any, args: ModelArguments) -> tuple[Any, Any]:
    """The model (as given, or of the directory) and its tokenizer."""
    family = None if args.family == "auto" else families.of(args.family).name
    if isinstance(model_or_path, (ChatGLMForConditionalGeneration, PeftModel)):
        model = model_or_path
        base = methods.unwrapped(model)
        place = getattr(base, "name_or_path", None) or base.config.get("_name_or_path")
        if tokenizer is None and args.tokenizer_name is None:
            if not place or not os.path.isfile(os.path.join(place, "tokenizer.model")):
                raise TypeError(
                    "tokenizer: needed when a model object is given, e.g. "
                    "tokenizer=AutoTokenizer.from_pretrained(path)"
                )
    elif isinstance(model_or_path, (str, os.PathLike)):
        place = os.fspath(model_or_path)
        config = ChatGLMConfig.from_pretrained(args.config_name or place, family=family)
        if args.use_v2 and config.family != families.DEFAULT:
            warnings.warn(
                f"use_v2: {place} is of family {config.family}, which is used", stacklevel=3
            )
        model = AutoModel.from_pretrained(place, config=config, compute_dtype=args.compute_dtype)
        model.name_or_path = place
        family = config.family
    else:
        raise TypeError(
            f"model_or_path: expected a directory or a model, got {type(model_or_path).__name__}"
        )
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or place, family=family)
    return model, tokenizer


def _quantize(base: ChatGLMForConditionalGeneration, bits: int | None, kind: str) -> None:
    """The base of p_tuning gets THUDM's row-wise form; 4 bits under LoRA the more exact one in
    groups.
    """
    if bits:
        base.quantize(bits, group_size=GROUP_SIZE if bits == 4 and kind == "lora" else None)


def _load_records(args: DataArguments) -> list[dict[str, Any]]:
    """The data sets of the command line; what is to be said about them goes to standard output."""
    for name in args.dataset_names:
        print(f"Loading dataset {name}...")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = load_datasets(args.dataset_names, args.dataset_dir, args.max_samples)
    for warning in caught:
        print(f"Warning: {warning.message}")
    return records


def _split(
    records: list[dict[str, Any]], ratio: float, args: TrainingArguments
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    seed = args.seed if args.data_seed is None else args.data_seed
    kept, held_out = split_dev(len(records), ratio, seed)
    return [records[i] for i in kept], [records[i] for i in held_out]


def _encode(
    records: list[dict[str, Any]], tokenizer: Any, args: DataArguments, verbose: bool
) -> Encoded:
    encoded = encode_records(
        records,
        tokenizer,
        args.max_source_length,
        args.max_target_length,
        args.truncation,
        args.source_prefix,
        args.template,
    )
    if verbose:
        print(_example(encoded, tokenizer, _ignored_id(tokenizer, args)))
    if encoded.n_cut:
        text = (
            f"{encoded.n_cut} of {len(encoded)} prompts were longer than max_source_length "
            f"{args.max_source_length} and were cut"
        )
        print(text)
    return encoded


def _example(encoded: Encoded, tokenizer: Any, ignored_id: int | None) -> str:
    """The first record as the model gets it: ids and text, labels with masked ids as the pad."""
    batch = encoded.batch(np.arange(1), ignored_id)
    ids, labels = batch.ids.tolist(), batch.labels.tolist()
    shown = [tokenizer.pad_token_id if i == IGNORED else i for i in labels]
    return (
        f"input_ids:\n{ids}\ninputs:\n{tokenizer.decode(ids, skip_special_tokens=False)}\n"
        f"label_ids:\n{labels}\nlabels:\n{tokenizer.decode(shown, skip_special_tokens=False)}"
    )


def _check_lengths(encoded: Encoded, config: ChatGLMConfig, source: str) -> None:
    longest = int(encoded.lengths.argmax())
    if encoded.lengths[longest] > config.seq_length:
        raise ValueError(
            f"{source}: record {longest} has {encoded.lengths[longest]} ids, the model has "
            f"positions for {config.seq_length} (seq_length): use a smaller max_source_length or "
            "max_target_length"
        )
    if int(encoded.ids.max()) >= config.padded_vocab_size:
        raise ValueError(
            f"tokenizer: id {int(encoded.ids.max())} is outside the model's vocabulary of "
            f"{config.padded_vocab_size} ids: it belongs to another model"
        )


def _ignored_id(tokenizer: Any, args: DataArguments) -> int | None:
    return tokenizer.pad_token_id if args.ignore_pad_token_for_loss else None


def _tell_metrics(
    output_dir: Path, split: str, metrics: Mapping[str, Any], verbose: bool = True
) -> None:
    if verbose:
        print(metrics_block(split, metrics))
    save_metrics(output_dir, split, metrics)


def _predict(
    model: Any, tokenizer: Any, encoded: Encoded, args: TrainingArguments, data_args: DataArguments
) -> None:
    """Scores of generated answers for do_eval; the answers too for do_predict."""
    beams = data_args.eval_num_beams or args.generation_num_beams or 1
    for prefix, wanted in (("eval", args.do_eval), ("predict", args.do_predict)):
        if not wanted:
            continue
        set_seed(args.seed)
        metrics, answers, references = predict(
            model,
            tokenizer,
            encoded,
            prefix,
            args.per_device_eval_batch_size,
            data_args.max_target_length + 1,
            beams,
            args.disable_tqdm,
        )
        _tell_metrics(Path(args.output_dir), prefix, metrics)
        if prefix == "predict":
            path = Path(args.output_dir) / "generated_predictions.jsonl"
            write_predictions(path, answers, references)
