"""The command `glmlora`: train, chat, predict, plan, init, run, merge, doctor, demo.

Each verb is one function below."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from .tools.demo import ORDER


def _load(
    model_path: str,
    adapter: str | None,
    dtype: str | None,
    compute_dtype: str | None,
    device: str = "cpu",
) -> tuple[Any, Any]:
    """Model and tokenizer of a base directory and an optional adapter or P-Tuning directory."""
    import glmlora
    from glmlora.model.peft import load_prefix

    is_prefix = adapter and not os.path.exists(os.path.join(adapter, "adapter_config.json"))
    model = glmlora.AutoModel.from_pretrained(model_path, compute_dtype=compute_dtype)
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
    return model.eval(), glmlora.AutoTokenizer.from_pretrained(model_path)


def _generation(args: argparse.Namespace) -> dict[str, Any]:
    names = ("temperature", "top_p", "top_k", "max_length", "repetition_penalty", "seed")
    return {n: getattr(args, n) for n in names if getattr(args, n, None) is not None}


def chat(args: argparse.Namespace) -> int:
    """Talk to a model in the terminal; the answer streams."""
    model, tokenizer = _load(args.model, args.adapter, args.dtype, args.compute_dtype, args.device)
    history: list[Any] = []
    kwargs = _generation(args)
    interactive = sys.stdin.isatty()
    if interactive:
        print("Type a question; `clear` forgets the conversation, `stop` (or Ctrl-D) ends.")
    while True:
        try:
            query = input("> " if interactive else "").strip()
        except EOFError:
            return 0
        if not query:
            continue
        if query == "stop":
            return 0
        if query == "clear":
            history = []
            continue
        shown = 0
        before = history
        try:
            for response, turn in model.stream_chat(tokenizer, query, history=before, **kwargs):
                text = response if isinstance(response, str) else str(response)
                print(text[shown:], end="", flush=True)
                shown, history = len(text), turn
        except KeyboardInterrupt:  # ends this answer, not the conversation
            history = before
            print(" [interrupted]", end="")
        print()


def predict(args: argparse.Namespace) -> int:
    """A table in, a table out: one answer for each row."""
    from glmlora import tables
    from glmlora.training.methods import unwrapped

    rows = tables.read_table(args.input, args.template)
    if os.path.exists(args.output) and not args.overwrite:
        raise FileExistsError(f"{args.output} exists: pass --overwrite to replace it")
    prompts = tables.fill_template(args.template, rows)
    model, tokenizer = _load(args.model, args.adapter, args.dtype, args.compute_dtype, args.device)
    sampling = {"temperature": 0.01, **_generation(args)}
    answers = tables.answer_all(unwrapped(model), tokenizer, prompts, **sampling)
    answers = tables.check_choices(answers, args.choices, args.fallback)
    columns = args.columns.split(",") if args.columns else list(rows[0])
    constants = dict(pair.split("=", 1) for pair in args.add or [])
    tables.write_table(args.output, rows, columns, constants, args.answer_column, answers)
    print(f"{args.output}: {len(rows)} rows")
    return 0


def plan(args: argparse.Namespace) -> int:
    """Memory and products of a training step or a chat, before anything is allocated."""
    from glmlora.tools.plan import plan

    names = ("lora_rank", "lora_target", "pre_seq_len", "num_layer_trainable")
    finetuning = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    planned = plan(
        args.model,
        args.batch,
        args.seq,
        args.method,
        args.labels,
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
    if os.path.exists(args.output) and os.listdir(args.output):
        raise FileExistsError(f"{args.output} exists and is not empty")
    model, tokenizer = _load(args.model, args.adapter, args.dtype, "float32")
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(f"{args.adapter}: a P-Tuning prefix cannot be merged into the weights")
    model.merge_and_unload().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"{args.output}: merged model and tokenizer")
    return 0


def train(argv: Sequence[str]) -> int:
    """All flags of the training script; see `glmlora train --help`."""
    from glmlora.training.trainer import run_train

    run_train(list(argv))
    return 0


def doctor(args: argparse.Namespace) -> int:
    """What this machine has, and what is missing."""
    from glmlora.tools.doctor import report

    return report()


def demo(args: argparse.Namespace) -> int:
    """csv -> LoRA -> chat -> predictions -> submit.csv, with pictures."""
    from glmlora.tools.demo import run_demo

    return run_demo(args.directory)


def _sampling_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="base model directory")
    parser.add_argument("--adapter", help="LoRA or P-Tuning directory")
    parser.add_argument(
        "--dtype", choices=["float16", "bfloat16", "float32"], help="default: as stored"
    )
    parser.add_argument(
        "--device", default="auto", help="auto: a GPU where there is one; cpu, cuda, cuda:1"
    )
    parser.add_argument(
        "--compute_dtype",
        "--compute-dtype",
        choices=["auto", "float32", "bfloat16", "int8"],
        help="type of the large products; default: what the processor multiplies fast",
    )
    parser.add_argument("--temperature", type=float, help="0 is greedy")
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--max-length", type=int, help="prompt and answer together, tokens")
    parser.add_argument("--repetition-penalty", type=float)
    parser.add_argument("--seed", type=int)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glmlora",
        description="Fine-tune GLM models and chat with them, from one small package.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and end")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")

    def verb(name: str, function) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(function=function)
        return sub

    verbs.add_parser("train", help=train.__doc__, add_help=False)

    p = verb("chat", chat)
    _sampling_flags(p)

    p = verb("predict", predict)
    _sampling_flags(p)
    p.add_argument("--input", required=True, help="csv, json or jsonl table")
    p.add_argument("--output", required=True, help="csv to write")
    p.add_argument(
        "--template",
        default=ORDER + "title:{title},abstract:{abstract}",
        help="prompt with {column} places; default: the paper workflow's",
    )
    p.add_argument("--columns", help="columns to keep, comma separated; default: all")
    p.add_argument("--add", action="append", metavar="COLUMN=TEXT", help="a constant column")
    p.add_argument("--answer-column", default="label")
    p.add_argument(
        "--choices", type=lambda s: s.split(","), help="the only answers allowed, e.g. 0,1"
    )
    p.add_argument("--fallback", help="the answer for rows whose answer is none of --choices")
    p.add_argument("--overwrite", action="store_true")

    p = verb("plan", plan)
    p.add_argument("--model", required=True, help="a directory with config.json")
    p.add_argument("--batch", type=int, default=1, help="rows of a micro-batch, or of a chat")
    p.add_argument("--seq", type=int, default=512, help="tokens of a row")
    p.add_argument("--method", default="lora", help="lora, p_tuning, freeze, full or chat")
    p.add_argument("--labels", type=int, default=3, help="labelled tokens of a row")
    p.add_argument("--quantization_bit", "--quantization-bit", type=int, choices=[4, 8])
    p.add_argument("--dtype", choices=["float16", "bfloat16", "float32"])
    p.add_argument(
        "--gradient_checkpointing",
        "--gradient-checkpointing",
        action="store_true",
        help="keep 1 GiB of activations at most; without it, what fits into the free memory",
    )
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--memory", help="of the GPU, e.g. 16GB: decides what is recomputed")
    p.add_argument("--lora_rank", type=int)
    p.add_argument("--lora_target")
    p.add_argument("--pre_seq_len", type=int)
    p.add_argument("--num_layer_trainable", type=int)

    p = verb("init", init)
    p.add_argument("directory")
    p.add_argument("--model", help="your own base model directory; default: the small one inside")

    p = verb("run", run)
    p.add_argument("path", metavar="NOTEBOOK_OR_SCRIPT")
    p.add_argument("arguments", nargs=argparse.REMAINDER)
    p.add_argument("--cwd", help="directory to run in; default: the current one")

    p = verb("merge", merge)
    p.add_argument("--model", required=True)
    p.add_argument("--adapter", required=True)
    p.add_argument("--output", required=True)
    p.add_argument("--dtype", choices=["float16", "bfloat16", "float32"])

    verb("doctor", doctor)
    p = verb("demo", demo)
    p.add_argument("directory", nargs="?", default="demo")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; user errors are one line on stderr and exit status 1 (GLMLORA_TRACEBACK=1
    shows where)."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    try:
        if words[:1] == ["train"]:
            return train(words[1:])
        args = parser.parse_args(words)
        if args.version:
            import glmlora

            print(glmlora.__version__)
            return 0
        if not args.verb:
            parser.print_help()
            return 2
        return args.function(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError, ArithmeticError) as error:
        if os.environ.get("GLMLORA_TRACEBACK"):
            raise
        print(f"glmlora: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
