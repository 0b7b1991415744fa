"""A vocabulary of bytes that are merged: base64 and rank per line, as tiktoken has it, or the
tokenizer.json of the same (`tokenizer_json.py`)."""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Sequence
from typing import Any

from ..families.vocabulary import is_json
from .tokenizer_json import CUT, read
from .vocabulary import Token

BLANKS = 500_000  # in a row: from a million on the expression overflows its stack in tiktoken
_LONG_BLANKS = re.compile(rf"\s{{{BLANKS}}}")


class BytePairs:
    """See `Vocabulary`. Tokens are bytes; the id of a token is its rank, and the two neighbours of
    lowest rank are merged first. Nothing is put in front of a text.
    """

    dummy_space_id = None

    def __init__(self, data: bytes, file: str):
        """data: the content of `file`. ValueError naming file and line for another form, ranks that
        are not 0, 1, 2, .., or a byte without a token; ImportError without tiktoken.
        """
        try:
            import tiktoken
        except ModuleNotFoundError as error:
            raise ImportError(
                "this model's tokenizer needs the tiktoken package: pip install tiktoken"
            ) from error
        self.added: dict[str, Any] | None = None
        self.prefix: tuple[str, ...] | None = None
        if is_json(data):
            self._ranks, self.added, self.prefix = read(data, file)
        else:
            self._ranks = _ranks(data, file)
        self.size = len(self._ranks)
        self._tokens = sorted(self._ranks, key=self._ranks.__getitem__)
        if [*map(self._ranks.__getitem__, self._tokens)] != [*range(self.size)]:
            raise ValueError(f"{file}: expected ranks 0 to {self.size - 1}, each once")
        missing = next((b for b in range(256) if bytes([b]) not in self._ranks), None)
        if missing is not None:
            raise ValueError(f"{file}: has no token of the byte 0x{missing:02X}")
        self._encoding = tiktoken.Encoding(
            file, pat_str=CUT, mergeable_ranks=self._ranks, special_tokens={}
        )
        self.named: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        if len(text) >= BLANKS and _LONG_BLANKS.search(text):
            raise ValueError(f"text: has more than {BLANKS} blanks in a row, which is not encoded")
        return self._encoding.encode_ordinary(text)

    def starts(self, ids: Sequence[int], text: str) -> list[int]:
        offsets, characters = [], 0
        for i in ids:
            token = self._tokens[i]
            begins_character = token[0] & 0xC0 != 0x80
            offsets.append(characters if begins_character else characters - 1)
            characters += sum(byte & 0xC0 != 0x80 for byte in token)
        return offsets

    def token(self, i: int) -> bytes:
        return self._tokens[i]

    def id_of(self, token: Token) -> int | None:
        if isinstance(token, str):
            token = token.encode("utf-8", "surrogatepass")  # a lone one is no token
        return self._ranks.get(token) if isinstance(token, bytes) else None

    def text(self, tokens: Sequence[Token]) -> str:
        # A character that is cut off, or bytes that are none, give one U+FFFD; names end a run.
        text, run = "", b""
        for token in tokens:
            if isinstance(token, bytes):
                run += token
            elif token:
                text, run = text + run.decode("utf-8", "replace") + token, b""
        return text + run.decode("utf-8", "replace")


def _ranks(data: bytes, file: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split(b" ")
            decoded = b64decode(token, validate=True)
            if not decoded or decoded in ranks:
                raise ValueError
            ranks[decoded] = int(rank)
        except ValueError:
            raise ValueError(
                f"{file}: line {number}: expected a new token in base64 and its rank, got "
                f"{line.decode('utf-8', 'replace')!r:.60}"
            ) from None
    return ranks
