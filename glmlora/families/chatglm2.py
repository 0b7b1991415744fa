"""ChatGLM2: the rounds of a conversation in one text, numbered from 1."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .family import Family, Tokenizer
from .messages import TRAINING_TIME, check_messages, check_rounds
from .vocabulary import TOKENIZER_FILES, has_text

ANSWER = "\n\n答："


def asked(number: int, query: str) -> str:
    """One round's question and an open answer."""
    return f"[Round {number}]\n\n问：{query}{ANSWER}"


def build_prompt(query: str, history: Any = None) -> str:
    """Past rounds, then the query and an open answer.

    history: list of (query, answer) pairs or None; what is not a string is formatted by `str`.
    Raises ValueError for an item that is no pair.
    """
    rounds = check_rounds(history)
    past = [asked(i, q) + a + "\n\n" for i, (q, a) in enumerate(rounds, 1)]
    return "".join(past) + asked(len(rounds) + 1, str(query))


def process_response(text: str) -> str:
    """The answer: stripped, with the training-time placeholder filled in."""
    return text.strip().replace(*TRAINING_TIME)


def messages_as_rounds(messages: Any, add_generation_prompt: bool) -> str:
    """Role messages as ChatGLM2's rounds; a system message goes in front of the next query."""
    text, system, query, number = "", "", None, 1
    for i, message in enumerate(check_messages(messages, "messages")):
        role, content = message["role"], str(message["content"])
        if role == "system" and query is None and "tools" not in message:
            system += content
        elif role == "user" and query is None:
            query, system = system + content, ""
        elif role == "assistant" and query is not None:
            text += asked(number, query) + content + "\n\n"
            query, number = None, number + 1
        else:
            raise ValueError(
                f"messages[{i}]: ChatGLM2 takes user and assistant in turns after system messages "
                f"without tools, got {role!r} here"
            )
    if system or (query is None and add_generation_prompt):
        raise ValueError("messages: the last one must be from the user, there is nothing to answer")
    if query is None:
        return text
    text += asked(number, query)
    return text if add_generation_prompt else text.removesuffix("答：")


def _only_user(role: str) -> None:
    if role != "user":
        raise ValueError(f"role: ChatGLM2 knows only 'user', got {role!r}")


class ChatGLM2(Family):
    name, alias, title = "v2", "chatglm2", "ChatGLM2"
    named = re.compile(r"chatglm[-_ ]?2(?!\d)|codegeex[-_ ]?2(?!\d)")
    checkpoint = "THUDM/chatglm2-6b"
    base = re.compile(r"codegeex2-6b(-int[48])?")
    special_tokens = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
    template_mark = "[Round"
    takes_role = False

    def in_directory(self, directory: Path) -> bool:
        return has_text(directory, TOKENIZER_FILES, b"[Round {}]")

    def rope_mode(self, rope_ratio: float) -> str:
        return "interpolate" if rope_ratio != 1 else "base"

    def chat_ids(self, tokenizer: Tokenizer, query: str, history: Any, role: str) -> list[int]:
        _only_user(role)
        return tokenizer.get_prefix_tokens() + tokenizer.text_ids(build_prompt(query, history))

    def stream_ids(self, tokenizer: Tokenizer, query: str, number: int, role: str) -> list[int]:
        """The separator and the round without the dummy space that encoding puts in front."""
        _only_user(role)
        ids = tokenizer.text_ids("\n\n" + asked(number, str(query)))
        return ids[1:] if ids[0] == tokenizer.dummy_space_id else ids

    def prompt_text(self, query: str, history: Any = None) -> str:
        """See `build_prompt`."""
        return build_prompt(query, history)

    def template_ids(
        self, tokenizer: Tokenizer, messages: Any, add_generation_prompt: bool
    ) -> list[int]:
        text = messages_as_rounds(messages, add_generation_prompt)
        return tokenizer.get_prefix_tokens() + tokenizer.text_ids(text)

    def template_text(
        self, tokenizer: Tokenizer, messages: Any, add_generation_prompt: bool
    ) -> str:
        return messages_as_rounds(messages, add_generation_prompt)

    def asked(self, query: str, history: Any, role: str | None) -> list[Any]:
        return [*(history or []), query]

    def answer(self, text: str, asked: list[Any]) -> tuple[Any, list[Any]]:
        response = process_response(text)
        return response, [*asked[:-1], (asked[-1], response)]

    def source_ids(
        self,
        tokenizer: Tokenizer,
        first: str,
        query: str,
        rounds: Sequence[tuple[str, str]],
        system: str,
    ) -> list[int]:
        kept = list(rounds)
        if kept:  # a system message stands in front of the first query
            kept[0] = (system + kept[0][0], kept[0][1])
        text = build_prompt(query if kept else system + query, kept)
        return tokenizer.text_ids(first + text)


FAMILY = ChatGLM2()
