"""Answers that have a thought in front: it is told apart, and in no later prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .chatglm3 import ChatGLM3
from .family import Tokenizer

OPEN, CLOSE = "<think>", "</think>"


def split_thought(text: str, opened: bool) -> tuple[str | None, str]:
    """(thought, what is said behind it) of an answer so far; None for an answer without a thought.

    opened: the prompt opened one, so the answer begins inside it.
    """
    if not opened:
        begin = text.strip()
        if begin and OPEN.startswith(begin):  # on the way
            return "", ""
        if not begin.startswith(OPEN):
            return None, text
    thought, _, said = text.partition(CLOSE)
    return thought.strip().removeprefix(OPEN).strip(), said.strip()


class Thinks(ChatGLM3):
    """Of families whose answers may begin with a thought."""

    opens_thought = False  # the prompt does

    def answer(self, text: str, asked: list[Any]) -> tuple[Any, list[Any]]:
        """The answer is what stands behind the thought, "" while there is nothing; the thought is
        `thought` of the history's last message.
        """
        thought, said = split_thought(text, self.opens_thought)
        if thought is None:
            return super().answer(text, asked)
        name = said.partition("\n")[0].strip()
        if name not in _tool_names(asked):  # the first line is the answer's own
            said = f"\n{said}"
        response, history = super().answer(said, asked)
        history[-1]["thought"] = thought
        return response, history

    def answer_ids(self, tokenizer: Tokenizer, response: str) -> list[int]:
        """The response with the thought that it has; in a thought that the prompt opened, behind an
        empty one where it has none.
        """
        if not self.opens_thought:
            if CLOSE not in response:
                return super().answer_ids(tokenizer, response)
            return with_tokens(tokenizer, f"\n{response}", (OPEN, CLOSE))
        whole = response.removeprefix(OPEN) if CLOSE in response else f"{CLOSE}\n{response}"
        return with_tokens(tokenizer, whole, (CLOSE,))


def with_tokens(tokenizer: Tokenizer, text: str, names: tuple[str, ...]) -> list[int]:
    """Ids of a text in which the special tokens of `names` are meant, each once: those that there
    are.
    """
    for i, name in enumerate(names):
        before, found, after = text.partition(name)
        if found and name in tokenizer.special_tokens:
            parts = [with_tokens(tokenizer, part, names[i + 1 :]) for part in (before, after)]
            return [*parts[0], tokenizer.get_command(name), *parts[1]]
    return tokenizer.text_ids(text) if text else []


def _tool_names(messages: list[Any]) -> set[str]:
    """Names of the functions that messages tell of."""
    names = set()
    for message in messages:
        for tool in message.get("tools") or ():
            function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
            names.add(str(function.get("name", "")) if isinstance(function, Mapping) else "")
    return names - {""}
