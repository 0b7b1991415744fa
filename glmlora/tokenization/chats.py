"""Conversations as ids: in the form of the tokenizer's family, or in a template of the checkpoint's
own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .. import families
from ..encoding import BatchEncoding, Encoder, TemplateOptions, refuse_options
from ..families import prompt as prompts
from ..families.rendered import rendered
from .chat_template import MARK, ChatTemplate, marked, written_by
from .special import content_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Chats(Encoder):
    """The part of a tokenizer that writes conversations."""

    name_or_path: str
    special_tokens: dict[str, int]
    special_tokens_map: dict[str, Any]
    encode_special_tokens: bool
    _family: families.Family
    _template: Any
    _plain_ids: set[int]
    _special_text: re.Pattern[str]

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's own: see `get_chat_template`."""
        return self.get_chat_template()

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str | None:
        """A template by its name, in a checkpoint that has several, or as it is given; without
        either the one that conversations have (with tools the one called tool_use), None where the
        checkpoint has none.
        """
        own = self._template
        if isinstance(own, list | tuple):  # as tokenizer_config.json has several
            named = [one for one in own if isinstance(one, Mapping)]
            own = {str(one.get("name")): one.get("template") for one in named}
        if isinstance(own, Mapping):
            wanted = chat_template or ("tool_use" if tools and "tool_use" in own else "default")
            own = own.get(wanted)
            chat_template = own if isinstance(own, str) else chat_template
        found = own if chat_template is None else chat_template
        return found if isinstance(found, str) and found else None

    def _chat_template(self, source: str, given: bool = False) -> ChatTemplate:
        own = self.special_tokens_map
        constants = {name: content_of(value) for name, value in own.items()}
        where = "chat_template" if given else f"{self.name_or_path}: chat_template"
        return ChatTemplate(source, where, constants, self.special_tokens)

    @cached_property
    def _own(self) -> ChatTemplate | None:
        """The checkpoint's template, where its family does not write the same by itself."""
        source = self.chat_template
        template = None if source is None else self._chat_template(source)
        if template is None or written_by(self._family, template, self):  # type: ignore[arg-type]
            return None
        return template

    @cached_property
    def writer(self) -> families.Family:
        """Who writes prompts: the family, or in front of it the checkpoint's own template."""
        if not self._family.chats_by_template or self._own is None:
            return self._family.as_released(self)  # type: ignore[arg-type]
        return rendered(self._family, self._own)

    def text_ids(self, text: str) -> list[int]:
        raise NotImplementedError

    def rendered_ids(self, messages: Any, add_generation_prompt: bool) -> list[int]:
        """Ids of a conversation in the checkpoint's own template."""
        assert self._own is not None
        return self._ids_of_text(self._marked_text(self._own, messages, add_generation_prompt))

    def _marked_text(
        self, template: ChatTemplate, messages: Any, add_generation_prompt: bool, **others: Any
    ) -> str:
        """Its text. Special tokens that messages name are marked, unless they are meant."""
        if not self.encode_special_tokens:
            plain = self._plain_ids
            names = [name for name, i in self.special_tokens.items() if i not in plain]
            names = sorted((n for n in names if not n.isalnum()), key=len, reverse=True)
            found = re.compile("|".join(map(re.escape, names)))
            messages = marked(messages, found)
            others = {key: marked(value, found) for key, value in others.items()}
        return template.text(messages, add_generation_prompt, **others)

    def _ids_of_text(self, text: str) -> list[int]:
        """Ids of a template's text: the names of special tokens are those, where none is marked."""
        ids: list[int] = []
        last = 0
        for match in self._special_text.finditer(text):
            i = self.special_tokens.get(match.group())
            if match.group().isalnum():  # a lone "sop" is a word
                continue
            ids += self.text_ids(text[last : match.start()].replace(MARK, ""))
            ids += self.get_prefix_tokens() if i is None else [i]
            last = match.end()
        return ids + self.text_ids(text[last:].replace(MARK, ""))

    def build_prompt(self, query: str, history: Any = None) -> str:
        """Prompt text of the families whose histories are (query, answer) pairs."""
        writer = families.default() if self._family.takes_role else self._family
        return writer.prompt_text(query, history)

    def build_chat_input(
        self, query: str, history: Any = None, role: str = "user"
    ) -> BatchEncoding:
        """Arrays (1, T) of a chat prompt, see `prompt.chat_ids`."""
        ids = prompts.chat_ids(self, query, history, role)  # type: ignore[arg-type]
        return self._finish([self._row(ids)], True, False, None, "np")

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        """Ids of one message: role, metadata and its newline, text. ValueError in families that
        have rounds of questions and answers.
        """
        return self._family.message_ids(self, role, metadata, message)  # type: ignore[arg-type]

    def apply_chat_template(
        self,
        messages: Any = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_tensors: str | None = None,
        return_dict: bool = False,
        *,
        conversation: Any = None,
        chat_template: str | None = None,
        tools: Any = None,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        **others: Unpack[TemplateOptions],
    ) -> Any:
        """A list of messages {"role", "content"} in the checkpoint's chat template, or a list of
        such lists. `conversation` is another name of messages.

        The family writes a template that is its own; another one, and `chat_template` where it is
        given (or named), is rendered by jinja2, which is an extra, in a process of its own with
        limits. tools: JSON objects, where the template takes them beside the messages. What else a
        template reads is given by name: `enable_thinking=False`, `documents`.

        Returns a list of ids; the text with `tokenize=False`; an `Array` (1, T) with
        `return_tensors`; a `BatchEncoding` with `return_dict`; lists of them for several. Padding
        and truncation as in `__call__`. Names of special tokens in messages stay text, unless the
        tokenizer was made with `encode_special_tokens=True`; those that are flagged as no special
        ones (`<think>`) are meant where jinja2 renders. Raises ValueError for messages that the
        template refuses, naming it; TypeError for an argument that it does not read; ImportError
        where jinja2 is needed and missing.
        """
        messages = conversation if messages is None else messages
        several = isinstance(messages, list | tuple) and messages and _is_rows(messages[0])
        rows = list(messages) if several else [messages]
        source = self.get_chat_template(chat_template, tools)
        if chat_template is not None or source != self.chat_template:
            template = self._chat_template(source, True) if source else None
        else:
            template = self._own
        if template is None:
            texts, ids = self._by_family(rows, add_generation_prompt, tokenize, tools, others)
        else:
            given = {n: v for n, v in {"tools": tools, **others}.items() if v is not None}
            read = {n: given.pop(n) for n in list(given) if n in template.variables}
            unknown = [n for n in given if n not in TemplateOptions.__annotations__]
            template.check_variables(unknown, "apply_chat_template")
            refuse_options(given, TemplateOptions, self.apply_chat_template)
            texts = [
                self._marked_text(template, row, add_generation_prompt, **read) for row in rows
            ]
            ids = [self._ids_of_text(text) for text in texts] if tokenize else []
            texts = [text.replace(MARK, "") for text in texts]
        if not tokenize:
            return texts if several else texts[0]
        encoding = self._encoded(
            [(row, None) for row in ids],
            not several,
            {
                "add_special_tokens": False,
                "padding": padding,
                "truncation": truncation,
                "max_length": max_length,
                "return_tensors": return_tensors,
            },
            self.apply_chat_template,
        )
        return encoding if return_dict else encoding["input_ids"]

    def _by_family(
        self,
        rows: list[Any],
        add_generation_prompt: bool,
        tokenize: bool,
        tools: Any,
        others: TemplateOptions,
    ) -> tuple[list[str], list[list[int]]]:
        """(texts, []) or ([], ids) of conversations as the family writes them."""
        family, given = self._family, dict(others)
        thinking = given.pop("enable_thinking", None)
        if thinking is not None and bool(thinking) != family.thinks:
            always = "always thinks" if family.thinks else "has no thoughts"
            raise ValueError(f"enable_thinking: {family.title} {always}, got {thinking!r}")
        if tools and not family.takes_tools:
            raise ValueError(
                f"tools: {family.title} has none beside the messages, got {tools!r:.80}; a message "
                "holds them: {'role': 'system', 'content': .., 'tools': ..}"
            )
        refuse_options(given, TemplateOptions, self.apply_chat_template)
        if tools:
            told = {"role": "system", "content": "", "tools": tools}
            rows = [[told, *row] for row in rows]
        how: Any = (self, add_generation_prompt)
        if not tokenize:
            return [family.template_text(how[0], row, how[1]) for row in rows], []
        return [], [list(family.template_ids(how[0], row, how[1])) for row in rows]


def _is_rows(value: Any) -> bool:
    return isinstance(value, list | tuple)
