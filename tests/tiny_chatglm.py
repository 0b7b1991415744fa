"""Makers of small things of ChatGLM-6B: its vocabulary in the form of both releases, written field
by field, and a model directory.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import tiny

SPECIAL = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
BLANKS = ["<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81))]
WORDS = ("你好", "世界", "人工智能", "paper", "title", "medical", "▁title", "▁paper", "Round")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def number(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def message(*fields: tuple[int, Any]) -> bytes:
    """A protobuf message of (number, value): whole numbers, floats, text or bytes."""
    out = b""
    for field, value in fields:
        if isinstance(value, int):
            out += number(field << 3) + number(value)
        elif isinstance(value, float):
            out += number(field << 3 | 5) + struct.pack("<f", value)
        else:
            content = value.encode() if isinstance(value, str) else value
            out += number(field << 3 | 2) + number(len(content)) + content
    return out


def text_pieces() -> list[tuple[str, float, int]]:
    """(piece, score, kind): what both releases have, the word the likelier the longer it is."""
    characters = sorted({c for s in tiny.SENTENCES for c in s if c != " "} | set("0123456789"))
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [("<pad>", 0.0, CONTROL), ("<n>", 0.0, USER_DEFINED), ("▁", -2.0, NORMAL)]
    pieces += [(word, -3.0 - 0.01 * i, NORMAL) for i, word in enumerate(WORDS)]
    return pieces + [(c, -5.0 - 0.01 * i, NORMAL) for i, c in enumerate(characters)]


def ice_text(first: bool = False, characters: bytes | None = None) -> bytes:
    """The content of an ice_text.model, of the first release or the later one. characters: the map
    of a normalisation; extra spaces are then left out, too.
    """
    pieces = text_pieces()
    trainer = [(3, 1), (4, len(pieces)), (40, 0), (41, 1), (42, 2), (43, 3)]
    if not first:
        pieces += [(name, 0.0, CONTROL) for name in SPECIAL]
        pieces += [(name, 0.0, USER_DEFINED) for name in BLANKS]
        pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
        trainer.append((35, 1))
    normal = [(1, "nmt_nfkc" if characters else "identity"), (3, 1), (4, int(bool(characters)))]
    normal += [(2, characters)] if characters else []
    whole = [(1, message((1, piece), (2, score), (3, kind))) for piece, score, kind in pieces]
    return message(*whole, (2, message(*trainer)), (3, message(*normal)))


def tiny_ice_text_dir(
    directory: str | Path, first: bool = False, images: int | None = None, **fields: Any
) -> Path:
    """Write a small ice_text.model and the tokenizer_config.json of its release into `directory`,
    and return it. images: num_image_tokens; None: as the release has it. fields: more of them.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "ice_text.model").write_bytes(ice_text(first))
    config = {
        "name_or_path": "THUDM/chatglm-6b",
        "bos_token": "<sop>",
        "eos_token": "<eop>",
        "end_token": "</s>",
        "gmask_token": "[gMASK]",
        "mask_token": "[MASK]",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "remove_space": False,
        "do_lower_case": False,
        "tokenizer_class": "ChatGLMTokenizer",
        "num_image_tokens": 0,
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    }
    if first:
        del config["num_image_tokens"], config["end_token"]
        config |= {"eos_token": "</s>", "eop_token": "<eop>"}
    if images is not None:
        config["num_image_tokens"] = images
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, **fields}))
    return directory
