"""What the tokenizer's files say of a family. A `tokenizer.model` is one of two formats."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

OTHERS = {  # vocabularies of other names, and what to say of them
    "ice_text.model": "ice_text.model is the vocabulary of ChatGLM-6B, which is not supported",
}
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


def is_byte_pairs(data: bytes) -> bool:
    """Whether a file begins with lines of base64 and rank, which no SentencePiece model does."""
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\n", data) is not None


def has_byte_pairs(directory: Path) -> bool:
    """Whether a model directory has such a vocabulary."""
    file = directory / "tokenizer.model"
    if not file.is_file():
        return False
    with open(file, "rb") as f:
        return is_byte_pairs(f.read(200))
