"""ChatGLM-6B, both releases: rounds numbered from 0, `[gMASK] <sop>` behind the prompt, answers
with the punctuation of Chinese.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .family import Family, Tokenizer
from .rounds import Rounds, process_response
from .vocabulary import ICE_TEXT, vocabulary_file

_FULL_WIDTH = str.maketrans(",!:;?", "，！：；？")  # noqa: RUF001
_BESIDE_CHINESE = re.compile("(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")


class ChatGLM(Rounds):
    name, alias, title = "v1", "chatglm", "ChatGLM-6B"
    named = re.compile(r"chatglm[-_ ]?6b")
    checkpoint = "THUDM/chatglm-6b"
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

    # Which family it is

    def in_config(self, fields: Mapping[str, Any]) -> bool:
        return "inner_hidden_size" in fields or "position_encoding_2d" in fields

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
