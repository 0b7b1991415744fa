"""GLM-4-9B in its original layout: ChatGLM3's messages, another tokenizer, ends from the config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .chatglm3 import ChatGLM3
from .family import Tokenizer
from .vocabulary import has_tiktoken


class GLM4(ChatGLM3):
    name, alias, title = "g4", "glm4", "GLM-4"
    named = re.compile(r"(glm|codegeex)[-_ ]?4(?!\d|-?bit)")
    checkpoint = "THUDM/glm-4-9b-chat"
    special_tokens = None
    vocabulary = 151552  # ids, padding with them; no other family has as many

    def in_config(self, fields: Mapping[str, Any]) -> bool:
        return fields.get("padded_vocab_size") == self.vocabulary

    def in_vocabulary(self, directory: Path) -> bool:
        return has_tiktoken(directory)

    def end_ids(self, tokenizer: Tokenizer, eos_token_ids: list[int]) -> list[int]:
        return list(eos_token_ids)


FAMILY = GLM4()
