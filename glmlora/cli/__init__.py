"""The command `glmlora`, whose verbs `glmlora --help` lists: `verbs.py`, `flags.py`."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ..interrupts import Terminated, end_now
from ..names import did_you_mean
from ..training.flags import given_twice
from . import verbs
from .flags import parser_of_verbs
from .verbs import USER_ERRORS, report

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
    words: Sequence[str], parser: argparse.ArgumentParser, known_verbs: Mapping[str, Any]
) -> None:
    """Exit with status 2 for a verb or flag that there is not, naming the nearest; tell flags that
    are given twice with different values.
    """
    if not words or words[0].startswith("-"):
        return
    if words[0] not in known_verbs:
        near = did_you_mean(words[0], [*known_verbs, "train"])
        parser.error(f"argument VERB: invalid choice: {words[0]!r}{near}")
    verb = known_verbs[words[0]]
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
    parser, known = parser_of_verbs()
    try:
        if words[:1] == ["train"]:
            return verbs.train(words[1:])
        _check_words(words, parser, known)
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
        report(error)
        return 1
