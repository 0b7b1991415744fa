"""A vocabulary of pieces in which line breaks, tabs and runs of spaces are tokens, and special
tokens stand among the pieces: SentencePiece's `ice_text.model`.

Its first release is the text pieces alone, and the ids before them were those of images; the
special tokens, the blanks and a byte each for what has no piece are added here. The later one has
all of them inside, and no images.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from .pieces import DUMMY_SPACE, opened, piece_id
from .protobuf import FIXED32, VARINT, fields, key, sized
from .vocabulary import Token

LINE_BREAK, TAB = "<n>", "<|tab|>"
LONGEST_RUN = 80  # spaces that are one token
IMAGE_TOKENS = 20000  # of the first release, in front of the pieces
_BLANKS = re.compile(rf"\n|\t| {{2,{LONGEST_RUN}}}")
_WRITTEN = {LINE_BREAK: "\n", TAB: "\t"}
_WRITTEN |= {f"<|blank_{n}|>": " " * n for n in range(2, LONGEST_RUN + 1)}
_TOKENS = {blank: token for token, blank in _WRITTEN.items()}
_IMAGE = re.compile(r"<image_\d+>")
_NAMED = {"unk": "<unk>", "pad": "<pad>", "end": "</s>"}
# Kinds of pieces in SentencePiece's file.
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6
_PIECES, _BEGIN = 2, 4  # fields of an encoded text, and of a piece in it


class IceText:
    """See `Vocabulary`. Text gets a dummy space in front. Ids below `image_tokens` are those of
    images, `<image_0>` and so on, which are no text.
    """

    added = prefix = None

    def __init__(
        self,
        data: bytes,
        file: str,
        special_tokens: Sequence[str],
        image_tokens: Any = None,
        where: str = "",
    ):
        """data: the content of `file`. special_tokens: their names, in order. image_tokens: as
        `where` says it; None: 20000 where the file lacks the special tokens, else 0.

        ValueError naming the file for what is no SentencePiece model or another's, and naming
        `where` for a number of images that cannot be; ImportError without sentencepiece.
        """
        sp = opened(data, file)
        _check(sp, file, (*_NAMED.values(), LINE_BREAK))
        lacking = [name for name in special_tokens if piece_id(sp, name) is None]
        self.has_special_pieces = not lacking
        if len(lacking) == len(special_tokens):
            sp = opened(data + _added(special_tokens), file)
        elif lacking:
            raise ValueError(f"{file}: has no piece {lacking[0]}, but other special tokens")
        elif any(piece_id(sp, name) in sp.encode_as_ids(name) for name in special_tokens):
            sp = opened(_hidden(data, special_tokens), file)
        _check(sp, file, _WRITTEN)
        if image_tokens is None:
            image_tokens = 0 if self.has_special_pieces else IMAGE_TOKENS
        if type(image_tokens) is not int or not 0 <= image_tokens < 1 << 24:
            raise ValueError(f"{where}: expected a whole number from 0, got {image_tokens!r:.80}")
        self._sp, self.image_tokens = sp, image_tokens
        self.size = image_tokens + sp.get_piece_size()
        self.named = {word: image_tokens + sp.piece_to_id(name) for word, name in _NAMED.items()}
        self.dummy_space_id = self.id_of(DUMMY_SPACE)

    def encode(self, text: str) -> list[int]:
        return [self.image_tokens + i for i in self._sp.encode_as_ids(_marked(text))]

    def starts(self, ids: Sequence[int], text: str) -> list[int]:
        # Pieces are of a normalised text, whose bytes the library traces back to what it was given.
        marked, origins = _traced(text)
        found = self._sp.encode(marked, out_type="serialized_proto")
        pieces = (dict(fields(piece)) for number, piece in fields(found) if number == _PIECES)
        return [origins[piece.get(_BEGIN, 0)] for piece in pieces]

    def token(self, i: int) -> str:
        if i < self.image_tokens:
            return f"<image_{i}>"
        return self._sp.id_to_piece(i - self.image_tokens)

    def id_of(self, token: Token) -> int | None:
        if not isinstance(token, str):
            return None
        if _IMAGE.fullmatch(token):
            i = int(token[len("<image_") : -1])
            return i if i < self.image_tokens else None
        i = piece_id(self._sp, token)
        return None if i is None else self.image_tokens + i

    def text(self, tokens: Sequence[Token]) -> str:
        # All at once, as the other pieces; a blank's token is the blank.
        shown = [_WRITTEN.get(t, t) for t in tokens if not _IMAGE.fullmatch(t)]
        return self._sp.decode_pieces(shown) if shown else ""


def _marked(text: str) -> str:
    """A text whose blanks are written as tokens, the longest runs first."""
    return _BLANKS.sub(lambda blank: _TOKENS[blank[0]], text)


def _traced(text: str) -> tuple[str, list[int]]:
    """What `_marked` gives, and of each byte of it, and of its end, the character of the text that
    it is of.
    """
    marked, origins, end = "", [], 0
    for blank in [*_BLANKS.finditer(text), None]:
        start = blank.start() if blank else len(text)
        marked += text[end:start]
        for at, character in enumerate(text[end:start], end):
            origins += [at] * len(character.encode())
        if blank:
            marked += _TOKENS[blank[0]]
            origins += [start] * len(_TOKENS[blank[0]])
            end = blank.end()
    return marked, [*origins, len(text)]


def _check(sp: Any, file: str, pieces: Iterable[str]) -> None:
    missing = next((name for name in pieces if piece_id(sp, name) is None), None)
    if missing is not None:
        raise ValueError(
            f"{file}: has no piece {missing}, which every ice_text.model has: it is the vocabulary "
            "of another model"
        )


def _added(special_tokens: Sequence[str]) -> bytes:
    """What the first release's code adds to its file, in the file's own form: pieces at the end,
    and that bytes are among them. Fields that follow others of their number are more of a list, or
    replace what these say.
    """
    blanks = [token for token in _WRITTEN if token != LINE_BREAK]
    kinds = [*((name, _CONTROL) for name in special_tokens), *((t, _USER_DEFINED) for t in blanks)]
    kinds += [(f"<0x{byte:02X}>", _BYTE) for byte in range(256)]
    pieces = b"".join(sized(1, _piece(name.encode(), kind)) for name, kind in kinds)
    return pieces + sized(2, key(35, VARINT) + b"\x01")


def _hidden(data: bytes, special_tokens: Sequence[str]) -> bytes:
    """The file with special tokens that no text encodes to, whatever it says."""
    names = {name.encode() for name in special_tokens}
    whole = []
    for number, value in fields(data):
        name = next((v for n, v in fields(value) if n == 1), b"") if number == 1 else b""
        whole.append(sized(number, _piece(name, _CONTROL) if name in names else value))
    return b"".join(whole)


def _piece(name: bytes, kind: int) -> bytes:
    """A piece with the score 0.0."""
    return sized(1, name) + key(2, FIXED32) + bytes(4) + key(3, VARINT) + bytes([kind])
