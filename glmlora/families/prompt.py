"""Ids of prompts and of training records in the form of the tokenizer's family.

Training uses the templates of chats, so a tuned model is asked in the form it has learnt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import default, of
from .family import Family, Tokenizer
from .messages import check_rounds, rounds_to_drop
from .vendored import TEMPLATES

NO_LIMIT = 1 << 40  # ids


def chat_ids(
    tokenizer: Tokenizer, query: str, history: Any = None, role: str = "user"
) -> list[int]:
    """Ids of a whole prompt, `[gMASK] sop` in front, or behind in a family that has them there.

    history: (query, answer) pairs or messages, as the family has them; it is not changed. Raises
    ValueError for a malformed history, or a role that the family does not have.
    """
    return writer(tokenizer).chat_ids(tokenizer, query, history, role)


def stream_ids(
    tokenizer: Tokenizer, query: str, round_number: int = 1, role: str = "user"
) -> list[int]:
    """Ids of a later turn alone, for a cache that already holds what came before.

    round_number: number of this round, from 1 (for families that number them).
    """
    return writer(tokenizer).stream_ids(tokenizer, query, round_number, role)


def encode_source(
    tokenizer: Tokenizer,
    prompt: str,
    query: str | None,
    history: Any,
    max_source_length: int,
    truncation: str = "template",
    source_prefix: str | None = "",
    template: str = "auto",
    system: str | None = None,
) -> tuple[list[int], bool]:
    """Prompt ids of a training record, `[gMASK] sop` with them, and whether anything was cut.

    prompt, query: joined with nothing between. history: (query, answer) pairs. source_prefix: put
    before the whole text. template: "auto" is the family's own chat template; "vendored" is
    the oldest family's text for every family, as in the original training code. system: a system
    message's text, where the family's chats have it.
    At most `max_source_length` ids. truncation "vendored" cuts the end, the answer marker with it,
    id for id as the original; "template" drops the oldest rounds while the rounds alone do not fit,
    then cuts the end of the query, or without one that of the prompt, by pieces, and encodes what
    is left anew: the marker stays, and so does a prompt that fits.
    Raises ValueError for an unknown name or a length that the template alone exceeds.
    """
    _one_of("truncation", truncation, ("template", "vendored"))
    writes = writer(tokenizer, template)
    frame = len(writes.framed(tokenizer, []))
    room = max_source_length - frame
    if room < 1:
        raise ValueError(f"max_source_length: expected more than {frame}, got {max_source_length}")
    rounds, query = check_rounds(history), query or ""

    def ids(asked: str, dropped: int = 0) -> list[int]:
        first = source_prefix or ""
        return writes.source_ids(tokenizer, first, asked, rounds[dropped:], system or "")

    whole = ids(f"{prompt}{query}")
    if len(whole) <= room:
        return writes.framed(tokenizer, whole), False
    if truncation == "vendored":
        return writes.framed(tokenizer, whole[:room]), True
    dropped = rounds_to_drop(lambda n: len(ids("", n)), len(rounds), room)

    def excess(asked: str) -> int:
        return len(ids(asked, dropped)) - room

    if excess(prompt) <= 0:
        prompt += shortened(tokenizer, query, lambda left: excess(prompt + left))
    else:
        prompt = shortened(tokenizer, prompt, excess)
    return writes.framed(tokenizer, ids(prompt, dropped)), True


def prompt_length(tokenizer: Tokenizer, query: str, template: str = "auto") -> int:
    """Ids of a whole prompt that asks the query, without history: as `encode_source` and chats in
    the template have it.
    """
    return len(encode_source(tokenizer, query, None, None, NO_LIMIT, template=template)[0])


def shortened(tokenizer: Tokenizer, text: str, excess: Callable[[str], int]) -> str:
    """The text without as many of its last pieces as are too many: `excess` is how many that are of
    a text that is left. "" where that does not suffice. All prompts are cut by this.
    """
    too_many = excess(text)
    starts = tokenizer.text_offsets(text) if too_many > 0 else []
    kept = len(starts)
    while too_many > 0 and text:
        # What is left may fall into other pieces than it had in the whole.
        kept = max(kept - too_many, 0)
        text = text[: min(starts[kept], len(text) - 1)]
        too_many = excess(text)
    return text


def encode_target(
    tokenizer: Tokenizer, response: str, max_target_length: int, template: str = "auto"
) -> list[int]:
    """Answer ids of a training record with the end id, which is never cut away.

    At most `max_target_length` ids. The answer is encoded apart from the prompt. In a
    family's own template it begins as the model has to begin in a chat; the end is the family's own
    in every template.
    """
    if max_target_length < 1:
        raise ValueError(f"max_target_length: expected at least 1, got {max_target_length}")
    ids = _answer_ids(tokenizer, response, template)
    return ids[: max_target_length - 1] + [end_id(tokenizer, template)]


def end_id(tokenizer: Tokenizer, template: str = "auto") -> int:
    """The id that ends a record's answer."""
    family = of(tokenizer.family) if template == "vendored" else writer(tokenizer)
    return family.end_id(tokenizer)


def encode_label(
    tokenizer: Tokenizer, response: str, max_target_length: int, template: str = "auto"
) -> list[int]:
    """Reference ids for prediction runs: `[gMASK] sop` and the answer, no end id; at most
    `max_target_length` ids, as in the original."""
    writes = writer(tokenizer, template)
    frame = len(writes.framed(tokenizer, []))
    if max_target_length < frame:
        raise ValueError(f"max_target_length: expected at least {frame}, got {max_target_length}")
    ids = _answer_ids(tokenizer, response, template)
    return writes.framed(tokenizer, ids[: max_target_length - frame])


def _answer_ids(tokenizer: Tokenizer, response: str, template: str) -> list[int]:
    return writer(tokenizer, template).answer_ids(tokenizer, str(response))


def writer(tokenizer: Tokenizer, template: str = "auto") -> Family:
    """Who writes prompts and answers: the tokenizer's family, in the checkpoint's own template
    where it has one; in the template "vendored" the oldest family.
    """
    _one_of("template", template, TEMPLATES)
    if template == "vendored":
        return default()
    return getattr(tokenizer, "writer", None) or of(tokenizer.family)


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {value!r}")
