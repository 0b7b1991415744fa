"""Answers that can only be what the caller allows: one of some texts, by the tree of their ids, or
JSON, by llguidance.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from ..generation.labels import answer_ids
from ..model.kept import Kept

WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Guide(Protocol):
    """What may follow an answer so far."""

    def restrict(self, scores: np.ndarray) -> None:
        """Set the scores float32 (V) of ids that may not come to -inf."""

    def take(self, token: int) -> None:
        """The id that came."""


class Choices:
    """One of some texts, each with the end that training writes behind it."""

    def __init__(self, model: Kept, tokenizer: Any, texts: Sequence[str]):
        """ValueError where one text's ids begin another's."""
        self._answers = answer_ids(model, tokenizer, texts)  # type: ignore[arg-type]
        self._path: list[int] = []
        for number, ids in enumerate(self._answers):
            others = self._answers[:number] + self._answers[number + 1 :]
            if any(other[: len(ids)] == ids for other in others):
                raise ValueError(
                    f"guided_choice: {texts[number]!r:.60} begins another one, or is it"
                )

    @property
    def longest(self) -> int:
        """Ids of the longest text, with its end."""
        return max(map(len, self._answers))

    def restrict(self, scores: np.ndarray) -> None:
        n = len(self._path)
        allowed = {ids[n] for ids in self._answers if ids[:n] == self._path and len(ids) > n}
        kept = sorted(allowed)
        values = scores[kept]
        scores[:] = -np.inf
        scores[kept] = values

    def take(self, token: int) -> None:
        self._path.append(token)


def missing() -> ImportError:
    """What to say where llguidance is not there."""
    return ImportError(
        'response_format: needs llguidance: pip install "glmlora[serve]" on the server'
    )


class Grammar:
    """What a grammar of llguidance allows."""

    def __init__(self, vocabulary: Any, grammar: str):
        from llguidance import LLMatcher

        wrong = LLMatcher.validate_grammar(grammar, vocabulary)
        if wrong:
            raise ValueError(f"response_format: json_schema: {wrong.strip().splitlines()[0]:.300}")
        self._matcher = LLMatcher(vocabulary, grammar, log_level=0)
        self._mask = np.zeros((1, -(-vocabulary.vocab_size // 32)), np.int32)

    def restrict(self, scores: np.ndarray) -> None:
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._mask)
        if self._matcher.is_error():
            raise ValueError(f"response_format: {self._matcher.get_error():.300}")
        allowed = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: scores.size]
        scores[: allowed.size][allowed == 0] = -np.inf
        scores[allowed.size :] = -np.inf

    def take(self, token: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


def json_grammar(schema: dict[str, Any] | None) -> str:
    """The grammar of a JSON document, behind the empty line with which an answer may begin.
    schema: None: any object.
    """
    try:
        text = json.dumps({**(schema or {"type": "object"}), "x-guidance": WRITTEN})
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"response_format: json_schema: schema: {error}") from None
    return f"start: /\\n? ?/ body\nbody: %json {text}"


@lru_cache(maxsize=2)
def vocabulary_of(tokenizer: Any, size: int, ends: tuple[int, ...]) -> Any:
    """A tokenizer as llguidance takes it. size: ids of the model; ends: those that end an answer.
    ImportError without llguidance.
    """
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ImportError:
        raise missing() from None

    own = [_bytes_of(tokenizer, i) for i in range(size)]
    special = [i for i in range(size) if not own[i]]
    hidden = set(special)
    for i in special:
        own[i] = b"\xff<%d>" % i  # llguidance's mark of special tokens

    numbers = {token: i for i, token in reversed(list(enumerate(own))) if i not in hidden}

    class Described:
        eos_token_id = ends[0]
        bos_token_id = None
        tokens = own
        special_token_ids = special

        def __call__(self, text: bytes) -> list[int]:
            return _longest_first(text, numbers)

    return LLTokenizer(TokenizerWrapper(Described()), n_vocab=size, eos_token=list(ends))


def _longest_first(text: bytes, numbers: dict[bytes, int]) -> list[int]:
    """Ids of bytes, the longest each time: the tokenizer's own might have a space in front."""
    longest, ids, at = max(map(len, numbers)), [], 0
    while at < len(text):
        ends = range(min(len(text), at + longest), at, -1)
        end = next((end for end in ends if text[at:end] in numbers), None)
        if end is None:  # a byte of no token
            return ids
        ids.append(numbers[text[at:end]])
        at = end
    return ids


def _bytes_of(tokenizer: Any, i: int) -> bytes:
    """The bytes that an id adds to a text; b"" for a special one, or none."""
    if i >= tokenizer.vocab_size or tokenizer._is_special(i):
        return b""
    shown = tokenizer._shown(i)
    if isinstance(shown, bytes):
        return shown
    if match := BYTE.fullmatch(shown):
        return bytes([int(match[1], 16)])
    return tokenizer._text(["\x00", shown])[1:].encode("utf-8", "ignore")
