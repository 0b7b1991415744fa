"""GLM-Edge (`model_type` glm): the transformers layout with embeddings for a head, a vocabulary of
its own, and prompts without a prefix that always open the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .family import Tokenizer
from .glm_hf import GLM
from .messages import check_messages

_ROLES = ("system", "user", "assistant")  # what the template writes


class GLMEdge(GLM):
    name, alias, title = "edge", "glm-edge", "GLM-Edge"
    named = re.compile(r"glm[-_ ]?edge")
    checkpoint = "THUDM/glm-edge-1.5b-chat"
    base = None
    prefix_tokens = ()
    template_marks = ("<|system|>", "<|user|>", "<|assistant|>", "item['role'] == 'assistant'")
    always_opens = True
    ids = 59264  # of the model, padding with them

    def in_config(self, fields: Mapping[str, Any]) -> bool:
        if fields.get("model_type") != self.model_type:
            return False
        return fields.get("tie_word_embeddings") is True or fields.get("vocab_size") == self.ids

    def in_tokenizer(self, config: Mapping[str, Any]) -> bool:
        template = str(config.get("chat_template") or "")
        has = "<|assistant|>" in template and "<|endoftext|>" in repr(config)
        return has and not any(mark in template for mark in ("[gMASK]", "add_generation_prompt"))

    def check(self, messages: Any, name: str = "history") -> list[dict[str, Any]]:
        return check_messages(messages, name, with_tools=())

    def parts(
        self, tokenizer: Tokenizer, message: Mapping[str, Any]
    ) -> Iterator[tuple[str, str, str]]:
        """The template has no tools: what they return is left out."""
        if message["role"] in _ROLES:
            yield message["role"], "", str(message["content"])

    def stream_ids(self, tokenizer: Tokenizer, query: str, number: int, role: str) -> list[int]:
        if role == "observation":
            raise ValueError(f"role: expected one of {' '.join(_ROLES)}, got {role!r}")
        return super().stream_ids(tokenizer, query, number, role)


FAMILY = GLMEdge()
