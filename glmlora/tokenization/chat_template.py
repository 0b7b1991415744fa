"""A checkpoint's own chat template, for conversations and for what training learns behind a prompt.
Whether a family writes the same by itself is found out by comparing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from .. import rendering, tell
from ..families import Family
from ..families.family import Tokenizer
from ..families.thoughts import OPEN
from ..names import did_you_mean

MARK = "\ufdd0"  # no character: stands in typed names of special tokens, so that they stay text
_ANSWER = "The answer of the assistant."
_GIVEN = ("messages", "add_generation_prompt")
# What a template and a family write alike, if they do: every kind of message, a thought, blanks.
_PROBES: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": " q\n"}],
    [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"},
    ],
    [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": f"{OPEN}t</think>\n\na"},
        {"role": "user", "content": "r"},
    ],
)


class ChatTemplate:
    """A template in the language of jinja2, rendered as transformers renders it.

    source: its text. where: what errors call it. constants: what it may read beside the
    conversation, such as `eos_token`. names: special tokens that it may write.
    """

    def __init__(self, source: str, where: str, constants: Mapping[str, Any], names: Iterable[str]):
        self.source, self.where = source, where
        self.constants, self.names = dict(constants), tuple(names)

    def text(
        self,
        messages: Any,
        add_generation_prompt: bool = False,
        tools: Any = None,
        documents: Any = None,
        **variables: Any,
    ) -> str:
        """A conversation. ValueError naming the template for one that it refuses, and for a
        template that cannot be rendered; TypeError for what is no message.
        """
        given = {
            **self.constants,
            "messages": checked_messages(messages),
            "tools": _checked_objects("tools", tools),
            "documents": _checked_objects("documents", documents),
            "add_generation_prompt": bool(add_generation_prompt),
            **variables,
        }
        try:
            return rendering.render(self.source, given)
        except rendering.TemplateError as error:
            raise ValueError(f"{self.where}: {error}") from None
        except ImportError as error:
            raise ImportError(f"{self.where} is not one that is known here; {error}") from None

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names of what else it reads: `tools`, `documents`, `enable_thinking`, say."""
        try:
            read = rendering.variables_of(self.source)
        except rendering.TemplateError as error:
            raise ValueError(f"{self.where}: {error}") from None
        return read - {*_GIVEN, *self.constants}

    def check_variables(self, given: Iterable[str], function: str) -> None:
        """TypeError for a variable that it does not read."""
        for name in given:
            if name not in self.variables:
                near = did_you_mean(name, self.variables)
                raise TypeError(
                    f"{function}: unknown argument {name!r}, which {self.where} does not read{near}"
                )

    # What training learns

    @cached_property
    def prompt_end(self) -> tuple[str, str]:
        """(a prompt that asks for an answer, the conversation with the answer _ANSWER)."""
        asked = [{"role": "user", "content": "q"}]
        said = [*asked, {"role": "assistant", "content": _ANSWER}]
        return self.text(asked, True), self.text(said)

    @cached_property
    def opens_thought(self) -> bool:
        """Whether a prompt ends inside a thought."""
        return self.prompt_end[0].rstrip().endswith(OPEN)

    @cached_property
    def around_answer(self) -> tuple[str, str, str | None]:
        """What the template writes between prompt and answer, between answer and end, and the
        special token that is the end; None where none follows.
        """
        prompt, whole = self.prompt_end
        before, found, after = whole.rpartition(_ANSWER)
        if not found:  # it writes no answers: a prompt is all there is
            return "", "", None
        lead = before[len(prompt) :] if before.startswith(prompt) else ""
        end = re.match(r"\s*(" + "|".join(map(re.escape, self.names)) + ")", after)
        if self.names and end:
            return lead, end[0][: -len(end[1])], end[1]
        return lead, "", None


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages without fields that are None. TypeError, ValueError naming what is none."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages: expected a list of messages, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages: expected at least one, got none")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"messages[{i}]: expected a message {{'role', 'content'}}, got {message!r:.80}"
            )
    return [{k: v for k, v in message.items() if v is not None} for message in messages]


def _checked_objects(name: str, values: Any) -> Any:
    """None, or a list of JSON objects; ValueError for others."""
    if values is None:
        return None
    if not isinstance(values, list | tuple) or not all(isinstance(v, Mapping) for v in values):
        raise ValueError(f"{name}: expected a list of JSON objects, got {values!r:.80}")
    return list(values)


def marked(value: Any, names: re.Pattern[str]) -> Any:
    """Texts in messages and tools, with MARK in every name of a special token."""
    if isinstance(value, str):
        return names.sub(lambda found: found[0][0] + MARK + found[0][1:], value)
    if isinstance(value, Mapping):
        return {key: marked(item, names) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [marked(item, names) for item in value]
    return value


def written_by(family: Family, template: ChatTemplate, tokenizer: Tokenizer) -> bool:
    """Whether the family writes by itself what a template writes. Where jinja2 is missing, the
    template's marks decide.
    """
    if not rendering.available():
        marks = family.template_marks
        return bool(marks) and all(mark in template.source for mark in marks)
    if "enable_thinking" in template.variables:
        return False
    try:
        with tell.silence():
            return all(
                template.text(messages, prompt) == family.template_text(tokenizer, messages, prompt)
                for messages in _PROBES
                for prompt in (True, False)
            )
    except ValueError:  # what one of them refuses, the other may write
        return False
