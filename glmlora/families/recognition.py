"""Which family a model directory is of: what speaks for one is weighed, a guess is told.

Families have alike configs and the same vocabulary file, so names and the tokenizer's small files
have to tell.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..tell import once, warn
from . import all_families, default, of, of_layout, refuse_others, with_tokenizer
from .family import Family

OWN_KEY = "glmlora_family"  # in config.json and tokenizer_config.json that this package wrote

_VOCABULARY = "the vocabulary"

EMBEDDED = "glm-tiny"  # the model inside this package, of the default family


def own_part(name: str) -> str:
    """The part of a model's path or id that names the model: the last one, and in a hub's cache,
    whose last part is a commit, the one before `snapshots`.
    """
    parts = [part for part in re.split(r"[/\\]+", name) if part not in ("", ".", "..")]
    if len(parts) > 2 and parts[-2] == "snapshots":
        return parts[-3]
    return parts[-1] if parts else ""


def named_in(name: str) -> Family | None:
    """The family that a name or path says; None where its own part names none, or several."""
    own = own_part(name).lower()
    found = [f for f in all_families().values() if f.named.search(own)]
    return found[0] if len(found) == 1 else None


def _first(question: str, asked_of: Any) -> Family | None:
    """The family that says yes, of those whose own class answers the question; one that builds on
    another is asked before it.
    """
    ordered = sorted(all_families().values(), key=lambda family: -len(type(family).__mro__))
    asked = (family for family in ordered if question in vars(type(family)))
    return next((family for family in asked if getattr(family, question)(asked_of)), None)


def _evidence(
    fields: Mapping[str, Any], tokenizer: Mapping[str, Any], directory: Path | None
) -> Iterator[tuple[str, Family | None]]:
    """(what speaks, the family it speaks for), the strongest first."""
    for file, keys in (("config.json", fields), ("tokenizer_config.json", tokenizer)):
        if keys.get(OWN_KEY):
            yield f"{OWN_KEY} in {file}", of(str(keys[OWN_KEY]))
    yield "config.json", _first("in_config", fields)
    if directory is not None:
        yield _VOCABULARY, _first("in_vocabulary", directory)
    name = str(fields.get("_name_or_path") or "")
    yield f"_name_or_path {name!r} in config.json", named_in(name)
    yield "tokenizer_config.json", _first("in_tokenizer", tokenizer)
    if directory is not None:
        yield "the tokenizer's files", _first("in_directory", directory)
    name = str(tokenizer.get("name_or_path") or "")
    yield f"name_or_path {name!r} in tokenizer_config.json", named_in(name)
    if directory is not None:
        yield "the directory's name", named_in(str(directory.absolute()))


def find(
    fields: Mapping[str, Any],
    directory: Path | None = None,
    tokenizer: Mapping[str, Any] | None = None,
) -> str:
    """Name of the family of a config.json, of the tokenizer_config.json beside it (`tokenizer`) and
    of the directory around them.

    The strongest evidence decides. Evidence for another family is told by a warning, and so is that
    there is none at all, unless there is no directory.
    """
    refuse_others({"model_type": default().model_type, **fields})
    known = _of_its_layout(fields)
    if len(known) == 1:
        return known[0].name
    found = [
        (what, f)
        for what, f in _evidence(fields, tokenizer or {}, directory)
        if f and (f in known or not known)
    ]
    if not found and known:
        return known[0].name
    if not found:
        if directory is not None and own_part(str(fields.get("_name_or_path"))) != EMBEDDED:
            _tell_guess(fields, directory)
        return default().name
    decisive, family = found[0]
    if decisive == _VOCABULARY:  # which families that build on one another share
        closer = (one for one in found if isinstance(one[1], type(family)) and one[1] != family)
        decisive, family = next(closer, found[0])
    if directory is not None and not decisive.startswith(OWN_KEY):
        for what, other in found[1:]:
            if not isinstance(family, type(other)):
                warn(
                    f"{directory}: {decisive} says {family.title}, {what} says {other.title}: "
                    f'taken as {family.title}. Say family="{family.name}" or family="{other.name}"'
                )
                break
    return family.name


def _of_its_layout(fields: Mapping[str, Any]) -> list[Family]:
    """The families of the layout of a config.json, that which the others build on first: it is
    taken where nothing tells. [] for the layout of the default family, whose names have to tell.
    """
    known = of_layout({"model_type": default().model_type, **fields})
    if default() in known:
        return []
    return sorted(known, key=lambda family: len(type(family).__mro__))


def choices(known: Iterable[Family]) -> str:
    """How one of the families is asked for."""
    return " or ".join(f'family="{family.name}"' for family in known)


def _tell_guess(fields: Mapping[str, Any], directory: Path) -> None:
    family = default()
    known = [
        f
        for f in with_tokenizer()
        if (f.vocabulary_name, f.byte_pairs) == (family.vocabulary_name, family.byte_pairs)
    ]
    others = " and ".join(f.title for f in known if f is not family)
    ratio = fields.get("rope_ratio") or 1
    meaning = ""
    if ratio != 1:
        meaning = (
            f" Its rope_ratio {ratio} then divides positions; in the others it multiplies the "
            'rotary base, which rope_mode="base" says.'
        )
    warn(
        f"{directory}: taken as {family.title}, which is a guess: no name of a published model and "
        f"nothing in its files tells it from {others}, whose prompts are others.{meaning} Say "
        f"{choices(known)} when it is opened"
    )


def tell_base(family: str, *names: Any) -> None:
    """A warning, once, where a model's own name is that of one that only continues texts."""
    pattern = of(family).base
    for name in names:
        own = own_part(os.fspath(name)) if isinstance(name, str | os.PathLike) else ""
        if pattern is not None and pattern.fullmatch(own.lower()):
            once(
                f"{own} is a base model, which continues texts: it has not learnt to answer in "
                "chats, unless somebody trained it to; model.generate gives the continuation"
            )


def tells(fields: Mapping[str, Any], family: str) -> bool:
    """Whether a config.json or tokenizer_config.json alone says that it is of this family."""
    named = named_in(str(fields.get("_name_or_path") or fields.get("name_or_path") or ""))
    known = _of_its_layout(fields)
    said = (named, _first("in_config", fields), _first("in_tokenizer", fields), *known[:1])
    first = next((f for f in said if f and (f in known or not known)), None)
    return first is not None and first.name == family


def check_adapter(directory: Path, base_name: Any, family: str, own: Any = None) -> None:
    """A warning for an adapter or prefix whose files name a base of another family than `family`,
    the model's: the shapes may be the same. own: what the files say under OWN_KEY.
    """
    named = of(str(own)) if own else named_in(str(base_name or ""))
    if named is not None and named is not of(family):
        warn(
            f"{directory}: was trained on a {named.title} model ({base_name}), this one is of "
            f"family {of(family).title}: its answers will be wrong, or say "
            f'family="{named.name}" where the model is opened'
        )


def check_tokenizer(tokenizer: Any, family: str, vocabulary: int) -> None:
    """ValueError for a tokenizer with more ids than the model's `vocabulary`, a warning for one of
    another family than the model's.
    """
    size = getattr(tokenizer, "vocab_size", None)
    if isinstance(size, int) and size > vocabulary:
        raise ValueError(
            f"tokenizer: has {size} ids, the model's vocabulary has {vocabulary}: it belongs to "
            "another model; open the one in the model's own directory"
        )
    own = getattr(tokenizer, "family", family)
    if own != family:
        warn(
            f"the tokenizer is of family {of(own).title}, the model of {of(family).title}: prompts "
            f'have the form of the tokenizer\'s. Say family="{own}" where the model is opened, or '
            f'family="{family}" where the tokenizer is'
        )
