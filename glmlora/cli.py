"""The command `glmlora`, whose verbs `glmlora --help` lists.

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
from .task import ANY_TEXT, Task, check_asked
from .templates import columns_of
from .tools.demo import PAPERS
from .training.flags import check_directory, given_twice

#: What a user can put right; everything else is a fault of this program and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, RuntimeError, MemoryError, ArithmeticError)


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
    from glmlora.model import loading

    kwargs = _generation(args)
    _check_model(args)
    model, tokenizer = loading.load_model(
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
    from glmlora.prediction import Source
    from glmlora.tables import output as table
    from glmlora.tables import shards
    from glmlora.tables.job import predict_rows

    _check_model(args)
    part = None if args.shard is None else shards.part_of(args.shard, "--shard")
    if part is None:
        table.check_place(args.output, args.overwrite, args.input)
    elif args.overwrite:
        raise ValueError("--overwrite: has no effect with --shard; remove the folder of the shards")
    else:
        shards.check_folder(args.output)
    loaded = ("model", "adapter", "family", "dtype", "compute_dtype", "device")
    source = Source(**{name: getattr(args, name) for name in loaded})
    task, rows = source.task, table_rows(args.input, "--input")
    asked = _asked(args, source.directory, task, rows)
    columns = columns_of(rows)
    output = table.plan_output(
        args.output, columns, args.columns, args.add or [], args.answer_column, asked.more
    )
    answering = source.answering(asked, columns)
    job = {"describe": source.describe, "settings": source.settings(), "seed": args.seed}
    if part is not None:
        form = {n: getattr(args, n) for n in shards.FORM} | {"labels": list(asked.labels)}
        done = shards.predict_shard(rows, asked, answering, args.output, part, form, **job)
        print(f"{done.path}: {len(done.results)} rows")
        return 0
    _, whole = predict_rows(rows, asked, answering, output=output, overwrite=args.overwrite, **job)
    print(f"{args.output}: {len(rows)} rows")
    return 0 if whole else 1


def _asked(
    args: argparse.Namespace, directory: str, task: Task | None, rows: Sequence[Mapping[str, Any]]
) -> Any:
    """What the flags of `predict` ask about each row."""
    from glmlora.tables.answers import ask, split_answers
    from glmlora.tables.output import check_question

    labels = split_answers(args.labels)
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
    check_question(template, rows, args.input)
    return asked


def _template(given: str | None, task: Task | None, columns: Sequence[str]) -> str:
    """The question of `predict`: the one that is given; else what was trained, if the table has the
    columns; else the paper workflow's.
    """
    if given is not None or task is None:
        return given or PAPERS
    any_text = task.template in ANY_TEXT and not set(task.columns) <= set(columns)
    return PAPERS if any_text else task.question


def gather(args: argparse.Namespace) -> int:
    """The shards of `predict --shard` become one table: the bytes of a run without shards."""
    from glmlora.tables import shards

    rows, whole = shards.gather(args.folder, args.output, args.fallback, args.overwrite)
    print(f"{args.output}: {rows} rows")
    return 0 if whole else 1


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
    from glmlora.model import loading

    _check_model(args)
    check_new_directory(args.output)
    if not os.path.exists(os.path.join(args.adapter, "adapter_config.json")):
        raise ValueError(
            f"--adapter: {args.adapter} has no adapter_config.json: a P-Tuning prefix cannot be "
            "merged into the weights"
        )
    model, tokenizer = loading.load_model(
        args.model, args.adapter, args.dtype, "float32", family=args.family
    )
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


def export(args: argparse.Namespace) -> int:
    """A model directory, or an adapter -> a GGUF file, for llama.cpp and what is built on it."""
    from glmlora.tools.gguf_export import export

    family = None if args.family == "auto" else args.family
    if args.gguf is None and not args.adapter_only:
        raise ValueError("--gguf: expected f16, q8_0 or q4_0")
    nbytes = export(args.model, args.output, args.gguf, args.adapter, args.adapter_only, family)
    print(f"{args.output}: {nbytes / 1e9:.2f} GB of tensors")
    return 0


def import_(args: argparse.Namespace) -> int:
    """A GGUF file -> a model directory."""
    from glmlora.tools.gguf_import import import_gguf

    family = None if args.family == "auto" else args.family
    config = import_gguf(args.file, args.output, family)
    print(f"{args.output}: {families.of(config.family).title}")
    return 0


def serve(args: argparse.Namespace) -> int:
    """OpenAI's endpoints for a model and its adapters, and a page to try them on."""
    from glmlora.model import loading
    from glmlora.serving import command

    command.check_extra()
    keys = command.read_keys(args.api_key_file, args.host, args.no_key)
    adapters = command.adapters_of(args.adapter or [])
    devices.parse(args.device)
    directory = model_directory(args.model)
    base, tokenizer = loading.load_model(
        args.model, None, args.dtype, args.compute_dtype, args.device, args.family
    )
    return command.run(
        base,
        tokenizer,
        args.name or os.path.basename(os.path.realpath(directory)),
        adapters,
        host=args.host,
        port=args.port,
        keys=keys,
        rows=args.rows,
        context=args.context,
        cache_memory=int(args.cache_memory * 1e9) if args.cache_memory else None,
        waiting=args.waiting,
        timeout=args.timeout,
        body_bytes=int(args.body_limit * 1e6),
        log_prompts=args.log_prompts,
    )


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


def _loading_flags(parser: argparse.ArgumentParser) -> None:
    _flag(parser, "--model", required=True, help="base model directory")
    _flag(parser, "--family", default="auto", choices=families.choices(), help="of the model")
    _flag(parser, "--dtype", choices=DTYPES, help="default: as stored")
    _flag(parser, "--device", default="auto", help="auto: a GPU, if any; cpu, cuda, cuda:1")
    _flag(
        parser,
        "--compute-dtype",
        choices=["auto", "float32", "bfloat16", "int8"],
        help="type of the large products; default: what the processor multiplies fast",
    )


def _sampling_flags(parser: argparse.ArgumentParser) -> None:
    _loading_flags(parser)
    _flag(parser, "--adapter", help="LoRA or P-Tuning directory")
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
    _flag(
        parser,
        "--shard",
        metavar="I/N",
        help="answer the I-th of N parts of the rows (from 1/N to N/N), in the folder --output, "
        "from which `glmlora gather` makes the table",
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


def _serve_flags(parser: argparse.ArgumentParser) -> None:
    _loading_flags(parser)
    _flag(
        parser,
        "--adapter",
        action="append",
        metavar="NAME=DIR",
        help="a LoRA adapter, which callers name as their model; several may be given",
    )
    _flag(parser, "--name", help="what callers call the base; default: its directory's name")
    _flag(parser, "--host", default="127.0.0.1", help="address to listen at")
    _flag(parser, "--port", type=int, default=8000)
    _flag(parser, "--api-key-file", metavar="FILE", help="keys that callers need, one a line")
    _flag(parser, "--no-key", action="store_true", help="let everybody ask who reaches --host")
    _flag(parser, "--rows", type=int, help="answers that run together; default: 8, if they fit")
    _flag(parser, "--context", type=int, help="tokens of prompt and answer; default: 4096, if ..")
    _flag(
        parser,
        "--cache-memory",
        type=float,
        metavar="GB",
        help="what keys and values may take, all of it from the beginning; default: half of what "
        "is free",
    )
    _flag(parser, "--waiting", type=int, default=256, help="requests that may wait for a row")
    _flag(parser, "--timeout", type=float, default=600, help="seconds of a request, waiting too")
    _flag(parser, "--body-limit", type=float, default=4, metavar="MB", help="of a request")
    _flag(parser, "--log-prompts", action="store_true", help="requests in the log, whole")


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
    p = verb("gather", gather)
    p.add_argument("folder", metavar="FOLDER", help="the --output of `predict --shard`")
    _flag(p, "--output", required=True, help="table to write")
    _flag(p, "--fallback", help="the answer for rows without one; default: that of the shards")
    _flag(p, "--overwrite", action="store_true", help="replace an output that is there")
    _inspect_flags(verb("inspect", inspect))
    p = verb("submit", submit)
    _flag(p, "--sample", required=True, metavar="TABLE", help="the sample submission")
    _flag(p, "--predictions", required=True, metavar="TABLE", help="csv, json or jsonl table")
    _flag(p, "--output", required=True, help="csv to write")
    _flag(p, "--overwrite", action="store_true", help="replace an output that is there")

    _serve_flags(verb("serve", serve))
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

    p = verb("export", export)
    _flag(p, "--model", required=True)
    _flag(p, "--gguf", choices=["f16", "q8_0", "q4_0"], help="the type of linear layers")
    _flag(p, "--output", required=True, metavar="FILE.gguf", help="a new file")
    _flag(p, "--adapter", metavar="DIR", help="a LoRA adapter, which is merged into the model")
    _flag(p, "--adapter-only", action="store_true", help="it alone, for llama.cpp's --lora")
    _flag(p, "--family", default="auto", choices=families.choices(), help="of the model")

    p = verb("import", import_)
    p.add_argument("file", metavar="FILE.gguf")
    p.add_argument("output", metavar="DIR", help="a new directory")
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
