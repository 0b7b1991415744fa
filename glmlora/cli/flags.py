"""The verbs of `glmlora` and their flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from .. import families
from ..model import device as devices
from . import verbs


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
        choices=["auto", *devices.COMPUTE_DTYPES],
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
    _flag(parser, "--input", required=True, help="csv, json, jsonl or parquet table")
    _flag(parser, "--output", required=True, help="csv, jsonl or parquet table to write")
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
    _flag(parser, "--engine", choices=["ray"], help="processes by Ray, on one machine or many")
    _flag(parser, "--workers", type=int, help="with --engine: how many; default: one a node or GPU")
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
    _flag(
        parser,
        "--context",
        type=int,
        help="tokens of a prompt with its answer; default: 4096, or what the model and "
        "--cache-memory have room for",
    )
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


def parser_of_verbs() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of all verbs, and the one of each. A flag's beginning does not stand for it: what
    is a prefix today may be ambiguous, or another flag, tomorrow.
    """
    parser = argparse.ArgumentParser(
        prog="glmlora",
        description="Fine-tune GLM models and chat with them, from one small package.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and end")
    found = parser.add_subparsers(dest="verb", metavar="VERB")
    parsers: dict[str, argparse.ArgumentParser] = {}

    def verb(name: str, function: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        p = found.add_parser(
            name, help=function.__doc__, description=function.__doc__, allow_abbrev=False
        )
        p.set_defaults(function=function)
        parsers[name] = p
        return p

    found.add_parser("train", help=verbs.train.__doc__, add_help=False)

    _sampling_flags(verb("chat", verbs.chat))
    _sampling_flags(p := verb("predict", verbs.predict))
    _predict_flags(p)
    p = verb("gather", verbs.gather)
    p.add_argument("folder", metavar="FOLDER", help="the --output of `predict --shard`")
    _flag(p, "--output", required=True, help="table to write")
    _flag(p, "--fallback", help="the answer for rows without one; default: that of the shards")
    _flag(p, "--overwrite", action="store_true", help="replace an output that is there")
    _inspect_flags(verb("inspect", verbs.inspect))
    p = verb("submit", verbs.submit)
    _flag(p, "--sample", required=True, metavar="TABLE", help="the sample submission")
    _flag(p, "--predictions", required=True, metavar="TABLE", help="csv, json or jsonl table")
    _flag(p, "--output", required=True, help="csv to write")
    _flag(p, "--overwrite", action="store_true", help="replace an output that is there")

    _serve_flags(verb("serve", verbs.serve))
    _plan_flags(verb("plan", verbs.plan))

    p = verb("init", verbs.init)
    p.add_argument("directory")
    _flag(p, "--model", help="your own base model directory; default: the small one inside")

    p = verb("run", verbs.run)
    p.add_argument("path", metavar="NOTEBOOK_OR_SCRIPT")
    p.add_argument("arguments", nargs=argparse.REMAINDER)
    _flag(p, "--cwd", help="directory to run in; default: the current one")

    p = verb("merge", verbs.merge)
    _flag(p, "--model", required=True)
    _flag(p, "--adapter", required=True)
    _flag(p, "--output", required=True)
    _flag(p, "--family", default="auto", choices=families.choices(), help="of the model")
    _flag(p, "--dtype", choices=DTYPES)

    p = verb("quantize", verbs.quantize)
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

    p = verb("export", verbs.export)
    _flag(p, "--model", required=True)
    _flag(p, "--gguf", choices=["f16", "q8_0", "q4_0"], help="the type of linear layers")
    _flag(p, "--output", required=True, metavar="FILE.gguf", help="a new file")
    _flag(p, "--adapter", metavar="DIR", help="a LoRA adapter, which is merged into the model")
    _flag(p, "--adapter-only", action="store_true", help="it alone, for llama.cpp's --lora")
    _flag(p, "--family", default="auto", choices=families.choices(), help="of the model")

    p = verb("import", verbs.import_)
    p.add_argument("file", metavar="FILE.gguf")
    p.add_argument("output", metavar="DIR", help="a new directory")
    _flag(p, "--family", default="auto", choices=families.choices(), help="of the model")

    p = verb("doctor", verbs.doctor)
    p.add_argument("--speed", action="store_true", help="measure this machine, for half a second")
    p = verb("demo", verbs.demo)
    p.add_argument("directory", nargs="?", default="demo")
    return parser, parsers
