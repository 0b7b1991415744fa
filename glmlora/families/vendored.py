"""Chats in the text that the original training code writes for every family: what a model that was
trained with `template="vendored"` has learnt to answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from . import default
from .family import Family, Tokenizer

TEMPLATES = ("auto", "vendored")  # the family's own chat template; the original training code's


def in_template(family: Family, template: str) -> Family:
    """The family with prompts in a template, one of TEMPLATES. Histories and ends stay its own."""
    return family if template == "auto" or family is default() else _vendored(family)


@cache
def _vendored(family: Family) -> Family:
    kind: type[Family] = type("Vendored", (_Vendored, type(family)), {})
    return kind()


class _Vendored(Family):
    """In front of a family: its prompts are the default family's."""

    def chat_ids(self, tokenizer: Tokenizer, query: str, history: Any, role: str) -> list[int]:
        messages = self.asked(query, history, role)
        if not _are_messages(messages):
            return default().chat_ids(tokenizer, query, history, role)
        return default().template_ids(tokenizer, messages, add_generation_prompt=True)

    def stream_ids(self, tokenizer: Tokenizer, query: str, number: int, role: str) -> list[int]:
        if _are_messages(self.asked(query, [], role)):  # two of which are a round
            number = (number + 1) // 2
        return default().stream_ids(tokenizer, query, number, role)

    def answer(self, text: str, asked: list[Any]) -> tuple[Any, list[Any]]:
        if not _are_messages(asked):
            return super().answer(text, asked)
        response, _ = default().answer(text, [""])
        return response, [*asked, {"role": "assistant", "metadata": "", "content": response}]


def _are_messages(history: Sequence[Any]) -> bool:
    return isinstance(history[-1], dict)
