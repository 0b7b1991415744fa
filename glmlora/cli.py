"""The command `glmlora`: train, chat, predict, inspect, submit, plan, init, run, merge, quantize,
doctor, demo.

Each verb is one function below."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from . import families
from .files.hub import model_directory
from .files.rows import table_rows
from .files.write import check_new_directory
from .generation.config import GenerationConfig
from .interrupts import Terminated, end_now
from .model import device as devices
from .names import did_you_mean
from .task import ANY_TEXT, Task, check_asked, task_in
from .templates import columns_of
from .tools.demo import PAPERS
from .training.flags import check_directory, given_twice

#: What a user can put right; everything else is a fault of this program and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, RuntimeError, MemoryError, ArithmeticError)


def _load(
    model_path: str,
    adapter: str | None,
    dtype: str | None,
    compute_dtype: str | None,
    device: str = "cpu",
    family: str = "auto",
) -> tuple[Any, Any]:
    """Model and tokenizer of a base directory and an optional adapter or P-Tuning directory."""
    import glmlora
    from glmlora.model.peft import load_prefix

    known = None if family == "auto" else family
    is_prefix = adapter and not os.path.exists(os.path.join(adapter, "adapter_config.json"))
    model = glmlora.AutoModel.from_pretrained(model_path, compute_dtype=compute_dtype, family=known)
    if dtype:
        model = getattr(
            model, {"float16": "half", "bfloat16": "bfloat16", "float32": "float"}[dtype]
        )()
    if adapter:
        model = (
            load_prefix(model, adapter)
            if is_prefix
            else glmlora.PeftModel.from_pretrained(model, adapter)
        )
    model.to(device=device)
    return model.eval(), glmlora.AutoTokenizer.from_pretrained(model_path, family=known)


def _check_model(args: argparse.Namespace) -> None:
    """OSError for a model or adapter that is not there, ValueError for a device that is none:
    before anything is read or loaded.
    """
    devices.parse(getattr(args, "device", None))
    model_directory(args.model)
    if args.adapter:
        check_directory("--adapter", args.adapter)


def _generation(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling flags that were given. ValueError naming one that is out of range."""
    names = ("temperature", "top_p", "top_k", "max_length", "repetition_penalty", "seed")
    given = {n: getattr(args, n) for n in names if getattr(args, n, None) is not None}
    settings = GenerationConfig()
    settings.update(**given)
    settings.check(sys.maxsize)
    return given


def _as_text(query: str) -> str:
    """A question that was read with surrogates for bytes that the terminal's encoding lacks: those
    of UTF-8 where LANG says ASCII. ValueError for bytes that are no text.
    """
    if not any("\udc80" <= character <= "\udcff" for character in query):
        return query
    try:
        return query.encode(sys.stdin.encoding or "utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise ValueError("the question is not UTF-8 text, ask it again") from None


def _stream(model: Any, tokenizer: Any, query: str, history: list[Any], **kwargs: Any) -> list[Any]:
    """Print the answer while it comes; the history with it. A call of a tool is shown as JSON."""
    printed = text = ""
    for response, turn in model.stream_chat(tokenizer, query, history=history, **kwargs):
        is_text = isinstance(response, str)
        text = response if is_text else json.dumps(response, ensure_ascii=False)
        if is_text and text.startswith(printed):
            print(text[len(printed) :], end="", flush=True)
            printed = text
        history = turn
    if text != printed:  # the end made something else of what was shown
        print(f"\n{text}" if printed else text, end="", flush=True)
    return history


def chat(args: argparse.Namespace) -> int:
    """Talk to a model in the terminal; the answer streams."""
    kwargs = _generation(args)
    _check_model(args)
    model, tokenizer = _load(
        args.model, args.adapter, args.dtype, args.compute_dtype, args.device, args.family
    )
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are no text spoil one question only
        sys.stdin.reconfigure(errors="surrogateescape")
    if interactive:
        with suppress(ImportError):  # not on Windows: input() then has the console's own editing
            import readline  # noqa: F401  (arrow keys, earlier questions, whole characters)
        print("Type a question; `clear` forgets the conversation, `stop` (or Ctrl-D) ends.")
    history: list[Any] = []
    failed = False
    while True:
        try:
            query = input("> " if interactive else "").strip()
        except EOFError:
            return int(failed and not interactive)
        except KeyboardInterrupt:  # clears the line, as Python's own prompt
            if not interactive:
                raise
            print()
            continue
        if not query:
            continue
        if query == "stop":
            return int(failed and not interactive)
        if query == "clear":
            history = []
            continue
        try:
            history = _stream(model, tokenizer, _as_text(query), history, **kwargs)
        except KeyboardInterrupt:  # ends this answer, not the conversation
            print(" [interrupted]", end="")
        except BrokenPipeError:  # nobody reads the answers any more
            raise
        except Exception as error:
            failed = True
            _report(error)
            if history:
                print("(the conversation goes on; `clear` begins a new one)", file=sys.stderr)
        print(flush=True)


def predict(args: argparse.Namespace) -> int:
    """A table in, a table out: one answer for each row."""
    import glmlora
    from glmlora.tables import output as table
    from glmlora.tables.answers import ask, split_answers
    from glmlora.tables.job import describe_folders, predict_rows
    from glmlora.training.methods import unwrapped

    _check_model(args)
    table.check_place(args.output, args.overwrite, args.input)
    directory, labels = model_directory(args.model), split_answers(args.labels)
    task = task_in(args.adapter or directory)
    rows = table_rows(args.input, "--input")
    template = _template(args.template, task, columns_of(rows))
    own = task is not None and template == task.question
    check_asked(
        task,
        args.strict,
        template=None if own else template,
        labels=labels,
        base=directory if args.adapter else None,
    )
    asked = ask(
        template,
        labels=labels,
        proba=args.proba,
        choices=split_answers(args.choices),
        pattern=args.pattern,
        between=split_answers(args.between),
        fallback=args.fallback,
        answer_column=args.answer_column,
        sampling=_generation(args),
        task=task,
        spelled=lambda name: "--" + name.replace("_", "-"),
    )
    table.check_question(template, rows, args.input)
    output = table.plan_output(
        args.output, columns_of(rows), args.columns, args.add or [], args.answer_column, asked.more
    )
    several = task is not None and task.is_ensemble
    adapter = None if several else args.adapter
    adapters = [args.adapter] if args.adapter else []
    if adapters and task is not None:
        adapters = task.folders(args.adapter)

    def load() -> tuple[Any, Any]:
        model, tokenizer = _load(
            args.model, adapter, args.dtype, args.compute_dtype, args.device, args.family
        )
        return unwrapped(model), tokenizer

    classify = _classify(args, asked, load) if several else None

    loaded = {n: getattr(args, n) for n in ("family", "dtype", "compute_dtype")}
    device = devices.find(args.device).type
    _, whole = predict_rows(
        rows,
        asked,
        load,
        output=output,
        describe=lambda: describe_folders(directory, adapters),
        settings={**loaded, "device": device, "glmlora": glmlora.__version__},
        seed=args.seed,
        overwrite=args.overwrite,
        classify=classify,
    )
    print(f"{args.output}: {len(rows)} rows")
    return 0 if whole else 1


def _template(given: str | None, task: Task | None, columns: Sequence[str]) -> str:
    """The question of `predict`: the one that is given; else what was trained, if the table has the
    columns; else the paper workflow's.
    """
    if given is not None or task is None:
        return given or PAPERS
    any_text = task.template in ANY_TEXT and not set(task.columns) <= set(columns)
    return PAPERS if any_text else task.question


def _classify(args: argparse.Namespace, asked: Any, load: Callable[[], tuple[Any, Any]]) -> Any:
    """What weighs the labels of rows by folds or a head, over the base that `load` gives.
    ValueError for what cannot be asked of them.
    """
    import glmlora

    if asked.template != asked.task.question or list(asked.labels) != asked.task.answers:
        raise ValueError(
            f"--adapter: {args.adapter} has folds or a head, which weigh the labels "
            f"{asked.task.answers} of the question they were trained with; leave --template, "
            "--labels and how answers are written away"
        )
    classifier = glmlora.LoraClassifier.load(args.adapter, base=args.model)
    loaded: list[Any] = []

    def classify(rows: list[dict[str, Any]]) -> Any:
        if not loaded:
            loaded.extend(load())
            classifier.use_base(*loaded)
        return classifier.predict_proba(rows)

    return classify


def inspect(args: argparse.Namespace) -> int:
    """Look at a table before training on it: missing, double, contradictory, leaked, cut rows."""
    from glmlora import inspection
    from glmlora.tables.output import check_new_place

    if args.model:
        model_directory(args.model)
    if args.output:
        picture = os.path.splitext(args.output)[0] + ".png"
        for path in (args.output, picture):
            check_new_place(path, args.overwrite, args.table)
    report = inspection.inspect(
        args.table,
        args.test,
        args.label,
        args.template,
        args.model,
        args.max_source_length,
        args.adapter,
    )
    print(report)
    if args.output:
        report.to_csv(args.output)
        written = f"{args.output}: {len(report.findings)} findings"
        with suppress(ImportError):
            report.plot(picture)
            written += f"; {picture}: lengths and labels"
        print(f"\n{written}")
    return 0


def submit(args: argparse.Namespace) -> int:
    """Predictions as a submission: checked against a sample, in its order and form."""
    from glmlora import submission

    print(submission.submit(args.sample, args.predictions, args.output, args.overwrite))
    return 0


def plan(args: argparse.Namespace) -> int:
    """Memory and products of a training step or a chat, before anything is allocated."""
    from glmlora.tools.plan import plan

    methods = {
        "lora_rank": "lora",
        "lora_target": "lora",
        "use_dora": "lora",
        "modules_to_save": "lora",
        "pre_seq_len": "p_tuning",
        "num_layer_trainable": "freeze",
    }
    finetuning = {n: getattr(args, n) for n in methods if getattr(args, n) is not None}
    unused = [n for n in finetuning if methods[n] != args.method]
    if args.method == "chat":
        unused += [n for n in ("labels", "gradient_checkpointing") if getattr(args, n)]
    for name in unused:
        finetuning.pop(name, None)
        print(f"Notice: {name} has no effect: method is {args.method!r}", file=sys.stderr)
    planned = plan(
        args.model,
        args.batch,
        args.seq,
        args.method,
        3 if args.labels is None else args.labels,
        args.quantization_bit,
        args.dtype,
        gradient_checkpointing=args.gradient_checkpointing,
        device=args.device,
        memory=args.memory,
        **finetuning,
    )
    print(planned)
    return 0


def init(args: argparse.Namespace) -> int:
    """A ready project folder."""
    from glmlora.tools import project

    project.init(args.directory, model=args.model)
    print(f"{args.directory} is ready. Next:\n  cd {args.directory}\n  glmlora run xfg.ipynb")
    return 0


def run(args: argparse.Namespace) -> int:
    """An unchanged notebook or script that imports transformers and peft."""
    from glmlora import compat

    if args.cwd:
        path = os.path.abspath(args.path)
        os.chdir(args.cwd)
        args.path = path
    result = compat.run(args.path, args.arguments)
    return result if isinstance(result, int) else 0


def merge(args: argparse.Namespace) -> int:
    """Base + adapter -> one model directory."""
    _check_model(args)
    check_new_directory(args.output)
    if not os.path.exists(os.path.join(args.adapter, "adapter_config.json")):
        raise ValueError(
            f"--adapter: {args.adapter} has no adapter_config.json: a P-Tuning prefix cannot be "
            "merged into the weights"
        )
    model, tokenizer = _load(args.model, args.adapter, args.dtype, "float32", family=args.family)
    model.merge_and_unload().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"{args.output}: merged model and tokenizer")
    return 0


def quantize(args: argparse.Namespace) -> int:
    """A model directory -> one with 8 or 4 bits a weight, in the memory of one matrix."""
    from glmlora.tools.quantize import quantize

    family = None if args.family == "auto" else args.family
    nbytes = quantize(args.model, args.output, args.bits, args.group_size, family)
    print(f"{args.output}: {nbytes / 1e9:.2f} GB of weights")
    return 0


def train(argv: Sequence[str]) -> int:
    """All flags of the training script; see `glmlora train --help`."""
    from glmlora.training.trainer import run_train

    run_train(list(argv))
    return 0


def doctor(args: argparse.Namespace) -> int:
    """What this machine has, and what is missing."""
    from glmlora.tools.doctor import report

    return report(args.speed)


def demo(args: argparse.Namespace) -> int:
    """csv -> a look at it -> LoRA -> probabilities -> submit.csv, with pictures."""
    from glmlora.tools.demo import run_demo

    return run_demo(args.directory)


def _flag(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """A flag, with dashes and with underscores."""
    parser.add_argument(*dict.fromkeys((name, "--" + name[2:].replace("-", "_"))), **options)


DTYPES = ["float16", "bfloat16", "float32"]


def _sampling_flags(parser: argparse.ArgumentParser) -> None:
    _flag(parser, "--model", required=True, help="base model directory")
    _flag(parser, "--adapter", help="LoRA or P-Tuning directory")
    _flag(parser, "--family", default="auto", choices=families.choices(), help="of the model")
    _flag(parser, "--dtype", choices=DTYPES, help="default: as stored")
    _flag(parser, "--device", default="auto", help="auto: a GPU, if any; cpu, cuda, cuda:1")
    _flag(
        parser,
        "--compute-dtype",
        choices=["auto", "float32", "bfloat16", "int8"],
        help="type of the large products; default: what the processor multiplies fast",
    )
    _flag(parser, "--temperature", type=float, help="0 is greedy")
    _flag(parser, "--top-p", type=float)
    _flag(parser, "--top-k", type=int)
    _flag(parser, "--max-length", type=int, help="prompt and answer together, tokens")
    _flag(parser, "--repetition-penalty", type=float)
    _flag(parser, "--seed", type=int)


def _predict_flags(parser: argparse.ArgumentParser) -> None:
    _flag(parser, "--input", required=True, help="csv, json or jsonl table")
    _flag(parser, "--output", required=True, help="csv to write")
    _flag(
        parser,
        "--template",
        help="prompt with {column} places; default: what the adapter was trained with, else the "
        "paper workflow's",
    )
    _flag(
        parser,
        "--strict",
        action="store_true",
        help="refuse a template, labels or base that the adapter was not trained with",
    )
    _flag(parser, "--columns", help="columns to keep, comma separated; default: all")
    _flag(
        parser,
        "--add",
        action="append",
        metavar="COLUMN=TEXT",
        help="a constant column, in its place in --columns or behind them",
    )
    _flag(parser, "--answer-column", default="label", help="name of the answers' column")
    _flag(
        parser,
        "--labels",
        help="weigh these answers, e.g. 0,1, and take the most probable; nothing is drawn",
    )
    _flag(parser, "--proba", action="store_true", help="with --labels: a column proba_LABEL each")
    _flag(parser, "--choices", help="the only answers allowed, e.g. 0,1")
    _flag(parser, "--pattern", metavar="REGEX", help="what a whole answer has to match")
    _flag(parser, "--between", metavar="LOW,HIGH", help="answers are whole numbers from .. to")
    _flag(parser, "--fallback", help="the answer for rows without one, or with one that is none")
    _flag(
        parser,
        "--overwrite",
        action="store_true",
        help="replace an output, or another job's journal",
    )


def _inspect_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", metavar="TABLE", help="csv, json or jsonl table to train on")
    _flag(parser, "--test", metavar="TABLE", help="the table to predict: leaks, missing, lengths")
    _flag(parser, "--label", metavar="COLUMN", help="of the answers; default: label or output")
    _flag(
        parser,
        "--template",
        help="prompt with {column} places; default: the paper workflow's, where its columns are "
        "there, else all columns",
    )
    _flag(parser, "--model", help="its directory: lengths in tokens, and a forecast of the time")
    _flag(parser, "--adapter", help="its task.json has template, model and max_source_length")
    _flag(parser, "--max-source-length", type=int, help="where prompts are cut; default: 512")
    _flag(parser, "--output", help="csv to write: every finding with its row; a picture beside it")
    _flag(parser, "--overwrite", action="store_true", help="replace an output that is there")


def _plan_flags(parser: argparse.ArgumentParser) -> None:
    _flag(parser, "--model", required=True, help="a directory with config.json")
    _flag(parser, "--batch", type=int, default=1, help="rows of a micro-batch, or of a chat")
    _flag(parser, "--seq", type=int, default=512, help="tokens of a row")
    _flag(parser, "--method", default="lora", help="lora, p_tuning, freeze, full or chat")
    _flag(parser, "--labels", type=int, help="labelled tokens of a row; default: 3")
    _flag(parser, "--quantization-bit", type=int, choices=[4, 8])
    _flag(parser, "--dtype", choices=DTYPES)
    _flag(
        parser,
        "--gradient-checkpointing",
        action="store_true",
        help="keep 1 GiB of activations at most; without it, what fits into the free memory",
    )
    _flag(parser, "--device", default="cpu", choices=["cpu", "cuda"])
    _flag(parser, "--memory", help="of the GPU, e.g. 16GB: decides what is recomputed")
    _flag(parser, "--lora-rank", type=int)
    _flag(parser, "--lora-target")
    _flag(parser, "--use-dora", action="store_true", default=None)
    _flag(parser, "--modules-to-save")
    _flag(parser, "--pre-seq-len", type=int)
    _flag(parser, "--num-layer-trainable", type=int)


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of all verbs, and the one of each. A flag's beginning does not stand for it: what
    is a prefix today may be ambiguous, or another flag, tomorrow.
    """
    parser = argparse.ArgumentParser(
        prog="glmlora",
        description="Fine-tune GLM models and chat with them, from one small package.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and end")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    parsers: dict[str, argparse.ArgumentParser] = {}

    def verb(name: str, function: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        p = verbs.add_parser(
            name, help=function.__doc__, description=function.__doc__, allow_abbrev=False
        )
        p.set_defaults(function=function)
        parsers[name] = p
        return p

    verbs.add_parser("train", help=train.__doc__, add_help=False)

    _sampling_flags(verb("chat", chat))
    _sampling_flags(p := verb("predict", predict))
    _predict_flags(p)
    _inspect_flags(verb("inspect", inspect))
    p = verb("submit", submit)
    _flag(p, "--sample", required=True, metavar="TABLE", help="the sample submission")
    _flag(p, "--predictions", required=True, metavar="TABLE", help="csv, json or jsonl table")
    _flag(p, "--output", required=True, help="csv to write")
    _flag(p, "--overwrite", action="store_true", help="replace an output that is there")

    _plan_flags(verb("plan", plan))

    p = verb("init", init)
    p.add_argument("directory")
    _flag(p, "--model", help="your own base model directory; default: the small one inside")

    p = verb("run", run)
    p.add_argument("path", metavar="NOTEBOOK_OR_SCRIPT")
    p.add_argument("arguments", nargs=argparse.REMAINDER)
    _flag(p, "--cwd", help="directory to run in; default: the current one")

    p = verb("merge", merge)
    _flag(p, "--model", required=True)
    _flag(p, "--adapter", required=True)
    _flag(p, "--output", required=True)
    _flag(p, "--family", default="auto", choices=families.choices(), help="of the model")
    _flag(p, "--dtype", choices=DTYPES)

    p = verb("quantize", quantize)
    _flag(p, "--model", required=True)
    _flag(p, "--output", required=True, help="a new directory")
    _flag(p, "--bits", required=True, type=int, choices=[4, 8])
    _flag(
        p,
        "--group-size",
        type=int,
        help="columns that share a scale, e.g. 32: nearer to the float weights; default: a row",
    )
    _flag(p, "--family", default="auto", choices=families.choices(), help="of the model")

    p = verb("doctor", doctor)
    p.add_argument("--speed", action="store_true", help="measure this machine, for half a second")
    p = verb("demo", demo)
    p.add_argument("directory", nargs="?", default="demo")
    return parser, parsers


# Flags that other programs for these models have, and what they are here.
_ELSEWHERE = {
    **dict.fromkeys(("--model_name_or_path", "--model_path", "--base_model"), "--model"),
    **dict.fromkeys(("--checkpoint_dir", "--adapter_name_or_path", "--lora_path"), "--adapter"),
    **dict.fromkeys(("--ptuning_checkpoint", "--peft_path", "--adapter_path"), "--adapter"),
    **dict.fromkeys(("--output_dir", "--export_dir", "--output_path"), "--output"),
    **dict.fromkeys(("--quantization_bit", "--quant_bits", "--w_bit"), "--bits"),
    **dict.fromkeys(("--input_file", "--test_file", "--csv"), "--input"),
}
_TEMPLATE = ": prompts have the form of the model's family, or the one the adapter was trained with"


def _check_words(
    words: Sequence[str], parser: argparse.ArgumentParser, verbs: Mapping[str, Any]
) -> None:
    """Exit with status 2 for a verb or flag that there is not, naming the nearest; tell flags that
    are given twice with different values.
    """
    if not words or words[0].startswith("-"):
        return
    if words[0] not in verbs:
        near = did_you_mean(words[0], [*verbs, "train"])
        parser.error(f"argument VERB: invalid choice: {words[0]!r}{near}")
    verb = verbs[words[0]]
    known = verb._option_string_actions
    mine = words[1:]
    if words[0] == "run":  # what follows the path is the script's own
        at = 2 * (mine[:1] == ["--cwd"])
        mine = [word for word in mine[: at + 1] if word.startswith("-")]
    for word in mine:
        name = word.partition("=")[0]
        if word == "--":
            break
        if name.startswith("--") and name not in known:
            meant = _ELSEWHERE.get(name.replace("-", "_").replace("__", "--", 1), name)
            near = _TEMPLATE if name == "--template" else did_you_mean(meant, known)
            verb.error(f"unknown flag {name}{near}")
    single = {name: a.dest for name, a in known.items() if a.nargs is None and a.const is None}
    appended = {a.dest for a in known.values() if isinstance(a, argparse._AppendAction)}
    for text in given_twice(mine, {n: d for n, d in single.items() if d not in appended}):
        print(f"glmlora: {text}", file=sys.stderr)


def _report(error: Exception) -> None:
    """One line on standard error; the traceback too where it is not the user's to put right."""
    if not isinstance(error, USER_ERRORS):
        traceback.print_exception(error)
    print(f"glmlora: {type(error).__name__}: {error}", file=sys.stderr)


def _show_all_characters() -> None:
    """Characters that the terminal's encoding lacks are shown by their numbers: an answer in
    Chinese must not end a program that runs under LANG=C.
    """
    out = sys.stdout
    if not isinstance(out, io.TextIOWrapper) or out.errors not in ("strict", "surrogateescape"):
        return
    try:
        "答".encode(out.encoding)
    except UnicodeEncodeError:
        out.reconfigure(errors="backslashreplace")
        print(
            f"glmlora: output is in {out.encoding}: characters that it lacks are shown as "
            "\\uXXXX (PYTHONIOENCODING=utf-8 changes that)",
            file=sys.stderr,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; user errors are one line on stderr and exit status 1 (GLMLORA_TRACEBACK=1
    shows where)."""
    if argv is not None:
        return _run_words(list(argv))
    try:
        status = _run_words(sys.argv[1:])
    except Terminated as end:
        end_now(end.status)
        raise
    end_now(status)
    return status


def _run_words(words: list[str]) -> int:
    if words[:1] == ["run"]:  # a user's program, whose output and warnings are its own
        return _main(words)
    _show_all_characters()
    before = warnings.formatwarning
    warnings.formatwarning = _one_line
    try:
        return _main(words)
    finally:
        warnings.formatwarning = before


def _one_line(message: Warning | str, category: type[Warning], *place: Any) -> str:
    """A warning without the place in the program: it is about the user's words and files."""
    return f"glmlora: {category.__name__}: {message}\n"


def _main(words: list[str]) -> int:
    parser, verbs = _parser()
    try:
        if words[:1] == ["train"]:
            return train(words[1:])
        _check_words(words, parser, verbs)
        args = parser.parse_args(words)
        if args.version:
            import glmlora

            print(glmlora.__version__)
            return 0
        if not args.verb:
            parser.print_help()
            return 2
        return int(args.function(args))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if os.environ.get("GLMLORA_TRACEBACK"):
            raise
        _report(error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
