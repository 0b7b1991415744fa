"""GLM-Z1-Rumination (`model_type` glm4): a model that searches. Its prompts begin with a system
text of its own, which stands in the checkpoint's template; it opens its thoughts itself, and calls
its tools by name and arguments in JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import tell
from .chatglm3 import TOOL_CALL_MAX
from .family import Tokenizer
from .glm4_z1 import GLMZ1


class GLMRumination(GLMZ1):
    name, alias, title = "rumination", "glm-z1-rumination", "GLM-Z1-Rumination"
    named = re.compile(r"glm[-_ ]?z1.*rumination")
    checkpoint = "THUDM/GLM-Z1-Rumination-32B-0414"
    # A text stands where the others ask for tools or messages.
    in_template = re.compile(r"\[gMASK\]<sop>\s*<\|system\|>(?:\n|\\n)(?!\s*\{)")
    template_marks = ("[gMASK]<sop><|system|>\n", "if message.role != 'system'", "</think>")
    after_opening = ""
    opens_thought = False
    takes_tools = False

    def in_directory(self, directory: Path) -> bool:
        return super().in_directory(directory)

    def in_tokenizer(self, config: Mapping[str, Any]) -> bool:
        return super().in_tokenizer(config)

    def all_parts(
        self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[str, str, str]]:
        """The template's system text; given system messages and tools are left out."""
        if (text := _system_text(tokenizer.chat_template)) is None:
            tell.once(
                f"{self.title}: the checkpoint has no chat_template, which holds its system text: "
                "prompts are written without it"
            )
        else:
            yield "system", "", text
        told = [{**message, "tools": None} for message in messages if message["role"] != "system"]
        if len(told) < len(messages):
            tell.once(f"{self.title}: system messages and tools are not used, it has its own")
        yield from super().all_parts(tokenizer, told)

    def answer(self, text: str, asked: list[Any]) -> tuple[Any, list[Any]]:
        response, history = super().answer(text, asked)
        called = _call(response) if isinstance(response, str) else None
        return called or response, history


def _system_text(template: str | None) -> str | None:
    found = re.match(r"\[gMASK\]<sop>\s*<\|system\|>\n(.*?)(\s*\{%-|\{%)", template or "", re.S)
    return found[1] if found else None


def _call(text: str) -> dict[str, Any] | None:
    """{"name", "parameters"} of a call; None for any other text."""
    if not text.startswith("{") or len(text) > TOOL_CALL_MAX:
        return None
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if set(call) != {"name", "arguments"} or not isinstance(call["arguments"], dict):
        return None
    return {"name": str(call["name"]), "parameters": call["arguments"]}


FAMILY = GLMRumination()
