"""What a tokenizer needs of a vocabulary, whatever file it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

#: A token as the published tokenizers show it: text, or bytes where one may be half a character.
Token = str | bytes


class Vocabulary(Protocol):
    """Text to ids 0 .. size - 1 and back. Special tokens come behind, and are the tokenizer's, but
    for those that are pieces.
    """

    size: int
    named: dict[str, int]  # "unk", "bos", "eos", ..: those that are among the ids
    dummy_space_id: int | None  # what encoding may put in front of a text
    added: dict[str, Any] | None  # special tokens that the file lists: id -> content, flags
    prefix: tuple[str, ...] | None  # those that it puts in front of texts; None: it does not say

    def encode(self, text: str) -> list[int]:
        """Ids of text that UTF-8 can hold; no special token is found in it."""

    def starts(self, ids: Sequence[int], text: str) -> list[int]:
        """For every id of the encoded text the index of the character where it begins."""

    def token(self, i: int) -> Token:
        """The token of an id."""

    def id_of(self, token: Token) -> int | None:
        """The id of a token; None for one that there is not."""

    def text(self, tokens: Sequence[Token]) -> str:
        """The text of tokens, names of special ones among them; "" for none."""
