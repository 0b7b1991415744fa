"""A vocabulary of pieces of text: SentencePiece's `tokenizer.model`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .vocabulary import Token

DUMMY_SPACE = "\u2581"


def opened(data: bytes, file: str) -> Any:
    """A processor of SentencePiece over the content of `file`. ValueError naming it for what is no
    model of it, ImportError without the library.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ModuleNotFoundError as error:
        raise ImportError(
            "the tokenizer needs the sentencepiece package: pip install sentencepiece"
        ) from error
    try:
        if not data:
            raise ValueError("file is empty")
        sp = SentencePieceProcessor(model_proto=data)
        sp.id_to_piece(list(range(sp.get_piece_size())))  # every one is UTF-8
        return sp
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"{file}: is not a SentencePiece model: {error}") from error


def piece_id(sp: Any, token: Token) -> int | None:
    """The id of a piece of a processor; None where there is none."""
    try:
        i = sp.piece_to_id(token)
    except TypeError:  # no text, or one that UTF-8 cannot hold
        return None
    return i if i != sp.unk_id() or token == sp.id_to_piece(i) else None


class Pieces:
    """See `Vocabulary`. Text gets a dummy space in front; bytes without a piece are `<0x..>`."""

    added = prefix = None

    def __init__(self, data: bytes, file: str):
        """data: the content of `file`. ValueError for what is no SentencePiece model, lacks a piece
        for unk, bos or eos, or is an ice_text.model; ImportError without sentencepiece.
        """
        self._sp = sp = opened(data, file)
        self.size = sp.get_piece_size()
        self.named = {"unk": sp.unk_id(), "bos": sp.bos_id(), "eos": sp.eos_id()}
        if None not in (self.id_of("<pad>"), self.id_of("<n>")):
            raise ValueError(
                f"{file}: has the pieces <pad> and <n> of an ice_text.model: it is the vocabulary "
                "of another model"
            )
        for name, i in self.named.items():
            if not 0 <= i < self.size:
                raise ValueError(f"{file}: has no {name} piece")
        self.dummy_space_id = self.id_of(DUMMY_SPACE)

    def encode(self, text: str) -> list[int]:
        return self._sp.encode_as_ids(text)

    def starts(self, ids: Sequence[int], text: str) -> list[int]:
        offsets, position = [], -1  # the dummy space stands one before the text
        for i in ids:
            piece = self._sp.id_to_piece(i)
            if self._sp.is_byte(i):
                begins_character = int(piece[3:5], 16) & 0xC0 != 0x80
                offsets.append(position if begins_character else position - 1)
                position += begins_character
            else:
                offsets.append(max(position, 0))
                position += len(piece)
        return offsets

    def token(self, i: int) -> str:
        return self._sp.id_to_piece(i)

    def id_of(self, token: Token) -> int | None:
        return piece_id(self._sp, token)

    def text(self, tokens: Sequence[Token]) -> str:
        # All at once: only a dummy space at the very beginning is dropped, and bytes join to
        # characters. A special token's name is no piece, and unknown pieces are taken as they are.
        return self._sp.decode_pieces(list(tokens)) if tokens else ""
