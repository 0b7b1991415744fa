"""Conversations as lists of messages: OpenAI's (`role`, `content`), ShareGPT's (`from`, `value`),
and those whose tags an entry of dataset_info.json names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ..names import did_you_mean

#: Columns of a user's own table that hold a conversation.
MESSAGES = ("messages", "conversations", "conversation")


@dataclass(frozen=True)
class Tags:
    """Keys of a message, and what its role is called."""

    role: tuple[str, ...] = ("role", "from")
    content: tuple[str, ...] = ("content", "value")
    user: tuple[str, ...] = ("user", "human")
    assistant: tuple[str, ...] = ("assistant", "gpt", "bot", "model")
    system: tuple[str, ...] = ("system",)
    observation: tuple[str, ...] = ("observation", "tool")
    function: tuple[str, ...] = ("function_call", "function")


def read_tags(tags: Any, where: str) -> Tags:
    """The tags of an entry of dataset_info.json. ValueError naming an unknown key or bad value."""
    if tags is None:
        return Tags()
    if not isinstance(tags, Mapping):
        raise ValueError(f"{where}: tags: expected an object, got {type(tags).__name__}")
    known = [f"{field.name}_tag" for field in fields(Tags)]
    for key, value in tags.items():
        if key not in known:
            raise ValueError(
                f"{where}: tags: expected keys from {', '.join(known)}, got {key!r}"
                f"{did_you_mean(str(key), known)}"
            )
        if not isinstance(value, str) or not value:
            raise ValueError(f"{where}: tags: {key}: expected a name, got {value!r}")
    return Tags(**{key.removesuffix("_tag"): (value,) for key, value in tags.items()})


class Unusable(Exception):
    """A conversation that cannot be learnt from; the text says why, for a counted warning."""


@dataclass
class Conversation:
    """system: text of the system message; rounds: the questions before the last and their answers;
    prompt, response: the last round.
    """

    system: str
    rounds: list[list[str]]
    prompt: str
    response: str


def read_messages(value: Any, what: str) -> Sequence[Any]:
    """A list of messages, from a cell with JSON too; [] for a missing one. ValueError that begins
    with `what` for anything else.
    """
    if isinstance(value, str):
        if not value.strip():
            return []
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"{what}: expected a list of messages, got {value[:60]!r}") from None
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{what}: expected a list of messages, got {type(value).__name__}")
    return value


def read_conversation(
    value: Any, what: str, tags: Tags, text: Callable[[Any], str], tell: Callable[[str], None]
) -> Conversation:
    """A conversation whose last answer is to be learnt.

    text: a value as text, or ValueError; tell: counts something that is not used. Raises Unusable
    saying why the row is skipped, ValueError that begins with `what` for what is no conversation.
    """
    system, rounds, question = "", [], None
    for place, message in enumerate(read_messages(value, what)):
        role, content = _message(message, f"{what}[{place}]", tags, text, tell)
        if role == "system" and place == 0:
            system = content
        elif role == "user" and question is None:
            question = content
        elif role == "assistant" and question is not None:
            rounds.append([question, content])
            question = None
        else:
            article = "an" if role == "assistant" else "a"
            raise Unusable(
                f"{article} {role} message stands where another is expected: user and assistant in "
                "turns, after at most one of system"
            )
    if not rounds:
        raise Unusable("answer empty or missing")
    if question is not None:
        tell("end in a question without an answer, which is left out")
    if len(rounds) > 1:
        tell("have several answers: the last is learnt, those before it are history")
    *before, (prompt, response) = rounds
    return Conversation(system, before, prompt, response)


def _message(
    message: Any, what: str, tags: Tags, text: Callable[[Any], str], tell: Callable[[str], None]
) -> tuple[str, str]:
    """(user, assistant or system; the content)."""
    if not isinstance(message, Mapping):
        raise ValueError(f"{what}: expected a message, got {type(message).__name__}")
    key = next((name for name in tags.role if name in message), None)
    body = next((name for name in tags.content if name in message), None)
    if key is None:
        raise ValueError(_without(what, tags.role, message))
    said = message[key]
    for role in ("user", "assistant", "system"):
        if said in getattr(tags, role):
            break
    else:
        if said in (*tags.observation, *tags.function):
            raise Unusable(f"a {said!r} message is not supported: calls of tools are not learnt")
        known = (*tags.user, *tags.assistant, *tags.system)
        raise ValueError(
            f"{what}: {key}: expected one of {', '.join(known)}, got {said!r}"
            f"{did_you_mean(str(said).lower(), known)}"
        )
    if any(message.get(name) for name in ("tool_calls", "function_call", "tools")):
        raise Unusable("calls of tools in messages are not supported")
    if body is None:
        raise ValueError(_without(what, tags.content, message))
    for name, value in message.items():
        if name not in (key, body) and value not in (None, "", [], {}):
            tell(f"have {name!r} in messages, which is not used")
    return role, _content(message[body], text)


def _without(what: str, names: Sequence[str], message: Mapping[str, Any]) -> str:
    return (
        f"{what}: expected a message with {' or '.join(map(repr, names))}, got "
        f"{', '.join(map(str, message)) or 'none'}"
    )


def _content(content: Any, text: Callable[[Any], str]) -> str:
    """The content as text, of parts too."""
    if not isinstance(content, (list, tuple)):
        return text(content)
    parts = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type", "text") == "text" and "text" in part:
            parts.append(text(part["text"]))
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise Unusable(f"messages with a part of type {kind!r} are not supported")
    return "".join(parts)
