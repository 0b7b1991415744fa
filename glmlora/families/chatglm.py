"""ChatGLM-6B, both releases: prompts that are read in both directions, positions in two dimensions,
rounds numbered from 0, and answers with the punctuation of Chinese.

Their config.json has keys of its own. The first release has no ids of [MASK] and [gMASK] in it;
they stand four and three ids before that of <sop>, `bos_token_id`, in both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .context import Context, row_positions
from .family import Family, Tokenizer
from .rounds import Rounds, process_response
from .vocabulary import ICE_TEXT, vocabulary_file

# What the published configuration class assumes for keys that a file leaves out.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 150528,
    "hidden_size": 4096,
    "inner_hidden_size": 16384,
    "num_layers": 28,
    "num_attention_heads": 32,
    "max_sequence_length": 2048,
    "layernorm_epsilon": 1e-5,
    "bos_token_id": 150004,
    "eos_token_id": 150005,
    "position_encoding_2d": True,
}
# Keys of other layouts that say what this one is anyway, or nothing.
_OTHERS = (
    "rmsnorm",
    "apply_residual_connection_post_layernorm",
    "post_layer_norm",
    "add_bias_linear",
    "add_qkv_bias",
    "kv_channels",
    "multi_query_attention",
    "multi_query_group_num",
    "original_rope",
    "rope_ratio",
)
# A layer of the published code is told nothing of their number and takes 28.
_LAYERS_IN_ALPHA = 28
_IMAGES = 20000  # ids of images, before all others in the first release
_FULL_WIDTH = str.maketrans(",!:;?", "，！：；？")  # noqa: RUF001
_BESIDE_CHINESE = re.compile("(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")


class ChatGLM(Rounds):
    name, alias, title = "v1", "chatglm", "ChatGLM-6B"
    named = re.compile(r"chatglm[-_ ]?6b")
    checkpoint = "THUDM/chatglm-6b"
    layout_keys = ("inner_hidden_size", "position_encoding_2d")
    config_keys: Mapping[str, str] = {
        "vocab_size": "padded_vocab_size",
        "inner_hidden_size": "ffn_hidden_size",
        "max_sequence_length": "seq_length",
    }
    tensor_names: Mapping[str, str] = {
        "word_embeddings": "transformer.word_embeddings",
        "final_layernorm": "transformer.final_layernorm",
        "output_layer": "lm_head",
        "layer": "transformer.layers.{}",
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "post_attention_layernorm",
        "query_key_value": "attention.query_key_value",
        "dense": "attention.dense",
        "dense_h_to_4h": "mlp.dense_h_to_4h",
        "dense_4h_to_h": "mlp.dense_4h_to_h",
        "prefix_encoder": "transformer.prefix_encoder",
    }

    # Tokens and prompts

    special_tokens = (
        *("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"),
    )
    vocabulary_name = ICE_TEXT
    blank_tokens = prefix_behind = True
    named_tokens = {
        **{"unk": "<unk>", "bos": "<sop>", "eos": "<eop>", "end": "</s>"},
        **{"mask": "[MASK]", "gmask": "[gMASK]"},
    }
    prefix_tokens = ("[gMASK]", "<sop>")
    in_texts = ("[MASK]", "[gMASK]", "[sMASK]")
    template_mark = "[Round"
    takes_past = shows_end = False
    chat_defaults = {"max_length": 2048, "top_p": 0.7, "temperature": 0.95}
    round_form = "[Round {}]\n问：{}\n答："
    after_answer = "\n"
    first_round = 0
    bare_first = True

    # Architecture

    def own_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        found = {k: v for k, v in fields.items() if v is not None}
        for key, value in DEFAULTS.items():
            found.setdefault(key, value)
        first = found["bos_token_id"] == DEFAULTS["bos_token_id"]
        found.setdefault("pad_token_id", _IMAGES + 3 if first else 3)
        for key, own in self.config_keys.items():
            found.setdefault(own, found[key])
            found[key] = found[own]
        hidden, heads = found["hidden_size"], found["num_attention_heads"]
        whole = all(type(n) is int and n > 0 for n in (hidden, heads))
        found["kv_channels"] = hidden // heads if whole else 4
        found["multi_query_group_num"] = heads
        return {**found, "multi_query_attention": True, "add_qkv_bias": True}

    def file_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        nulls = [k for k in ("quantization_group_size", "_name_or_path") if not fields.get(k)]
        dropped = {*_OTHERS, *self.config_keys.values(), *nulls}
        kept = {k: v for k, v in fields.items() if k not in dropped}
        return {**kept, **{key: fields[own] for key, own in self.config_keys.items()}}

    def check_config(self, config: Any) -> None:
        if config.position_encoding_2d is not True:
            raise ValueError(
                f"position_encoding_2d {config.position_encoding_2d!r:.40} is not supported by "
                "this release, only true"
            )
        if config.hidden_size != config.kv_channels * config.num_attention_heads:
            raise ValueError(
                f"hidden_size {config.hidden_size} is no multiple of num_attention_heads "
                f"{config.num_attention_heads}"
            )
        if config.rope_mode == "half":
            raise ValueError("rope_mode: expected base, this model's table has no other form")
        ids = {"bos_token_id": config.bos_token_id}
        ids |= {k: config.get(k) for k in ("gmask_token_id", "mask_token_id") if config.get(k)}
        for name, value in ids.items():
            if type(value) is not int or not 4 <= value < config.padded_vocab_size:
                raise ValueError(
                    f"{name}: expected an id from 4 to {config.padded_vocab_size - 1}, the end of "
                    f"the vocabulary, got {value!r:.40}"
                )

    def context(self, config: Any) -> Context:
        sop, gmask = config.bos_token_id, config.get("gmask_token_id")
        mask = config.get("mask_token_id")
        return Context(
            sop=sop,
            gmask=sop - 3 if gmask is None else gmask,
            mask=sop - 4 if mask is None else mask,
            sop_in_place=gmask is None,
        )

    def prefix_input(self, config: Any) -> int:
        return config.hidden_size

    def arch(self, config: Any) -> dict[str, Any]:
        return super().arch(config) | {
            "linear_bias": True,
            "layer_norm": True,
            "gelu": True,
            "qkv_by_head": True,
            "half_rope_frequencies": True,
            "residual_scale": math.sqrt(2 * _LAYERS_IN_ALPHA),
            "rope_2d": True,
            **self.context(config)._asdict(),
        }

    # Which family it is

    def in_vocabulary(self, directory: Path) -> bool:
        file = vocabulary_file(directory)
        return file is not None and file.name == ICE_TEXT

    def in_tokenizer(self, config: Mapping[str, Any]) -> bool:
        return "gmask_token" in config

    # Text

    def tokenizer_words(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """The first release calls the end of a text its eos, and the end of an answer eop."""
        if "eop_token" not in fields:
            return fields
        others = {k: v for k, v in fields.items() if k not in ("eop_token", "eos_token")}
        named = {"eos_token": fields["eop_token"]}
        return {**others, **named, "end_token": fields.get("eos_token", "</s>")}

    def positions(self, tokenizer: Tokenizer, ids: Sequence[int]) -> list[Any]:
        """Position and block of each id; text that ends in no answer is all context."""
        sop, *masks = map(tokenizer.get_command, ("<sop>", "[gMASK]", "[MASK]"))
        if sop not in ids or not set(masks) & set(ids):
            return [list(range(len(ids))), [0] * len(ids)]
        context = Context(sop, *masks, sop_in_place=not tokenizer.has_special_pieces)
        return row_positions(ids, context).tolist()

    def as_released(self, tokenizer: Tokenizer) -> Family:
        """The first release shows answers as they are, and has its special tokens in its code."""
        return self if tokenizer.has_special_pieces else _FIRST_RELEASE

    def response(self, text: str) -> str:
        """Punctuation beside a Chinese character is full-width."""
        return _BESIDE_CHINESE.sub(
            lambda mark: mark[0].translate(_FULL_WIDTH), process_response(text)
        )


class _FirstRelease(ChatGLM):
    def response(self, text: str) -> str:
        return process_response(text)


FAMILY = ChatGLM()
_FIRST_RELEASE = _FirstRelease()
