"""What each GLM family is, a file a family: prompts, answers, ends, tokens, names of tensors.

A module of this folder that has a `FAMILY` is one; nothing else lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from ..names import did_you_mean
from . import refused
from .family import Family as Family

UNNAMED = "THUDM/chatglm-6b"  # the base of the original training script where none is named
DEFAULT = "v2"  # where nothing tells; its text is also what the original training code writes


@cache
def all_families() -> dict[str, Family]:
    """Every family by its name, in the order of the files."""
    modules = (import_module(f"{__name__}.{m.name}") for m in iter_modules(__path__))
    return {m.FAMILY.name: m.FAMILY for m in modules if hasattr(m, "FAMILY")}


def of(name: str) -> Family:
    """The family of a name or alias. ValueError listing those that there are."""
    for family in all_families().values():
        if name in (family.name, family.alias):
            return family
    known = " ".join(all_families())
    words = [word for family in all_families().values() for word in (family.name, family.alias)]
    near = did_you_mean(str(name), words)
    raise ValueError(f"family: expected one of {known}, got {name!r}{near}")


def with_tokenizer() -> list[Family]:
    """The families whose texts this release can read."""
    return [f for f in all_families().values() if f.special_tokens is not None]


def choices() -> tuple[str, ...]:
    """Values of flags that name a family."""
    return ("auto", *(family.alias for family in with_tokenizer()))


def default() -> Family:
    """The family of models that nothing tells apart from it."""
    return of(DEFAULT)


def of_layout(fields: Mapping[str, Any]) -> list[Family]:
    """The families whose config.json has the layout of this one, [] where none has."""
    kind = fields.get("model_type")
    found = [f for f in all_families().values() if f.model_type == kind]
    marked = [f for f in found if any(key in fields for key in f.layout_keys)]
    return marked or [f for f in found if not f.layout_keys]


def refuse_others(fields: Mapping[str, Any]) -> None:
    """ValueError for a config.json of a model that is of none of the families, or whose positions
    are scaled in a way that is not there.
    """
    refused.check(fields, list(dict.fromkeys(f.model_type for f in all_families().values())))
