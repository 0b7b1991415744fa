"""A vocabulary of byte pairs in the `tokenizer.json` of the tokenizers library: its ranks are all
that is needed, since its merges are every cut of a token into two, the lowest rank first. What
would change ids is checked and refused, never skipped.
"""

from __future__ import annotations

import json
from typing import Any

# How text is cut before anything is merged: the published tokenizers' own expression.
CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How it writes bytes: most as the character of the same number, the others as those from 256 on.
_SHOWN = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_HIDDEN = [b for b in range(256) if b not in _SHOWN]
_BYTES = {chr(b): b for b in _SHOWN} | {chr(256 + i): b for i, b in enumerate(_HIDDEN)}
_CUTS = [
    {"type": "Split", "pattern": {"Regex": CUT}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
]
_MODEL = {
    "type": "BPE",
    "ignore_merges": True,
    "byte_fallback": False,
    **dict.fromkeys(("dropout", "continuing_subword_prefix", "end_of_word_suffix")),
}


def read(data: bytes, file: str) -> tuple[dict[bytes, int], dict[str, Any], tuple[str, ...]]:
    """(ranks of tokens, special tokens by id, names of those in front of a text). ValueError naming
    the file and the field for another kind of tokenizer.
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is not JSON: {error}") from None
    try:
        return _ranks(fields), _added(fields), _prefix(fields)
    except (KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{file}: expected the fields of the tokenizers library's file") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _ranks(fields: Any) -> dict[bytes, int]:
    model = fields["model"]
    if fields.get("normalizer") is not None:
        raise ValueError(f"normalizer: expected none, got {fields['normalizer']!r:.80}")
    cuts = fields["pre_tokenizer"]["pretokenizers"]
    for i, wanted in enumerate(_CUTS):
        if len(cuts) != len(_CUTS) or any(cuts[i].get(k) != v for k, v in wanted.items()):
            raise ValueError(
                "pre_tokenizer: expected the expression of this family's published files and then "
                f"bytes, got {cuts!r:.200}"
            )
    for key, value in _MODEL.items():
        if (model.get(key) or value) != value or (value is True and not model.get(key)):
            raise ValueError(f"model: {key}: expected {value!r}, got {model.get(key)!r:.80}")
    ranks: dict[bytes, int] = {}
    for token, rank in model["vocab"].items():
        if type(rank) is not int or any(c not in _BYTES for c in token) or not token:
            raise ValueError(
                f"model: vocab: expected bytes and an id, got {token!r:.60}: {rank!r:.60}"
            )
        ranks[bytes(_BYTES[c] for c in token)] = rank
    cuts_of_tokens = sum(t[:i] in ranks and t[i:] in ranks for t in ranks for i in range(1, len(t)))
    if cuts_of_tokens != len(model["merges"]):
        raise ValueError(
            f"model: merges: expected every cut of a token into two, {cuts_of_tokens} of them, got "
            f"{len(model['merges'])}"
        )
    return ranks


def _added(fields: Any) -> dict[str, Any]:
    return {str(token["id"]): dict(token) for token in fields.get("added_tokens") or []}


def _prefix(fields: Any) -> tuple[str, ...]:
    """What a template of the post-processor puts in front of one text."""
    last = fields.get("post_processor") or {}
    for step in last.get("processors", [last]):
        if step.get("type") == "TemplateProcessing":
            *before, text = step["single"]
            if "Sequence" not in text:
                raise ValueError("post_processor: expected special tokens in front of texts only")
            names = tuple(part["SpecialToken"]["id"] for part in before)
            known = {token["content"] for token in fields["added_tokens"]}
            if other := [name for name in names if name not in known]:
                raise ValueError(f"post_processor: {other[0]!r:.80} is not among added_tokens")
            return names
    return ()
