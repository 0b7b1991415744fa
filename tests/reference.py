"""Writes docs/reference.md: every public name of the package with its docstring, every flag of the
commands. tests/test_docs.py holds the page against the code.

    python tests/reference.py          writes the page anew
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import inspect
import re
from collections.abc import Iterator
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import glmlora
from glmlora.cli.flags import parser_of_verbs
from glmlora.training.arguments import FLAGS, REQUIRED

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"
SECTIONS = {  # title -> public names, in the order of a user's day; all names must stand here
    "Models": "AutoModel AutoModelForCausalLM ChatGLMForConditionalGeneration AutoTokenizer "
    "AutoConfig ChatGLMConfig load_state_dict",
    "Training": "train TrainingArguments AdamW set_seed",
    "Adapters": "LoraConfig PrefixTuningConfig get_peft_model PeftModel AutoPeftModelForCausalLM "
    "PeftConfig PeftType TaskType get_peft_model_state_dict set_peft_model_state_dict "
    "prepare_model_for_kbit_training load_prefix save_prefix",
    "Labels": "LoraClassifier vote_weight head.fit_head head.Head",
    "Tables": "inspect Report submit Submission scale.predict",
    "Generation": "GenerationConfig TextStreamer TextIteratorStreamer BaseStreamer "
    "LogitsProcessor LogitsProcessorList StoppingCriteria StoppingCriteriaList MaxLengthCriteria "
    "MaxTimeCriteria EosTokenCriteria StopStringCriteria",
    "Machine": "get_num_threads set_num_threads load_ipython_extension",
}
BEHIND = {  # a name that makes objects of another class -> the methods that users call of these
    "AutoTokenizer": "glmlora.tokenization:ChatGLMTokenizer",
}
FLAG_NAMES = {flag.name for flags in FLAGS.values() for flag in flags}
HEAD = """# Reference

Every public name and every flag, from the docstrings: `python tests/reference.py` writes this page.
What the names are for is in the [guide](README.md). The same in Python: `help(glmlora.train)`.

"""


def text_of(docstring: str) -> str:
    """A docstring as Markdown: what GitHub would take for markup stays text; code stays code."""
    parts = re.split(r"((?:^|\n\n)(?: {4}[^\n]*(?:\n|$)|\n)+|`[^`]+`)", docstring)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(\*|<|(?<!\w)_|_(?!\w)|\[(?=[^\]]*\]\())", r"\\\1", parts[i])
    return "".join(parts).strip()


def signature_of(name: str, thing: Any) -> str:
    """`name(a, b: int = 1)`, each argument on a line of its own where that is long."""
    if inspect.isbuiltin(thing):  # of the core: what Python says of these depends on its version
        stub = (Path(glmlora.__file__).parent / "_core.pyi").read_text(encoding="utf-8")
        return re.search(rf"^def ({name}\(.*?\))", stub, re.MULTILINE)[1]
    parameters = [*inspect.signature(thing).parameters.values()]
    words, star = [], False
    if thing is glmlora.train:  # every flag is a keyword: they stand among the commands
        parameters = [p for p in parameters if p.name not in FLAG_NAMES]
        parameters.append(inspect.Parameter("any_flag", inspect.Parameter.VAR_KEYWORD))
    for p in parameters:
        if p.name in ("self", "cls") or (p.name.startswith("_") and p.default is not p.empty):
            continue
        if p.kind is p.VAR_POSITIONAL:
            star = True
        elif p.kind is p.KEYWORD_ONLY and not star:
            words.append("*")
            star = True
        prefix = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        word = prefix + p.name
        annotation = p.annotation if isinstance(p.annotation, str) else None
        if annotation is None and p.annotation is not p.empty:
            plain = getattr(p.annotation, "__name__", str(p.annotation))
            annotation = getattr(p.annotation, "__forward_arg__", plain)
        if annotation:
            word += f": {annotation}"
        if p.default is not p.empty:
            plain = isinstance(p.default, (bool, int, float, str, tuple, type(None)))
            default = repr(p.default) if plain and not isinstance(p.default, enum.Enum) else ".."
            word += f" = {default}" if annotation else f"={default}"
        words.append(word)
    line = f"{name}({', '.join(words)})"
    return line if len(line) <= 96 else f"{name}(\n    " + ",\n    ".join(words) + ",\n)"


def methods_of(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods of a class and its bases in this package that have a docstring."""
    for name in sorted(dir(cls)):
        thing = inspect.getattr_static(cls, name)
        home = next((c for c in cls.__mro__ if name in vars(c)), object)
        if name.startswith("_") or not home.__module__.startswith("glmlora"):
            continue
        if isinstance(thing, property):
            thing = thing.fget
        elif isinstance(thing, (classmethod, staticmethod)):
            thing = thing.__func__
        if inspect.isfunction(thing) and thing.__doc__:
            yield name, inspect.getattr_static(cls, name)


def method_text(name: str, thing: Any) -> str:
    if isinstance(thing, property):
        return f"**`.{name}`**\n\n{text_of(inspect.getdoc(thing.fget))}"
    function = thing.__func__ if isinstance(thing, (classmethod, staticmethod)) else thing
    line = signature_of(name, function)
    said = text_of(inspect.getdoc(function))
    if "\n" in line:
        return f"**`.{name}`**\n\n```python\n{line}\n```\n\n{said}"
    return f"**`.{line}`**\n\n{said}"


def named(name: str) -> Any:
    """A public name, or one of a public module (`head.Head`)."""
    module, dot, _ = name.rpartition(".")
    if dot:
        import_module(f"glmlora.{module}")
    return reduce(getattr, name.split("."), glmlora)


def entry(name: str) -> str:
    thing = named(name)
    lines = [f"### {name}", ""]
    if inspect.isclass(thing) and issubclass(thing, enum.Enum):
        lines += [text_of(inspect.getdoc(thing)), "", ", ".join(f"`{one.name}`" for one in thing)]
        return "\n".join(lines) + "\n"
    made = inspect.isclass(thing) and (
        name.startswith("Auto") or name in ("ChatGLMForConditionalGeneration", "PeftModel")
    )
    if made:
        pass  # by from_pretrained, which stands among its methods
    elif dataclasses.is_dataclass(thing) and len(dataclasses.fields(thing)) > 60:
        fields = "Its fields are the [flags of training](#flags-training)."
        lines += [f"```python\n{name}(output_dir, ..)\n```", "", fields, ""]
    else:
        lines += [f"```python\n{signature_of(name, thing)}\n```", ""]
    lines += [text_of(inspect.getdoc(thing) or ""), ""]
    if name in BEHIND:
        module, behind = BEHIND[name].split(":")
        thing = getattr(import_module(module), behind)
        lines += [text_of(inspect.getdoc(thing) or ""), ""]
    if inspect.isclass(thing) and not (thing.__doc__ or "").startswith("The same as "):
        for method, one in methods_of(thing):
            lines += [method_text(method, one), ""]
    return "\n".join(lines)


def cell(text: str) -> str:
    return re.sub(r"([|<*])", r"\\\1", " ".join(text.split()))


def flags_of(parser: argparse.ArgumentParser) -> str:
    rows = ["| flag | |", "| --- | --- |"]
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        name = next(iter(action.option_strings), action.metavar or action.dest)
        if action.option_strings and action.nargs != 0:
            name += f" {action.metavar or action.dest.upper()}"
        said = (action.help or "").replace("%%", "%")
        if action.choices:
            said += f"{'; ' if said else ''}one of {', '.join(map(str, action.choices))}"
        if action.required and action.option_strings:
            said += "; required" if said else "required"
        if action.default not in (None, False, argparse.SUPPRESS) and "default" not in said:
            said += f"{'; ' if said else ''}default: {action.default}"
        rows.append(f"| `{name}` | {cell(said)} |")
    return "\n".join(rows) + "\n"


def train_flags() -> Iterator[str]:
    for group, flags in FLAGS.items():
        yield f"#### Flags: {group}\n\n| flag | | default |\n| --- | --- | --- |\n"
        for flag in flags:
            mark = {"R": "refused: ", "A": "no effect: "}.get(flag.mark, "")
            choices = f" ({', '.join(flag.choices)})" if flag.choices else ""
            none = flag.default is REQUIRED or flag.default is None
            default = "" if none else f"`{flag.default}`" if flag.default != "" else ""
            said = cell(mark + flag.help + choices)
            yield f"| `--{flag.name} {flag.kind.upper()}` | {said} | {default} |\n"
        yield "\n"


def page() -> str:
    out = [HEAD]
    links = [f"[{title}](#{title.lower()})" for title in (*SECTIONS, "Commands")]
    out.append(" · ".join(links) + "\n\n")
    for title, names in SECTIONS.items():
        out.append(f"## {title}\n\n")
        out += [re.sub(r"\n{3,}", "\n\n", entry(name).rstrip() + "\n\n") for name in names.split()]
    out.append("## Commands\n\nFlags take `-` and `_` alike.\n\n")
    parser, verbs = parser_of_verbs()
    told = {a.dest: a.help for a in parser._subparsers._group_actions[0]._choices_actions}
    for verb, said in told.items():
        out.append(f"### glmlora {verb}\n\n{text_of(said)}\n\n")
        if verb == "train":
            out += train_flags()
        else:
            out.append(flags_of(verbs[verb]) + "\n")
    return "".join(out).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: written")
