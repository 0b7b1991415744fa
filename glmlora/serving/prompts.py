"""From OpenAI's messages to the ids of a prompt in the form of the model's family, and from new ids
back to what OpenAI calls a message: content, thoughts, calls of tools.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

from .. import families
from ..generation.chat import chat_family
from ..model.kept import Kept
from ..questions import fit_question
from ..tokenization import TextStream
from .schema import AssistantMessage, Content, Message, Tool, ToolMessage


def text_of(content: Content | None) -> str:
    """A content, or its parts together."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


class Writer:
    """Prompts and answers of a model in the form of its family."""

    def __init__(self, model: Kept, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self.family: families.Family = chat_family(model, tokenizer)  # type: ignore[arg-type]
        self.renders = hasattr(self.family, "template")  # a template of the checkpoint's own does

    def ids(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        """Ids of a conversation that ends in what the model is to answer. ValueError naming a
        message that the family does not have, or a field.
        """
        if messages[-1].role == "assistant":
            raise ValueError(
                "messages: the last one is the assistant's: expected one to be answered"
            )
        if self.renders:
            return self._rendered(messages, tools)
        told = [tool.model_dump(exclude_none=True) for tool in tools]
        if told and not self.family.calls_tools:
            raise ValueError(f"tools: {self.family.title} calls none")
        own: list[dict[str, Any]] = []
        for number, message in enumerate(messages):
            own += self._own(message, f"messages[{number}]")
        if len(own) == 1 and own[0]["role"] == "user":
            task, template = self.model.task, self.model.prompt_template
            own[0]["content"] = fit_question(task, own[0]["content"], self.tokenizer, template)
        if told:
            if own[0]["role"] != "system":
                own.insert(0, {"role": "system", "content": ""})
            own[0]["tools"] = self.family.told_tools(told)
        return list(self.family.template_ids(self.tokenizer, own, True))

    def _own(self, message: Message, where: str) -> list[dict[str, Any]]:
        """A message as the family has it: calls of tools are messages of their own."""
        content = text_of(message.content)
        if isinstance(message, ToolMessage):
            if not self.family.calls_tools:
                raise ValueError(f"{where}: role: {self.family.title} has no 'tool'")
            return [{"role": "observation", "content": content}]
        if not isinstance(message, AssistantMessage):
            role = "user" if message.role == "user" else "system"
            return [{"role": role, "content": content}]
        calls = message.tool_calls or []
        if calls and not self.family.calls_tools:
            raise ValueError(f"{where}: tool_calls: {self.family.title} calls none")
        found = [{"role": "assistant", "content": content}] if content or not calls else []
        for call in calls:
            text = self.family.call_text(_arguments(call.function.arguments, where))
            found.append({"role": "assistant", "metadata": call.function.name, "content": text})
        return found

    def _rendered(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        plain = []
        for number, message in enumerate(messages):
            plain.append(message.model_dump(exclude_none=True))
            plain[-1]["content"] = text_of(message.content)
            if message.role == "developer":
                plain[-1]["role"] = "system"
            for call in plain[-1].get("tool_calls", ()):
                arguments = call["function"]["arguments"]
                call["function"]["arguments"] = _arguments(arguments, f"messages[{number}]")
        told = [tool.model_dump(exclude_none=True) for tool in tools] or None
        try:
            return list(self.tokenizer.apply_chat_template(plain, True, tools=told))
        except (TypeError, ValueError) as error:
            raise ValueError(f"messages: {error}") from None


def _arguments(text: str, where: str) -> dict[str, Any]:
    """A call's arguments, or ValueError."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: arguments: expected a JSON object, got {text!r:.60}")
    return found


class Answer:
    """What an answer is so far: take ids, and ask for what is new of content and thought.

    plain: nothing but content, as a grammar or a label has it. stops: texts that end it, left out.
    """

    def __init__(
        self,
        writer: Writer,
        tools: Sequence[Tool] = (),
        stops: Sequence[str] = (),
        plain: bool = False,
        chat: bool = True,
    ):
        self._writer = writer
        self._decoded = TextStream(writer.tokenizer)
        self._stops = stops
        self._plain, self._chat = plain, chat
        self._names = {tool.function.name for tool in tools}
        told = [{"function": {"name": name}} for name in sorted(self._names)]
        self._asked: list[Any] = [""]
        if writer.family.takes_role:
            first = {"role": "system", "content": "", **({"tools": told} if told else {})}
            self._asked = [first, {"role": "user", "content": ""}]
        self._sent = {"content": "", "reasoning_content": ""}
        self.text = ""  # decoded, up to a stop
        self.content, self.thought = "", ""
        self.call: dict[str, Any] | None = None  # name and parameters
        self.stopped = False

    def feed(self, token: int) -> None:
        """Take a new id that is no end."""
        found = self._decoded.feed(token)
        if found is None or self.stopped:
            return
        self._take(found)

    def close(self) -> None:
        """No id follows: half a character is shown as such."""
        if not self.stopped:
            self._take(self._decoded.text)

    def _take(self, text: str) -> None:
        begin = max(0, len(self.text) - max(map(len, self._stops), default=0))
        places = [at for stop in self._stops if (at := text.find(stop, begin)) >= 0]
        self.stopped = bool(places)
        self.text = text[: min(places)] if places else text
        self._read()

    def _read(self) -> None:
        """content, thought and call of the text so far."""
        if self._plain:
            self.content = self.text.strip()
            return
        if not self._chat:
            self.content = self.text
            return
        response, history = self._writer.family.answer(self.text, self._asked)
        last = history[-1]
        self.thought = last.get("thought") or "" if isinstance(last, dict) else ""
        self.call, self.content = None, ""
        if isinstance(response, str):
            self.content = response
        elif "parameters" in response and self._names:
            self.call = response
        else:  # nobody told of a tool: what the model wrote is text
            self.content = self.text.strip()

    @property
    def _may_be_a_call(self) -> bool:
        """Whether what was written may still become the name of a tool, or is one."""
        if self._plain or not self._names:
            return False
        text = self.text
        if self.thought:
            text = text.rpartition("</think>")[2]
        line, newline, _ = text.lstrip(" ").partition("\n")
        return bool(line.strip()) and (not newline or bool(line.strip()))

    def news(self, last: bool = False) -> dict[str, str]:
        """What was not told before, by field: all of it only where it is the last time, since the
        end of a text may become part of a stop, or of a tool's name.
        """
        found = {}
        for field, text in (("reasoning_content", self.thought), ("content", self.content)):
            if not last:
                if field == "content" and self._may_be_a_call:
                    continue
                text = text[: len(text) - self._held_back(text)]
            sent = self._sent[field]
            if len(text) > len(sent) and text.startswith(sent):
                found[field] = text[len(sent) :]
                self._sent[field] = text
        return found

    def _held_back(self, text: str) -> int:
        """Characters at the end of a text that a stop may begin with."""
        most = 0
        for stop in self._stops:
            for n in range(min(len(stop) - 1, len(text)), most, -1):
                if text.endswith(stop[:n]):
                    most = n
                    break
        return most

    def tool_calls(self) -> list[dict[str, Any]] | None:
        """The call, as OpenAI has it."""
        if self.call is None:
            return None
        arguments = json.dumps(self.call["parameters"], ensure_ascii=False)
        function = {"name": self.call["name"], "arguments": arguments}
        return [{"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}]
