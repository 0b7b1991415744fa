"""What an adapter was trained for, beside it in its folder as `task.json`.

    {"base": null, "columns": ["title"], "depth": null, "folds": 0, "instruction": "Medical? ",
     "labels": [0, 1], "max_source_length": 640, "method": "lora", "quantization_bit": null,
     "template": "{title}", "threshold": null}

Other programs do not look at it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..files.write import read_json, write_json

FILE = "task.json"


@dataclass(frozen=True)
class Task:
    """A question about a row of a table, and its possible answers.

    The prompt is `instruction`, then `template` with the row's values in place of its `{column}`,
    in at most `max_source_length` ids. columns: those of the table that was trained on. labels: the
    answers, as they stood in that table: text, whole numbers or booleans. threshold: the
    probability of the second of two labels from which on it is the answer; None: the likelier one.
    base: the model's directory, None for the one inside the package; quantization_bit: its form
    while training. method: what was trained, a key of `glmlora.classifier.METHODS`. depth: the
    layers that a head reads, None: all. folds: adapters
    in folders fold-0, fold-1, ..; 0: one, in the folder itself.
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

    @property
    def answers(self) -> list[str]:
        """The labels as the model writes them: 1.0, which a column with gaps makes of 1, as 1."""
        return [str(int(x) if isinstance(x, float) else x) for x in self.labels]

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
}


def read_task(directory: str | os.PathLike[str]) -> Task:
    """The task in a directory. FileNotFoundError where it has none, ValueError naming file and
    field.
    """
    file = Path(directory) / FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: not there; LoraClassifier.save writes it beside an adapter"
        )
    stored = read_json(file, dict)
    values = {}
    for field in fields(Task):
        if field.name not in stored:
            raise ValueError(f"{file}: has no {field.name!r}")
        value = values[field.name] = stored[field.name]
        if not isinstance(value, _KINDS[field.name]):
            kinds = " or ".join(k.__name__ for k in _KINDS[field.name])
            raise ValueError(f"{file}: {field.name}: expected {kinds}, got {value!r:.80}")
    for label in values["labels"]:
        if not (isinstance(label, str | int) or (isinstance(label, float) and label.is_integer())):
            raise ValueError(f"{file}: labels: expected text or whole numbers, got {label!r:.80}")
    return Task(**values)


def write_task(directory: str | os.PathLike[str], task: Task) -> None:
    """Write it into a directory, atomically."""
    write_json(Path(directory) / FILE, asdict(task))
