"""Makers of small things that tests share."""

from __future__ import annotations

import io
import json
import re
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glmlora.files.checkpoint import to_bf16, write_safetensors

SENTENCES = (
    "Please judge whether it is a medical field paper by its title and abstract",
    "output 1 or 0, the following is the paper title, author and abstract -->",
    "title:A study of cells,author:B. Name,abstract:We measure proteins of patients in 1990.",
    "title:Graph networks,abstract:A fast algorithm for large graphs is given.",
    "[Round 1] 问：你好 答：你好！我是人工智能助手。",
    "晚上睡不着应该怎么办 今天天气很好",
)


def tiny_tokenizer_dir(directory: str | Path, vocab_size: int = 480) -> Path:
    """Write a small `tokenizer.model` of ChatGLM2's kind into `directory` and return it.

    BPE with byte fallback, no normalisation, spaces kept, a newline always a piece of its own: at
    most `vocab_size` pieces, 259 of which are specials and bytes. The same bytes on every call.
    """
    import sentencepiece

    if tuple(map(int, sentencepiece.__version__.split(".")[:3])) < (0, 2, 3):
        import pytest  # a benchmark may have none

        reason = "its trainer ends the process where a text has fewer pieces than are asked for"
        pytest.skip(f"sentencepiece {sentencepiece.__version__}: {reason}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        character_coverage=1.0,
        required_chars="\n\t0123456789",
        num_threads=1,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return directory


TINY_CONFIG = {
    "_name_or_path": "THUDM/chatglm2-6b",
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "ffn_hidden_size": 40,
    "hidden_size": 32,
    "kv_channels": 8,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 2,
    "original_rope": True,
    "padded_vocab_size": 96,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 128,
    "torch_dtype": "float32",
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights of a ChatGLM2 model of the config's sizes, under checkpoint names."""
    rng = np.random.default_rng(seed)
    H, F, V = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    heads = config["num_attention_heads"] * config["kv_channels"]
    qkv = heads + 2 * config["multi_query_group_num"] * config["kv_channels"]
    shapes = {"transformer.embedding.word_embeddings.weight": (V, H)}
    for i in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (H,)
        shapes[layer + "self_attention.query_key_value.weight"] = (qkv, H)
        if config["add_qkv_bias"]:
            shapes[layer + "self_attention.query_key_value.bias"] = (qkv,)
        shapes[layer + "self_attention.dense.weight"] = (H, heads)
        shapes[layer + "post_attention_layernorm.weight"] = (H,)
        shapes[layer + "mlp.dense_h_to_4h.weight"] = (2 * F, H)
        shapes[layer + "mlp.dense_4h_to_h.weight"] = (H, F)
    shapes["transformer.encoder.final_layernorm.weight"] = (H,)
    shapes["transformer.output_layer.weight"] = (V, H)
    weights = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape)
        if "layernorm" in name:
            values = 1 + 0.1 * values
        elif "embedding" not in name:
            values = values * 1.5 / np.sqrt(shape[-1])
        weights[name] = values.astype(np.float32)
    return weights


def tiny_model_dir(tmp: Path, seed: int = 0, dtype: str = "F32", **overrides: Any) -> Path:
    """A directory below `tmp` with config.json and model.safetensors of a tiny random ChatGLM2.

    dtype: "F32", "F16" or "BF16". overrides: keys of config.json. Returns the directory.
    """
    config = {**TINY_CONFIG, **overrides}
    directory = Path(tmp) / "tiny-model"
    directory.mkdir(parents=True, exist_ok=True)
    weights: dict[str, Any] = tiny_weights(config, seed)
    if dtype == "F16":
        weights = {n: w.astype(np.float16) for n, w in weights.items()}
    elif dtype == "BF16":
        weights = {n: to_bf16(w) for n, w in weights.items()}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_safetensors(directory / "model.safetensors", weights)
    return directory


def tiny_byte_pairs_dir(directory: str | Path, merges: int = 120) -> Path:
    """Write a small `tokenizer.model` of GLM-4's kind (256 bytes and `merges` pairs, most frequent
    first) and its tokenizer_config.json into `directory` and return it. The same bytes on every
    call.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    words = Counter(word for s in SENTENCES for word in re.findall(r" ?[^\W\d]+|\d| ?[^\w\s]+", s))
    split = {tuple(bytes([b]) for b in word.encode()): n for word, n in words.items()}
    tokens = [bytes([b]) for b in range(256)]
    for _ in range(merges):
        pairs = Counter()
        for word, n in split.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        tokens.append(b"".join(best))
        split = {_merged(word, best): n for word, n in split.items()}
    lines = [f"{b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (directory / "tokenizer.model").write_text("".join(lines))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(len(tokens) + i): {"content": token, **flags, "special": True}
        for i, token in enumerate(GLM4_TOKENS)
    }
    config = {
        "added_tokens_decoder": added,
        "additional_special_tokens": GLM4_TOKENS,
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]},
        "clean_up_tokenization_spaces": False,
        "do_lower_case": False,
        "eos_token": "<|endoftext|>",
        "model_max_length": 128000,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "remove_space": False,
        "tokenizer_class": "ChatGLM4Tokenizer",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


GLM4_TOKENS = [
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
]


def _merged(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    new: list[bytes] = []
    for token in word:
        if new and (new[-1], token) == pair:
            new[-1] += token
        else:
            new.append(token)
    return tuple(new)


def tiny_glm4_dir(tmp: Path, seed: int = 0, merges: int = 120, **overrides: Any) -> Path:
    """A directory as `tiny_model_dir` writes it, of a tiny random GLM-4-9B with its tokenizer."""
    end = 256 + merges
    own = {
        "_name_or_path": "THUDM/glm-4-9b-chat",
        "architectures": ["ChatGLMModel"],
        "layernorm_epsilon": 1.5625e-07,
        "rope_ratio": 500,
        "eos_token_id": [end, end + 7, end + 9],
        "pad_token_id": end,
        "padded_vocab_size": 400,
        "seq_length": 512,
        "tie_word_embeddings": False,
    }
    directory = tiny_model_dir(tmp, seed, **{**own, **overrides})
    return tiny_byte_pairs_dir(directory, merges)


def transformers_weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Those of the tiny ChatGLM2, cut and renamed; with norms of branches for glm4."""
    c = config
    rows = np.array([c["num_attention_heads"], c["num_key_value_heads"]]) * c["head_dim"]
    own = {"kv_channels": c["head_dim"], "add_qkv_bias": c["attention_bias"]}
    own |= {"padded_vocab_size": c["vocab_size"]}
    found: dict[str, np.ndarray] = {}
    for name, array in tiny_weights({**TINY_CONFIG, **own}, seed).items():
        new = name.replace("transformer.encoder.layers", "model.layers")
        for old, word in (
            ("self_attention.dense", "self_attn.o_proj"),
            ("mlp.dense_h_to_4h", "mlp.gate_up_proj"),
            ("mlp.dense_4h_to_h", "mlp.down_proj"),
            ("transformer.embedding.word_embeddings", "model.embed_tokens"),
            ("transformer.encoder.final_layernorm", "model.norm"),
            ("transformer.output_layer", "lm_head"),
        ):
            new = new.replace(old, word)
        if "query_key_value" not in name:
            found[new] = array
            continue
        for part, cut in zip("qkv", np.split(array, np.cumsum(rows)), strict=True):
            found[new.replace("self_attention.query_key_value", f"self_attn.{part}_proj")] = cut
    if c["tie_word_embeddings"]:
        del found["lm_head.weight"]
    for i in range(c["num_hidden_layers"]) if c["model_type"] == "glm4" else ():
        for norm in ("post_self_attn_layernorm", "post_mlp_layernorm"):
            values = np.random.default_rng(i).normal(1, 0.2, c["hidden_size"])
            found[f"model.layers.{i}.{norm}.weight"] = values.astype(np.float32)
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def tiny_transformers_dir(
    tmp: Path, seed: int = 0, template: str | None = None, thinks: bool = False, **overrides: Any
) -> Path:
    """The model of `tiny_glm4_dir` in the transformers layout, its vocabulary as tokenizer.json.

    template: a chat_template. thinks: there are tokens around thoughts. overrides: keys of
    config.json; model_type glm4 has the norms of branches, and tied embeddings leave the output
    layer out.
    """
    from glmlora.tokenization import tokenizer_json

    directory = tiny_glm4_dir(tmp, seed)
    config = {
        **{"model_type": "glm", "attention_bias": True, "head_dim": 8, "hidden_act": "silu"},
        **{"hidden_size": 32, "intermediate_size": 40, "max_position_embeddings": 512},
        **{"num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2},
        **{"partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
        **{"tie_word_embeddings": False, "torch_dtype": "float32", "vocab_size": 400},
        **{"eos_token_id": [376, 383, 385], "pad_token_id": 376},
        **overrides,
    }
    weights = transformers_weights(config, seed)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_safetensors(directory / "model.safetensors", weights)
    file = directory / "tokenizer.model"
    shown = {b: c for c, b in tokenizer_json._BYTES.items()}
    ranks = {}
    for line in file.read_bytes().splitlines():
        token, rank = line.split()
        ranks[b64decode(token)] = int(rank)
    names = {token: "".join(shown[b] for b in token) for token in ranks}
    merges = [
        [names[token[:i]], names[token[i:]]]
        for token in ranks
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    said = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = [{"id": int(i), **token} for i, token in said["added_tokens_decoder"].items()]
    for i, token in enumerate(("<think>", "</think>") if thinks else ()):
        added.append({**added[0], "id": 390 + i, "content": token, "special": False})
    bytes_of = {"type": "ByteLevel", "trim_offsets": True, "use_regex": False}
    vocabulary = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{**bytes_of, **cut} for cut in tokenizer_json._CUTS],
        },
        "post_processor": None,
        "decoder": {**bytes_of, "add_prefix_space": False},
        "model": {
            **tokenizer_json._MODEL,
            **{"vocab": {names[t]: rank for t, rank in ranks.items()}, "merges": merges},
        },
    }
    file.unlink()
    (directory / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    said |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    del said["auto_map"]
    (directory / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")
    return directory


def speak(folder: Path, ids: list[int], family: str) -> Path:
    """The model of `tiny_transformers_dir` with weights that say what follows each of the ids: a
    token's own channel, and the next one's score.
    """
    from glmlora import load_state_dict

    weights = {name: np.array(a) for name, a in load_state_dict(folder).items()}
    embedding = weights["model.embed_tokens.weight"]
    output = weights.setdefault("lm_head.weight", np.zeros_like(embedding))
    embedding[:, : len(ids)] = output[:, : len(ids)] = 0
    for channel, (i, following) in enumerate(zip(ids, ids[1:], strict=False)):
        embedding[i] = np.eye(32)[channel]
        output[following, channel] = 5
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")) or any(
            word in name for word in ("post_self", "post_mlp")
        ):
            weights[name] *= 0.01
    write_safetensors(folder / "model.safetensors", weights)
    config = json.loads((folder / "config.json").read_text())
    if config["tie_word_embeddings"]:
        config |= {"tie_word_embeddings": False, "glmlora_family": family}
        (folder / "config.json").write_text(json.dumps(config))
    return folder
