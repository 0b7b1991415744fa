"""ChatGLM3: messages between role ids; tools in the system message, their calls in an answer."""

from __future__ import annotations

import ast
import copy
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .family import Family, Tokenizer
from .messages import TRAINING_TIME, check_messages, check_role, fit, rounds_to_drop
from .vocabulary import TOKENIZER_FILES, has_text

ROLE_TOKEN = re.compile(r"<\|(?:system|user|assistant|observation)\|>")
TOOL_CALL_MAX = 1 << 16  # characters of a tool call that are parsed


def _content(message: Mapping[str, Any]) -> str:
    content = str(message["content"])
    if message["role"] == "system" and "tools" in message:
        content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
    return content


def message_ids(tokenizer: Tokenizer, role: str, metadata: str, content: str) -> list[int]:
    """Ids of one message: role id, metadata with its newline, content, encoded separately.

    Role markers inside the texts stay plain text.
    """
    check_role(role)
    header = tokenizer.text_ids(f"{metadata}\n")
    return [tokenizer.get_command(f"<|{role}|>"), *header, *tokenizer.text_ids(content)]


def _messages_ids(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    ids: list[int] = []
    for message in messages:
        metadata = message.get("metadata") or ""
        ids += message_ids(tokenizer, message["role"], metadata, _content(message))
    return ids


def process_response(
    output: str, history: Sequence[Mapping[str, Any]]
) -> tuple[str | dict[str, Any], list[dict[str, Any]]]:
    """The answer and the history with it: a deep copy, the caller's list stays as it is.

    output: decoded text with role markers, end id removed. The answer is a string; or, where the
    model names a tool, {"name", "parameters"} if the history starts with a system message with
    `tools` and the text is one `tool_call(name=literal, ...)`; else {"name", "content"}.
    """
    history = copy.deepcopy(list(history))
    answer: str | dict[str, Any] = ""
    for part in output.split("<|assistant|>"):
        metadata, newline, content = part.partition("\n")
        if not newline:
            metadata, content = "", part
        name = metadata.strip()
        if not name:
            content = content.strip()
            history.append({"role": "assistant", "metadata": "", "content": content})
            answer = content.replace(*TRAINING_TIME)
            continue
        has_tools = history and history[0].get("role") == "system" and "tools" in history[0]
        history.append({"role": "assistant", "metadata": metadata, "content": content})
        parameters = _tool_call(content) if has_tools else None
        if parameters is None:
            answer = {"name": name, "content": content}
        else:
            answer = {"name": name, "parameters": parameters}
    return answer, history


def _tool_call(content: str) -> dict[str, Any] | None:
    """Arguments of one `tool_call(...)` between a code fence's lines; None for anything else."""
    code = "\n".join(content.split("\n")[1:-1]).strip()
    if len(code) > TOOL_CALL_MAX:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in a string warns
            call = ast.parse(code, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            return None
        names = [keyword.arg for keyword in call.keywords]
        if call.func.id != "tool_call" or call.args or None in names:
            return None
        if len(set(names)) != len(names):
            return None
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


class ChatGLM3(Family):
    name, alias, title = "v3", "chatglm3", "ChatGLM3"
    named = re.compile(r"chatglm[-_ ]?3(?!\d)")
    checkpoint = "THUDM/chatglm3-6b"
    special_tokens = (
        *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
        *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    )
    template_mark = "<|assistant|>"
    role_tokens = shows_special_tokens = True
    end_tokens = ("<|user|>", "<|observation|>")

    def in_directory(self, directory: Path) -> bool:
        return has_text(directory, TOKENIZER_FILES, b"<|assistant|>")

    def in_tokenizer(self, config: Mapping[str, Any]) -> bool:
        return ROLE_TOKEN.search(repr(config)) is not None

    def chat_ids(self, tokenizer: Tokenizer, query: str, history: Any, role: str) -> list[int]:
        past = _messages_ids(tokenizer, check_messages(history))
        return tokenizer.get_prefix_tokens() + past + self.stream_ids(tokenizer, query, 1, role)

    def stream_ids(self, tokenizer: Tokenizer, query: str, number: int, role: str) -> list[int]:
        ids = message_ids(tokenizer, role, "", str(query))
        return [*ids, tokenizer.get_command("<|assistant|>")]

    def message_ids(
        self, tokenizer: Tokenizer, role: str, metadata: str, content: str
    ) -> list[int]:
        return message_ids(tokenizer, role, metadata, content)

    def template_ids(
        self, tokenizer: Tokenizer, messages: Any, add_generation_prompt: bool
    ) -> list[int]:
        ids = _messages_ids(tokenizer, check_messages(messages, "messages"))
        if add_generation_prompt:
            ids.append(tokenizer.get_command("<|assistant|>"))
        return tokenizer.get_prefix_tokens() + ids

    def template_text(self, messages: Any, add_generation_prompt: bool) -> str:
        """The published template's text."""
        parts = ["[gMASK]sop"]
        for message in check_messages(messages, "messages"):
            metadata = message.get("metadata") or ""
            parts.append(f"<|{message['role']}|>{metadata}\n {_content(message)}")
        return "".join(parts) + ("<|assistant|>" if add_generation_prompt else "")

    def asked(self, query: str, history: Any, role: str | None) -> list[Any]:
        return [*copy.deepcopy(list(history or [])), {"role": role, "content": query}]

    def answer(self, text: str, asked: list[Any]) -> tuple[Any, list[Any]]:
        return process_response(text, asked)

    def source_ids(
        self,
        tokenizer: Tokenizer,
        first: str,
        query: str,
        rounds: Sequence[tuple[str, str]],
        room: int,
        truncation: str,
        system: str = "",
    ) -> tuple[list[int], bool]:
        def frame(dropped: int) -> list[int]:
            """Everything but the query's own text, up to where that text goes."""
            ids = message_ids(tokenizer, "system", "", system) if system else []
            for i, (q, a) in enumerate(rounds[dropped:]):
                ids += message_ids(tokenizer, "user", "", first + q if i == 0 else q)
                ids += message_ids(tokenizer, "assistant", "", a)
            return ids + message_ids(tokenizer, "user", "", "")

        def before(dropped: int) -> str:
            return first if dropped == len(rounds) else ""

        end = [tokenizer.get_command("<|assistant|>")]
        ids = frame(0) + tokenizer.text_ids(before(0) + query) + end
        if len(ids) <= room:
            return ids, False
        if truncation == "vendored":
            return ids[:room], True

        def length(dropped: int) -> int:
            return len(frame(dropped)) + len(tokenizer.text_ids(before(dropped))) + len(end)

        dropped = rounds_to_drop(length, len(rounds), room)
        kept = frame(dropped)
        text = fit(tokenizer, before(dropped), query, "", room - len(kept) - len(end))
        return kept + text + end, True

    def answer_ids(self, tokenizer: Tokenizer, response: str) -> list[int]:
        """It begins with the empty line of metadata that the model has to write in a chat."""
        return tokenizer.text_ids("\n") + tokenizer.text_ids(response)


FAMILY = ChatGLM3()
