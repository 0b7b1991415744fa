"""What each GLM family is, a file a family: prompts, answers, ends, tokens, names of tensors.

A module of this folder that has a `FAMILY` is one; nothing else lists them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

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
    raise ValueError(f"family: expected one of {known}, got {name!r}")


def with_tokenizer() -> list[Family]:
    """The families whose texts this release can read."""
    return [f for f in all_families().values() if f.special_tokens is not None]


def choices() -> tuple[str, ...]:
    """Values of flags that name a family."""
    return ("auto", *(family.alias for family in with_tokenizer()))


def default() -> Family:
    """The family of models that nothing tells apart from it."""
    return of(DEFAULT)


def named_in(name: str) -> Family | None:
    """The family that a model's name or path says, by what stands first in it."""
    found = [(m.start(), f) for f in all_families().values() if (m := f.named.search(name.lower()))]
    return min(found, key=lambda at: at[0])[1] if found else None


def first(says_yes: Callable[[Family], bool]) -> Family | None:
    """The family that evidence speaks for; one that builds on another is asked before it."""
    asked = sorted(all_families().values(), key=lambda family: -len(type(family).__mro__))
    return next((family for family in asked if says_yes(family)), None)


def refuse_others(fields: Mapping[str, Any]) -> None:
    """ValueError for a config.json of a model that is of none of the families."""
    kind = fields.get("model_type")
    if kind in ("glm", "glm4"):
        raise ValueError(
            f"model_type {kind!r} (the transformers layout of GLM-4) is not supported by this "
            "release; ChatGLM2, ChatGLM3 and GLM-4-9B in their original layout are"
        )
    if kind != "chatglm":
        raise ValueError(f"model_type {kind!r} is not supported by this release, only 'chatglm'")
    if "inner_hidden_size" in fields or "position_encoding_2d" in fields:
        raise ValueError(
            "ChatGLM-6B (the first generation) is not supported by this release; ChatGLM2 and 3 are"
        )


def find(fields: Mapping[str, Any], directory: Path | None = None) -> str:
    """Name of the family of a config.json, and of the directory around it.

    Configs can be alike, so in this order: the name in `_name_or_path`; the config; files of the
    directory, as its tokenizer's; the directory's name; else the default, with a warning where the
    config means different things in different families.
    """
    refuse_others({"model_type": "chatglm", **fields})
    if named := named_in(str(fields.get("_name_or_path") or "")):
        return named.name
    if family := first(lambda family: family.in_config(fields)):
        return family.name
    if directory is not None:
        if family := first(lambda family: family.in_directory(directory)):
            return family.name
        if named := named_in(directory.resolve().name):
            return named.name
        if fields.get("rope_ratio", 1) != 1:
            warnings.warn(
                f"{directory}: rope_ratio {fields['rope_ratio']} divides positions in ChatGLM2 "
                "and multiplies the rotary base in ChatGLM3 and GLM-4, and nothing here tells "
                'which this is: taken as ChatGLM2. Say family="v3" or rope_mode="base" otherwise',
                stacklevel=4,
            )
    return DEFAULT
