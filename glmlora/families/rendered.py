"""Chats in a template that a checkpoint brings: prompts, and what training learns behind them.
Histories stay the family's, and so do answers, but for thoughts that the template opens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from .family import Family, Tokenizer
from .messages import record_messages
from .thoughts import CLOSE, OPEN, Thinks, with_tokens


class Template(Protocol):
    """What is known of a template: see tokenization/chat_template.py."""

    @property
    def opens_thought(self) -> bool: ...
    @property
    def around_answer(self) -> tuple[str, str, str | None]: ...


def rendered(family: Family, template: Template) -> Family:
    """The family with prompts in a template, which the tokenizer renders. For families of role
    messages.
    """
    kind: type[_Rendered] = type("Rendered", (_Rendered, type(family)), {"template": template})
    return kind()


class _Rendered(Thinks):
    """In front of a family."""

    template: Template
    takes_tools = True

    @property
    def opens_thought(self) -> bool:  # type: ignore[override]
        return self.template.opens_thought

    # A chat

    def chat_ids(self, tokenizer: Tokenizer, query: str, history: Any, role: str) -> list[int]:
        messages = [*_turns(history), {"role": role or "user", "content": query}]
        return tokenizer.rendered_ids(messages, True)

    def later_ids(
        self, tokenizer: Tokenizer, past: list[int], query: str, history: Any, role: str
    ) -> list[int]:
        """The whole conversation, since a template may write a turn otherwise when it is past."""
        return self.chat_ids(tokenizer, query, history, role)

    def template_ids(
        self, tokenizer: Tokenizer, messages: Any, add_generation_prompt: bool
    ) -> list[int]:
        return tokenizer.rendered_ids(messages, add_generation_prompt)

    def end_ids(self, tokenizer: Tokenizer, eos_token_ids: list[int]) -> list[int]:
        own = super().end_ids(tokenizer, eos_token_ids)
        return list(dict.fromkeys([*own, self.end_id(tokenizer)]))

    # Training

    def framed(self, tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
        return list(ids)  # the template has it all

    def end_id(self, tokenizer: Tokenizer) -> int:
        """The token that the template writes behind an answer, else the family's."""
        end = self.template.around_answer[2]
        return super().end_id(tokenizer) if end is None else tokenizer.get_command(end)

    def source_ids(
        self,
        tokenizer: Tokenizer,
        first: str,
        query: str,
        rounds: Sequence[tuple[str, str]],
        system: str,
    ) -> list[int]:
        messages = record_messages(first, query, rounds, system)
        return tokenizer.rendered_ids(messages, True)

    def answer_ids(self, tokenizer: Tokenizer, response: str) -> list[int]:
        """As the template writes it behind a prompt, up to its end."""
        lead, tail, _ = self.template.around_answer
        if self.opens_thought:
            return [*super().answer_ids(tokenizer, response), *tokenizer.text_ids(tail)]
        if CLOSE in response:  # its own thought in place of an empty one
            lead = lead.partition(OPEN)[0]
        return with_tokens(tokenizer, f"{lead}{response}{tail}", (OPEN, CLOSE))


def _turns(history: Any) -> list[dict[str, Any]]:
    """Messages of a history, with thoughts under the name that templates know, too."""
    if history is None:
        return []
    turns = []
    for i, message in enumerate(history):
        if not isinstance(message, Mapping):
            raise ValueError(f"history[{i}]: expected a message {{'role', 'content'}}")
        turns.append(dict(message))
        if message.get("thought"):
            turns[-1].setdefault("reasoning_content", message["thought"])
    return turns
