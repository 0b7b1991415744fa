"""`glmlora.train(model, data, ...)` and the command behind `glmlora train`.

Both come down to the same steps, in this order: arguments, records (records.py), the model, what of
it is trained (methods.py), ids (records.py), the loop (loop.py), evaluation (evaluation.py).
"""

from __future__ import annotations

import inspect
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .. import _core, families, tell
from ..batch import split_dev
from ..families import recognition
from ..families.vocabulary import vocabulary_file
from ..files.hub import model_directory
from ..files.owner import owned
from ..generation.generate import warn_of_products
from ..interrupts import ending_signals
from ..model.auto import AutoModel
from ..model.configuration import ChatGLMConfig
from ..model.modeling import ChatGLMForConditionalGeneration
from ..model.peft import PeftModel, trainable_line
from ..model.quantization import GROUP_SIZE, is_quantized
from ..progress import in_notebook
from ..seeds import set_seed
from ..task import write_task
from ..tokenization import AutoTokenizer
from . import methods
from .arguments import (
    CALL_FLAGS,
    Arguments,
    DataArguments,
    ModelArguments,
    TrainingArguments,
    call_arguments,
    parse_train_arguments,
)
from .checkpoints import find_checkpoint
from .classes import SCORES
from .evaluation import evaluate_answers, evaluate_loss, report_metrics
from .flags import REQUIRED, check_directory
from .loop import Loop, checked_callbacks
from .plot import plot_loss
from .records import encode, load_datasets, read_records, records_from
from .state import TrainState
from .tasks import task_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .keywords import TrainKeywords

Function = TypeVar("Function", bound=Callable[..., Any])

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


def _with_flags(function: Function) -> Function:
    """Let help() and inspect.signature show every flag in place of `**overrides`."""
    signature = inspect.signature(function)
    *own, _ = signature.parameters.values()
    flags = [
        inspect.Parameter(
            flag.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if flag.default is REQUIRED else flag.default,
            annotation=flag.annotation,
        )
        for flag in CALL_FLAGS.values()
    ]
    function.__signature__ = signature.replace(parameters=own + flags)  # type: ignore[attr-defined]
    return function


@_with_flags
def train(
    model_or_path: Any,
    data: Any,
    args: TrainingArguments | Mapping[str, Any] | None = None,
    *,
    tokenizer: Any = None,
    eval_data: Any = None,
    callbacks: Sequence[Any] = (),
    verbose: bool | None = None,
    **overrides: Unpack[TrainKeywords],
) -> TrainResult:
    """Fine-tune a model on records; what it learns is written into `output_dir`.

    model_or_path: a model directory, a model, or a PeftModel (whose adapter is then trained
    further). data, eval_data: a DataFrame, a list of dicts, or a csv, json or jsonl file with the
    columns `instruction` (or `prompt`), `input` (or `query`), `output` (or `response`), `history`,
    `system`, or with `messages` (or `conversations`); see `records_from`.
    args: TrainingArguments or a dict; overrides: any argument of `glmlora train` by name, whatever
    its group (`glmlora train --help` says what each does), e.g.

        glmlora.train("../model", df, output_dir="out", lora_rank=8, num_train_epochs=1)

    callbacks: functions that get each log record, or objects with some of on_train_begin,
    on_step_end, on_log, on_save, on_train_end, each called with the TrainState, whose `should_stop`
    they may set. verbose: print how much is trained, and each log record; None: those not in
    Jupyter, where the bar shows the loss.
    `resume_from_checkpoint="last"` (or a checkpoint-N folder) goes on exactly where that checkpoint
    was written.

    Raises TypeError for an unknown argument, ValueError naming argument, value and what was
    expected, OSError for an output_dir that cannot be written (before training), MemoryError with
    the bytes needed and available (before the first step), FloatingPointError naming update, layer
    and records. Ctrl-C leaves a checkpoint of what was done and raises KeyboardInterrupt; SIGTERM
    and SIGHUP do the same and end the program with exit status 143 and 129; a second signal ends at
    once. `output_dir` belongs to one run at a time: OSError naming the process that has it.
    """
    arguments, given = call_arguments(args, overrides)
    for notice in arguments.notices:
        tell.warn(notice)
    model_args, data_args, training, finetuning, _ = arguments
    kind = finetuning.finetuning_type if "finetuning_type" in given else None
    _check_places(model_or_path, model_args)
    check_output_dir(training.output_dir)
    with ending_signals(), owned(training.output_dir):
        resume = find_checkpoint(training.resume_from_checkpoint, Path(training.output_dir))
        _warn_of_unused(model_or_path, tokenizer, eval_data, arguments, given)
        records, n_given = read_records(data, data_args.max_samples)
        if eval_data is not None:
            try:
                held_out = records_from(eval_data)
            except (TypeError, ValueError, FileNotFoundError) as error:
                raise type(error)(f"eval_data: {error}") from None
        else:
            records, held_out = _split(records, data_args.dev_ratio, training)
        _check_evaluation(training, bool(held_out))
        callbacks = checked_callbacks(callbacks)
        if model_args.threads:
            _core.set_num_threads(model_args.threads)
        set_seed(training.seed)
        model, tokenizer = _load(model_or_path, tokenizer, model_args)
        _quantize(methods.unwrapped(model), model_args.quantization_bit, finetuning.finetuning_type)
        _place(methods.unwrapped(model), training)
        names_before = methods.unwrapped(model).core.names()
        trainee = _trainee(model, tokenizer, arguments, kind)
        if verbose is not False:
            print(trainable_line(trainee.base))
        plot = model_args.plot_loss if "plot_loss" in given else None
        try:
            loop = _loop(trainee, records, held_out, arguments, callbacks)
            loop.prints = not in_notebook() if verbose is None else verbose
            result = _run(loop, resume, plot)
        except BaseException:
            trainee.release()
            if (
                trainee.base.core.names() != names_before
            ):  # the model is the caller's: leave it as it was
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
    arguments = parse_train_arguments(argv)
    model_args, data_args, args, finetuning, notices = arguments
    for name, group in (
        ("Model", model_args),
        ("Data", data_args),
        ("Finetuning", finetuning),
        ("Training/evaluation", args),
    ):
        print(f"{name} parameters: {group.to_dict()}")
    for notice in notices:
        print(f"Notice: {notice}")
    _check_places(model_args.model_name_or_path, model_args)
    check_output_dir(args.output_dir)
    with ending_signals(), owned(args.output_dir):
        resume = find_checkpoint(args.resume_from_checkpoint, Path(args.output_dir))
        if model_args.threads:
            _core.set_num_threads(model_args.threads)
        records, held_out = _load_records(data_args), []
        if args.do_train:
            records, held_out = _split(records, data_args.dev_ratio, args)
            _check_evaluation(args, bool(held_out))
        set_seed(args.seed)
        base, tokenizer = _load(model_args.model_name_or_path, None, model_args)
        kind = finetuning.finetuning_type
        _quantize(base, model_args.quantization_bit, kind)
        _place(base, args)
        if args.do_train:
            trainee = _trainee(base, tokenizer, arguments, kind)
            print(trainable_line(trainee.base))
            loop = _loop(trainee, records, held_out, arguments, verbose=True)
            return _run(loop, resume, model_args.plot_loss, verbose=True)
        checkpoints = model_args.checkpoint_dir or []
        if not checkpoints:
            tell.warn("no checkpoint_dir is given: the base model is evaluated")
        model = methods.attach(base, kind, checkpoints).eval()
        if base.prompt_template not in ("auto", data_args.template):
            tell.warn(
                f"template: {checkpoints[-1]} was trained with {base.prompt_template!r}, this run "
                f"has {data_args.template!r}"
            )
        print(trainable_line(base))
        if args.do_eval or args.do_predict:
            encoded = encode(records, tokenizer, data_args, base.config, "dataset", verbose=True)
            if args.predict_with_generate and not args.prediction_loss_only:
                evaluate_answers(model, tokenizer, encoded, args, data_args)
            else:
                metrics = evaluate_loss(
                    base.core, encoded, args.per_device_eval_batch_size, args.disable_tqdm
                )
                report_metrics(Path(args.output_dir), "eval", metrics)
        return None


def _warn_of_unused(
    model_or_path: Any, tokenizer: Any, eval_data: Any, arguments: Arguments, given: set[str]
) -> None:
    """Warn of flags that mean nothing beside what else `train` was given."""
    rules: list[tuple[str, bool, str]] = []
    if isinstance(model_or_path, (ChatGLMForConditionalGeneration, PeftModel)):
        rules.append(("config_name compute_dtype use_v2", True, "the model is given, not its path"))
        prepared = methods.prepared_for(model_or_path) if "finetuning_type" not in given else None
        names = "lora_rank lora_alpha lora_dropout lora_target pre_seq_len prefix_projection "
        names += "num_layer_trainable name_module_trainable resume_lora_training"
        rules.append((names, prepared is not None, f"the model was made ready for {prepared}"))
        is_adapter = isinstance(model_or_path, PeftModel)
        rules.append((names, is_adapter, "the model's adapter has its own"))
    rules.append(("tokenizer_name", tokenizer is not None, "a tokenizer is given"))
    rules.append(("dev_ratio", eval_data is not None, "eval_data are given"))
    nothing = eval_data is None and not arguments.data.dev_ratio
    rules.append(("do_eval", nothing, "there are no eval_data, and dev_ratio is 0"))
    rules.append(("do_train", not arguments.training.do_train, "train() trains"))
    told: dict[str, str] = {}
    for names, applies, why in rules:
        for name in names.split() if applies else ():
            if name in given:
                told.setdefault(name, f"{name} has no effect: {why}")
    if not arguments.training.do_eval:
        nobody = "neither evaluation_strategy nor do_eval evaluates them"
        if eval_data is not None:
            told["eval_data"] = f"eval_data have no effect: {nobody}"
        elif arguments.data.dev_ratio:
            told["dev_ratio"] = f"dev_ratio holds data out, but {nobody}"
    for text in told.values():
        tell.warn(text)


# Steps of both


def _trainee(model: Any, tokenizer: Any, args: Arguments, kind: str | None) -> methods.Trainee:
    """What of the model is trained: by `kind`, or by what the model brings."""
    return methods.prepare(
        model,
        tokenizer,
        args.finetuning,
        kind,
        args.model.checkpoint_dir or (),
        args.model.resume_lora_training,
        seed=args.training.seed,
    )


def _check_evaluation(training: TrainingArguments, there: bool) -> None:
    """ValueError for an evaluation while training that cannot be. there: whether there are data."""
    if training.eval_strategy != "no" and not there:
        raise ValueError(
            f"evaluation_strategy: {training.eval_strategy!r} needs evaluation data: give "
            "eval_data, or dev_ratio to hold some out"
        )
    metric = training.metric_for_best_model
    known = ("loss", *SCORES) if training.label_metrics else ("loss",)
    if training.load_best_model_at_end and str(metric).removeprefix("eval_") not in known:
        more = "" if training.label_metrics else f" (with label_metrics: {', '.join(SCORES)})"
        raise ValueError(
            f"metric_for_best_model: expected {' or '.join(map(repr, known))}, which evaluations "
            f"while training tell{more}, got {metric!r}"
        )


def _loop(
    trainee: methods.Trainee,
    records: list[dict[str, Any]],
    held_out: list[dict[str, Any]],
    args: Arguments,
    callbacks: Sequence[Any] = (),
    verbose: bool = False,
) -> Loop:
    """Encode the records, and those held out where they are evaluated; the loop over them."""
    training, config = args.training, trainee.base.config
    encoded = encode(records, trainee.tokenizer, args.data, config, "data", verbose)
    eval_encoded = None
    if held_out and (training.do_eval or training.eval_strategy != "no"):
        eval_encoded = encode(held_out, trainee.tokenizer, args.data, config, "eval_data")
    argument_files = {
        "training_args.bin": training.to_json_string(),
        "finetuning_args.json": args.finetuning.to_json_string(),
    }
    loop = Loop(trainee, encoded, training, eval_encoded, callbacks, argument_files)
    trainee.set_template(args.data.template)
    trainee.set_task(task_of(records, args, trainee))
    return loop


def _run(loop: Loop, resume: Path | None, plot: bool | None, verbose: bool = False) -> TrainResult:
    """Train, write the end state, evaluate; the model comes back released, with dropout off.

    plot: draw the curves; None: those that have points. verbose: print what a command line shows.
    """
    args, trainee, state = loop.args, loop.trainee, loop.state
    try:
        metrics = loop.run(resume)
        loop.finish()
        report_metrics(loop.output_dir, "train", metrics, verbose)
        keys = ["loss"] + ["eval_loss"] * (args.eval_strategy != "no")
        if plot is None:  # nobody asked: draw what there is
            keys = [key for key in keys if any(key in r for r in state.log_history)]
        if plot or (plot is None and keys):
            plot_loss(loop.output_dir, state.log_history, keys)
        if args.do_eval and loop.eval_encoded is not None:
            trainee.model.eval()
            scores = loop.scores(args.disable_tqdm)
            scores["epoch"] = metrics["epoch"]
            report_metrics(loop.output_dir, "eval", scores, verbose)
            metrics = {**metrics, **scores}
            trainee.note_scores(scores)
            write_task(loop.output_dir, trainee.model.task)
    finally:
        trainee.release()
    return TrainResult(
        model=trainee.model,
        tokenizer=trainee.tokenizer,
        output_dir=str(loop.output_dir),
        global_step=state.global_step,
        metrics=metrics,
        log_history=state.log_history,
        rows=len(loop.encoded),
        rows_cut=loop.encoded.n_cut,
        stopped_early=state.global_step < state.max_steps,
        best_metric=state.best_metric,
        best_model_checkpoint=state.best_model_checkpoint,
    )


def check_output_dir(output_dir: str | os.PathLike) -> None:
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


def _check_places(model_or_path: Any, args: ModelArguments) -> None:
    """OSError naming a directory of the model or of a checkpoint that is not there: before the data
    are read.
    """
    if isinstance(model_or_path, (str, os.PathLike)):
        model_directory(model_or_path)
    for name in ("config_name", "tokenizer_name"):
        if getattr(args, name) is not None:
            try:
                model_directory(getattr(args, name))
            except OSError as error:
                raise OSError(f"{name}: {error}") from None
    for path in args.checkpoint_dir or ():
        check_directory("checkpoint_dir", path)


def _place(base: ChatGLMForConditionalGeneration, args: TrainingArguments) -> None:
    """On a GPU where there is one and `no_cuda` does not say otherwise. One that is somewhere
    stays there. With fp16 or bf16 a GPU's large products are in that type from now on, whatever the
    weights are stored in, unless `compute_dtype` names one.
    """
    base.products = "float16" if args.fp16 else "bfloat16" if args.bf16 else None
    place = "cpu" if args.no_cuda else "auto"
    base.to(device=place if base.device == "cpu" else base.device)
    warn_of_products(base)
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
            tell.warn(text)


def _load(model_or_path: Any, tokenizer: Any, args: ModelArguments) -> tuple[Any, Any]:
    """The model (as given, or of the directory) and its tokenizer."""
    family = None if args.family == "auto" else families.of(args.family).name
    if isinstance(model_or_path, (ChatGLMForConditionalGeneration, PeftModel)):
        model = model_or_path
        base = methods.unwrapped(model)
        place = getattr(base, "name_or_path", None) or base.config.get("_name_or_path")
        if tokenizer is None and args.tokenizer_name is None:
            if not place or vocabulary_file(Path(place)) is None:
                raise TypeError(
                    "tokenizer: needed when a model object is given, e.g. "
                    "tokenizer=AutoTokenizer.from_pretrained(path)"
                )
    elif isinstance(model_or_path, (str, os.PathLike)):
        place = os.fspath(model_or_path)
        config = ChatGLMConfig.from_pretrained(args.config_name or place, family=family)
        if args.use_v2 and config.family != families.DEFAULT:
            tell.warn(f"use_v2: {place} is of family {config.family}, which is used")
        model = AutoModel.from_pretrained(place, config=config, compute_dtype=args.compute_dtype)
        model.name_or_path = place
        family = config.family
    else:
        raise TypeError(
            f"model_or_path: expected a directory or a model, got {type(model_or_path).__name__}"
        )
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or place, family=family)
    config = methods.unwrapped(model).config
    recognition.check_tokenizer(tokenizer, config.family, config.padded_vocab_size)
    return model, tokenizer


def _quantize(base: ChatGLMForConditionalGeneration, bits: int | None, kind: str) -> None:
    """The base of p_tuning gets THUDM's row-wise form; 4 bits under LoRA the more exact one in
    groups.
    """
    if bits and not is_quantized(base.config, bits):
        base.quantize(bits, group_size=GROUP_SIZE if bits == 4 and kind == "lora" else None)


def _load_records(args: DataArguments) -> list[dict[str, Any]]:
    """The data sets of the command line; notes on them go to standard output."""
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
    kept, held_out = split_dev(len(records), ratio, args.order_seed)
    return [records[i] for i in kept], [records[i] for i in held_out]
