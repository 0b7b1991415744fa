"""GLM-4-9B in its original layout: ChatGLM3's messages, a vocabulary of byte pairs, and tools whose
parameters are JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .chatglm3 import ROLE_TOKEN, ROLE_TOKENS, TOOL_CALL_MAX, ChatGLM3
from .family import Tokenizer
from .messages import ROLES, check_messages
from .vocabulary import has_byte_pairs

END = "<|endoftext|>"
# What stands in front of tools, and behind each function, where the checkpoint has no template.
TOOLS = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
)
AFTER_FUNCTION = "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
# Where these stand in a template. Jinja drops a newline behind a tag that is a statement.
_TOOLS = re.compile(r"<\|system\|>\n(.*?)(?:\s*\{%-|\{%)", re.DOTALL)
_AFTER_FUNCTION = re.compile(r"tojson\(indent=4[^)]*\) ?\}\}(.*?)(?:\s*\{%-|\{%)", re.DOTALL)
_OTHER_TOOL = r"tool\['type'\] == '{}' ?%\}}\n?([^{{]*)\{{%"


def tools_text(tools: Any, template: str | None, head: str = TOOLS) -> str:
    """The system message that tells of tools, as the checkpoint's template has it, with `head` in
    front where there is none. ValueError for a tool that is neither a function nor one of those in
    the template.
    """
    if not isinstance(tools, list | tuple):
        raise ValueError(f"tools: expected a list of tools, got {type(tools).__name__}")
    template = template or ""
    begin, after = _TOOLS.search(template), _AFTER_FUNCTION.search(template)
    text = begin[1] if begin else head
    for i, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        function = tool.get("function") if kind == "function" else None
        if kind == "function":
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise ValueError(f"tools[{i}]: function: expected an object with a name")
            shown = json.dumps(function, indent=4, ensure_ascii=False)
            text += f"\n## {function['name']}\n\n{shown}{after[1] if after else AFTER_FUNCTION}"
            continue
        other = re.search(_OTHER_TOOL.format(re.escape(str(kind))), template)
        if other is None:
            raise ValueError(
                f"tools[{i}]: expected {{'type': 'function', 'function': {{'name': .., ..}}}} or a "
                f"type that the chat_template of tokenizer_config.json has, got {tool!r:.80}"
            )
        text += other[1]
    return text


class GLM4(ChatGLM3):
    name, alias, title = "g4", "glm4", "GLM-4"
    named = re.compile(r"(glm|codegeex)[-_ ]?4(?!\d|-?bit)")
    checkpoint = "THUDM/glm-4-9b-chat"
    base: re.Pattern[str] | None = re.compile(r"glm-4-9b(-base)?")
    special_tokens = (
        *(END, "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *ROLE_TOKENS),
        *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    )
    byte_pairs = True
    named_tokens = {"eos": END}
    prefix_tokens: tuple[str, ...] = ("[gMASK]", "<sop>")
    in_texts = ()
    # CodeGeeX4's, around what is to be filled in; other vocabularies have none of them.
    in_messages = ("<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>")
    tokenizer_class = "ChatGLM4Tokenizer"
    template_marks: tuple[str, ...] = (
        "[gMASK]<sop>{% for item in messages %}",
        "item['metadata']",
        "item['tools']",
    )
    before_content = ""
    ids = 151552  # of the model, padding with them; no other family has as many

    def in_config(self, fields: Mapping[str, Any]) -> bool:
        return fields.get("padded_vocab_size") == self.ids

    def in_vocabulary(self, directory: Path) -> bool:
        return has_byte_pairs(directory) is True

    def in_tokenizer(self, config: Mapping[str, Any]) -> bool:
        text = repr(config)
        return "<sop>" in text and ROLE_TOKEN.search(text) is not None

    def check(self, messages: Any, name: str = "history") -> list[dict[str, Any]]:
        return check_messages(messages, name, with_tools=ROLES)

    def parts(
        self, tokenizer: Tokenizer, message: Mapping[str, Any]
    ) -> Iterator[tuple[str, str, str]]:
        """Tools are a system message in front; what has no content is left out."""
        if message.get("tools"):
            yield "system", "", tools_text(message["tools"], tokenizer.chat_template)
        if content := str(message["content"]):
            yield message["role"], message.get("metadata") or "", content

    def tool_parameters(self, content: str) -> dict[str, Any] | None:
        """The content's JSON object; None for anything else."""
        if len(content) > TOOL_CALL_MAX:
            return None
        try:
            parameters = json.loads(content)
        except (ValueError, RecursionError):
            return None
        return parameters if isinstance(parameters, dict) else None

    def end_id(self, tokenizer: Tokenizer) -> int:
        """An answer ends where the user speaks again."""
        return tokenizer.get_command("<|user|>")


FAMILY = GLM4()
