"""What the tokenizer's files say of a family. A `tokenizer.model` is one of two formats."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

OTHERS = {  # vocabularies of other names, and what to say of them
    "ice_text.model": "ice_text.model is the vocabulary of ChatGLM-6B, which is not supported",
    "tokenizer.json": "tokenizer.json is of the transformers layout, which is not supported: get "
    "the model in its original layout (THUDM/glm-4-9b-chat, without -hf)",
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


def is_byte_pairs(data: bytes) -> bool | None:
    """Whether a vocabulary begins with a line of base64 and rank; False for the beginning of a
    SentencePiece model, None for neither.
    """
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\n", data):
        return True
    return False if data.startswith(b"\n") else None


def has_byte_pairs(directory: Path) -> bool | None:
    """The same of the vocabulary of a model directory; None where there is none."""
    file = directory / "tokenizer.model"
    if not file.is_file():
        return None
    with open(file, "rb") as f:
        return is_byte_pairs(f.read(200))
