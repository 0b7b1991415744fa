"""The transformers layout of GLM (`model_type` glm): GLM-4-9B-chat-hf, with GLM-4's prompts.

Queries, keys and values are linears of their own, and config.json has transformers' keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .family import Tokenizer
from .glm4 import GLM4
from .messages import check_role, with_tokens

# What transformers' GlmConfig assumes for keys that a file leaves out.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
    "attention_bias": True,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "hidden_act": "silu",
    "pad_token_id": 151329,
    "eos_token_id": [151329, 151336, 151338],
}
_ROTARY = ("rope_theta", "partial_rotary_factor")  # at top level, or in rope_parameters
_MAY_BE_NULL = ("pad_token_id", "eos_token_id")
# Keys of the `chatglm` layout that say what this one is anyway, or nothing.
_OTHERS = (
    "rmsnorm",
    "apply_residual_connection_post_layernorm",
    "post_layer_norm",
    "add_bias_linear",
    "multi_query_attention",
    "original_rope",
    "rope_ratio",
)


def _rotary_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary keys, of either spelling. ValueError where positions are to be scaled, and where
    both spellings are there and differ.
    """
    found = {name: fields[name] for name in _ROTARY if fields.get(name) is not None}
    for key in ("rope_scaling", "rope_parameters"):
        inside = fields.get(key)
        if inside is None:
            continue
        if not isinstance(inside, Mapping):
            raise ValueError(f"{key}: expected an object or null, got {inside!r:.80}")
        kind = inside.get("rope_type", inside.get("type"))
        if kind not in (None, "default"):
            raise ValueError(
                f"{key}: type {kind!r} is not supported by this release, only 'default'; without "
                "it the model has the positions that it was trained with"
            )
        for name in _ROTARY:
            value = inside.get(name)
            if value is not None and found.setdefault(name, value) != value:
                raise ValueError(f"{name} is {found[name]!r}, but {value!r} in {key}: expected one")
    return found


class GLM(GLM4):
    """The `glm` layout. A message is encoded whole, as transformers encodes a rendered template."""

    name, alias, title = "hf", "glm-hf", "GLM in the transformers layout"
    named = re.compile(r"glm[-_ ]?4.*[-_]hf$")
    checkpoint = "THUDM/glm-4-9b-chat-hf"
    base: re.Pattern[str] | None = re.compile(r"glm-4-9b(-base)?-hf")
    tokenizer_class = "PreTrainedTokenizerFast"
    model_type = "glm"
    ties_head = True
    config_keys: Mapping[str, str] = {
        "num_hidden_layers": "num_layers",
        "vocab_size": "padded_vocab_size",
        "intermediate_size": "ffn_hidden_size",
        "head_dim": "kv_channels",
        "num_key_value_heads": "multi_query_group_num",
        "max_position_embeddings": "seq_length",
        "rms_norm_eps": "layernorm_epsilon",
        "attention_bias": "add_qkv_bias",
    }
    tensor_names: Mapping[str, str] = {
        "word_embeddings": "model.embed_tokens",
        "final_layernorm": "model.norm",
        "output_layer": "lm_head",
        "layer": "model.layers.{}",
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "post_attention_layernorm",
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "dense": "self_attn.o_proj",
        "dense_h_to_4h": "mlp.gate_up_proj",
        "dense_4h_to_h": "mlp.down_proj",
        "prefix_encoder": "prefix_encoder",
    }
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
    targets = ("q_proj", "k_proj", "v_proj")  # what query_key_value is

    def own_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        found = {k: v for k, v in fields.items() if v is not None}
        found |= _rotary_fields(fields)
        for key, value in DEFAULTS.items():
            found.setdefault(key, fields.get(key, value) if key in _MAY_BE_NULL else value)
        for key, own in self.config_keys.items():
            found.setdefault(own, found[key])
            found[key] = found[own]
        return {**found, "multi_query_attention": True}

    def file_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        owns = {own: key for key, own in self.config_keys.items()}
        nested = _ROTARY if fields.get("rope_parameters") else ()
        nulls = [k for k in ("quantization_group_size", "_name_or_path") if not fields.get(k)]
        dropped = {*_OTHERS, *nested, *owns, *nulls}
        kept = {k: v for k, v in fields.items() if k not in dropped}
        return {**kept, **{key: fields[own] for own, key in owns.items()}}

    def check_config(self, config: Any) -> None:
        if config.hidden_act != "silu":
            raise ValueError(
                f"hidden_act {config.hidden_act!r:.40} is not supported by this release, only "
                "'silu'"
            )
        for name, most in (("rope_theta", 1e12), ("partial_rotary_factor", 1.0)):
            value = config.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise ValueError(f"{name}: expected a positive number, got {value!r:.40}")
            if value > most:
                raise ValueError(f"{name}: expected at most {most:g}, got {value!r}")
        size = int(config.kv_channels * config.partial_rotary_factor)
        if size < 2 or size % 2:
            raise ValueError(
                f"partial_rotary_factor {config.partial_rotary_factor!r} of head_dim "
                f"{config.kv_channels} turns {size} channels, expected an even number from 2"
            )

    def arch(self, config: Any) -> dict[str, Any]:
        return super().arch(config) | {
            "rotary_dim": int(config.kv_channels * config.partial_rotary_factor),
            "rope_base": float(config.rope_theta),
            "rope_divisor": 1.0,
            "tied_head": bool(config.tie_word_embeddings),
        }

    def message_ids(
        self, tokenizer: Tokenizer, role: str, metadata: str, content: str
    ) -> list[int]:
        """Role id and the text behind it: a content that begins with a newline merges with the
        newline in front of it.
        """
        check_role(role)
        whole = with_tokens(tokenizer, f"{metadata}\n{content}", self.in_messages)
        return [tokenizer.get_command(f"<|{role}|>"), *whole]

    def answer_ids(self, tokenizer: Tokenizer, response: str) -> list[int]:
        return tokenizer.text_ids(f"\n{response}")


FAMILY = GLM()
