"""ChatGLM3: messages between role ids; tools in the system message, their calls in an answer."""

from __future__ import annotations

import ast
import copy
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .family import Family, Tokenizer
from .messages import ROLES, TRAINING_TIME, check_messages, check_role, record_messages, with_tokens
from .vocabulary import TOKENIZER_FILES, has_text

ROLE_TOKENS = tuple(f"<|{role}|>" for role in ROLES)
ROLE_TOKEN = re.compile("|".join(map(re.escape, ROLE_TOKENS)))
TOOL_CALL_MAX = 1 << 16  # characters of a tool call that are parsed


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
    base: re.Pattern[str] | None = re.compile(r"chatglm3-6b-base")
    special_tokens = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *ROLE_TOKENS)
    in_texts = ("[gMASK]", *ROLE_TOKENS)
    chats_by_template = True
    template_mark = "<|assistant|>"
    template_marks: tuple[str, ...] = (
        "{% if loop.first %}[gMASK]sop<|{{ message['role'] }}|>\n {{ message['content'] }}",
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    )
    role_tokens = shows_special_tokens = True
    end_tokens = ("<|user|>", "<|observation|>")
    before_content = " "  # in the template's text: the dummy space of a content encoded apart
    after_opening = ""  # what a prompt begins of the answer, behind <|assistant|>
    always_opens = False  # a template's text ends in <|assistant|> even where none is asked for

    def in_directory(self, directory: Path) -> bool:
        return has_text(directory, TOKENIZER_FILES, b"<|assistant|>")

    def in_tokenizer(self, config: Mapping[str, Any]) -> bool:
        return ROLE_TOKEN.search(repr(config)) is not None

    # Messages

    def check(self, messages: Any, name: str = "history") -> list[dict[str, Any]]:
        """See `check_messages`."""
        return check_messages(messages, name)

    def parts(
        self, tokenizer: Tokenizer, message: Mapping[str, Any]
    ) -> Iterator[tuple[str, str, str]]:
        """(role, metadata, content) of what a message is in a prompt."""
        content = str(message["content"])
        if message["role"] == "system" and "tools" in message:
            content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
        yield message["role"], message.get("metadata") or "", content

    def all_parts(
        self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[str, str, str]]:
        """The parts of messages in the order of a prompt."""
        return (part for message in messages for part in self.parts(tokenizer, message))

    def messages_ids(
        self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]
    ) -> list[int]:
        """Ids of messages that are checked."""
        parts = self.all_parts(tokenizer, messages)
        return [i for part in parts for i in self.message_ids(tokenizer, *part)]

    def opening_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Ids at a prompt's end, behind which the model answers."""
        return [tokenizer.get_command("<|assistant|>")]

    def message_ids(
        self, tokenizer: Tokenizer, role: str, metadata: str, content: str
    ) -> list[int]:
        """Role id, metadata with its newline, content, encoded separately. Role markers inside the
        texts stay plain text.
        """
        check_role(role)
        header = tokenizer.text_ids(f"{metadata}\n")
        said = with_tokens(tokenizer, content, self.in_messages)
        return [tokenizer.get_command(f"<|{role}|>"), *header, *said]

    def chat_ids(self, tokenizer: Tokenizer, query: str, history: Any, role: str) -> list[int]:
        past = self.messages_ids(tokenizer, self.check(history))
        return tokenizer.get_prefix_tokens() + past + self.stream_ids(tokenizer, query, 1, role)

    def stream_ids(self, tokenizer: Tokenizer, query: str, number: int, role: str) -> list[int]:
        check_role(role)
        ids = self.messages_ids(tokenizer, [{"role": role, "content": query}])
        return [*ids, *self.opening_ids(tokenizer)]

    def template_ids(
        self, tokenizer: Tokenizer, messages: Any, add_generation_prompt: bool
    ) -> list[int]:
        ids = self.messages_ids(tokenizer, self.check(messages, "messages"))
        if add_generation_prompt or self.always_opens:
            ids += self.opening_ids(tokenizer)
        return tokenizer.get_prefix_tokens() + ids

    def template_text(
        self, tokenizer: Tokenizer, messages: Any, add_generation_prompt: bool
    ) -> str:
        """The published template's text."""
        text = "".join(self.prefix_tokens)
        checked = self.check(messages, "messages")
        for role, metadata, content in self.all_parts(tokenizer, checked):
            text += f"<|{role}|>{metadata}\n{self.before_content}{content}"
        opens = add_generation_prompt or self.always_opens
        return text + (f"<|assistant|>{self.after_opening}" if opens else "")

    # Answers

    def asked(self, query: str, history: Any, role: str | None) -> list[Any]:
        return [*copy.deepcopy(list(history or [])), {"role": role, "content": query}]

    def answer(self, text: str, asked: list[Any]) -> tuple[Any, list[Any]]:
        """The answer is a string; or, where the model names a tool, {"name", "parameters"} if the
        history starts with a system message with `tools` and the call can be read; else {"name",
        "content"}. The history is a deep copy.
        """
        history = copy.deepcopy(list(asked))
        answer: str | dict[str, Any] = ""
        for part in text.split("<|assistant|>"):
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
            parameters = self.tool_parameters(content) if has_tools else None
            if parameters is None:
                answer = {"name": name, "content": content}
            else:
                answer = {"name": name, "parameters": parameters}
        return answer, history

    def tool_parameters(self, content: str) -> dict[str, Any] | None:
        """Arguments of the call of a tool; None where they cannot be read."""
        return _tool_call(content)

    # Training

    def source_ids(
        self,
        tokenizer: Tokenizer,
        first: str,
        query: str,
        rounds: Sequence[tuple[str, str]],
        system: str,
    ) -> list[int]:
        messages = record_messages(first, query, rounds, system)
        return [*self.messages_ids(tokenizer, messages), *self.opening_ids(tokenizer)]

    def answer_ids(self, tokenizer: Tokenizer, response: str) -> list[int]:
        """It begins with the empty line of metadata that the model has to write in a chat."""
        return tokenizer.text_ids("\n") + tokenizer.text_ids(response)


FAMILY = ChatGLM3()
