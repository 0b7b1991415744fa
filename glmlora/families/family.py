"""What a family is: all that one model family answers otherwise than another.

A family is one file in this folder with a class below `Family` and an instance `FAMILY`; nothing
else in the package names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from .context import Context

# What most architectures are not, under the names of `_core.Model`.
PLAIN_ARCH: Mapping[str, Any] = {
    "half_rope_table": False,
    "half_rope_frequencies": False,
    "split_qkv": False,
    "branch_norms": False,
    "tied_head": False,
    "linear_bias": False,
    "layer_norm": False,
    "gelu": False,
    "qkv_by_head": False,
    "residual_scale": 0.0,
    "rope_2d": False,
    **dict.fromkeys(("sop", "gmask", "mask", "sop_in_place"), 0),
}


class Tokenizer(Protocol):
    """What prompts need of a tokenizer."""

    family: str
    eos_token_id: int
    dummy_space_id: int | None
    special_tokens: dict[str, int]
    has_special_pieces: bool

    @property
    def chat_template(self) -> str | None: ...

    def get_command(self, token: str) -> int: ...
    def get_prefix_tokens(self) -> list[int]: ...
    def as_prompt(self, ids: Sequence[int]) -> list[int]: ...
    def rendered_ids(self, messages: Any, add_generation_prompt: bool) -> list[int]: ...
    def text_ids(self, text: str) -> list[int]: ...
    def text_offsets(self, text: str) -> list[int]: ...


class Family:
    """One family. Methods that differ raise NotImplementedError here; the others are the original
    `chatglm` layout's.
    """

    name: str  # `config.family`
    alias: str  # what flags call it
    title: str  # what messages call it
    named: re.Pattern[str]  # finds it in the lower-case name of a model
    checkpoint: str  # a published model of it
    base: re.Pattern[str] | None = None  # whole lower-case names of models that only continue texts

    # The layout of config.json, which its model_type names and, where several have the same, keys
    # that only this one has: layout_keys, any of them. config_keys: of its keys those that
    # this package calls otherwise, with its own word. ties_head: the output layer may be the
    # embeddings.
    model_type = "chatglm"
    layout_keys: tuple[str, ...] = ()
    config_keys: Mapping[str, str] = {}
    ties_head = False

    # Tensors. `layer` has the layer's number in place of {}; linears and norms stand below it,
    # each with .weight (and .bias where there is one); the core and adapters use these names.
    # `query`, `key` and `value` in place of query_key_value: they are linears of their own;
    # post_self_attn_layernorm and post_mlp_layernorm: what attention and MLP yield is normed.
    tensor_names: Mapping[str, str] = {
        "word_embeddings": "transformer.embedding.word_embeddings",
        "final_layernorm": "transformer.encoder.final_layernorm",
        "output_layer": "transformer.output_layer",
        "layer": "transformer.encoder.layers.{}",
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "post_attention_layernorm",
        "query_key_value": "self_attention.query_key_value",
        "dense": "self_attention.dense",
        "dense_h_to_4h": "mlp.dense_h_to_4h",
        "dense_4h_to_h": "mlp.dense_4h_to_h",
        "prefix_encoder": "transformer.prefix_encoder",
    }
    # Linears that adapters may change; and those they change where nobody says which.
    linears: tuple[str, ...] = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    targets: tuple[str, ...] = ("query_key_value",)

    # Tokens. special_tokens: the names behind the vocabulary, in order; None: this release has no
    # tokenizer of the family.
    special_tokens: tuple[str, ...] | None = None
    vocabulary_name = "tokenizer.model"
    byte_pairs = False  # tokenizer.model has base64 and rank per line, else it is SentencePiece's
    blank_tokens = False  # line breaks and runs of blanks are tokens: see tokenization/ice_text.py
    named_tokens: Mapping[str, str] = {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}
    prefix_tokens: tuple[str, ...] = ("[gMASK]", "sop")  # in front of every prompt
    prefix_behind = False  # they stand behind it
    in_texts: tuple[str, ...] = ()  # those that texts may name where that is asked for; (): all
    tokenizer_class = "ChatGLMTokenizer"  # what the published files call it
    role_tokens = False  # <|user|> and the like are among them, and texts may be encoded with them
    shows_special_tokens = False  # decoding writes their names
    end_tokens: tuple[str, ...] = ()  # end an answer as the end id does
    in_messages: tuple[str, ...] = ()  # those that messages may name: no roles, no ends
    template_mark = ""  # stands in every chat template (of tokenizer_config.json) of this form
    template_marks: tuple[str, ...] = ()  # stand, all of them, in one that `template_text` equals
    takes_tools = False  # a template has tools beside the messages
    takes_role = True  # chat(query, history, role, ..) rather than chat(query, history, ..)
    takes_past = True  # stream_chat goes on from past_key_values
    shows_end = True  # stream_chat yields the whole text once more at an end id
    chat_defaults: Mapping[str, Any] = {}  # where they are others than the signature's
    chats_by_template = False  # chat and training follow a template of the checkpoint's own
    thinks = False  # answers have a thought in front, always

    # Which family it is

    def in_config(self, fields: Mapping[str, Any]) -> bool:
        """Whether config.json can only be this family's."""
        return False

    def in_vocabulary(self, directory: Path) -> bool:
        """Whether the vocabulary of a model directory can only be this family's."""
        return False

    def in_directory(self, directory: Path) -> bool:
        """Whether the small files of a model directory speak for this family."""
        return False

    def in_tokenizer(self, config: Mapping[str, Any]) -> bool:
        """Whether a tokenizer_config.json speaks for this family."""
        return False

    # Architecture

    def own_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a config.json of this layout with this package's words beside the file's,
        and the layout's defaults. ValueError naming a field that asks for what there is not.
        """
        return dict(fields)

    def file_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a config as a config.json of this layout has them."""
        return dict(fields)

    def check_config(self, config: Any) -> None:
        """ValueError naming a field of the layout's own that no supported model can have."""

    def rope_mode(self, rope_ratio: float) -> str:
        """What `rope_ratio` means where nobody says: see `ChatGLMConfig`."""
        return "base"

    def context(self, config: Any) -> Context | None:
        """The ids that cut a row into what is read in both directions and what follows; None where
        no id sees a later one.
        """
        return None

    def cut_vocabulary(self, config: Any, size: int) -> None:
        """Let a config have `size` ids, with what it needs of them: to measure, not to answer."""
        config.padded_vocab_size = size

    def prefix_input(self, config: Any) -> int:
        """Columns of a P-Tuning embedding that a projection reads."""
        return config.prefix_width

    def arch(self, config: Any) -> dict[str, Any]:
        """What the core must know, under the names of `_core.Model`."""
        ratio, mode = float(config.rope_ratio), config.rope_mode
        return PLAIN_ARCH | {
            "layers": config.num_layers,
            "hidden": config.hidden_size,
            "ffn": config.ffn_hidden_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.multi_query_group_num,
            "head_dim": config.kv_channels,
            "vocab": config.padded_vocab_size,
            "max_positions": config.seq_length,
            "rotary_dim": config.kv_channels // 2,
            "eps": float(config.layernorm_epsilon),
            "rope_base": 10000.0 * ratio if mode == "base" else 10000.0,
            "rope_divisor": 1.0 if mode == "base" else ratio,
            "qkv_bias": bool(config.add_qkv_bias),
            "half_rope_table": mode == "half",
            "split_qkv": "query" in self.tensor_names,
            "branch_norms": "post_mlp_layernorm" in self.tensor_names,
            "prefix_input": self.prefix_input(config),
        }

    # A chat

    def tokenizer_words(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """The keys of a tokenizer_config.json with this package's words for those that a release
        calls otherwise.
        """
        return fields

    def positions(self, tokenizer: Tokenizer, ids: Sequence[int]) -> list[Any]:
        """The `position_ids` of a row without padding."""
        return list(range(len(ids)))

    def as_released(self, tokenizer: Tokenizer) -> Family:
        """The family as the release that the tokenizer is of has it."""
        return self

    def chat_ids(self, tokenizer: Tokenizer, query: str, history: Any, role: str) -> list[int]:
        """Ids of a whole prompt, `[gMASK] sop` in front. The history is not changed. ValueError for
        a malformed history or a role that there is not.
        """
        raise NotImplementedError

    def stream_ids(self, tokenizer: Tokenizer, query: str, number: int, role: str) -> list[int]:
        """Ids of a later turn alone, for a cache that holds what came before. number: of this
        round, from 1.
        """
        raise NotImplementedError

    def later_ids(
        self, tokenizer: Tokenizer, past: list[int], query: str, history: Any, role: str
    ) -> list[int]:
        """Ids of a conversation whose first ids, `past`, a cache holds, and a new question."""
        number = len(history or []) + 1
        return [*past, *self.stream_ids(tokenizer, query, number, role)]

    def framed(self, tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
        """`source_ids` with the special ids around them."""
        return tokenizer.as_prompt(ids)

    def message_ids(
        self, tokenizer: Tokenizer, role: str, metadata: str, content: str
    ) -> list[int]:
        """Ids of one message, in families that have messages; else ValueError."""
        raise ValueError(f"{self.title} has rounds of questions and answers, no messages")

    def prompt_text(self, query: str, history: Any = None) -> str:
        """A whole prompt as text, in families that write one."""
        raise NotImplementedError

    def template_ids(
        self, tokenizer: Tokenizer, messages: Any, add_generation_prompt: bool
    ) -> list[int]:
        """Ids of a list of role messages, `[gMASK] sop` in front."""
        raise NotImplementedError

    def template_text(
        self, tokenizer: Tokenizer, messages: Any, add_generation_prompt: bool
    ) -> str:
        """The text of `template_ids`."""
        raise NotImplementedError

    def end_ids(self, tokenizer: Tokenizer, eos_token_ids: list[int]) -> list[int]:
        """Ids that end an answer. eos_token_ids: those of the model's config.json."""
        return [
            int(tokenizer.eos_token_id),
            *(int(tokenizer.get_command(t)) for t in self.end_tokens),
        ]

    def asked(self, query: str, history: Any, role: str | None) -> list[Any]:
        """A new history that ends in the question."""
        raise NotImplementedError

    def answer(self, text: str, asked: list[Any]) -> tuple[Any, list[Any]]:
        """(response, history) of a decoded answer without its end; `asked` ends in the question and
        is not changed. Nothing that a model wrote is ever executed.
        """
        raise NotImplementedError

    # Training

    def end_id(self, tokenizer: Tokenizer) -> int:
        """The id that ends a record's answer."""
        return int(tokenizer.eos_token_id)

    def source_ids(
        self,
        tokenizer: Tokenizer,
        first: str,
        query: str,
        rounds: Sequence[tuple[str, str]],
        system: str,
    ) -> list[int]:
        """Ids of a record's prompt without the prefix, of any length: see `prompt.encode_source`.
        first: stands before everything; system: a system message, "" for none.
        """
        raise NotImplementedError

    def answer_ids(self, tokenizer: Tokenizer, response: str) -> list[int]:
        """Ids of a record's answer as a chat expects it, without its end."""
        return tokenizer.text_ids(response)
