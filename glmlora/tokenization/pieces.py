"""A vocabulary of pieces of text: SentencePiece's `tokenizer.model`."""

from __future__ import annotations

from collections.abc import Sequence

from .vocabulary import Token

DUMMY_SPACE = "\u2581"


class Pieces:
    """See `Vocabulary`. Text gets a dummy space in front; bytes without a piece are `<0x..>`."""

    added = prefix = None

    def __init__(self, data: bytes, file: str):
        """data: the content of `file`. ValueError for what is no SentencePiece model or lacks a
        piece for unk, bos or eos; ImportError without sentencepiece.
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
            self._sp = SentencePieceProcessor(model_proto=data)
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"{file}: is not a SentencePiece model: {error}") from error
        sp = self._sp
        self.size = sp.get_piece_size()
        self.named = {"unk": sp.unk_id(), "bos": sp.bos_id(), "eos": sp.eos_id()}
        for name, i in self.named.items():
            if not 0 <= i < self.size:
                raise ValueError(f"{file}: has no {name} piece")
        self.dummy_space_id = self.id_of(DUMMY_SPACE)

    def encode(self, text: str) -> list[int]:
        return self._sp.encode_as_ids(text)

    def starts(self, ids: Sequence[int]) -> list[int]:
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
        try:
            i = self._sp.piece_to_id(token)
        except TypeError:  # no text, or one that UTF-8 cannot hold
            return None
        named_so = i != self.named["unk"] or token == self._sp.id_to_piece(i)
        return i if named_so else None

    def text(self, tokens: Sequence[Token]) -> str:
        # All at once: only a dummy space at the very beginning is dropped, and bytes join to
        # characters. A special token's name is no piece, and unknown pieces are taken as they are.
        return self._sp.decode_pieces(list(tokens)) if tokens else ""
