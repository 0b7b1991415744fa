"""What the tokenizer's files say of a family. A `tokenizer.model` is one of two formats; that of
`ice_text.model` is the second one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

ICE_TEXT = "ice_text.model"
VOCABULARIES = ("tokenizer.model", "tokenizer.json", ICE_TEXT)
TOKENIZER_FILES = (
    "tokenization_chatglm.py",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def has_text(directory: Path, names: Iterable[str], text: bytes) -> bool:
    """Whether one of these files is there and has the text in its first MiB."""
    for file in (directory / name for name in names):
        if file.is_file() and text in file.read_bytes()[: 1 << 20]:
            return True
    return False


def is_byte_pairs(data: bytes) -> bool | None:
    """Whether a vocabulary begins with a line of base64 and rank, or as tokenizer.json does; False
    for the beginning of a SentencePiece model, None for neither.
    """
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\n", data) or is_json(data):
        return True
    return False if data.startswith(b"\n") else None


def is_json(data: bytes) -> bool:
    """Whether a vocabulary is a tokenizer.json."""
    return data.lstrip()[:1] == b"{"


def vocabulary_file(directory: Path, name: str = VOCABULARIES[0]) -> Path | None:
    """The vocabulary of a model directory: that of this name, else the first one that is there."""
    files = (directory / other for other in (name, *VOCABULARIES))
    return next((file for file in files if file.exists()), None)


def has_byte_pairs(directory: Path) -> bool | None:
    """`is_byte_pairs` of the vocabulary of a model directory; None where there is none."""
    file = vocabulary_file(directory)
    if file is None or not file.is_file():
        return None
    if file.name == ICE_TEXT:
        return False
    with open(file, "rb") as f:
        return is_byte_pairs(f.read(200))


def fits(directory: Path, name: str, byte_pairs: bool) -> bool:
    """Whether the vocabulary of a model directory, where there is one, may be of this name and
    form.
    """
    file = vocabulary_file(directory, name)
    if file is None or ICE_TEXT in (name, file.name):
        return file is None or file.name == name
    return has_byte_pairs(directory) in (None, byte_pairs)
