"""What an adapter was trained for, in its folder: `task.json`, and for people `README.md`.

    {"base": null, "base_digest": null, "columns": ["title"], "depth": null,
     "folds": 0, "instruction": "Medical? ", "labels": [0, 1], "max_source_length": 640,
     "method": "lora", "quantization_bit": null, "scores": {}, "template": "{title}",
     "threshold": null}

Other programs do not look at the former; peft and model hubs read the head of the latter.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from . import tell
from .files.journal import digest, digests
from .files.regular import read_bytes
from .files.write import read_json, write_json, write_text

FILE, CARD = "task.json", "README.md"
#: Templates of tasks that were trained on whole texts: any may stand behind the instruction.
ANY_TEXT = ("{input}", "{instruction}", "{instruction}{input}", "{text}")
MOST_LABELS, LONGEST_LABEL = 100, 64  # answers that are labels: how many, of how many characters
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt)")


@dataclass(frozen=True)
class Task:
    """A question about a row of a table, and its possible answers.

    The prompt is `instruction`, then `template` with the row's values in place of its `{column}`,
    in at most `max_source_length` ids. columns: those of the table that was trained on; of records
    `instruction` and `input`. labels: the answers, as they stood in that table: text, whole numbers
    or booleans; empty where answers are free text. threshold: the probability of the second of two
    labels from which on it is the answer; None: the likelier one. base: the model's directory, None
    for the one inside the package, "" where it is not known; base_digest: as `base_digest` has it.
    quantization_bit: its form while training. method: what was trained: lora, p_tuning, freeze,
    full, or a key of `glmlora.classifier.METHODS`. depth: the layers that a head reads, None: all.
    folds: adapters in folders fold-0, fold-1, ..; 0: one, in the folder itself. scores: of rows
    held out while training.
    """

    base: str | None
    instruction: str
    template: str
    columns: list[str]
    labels: list[Any]
    max_source_length: int
    threshold: float | None = None
    quantization_bit: int | None = None
    folds: int = 0
    method: str = "lora"
    depth: int | None = None
    base_digest: str | None = None
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def answers(self) -> list[str]:
        """The labels as the model writes them: 1.0, which a column with gaps makes of 1, as 1."""
        return [str(int(x) if isinstance(x, float) else x) for x in self.labels]

    @property
    def question(self) -> str:
        """Instruction and template as one template."""
        return self.instruction.replace("{", "{{").replace("}", "}}") + self.template

    @property
    def is_ensemble(self) -> bool:
        """Whether its answers are those of folds or a head, not of one model."""
        return bool(self.folds) or "head" in self.method

    def decisive(self) -> dict[str, Any]:
        """What of it answers depend on, beside the weights."""
        told = ("base", "base_digest", "columns", "scores")
        return {name: value for name, value in asdict(self).items() if name not in told}

    def takes(self, template: str) -> bool:
        """Whether a template asks what was trained: the task's own, or, where that is any text, one
        that begins with the instruction.
        """
        if self.template in ANY_TEXT:
            return template.startswith(self.question.removesuffix(self.template))
        return template == self.question

    def asked_by(self, template: str) -> Task:
        """The task with another template that it takes."""
        opening = self.question.removesuffix(self.template)
        return replace(self, template=template.removeprefix(opening))

    def folders(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Where its adapters are."""
        if not self.folds:
            return [Path(directory)]
        return [Path(directory) / f"fold-{number}" for number in range(self.folds)]


_KINDS: Mapping[str, tuple[type, ...]] = {
    "base": (str, type(None)),
    "instruction": (str,),
    "template": (str,),
    "columns": (list,),
    "labels": (list,),
    "max_source_length": (int,),
    "threshold": (float, int, type(None)),
    "quantization_bit": (int, type(None)),
    "folds": (int,),
    "method": (str,),
    "depth": (int, type(None)),
    "base_digest": (str, type(None)),
    "scores": (dict,),
}


# Files


def read_task(directory: str | os.PathLike[str]) -> Task:
    """The task in a directory. FileNotFoundError where it has none, ValueError naming file and
    field.
    """
    file = Path(directory) / FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: not there; training and LoraClassifier.save write it beside an adapter"
        )
    stored = read_json(file, dict)
    values = {}
    for one in fields(Task):
        if one.name not in stored:
            if one.default is MISSING and one.default_factory is MISSING:
                raise ValueError(f"{file}: has no {one.name!r}")
            continue
        value = values[one.name] = stored[one.name]
        if not isinstance(value, _KINDS[one.name]):
            kinds = " or ".join(k.__name__ for k in _KINDS[one.name])
            raise ValueError(f"{file}: {one.name}: expected {kinds}, got {value!r:.80}")
    for label in values["labels"]:
        if not (isinstance(label, str | int) or (isinstance(label, float) and label.is_integer())):
            raise ValueError(f"{file}: labels: expected text or whole numbers, got {label!r:.80}")
    return Task(**values)


def task_in(directory: str | os.PathLike[str] | None) -> Task | None:
    """The task in a directory, None where it has none. ValueError naming file and field."""
    if directory is None or not (Path(directory) / FILE).is_file():
        return None
    return read_task(directory)


def write_task(
    directory: str | os.PathLike[str],
    task: Task | None,
    target: str | os.PathLike[str] | None = None,
) -> None:
    """Write it into a directory, and a card, each atomically. target: the folder that the files
    will be put into. A README.md there that somebody else wrote, or edited, stays as it is.
    """
    if task is None:
        return
    write_json(Path(directory) / FILE, asdict(task))
    there = Path(directory if target is None else target) / CARD
    if not os.path.lexists(there) or (there.is_file() and _is_ours(there)):
        write_text(Path(directory) / CARD, card(task))


def base_digest(directory: str | os.PathLike[str] | None) -> str | None:
    """Of the weights in a model's directory, with their names: of large files it reads a sample.
    None where it has none.
    """
    if directory is None or not os.path.isdir(directory):
        return None
    found = digests(directory, _WEIGHTS)
    return digest(json.dumps(found, sort_keys=True).encode()) if found else None


# The card

_SUM = "<!-- Written by glmlora, and written anew while it is as it was: {:08x} -->"


def card(task: Task) -> str:
    """README.md: a head as model hubs and peft have it, and what a user needs to know."""
    base = "glm-tiny" if task.base is None else task.base
    own_format = task.method in ("lora", "lora+head")
    head = ["---"]
    if base:
        head.append(f"base_model: {json.dumps(base, ensure_ascii=False)}")
    if own_format:
        head.append("library_name: peft")
    head += ["tags:", *(f"- {tag}" for tag in ("glmlora", *task.method.split("+"))), "---"]
    over = f", over `{base}`" if base else ""
    bits = f" in {task.quantization_bit} bits" if task.quantization_bit else ""
    text = [
        "# What this was trained for",
        f"By glmlora, method {task.method}{over}{bits}.",
        f"The question, of at most {task.max_source_length} tokens:",
        _block(task.question),
    ]
    if task.labels:
        text.append("Its answer is one of these labels:")
        text.append(_block("\n".join(task.answers)))
    if task.threshold is not None:
        text.append(f"The second one is the answer from a probability of {task.threshold:.4g} on.")
    if task.scores:
        text.append("On the rows held out while training:")
        rows = [f"| {name} | {value:.4g} |" for name, value in task.scores.items()]
        text.append("\n".join(["| score | value |", "| --- | --- |", *rows]))
    text += ["## How to use it", _use(task, base or "BASE")]
    body = "\n".join(head) + "\n" + "\n\n".join(text) + "\n"
    return f"{body}\n{_SUM.format(zlib.crc32(body.encode()))}\n"


def _use(task: Task, base: str) -> str:
    if task.method == "freeze":  # a part of the weights
        return _block(
            "glmlora train --do_predict --finetuning_type freeze --checkpoint_dir . "
            f"--model_name_or_path {base}"
        )
    place = "--model ." if task.method == "full" else f"--model {base} --adapter ."
    lines = [f"glmlora predict {place} --input table.csv --output answers.csv"]
    if task.method in ("lora", "head", "lora+head") and task.labels:
        lines.append('python: glmlora.LoraClassifier.load(".").predict_proba(table)')
    if task.method in ("lora", "lora+head") and not task.folds:
        lines.append('python: glmlora.PeftModel.from_pretrained(base, ".")')
        lines.append('python: peft.PeftModel.from_pretrained(base, ".")')
    elif task.method == "p_tuning":
        lines.append('python: glmlora.load_prefix(base, ".")')
    elif task.method == "full":
        lines.append('python: glmlora.AutoModel.from_pretrained(".")')
    return _block("\n".join(lines))


def _block(text: str) -> str:
    """Text between fences longer than any in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _is_ours(file: Path) -> bool:
    body, _, last = read_bytes(file).removesuffix(b"\n").rpartition(b"\n")
    return last == _SUM.format(zlib.crc32(body)).encode()


# Use


def labels_among(answers: Iterable[str]) -> list[str]:
    """The different answers of some records, sorted, where they are labels: at least two, few,
    short, in one line, and each twice on the average. Else none.
    """
    counts = Counter(answers)
    few = 2 <= len(counts) <= MOST_LABELS and 2 * len(counts) <= counts.total()
    short = all(len(text) <= LONGEST_LABEL and "\n" not in text and text.strip() for text in counts)
    return sorted(counts) if few and short else []


def check_asked(
    task: Task | None,
    strict: bool = False,
    *,
    template: str | None = None,
    query: str | None = None,
    labels: Sequence[Any] | None = None,
    base: str | os.PathLike[str] | None = None,
) -> None:
    """Tell, once, what is asked otherwise than the task was trained; with `strict` the same
    sentence is a ValueError. template, query (a whole question), labels: what is asked; base: the
    directory of the model below. None: not asked, or as trained.
    """
    if task is None:
        return
    differ = []
    if template is not None and not task.takes(template):
        differ.append(f"template: {task.question!r:.300} was trained, {template!r:.300} is asked")
    if query is not None and not query.startswith(task.instruction):
        differ.append(
            f"template: questions began with {task.instruction!r:.300}, and one asked does not"
        )
    if labels is not None and task.labels and {str(x) for x in labels} != set(task.answers):
        asked = [str(x) for x in labels]
        differ.append(f"labels: {task.answers!r:.200} were trained, {asked!r:.200} are asked")
    if base is not None and task.base_digest not in (None, found := base_digest(base)) and found:
        named = task.base or "another one"
        differ.append(f"base: trained over {named}, asked over {os.fspath(base)}: other weights")
    if not differ:
        return
    text = f"the adapter was trained for another task than is asked: {'; '.join(differ)}"
    if strict:
        raise ValueError(text)
    tell.once(text)
