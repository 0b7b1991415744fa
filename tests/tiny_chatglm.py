"""Makers of small things of ChatGLM-6B: its vocabulary in the form of both releases, written field
by field, and a model directory.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import tiny

from glmlora.files.checkpoint import write_safetensors

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


def tiny_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights of a ChatGLM-6B of the config's sizes, under checkpoint names. What a
    layer adds is as large as what it is added to.
    """
    rng = np.random.default_rng(seed)
    H, F, V = config["hidden_size"], config["inner_hidden_size"], config["vocab_size"]
    found = {"transformer.word_embeddings.weight": rng.standard_normal((V, H))}

    def linear(name: str, rows: int, columns: int, scale: float = 1) -> None:
        found[f"{name}.weight"] = scale * rng.standard_normal((rows, columns)) / np.sqrt(columns)
        found[f"{name}.bias"] = 0.1 * rng.standard_normal(rows)

    def norm(name: str) -> None:
        found[f"{name}.weight"] = 1 + 0.1 * rng.standard_normal(H)
        found[f"{name}.bias"] = 0.1 * rng.standard_normal(H)

    for i in range(config["num_layers"]):
        layer = f"transformer.layers.{i}"
        norm(f"{layer}.input_layernorm")
        linear(f"{layer}.attention.query_key_value", 3 * H, H)
        linear(f"{layer}.attention.dense", H, H, 2 * np.sqrt(56))
        norm(f"{layer}.post_attention_layernorm")
        linear(f"{layer}.mlp.dense_h_to_4h", F, H)
        linear(f"{layer}.mlp.dense_4h_to_h", H, F, np.sqrt(56))
    norm("transformer.final_layernorm")
    found["lm_head.weight"] = 1.5 * rng.standard_normal((V, H)) / np.sqrt(H)
    return {name: array.astype(np.float32) for name, array in found.items()}


def tiny_chatglm_dir(tmp: Path, seed: int = 0, first: bool = False, **overrides: Any) -> Path:
    """A directory of a tiny random ChatGLM-6B of the later or the first release, with its
    tokenizer. overrides: keys of config.json.
    """
    images = 10 if first else 0
    directory = tiny_ice_text_dir(Path(tmp) / "tiny-model", first, images)
    names = [name for name, _, _ in text_pieces()]
    mask = images + len(names)
    config = {
        "_name_or_path": "THUDM/chatglm-6b",
        "architectures": ["ChatGLMModel"],
        "bos_token_id": mask + SPECIAL.index("<sop>"),
        "eos_token_id": mask + SPECIAL.index("<eop>"),
        "hidden_size": 32,
        "inner_hidden_size": 40,
        "layernorm_epsilon": 1e-5,
        "max_sequence_length": 512,
        "model_type": "chatglm",
        "num_attention_heads": 4,
        "num_layers": 2,
        "pad_token_id": images + names.index("<pad>"),
        "position_encoding_2d": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": 448,
    }
    if not first:
        config |= {"mask_token_id": mask, "gmask_token_id": mask + 1}
    config |= overrides
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_safetensors(directory / "model.safetensors", tiny_weights(config, seed))
    return directory
