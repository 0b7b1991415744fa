"""Prompts from the columns of a table's rows: a template has `{column}` where a value stands."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .files.rows import is_missing
from .names import did_you_mean, listed


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The columns of all rows, in the order in which they are met."""
    return list(dict.fromkeys(name for row in rows for name in row))


def places_of(template: str) -> list[str]:
    """The columns that a template names; ValueError for one that is not written as such."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"template: {error} (a brace of its own is written twice: {{{{ or }}}})"
        ) from None
    names = []
    for _, name, how, conversion in parts:
        if name is None:
            continue
        if not name or how or conversion or name.isdigit() or set(name) & set("{}[]."):
            more = f"{'!' + conversion if conversion else ''}{':' + how if how else ''}"
            raise ValueError(
                f"template: expected the name of a column between braces, got '{{{name}{more}}}'"
            )
        names.append(name)
    return names


def check_template(template: str, columns: Sequence[str], table: str) -> list[str]:
    """`places_of` the template, all of them columns of a table; ValueError naming one that is none,
    and the nearest. table: what a message calls it.
    """
    names = places_of(template)
    for name in names:
        if name not in columns:
            raise ValueError(
                f"template: {name!r} is no column of {table}{did_you_mean(name, columns)}; it has "
                f"{listed(columns)}"
            )
    return names


def fill_template(template: str, rows: Sequence[Mapping[str, Any]], first: int = 0) -> list[str]:
    """The template with the values of each row in place of its `{column}`. ValueError naming a row
    without a value, counted from `first`.
    """
    names = places_of(template)
    prompts = []
    for number, row in enumerate(rows, first):
        for name in names:
            if is_missing(row.get(name)):
                raise ValueError(
                    f"template: row {number} has no value in column '{name}'; columns are "
                    f"{listed(row)}"
                )
        prompts.append(template.format(**{name: as_text(row[name]) for name in names}))
    return prompts


def as_text(value: Any) -> str:
    """A value of a table as text: lists and objects as JSON."""
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
