"""Which ids a family's special tokens have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..families import Family
from ..families.messages import ROLES
from .vocabulary import Vocabulary

_MOST_ADDED = 4096  # ids of special tokens behind a vocabulary


def content_of(token: Any) -> Any:
    """The text of a token, which files may store with its flags."""
    return token.get("content", token) if isinstance(token, dict) else token


def special_ids(family: Family, vocabulary: Vocabulary, listed: Any, where: str) -> dict[str, int]:
    """Special tokens by name: those that are listed behind a vocabulary of byte pairs; those among
    the pieces; else the family's, one after the other behind them.

    listed: id -> token with its flags, or None; where: the file and field, for messages. ValueError
    for ids that cannot be, or a token that prompts need and that is not listed.
    """
    names, first = family.special_tokens or (), vocabulary.size
    if family.blank_tokens:
        found_ids = {name: vocabulary.id_of(name) for name in names}
        return {name: i for name, i in found_ids.items() if i is not None}
    if not family.byte_pairs or listed is None:
        return {name: first + i for i, name in enumerate(names)}
    if not isinstance(listed, Mapping):
        raise ValueError(f"{where}: expected ids and tokens, got {listed!r:.80}")
    found: dict[str, int] = {}
    for key, value in listed.items():
        token, last = content_of(value), first + _MOST_ADDED
        i = int(key) if str(key).isascii() and str(key).isdecimal() and len(str(key)) < 10 else -1
        if (
            not first <= i < last
            or not isinstance(token, str)
            or not token
            or token in found
            or i in found.values()
        ):
            raise ValueError(
                f"{where}: expected new tokens with ids from {first}, behind the vocabulary, got "
                f"{key!r:.80}: {token!r:.80}"
            )
        found[token] = i
    needed = [*family.prefix_tokens, family.named_tokens["eos"], *(f"<|{role}|>" for role in ROLES)]
    if missing := [token for token in needed if token not in found]:
        raise ValueError(f"{where}: has no {' '.join(missing)}, which {family.title} needs")
    return found
