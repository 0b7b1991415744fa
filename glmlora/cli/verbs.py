"""What each verb of `glmlora` does: a function a verb."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from .. import families
from ..files.hub import model_directory
from ..files.rows import table_rows
from ..files.write import check_new_directory
from ..generation.config import GenerationConfig
from ..model import device as devices
from ..task import ANY_TEXT, Task, check_asked
from ..templates import columns_of
from ..tools.demo import PAPERS
from ..training.flags import check_directory

#: What a user can put right; everything else is a fault of this program and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, RuntimeError, MemoryError, ArithmeticError)


def report(error: Exception) -> None:
    """One line on standard error; the traceback too where it is not the user's to put right."""
    if not isinstance(error, USER_ERRORS):
        traceback.print_exception(error)
    print(f"glmlora: {type(error).__name__}: {error}", file=sys.stderr)


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
            report(error)
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
