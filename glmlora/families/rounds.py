"""Families whose histories are (query, answer) pairs: the rounds of a conversation in one text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .family import Family, Tokenizer
from .messages import TRAINING_TIME, check_messages, check_rounds


def process_response(text: str) -> str:
    """The answer: stripped, with the training-time placeholder filled in."""
    return text.strip().replace(*TRAINING_TIME)


class Rounds(Family):
    """See `Family`. `round_form` is a round's question, of its number and query, and an open answer
    behind `answer_mark`; `after_answer` stands between rounds.
    """

    takes_role = False
    round_form: str
    answer_mark = "答："
    after_answer: str
    first_round = 1
    bare_first = False  # a question without history is the prompt, and no round

    def prompt_text(self, query: str, history: Any = None) -> str:
        """Past rounds, then the query and an open answer.

        history: list of (query, answer) pairs or None; what is not a string is formatted by `str`.
        Raises ValueError for an item that is no pair.
        """
        rounds = check_rounds(history)
        if self.bare_first and not rounds:
            return str(query)
        return self._past(rounds) + self.asked_text(self.first_round + len(rounds), str(query))

    def asked_text(self, number: int, query: str) -> str:
        """One round's question and an open answer."""
        return self.round_form.format(number, query)

    def _past(self, rounds: Sequence[tuple[str, str]]) -> str:
        numbered = enumerate(rounds, self.first_round)
        return "".join(self.asked_text(i, q) + a + self.after_answer for i, (q, a) in numbered)

    def messages_text(self, messages: Any, add_generation_prompt: bool) -> str:
        """Role messages as rounds; a system message goes in front of the next query."""
        system, query, rounds = "", None, []
        for i, message in enumerate(check_messages(messages, "messages")):
            role, content = message["role"], str(message["content"])
            if role == "system" and query is None and "tools" not in message:
                system += content
            elif role == "user" and query is None:
                query, system = system + content, ""
            elif role == "assistant" and query is not None:
                rounds.append((query, content))
                query = None
            else:
                raise ValueError(
                    f"messages[{i}]: {self.title} takes user and assistant in turns after system "
                    f"messages without tools, got {role!r} here"
                )
        if system or (query is None and add_generation_prompt):
            raise ValueError(
                "messages: the last one must be from the user, there is nothing to answer"
            )
        if query is None:
            return self._past(rounds)
        text = self.prompt_text(query, rounds)
        if add_generation_prompt or (self.bare_first and not rounds):
            return text
        return text.removesuffix(self.answer_mark)

    def chat_ids(self, tokenizer: Tokenizer, query: str, history: Any, role: str) -> list[int]:
        self._only_user(role)
        return tokenizer.as_prompt(tokenizer.text_ids(self.prompt_text(query, history)))

    def _only_user(self, role: str) -> None:
        if role != "user":
            raise ValueError(f"role: {self.title} knows only 'user', got {role!r}")

    def template_ids(
        self, tokenizer: Tokenizer, messages: Any, add_generation_prompt: bool
    ) -> list[int]:
        text = self.messages_text(messages, add_generation_prompt)
        return tokenizer.as_prompt(tokenizer.text_ids(text))

    def template_text(
        self, tokenizer: Tokenizer, messages: Any, add_generation_prompt: bool
    ) -> str:
        return self.messages_text(messages, add_generation_prompt)

    def asked(self, query: str, history: Any, role: str | None) -> list[Any]:
        return [*(history or []), query]

    def answer(self, text: str, asked: list[Any]) -> tuple[Any, list[Any]]:
        response = self.response(text)
        return response, [*asked[:-1], (asked[-1], response)]

    def response(self, text: str) -> str:
        """An answer as users see it."""
        return process_response(text)

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
        text = self.prompt_text(query if kept else system + query, kept)
        return tokenizer.text_ids(first + text)
