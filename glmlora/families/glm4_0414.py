"""GLM-4-0414 (`model_type` glm4): the transformers layout, with norms of what attention and MLP
yield. In prompts tools come first, then all system messages; a tool's name has a space behind it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .family import Tokenizer
from .glm4 import TOOLS, tools_text
from .glm_hf import GLM
from .messages import check_role


class GLM0414(GLM):
    """The `glm4` layout."""

    name, alias, title = "0414", "glm4-0414", "GLM-4-0414"
    named = re.compile(r"glm[-_ ]?4.*0414")
    checkpoint = "THUDM/GLM-4-9B-0414"
    base: re.Pattern[str] | None = re.compile(r"glm-4-32b-base-0414")
    model_type = "glm4"
    tensor_names = {
        **GLM.tensor_names,
        "post_self_attn_layernorm": "post_self_attn_layernorm",
        "post_mlp_layernorm": "post_mlp_layernorm",
    }
    template_marks: tuple[str, ...] = (
        "[gMASK]<sop>",
        "if message.role != 'system'",
        "<|assistant|>{{ meta }}",
    )
    takes_tools = True
    tools_head = TOOLS.replace("智谱AI", "智谱 AI 公司")

    def visible(self, content: str) -> str:
        """What a prompt has of a content that is no system message's."""
        return content

    def chat_ids(self, tokenizer: Tokenizer, query: str, history: Any, role: str) -> list[int]:
        check_role(role)
        messages = [*self.check(history), {"role": role, "content": query}]
        ids = self.messages_ids(tokenizer, messages)
        return [*tokenizer.get_prefix_tokens(), *ids, *self.opening_ids(tokenizer)]

    def all_parts(
        self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[str, str, str]]:
        given = [message["tools"] for message in messages if message.get("tools")]
        if given:
            tools = given[0] if len(given) == 1 else [tool for one in given for tool in one]
            yield "system", "", tools_text(tools, tokenizer.chat_template, self.tools_head)
        for message in sorted(messages, key=lambda message: message["role"] != "system"):
            role, content = message["role"], str(message["content"])
            if role != "system":
                metadata = str(message.get("metadata") or "").strip()
                yield role, f"{metadata} " if metadata else "", self.visible(content)
            elif content or not message.get("tools"):
                yield role, "", content


FAMILY = GLM0414()
