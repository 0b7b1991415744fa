"""What a run trains for, as its records say it: the task that stands beside what it saves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..task import Task, base_digest, labels_among
from .arguments import Arguments
from .methods import Trainee


def task_of(records: Sequence[Mapping[str, Any]], args: Arguments, trainee: Trainee) -> Task:
    """The task of records with the arguments of a run.

    An instruction that all records share, behind source_prefix, is the task's; the rest of a
    question stands in the columns `instruction` and `input`, as in records. The answers are labels
    where `labels_among` says so and no record has earlier rounds or a system message.
    """
    first, base = args.data.source_prefix or "", trainee.base
    instructions = {record["prompt"] for record in records}
    talks = any(record.get("history") or record.get("system") for record in records)
    columns = ["instruction"]
    if any(record.get("query") for record in records):
        columns.append("input")
        if len(instructions) == 1 and not talks:
            first += instructions.pop()
            columns.remove("instruction")
    place = base.opened.directory
    return Task(
        base="" if place is None else _text_of(place),
        instruction=first,
        template="".join(f"{{{name}}}" for name in columns),
        columns=columns,
        labels=[] if talks else list(labels_among(record["response"] for record in records)),
        max_source_length=args.data.max_source_length,
        quantization_bit=args.model.quantization_bit,
        method=trainee.kind,
        base_digest=base_digest(place),
    )


def _text_of(path: os.PathLike) -> str:
    """ "" for a path that is no text."""
    text = os.fspath(path)
    return text if text.isprintable() else ""
