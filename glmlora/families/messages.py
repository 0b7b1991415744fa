"""What prompts of all families are made of: checked histories, and texts cut to a length.

Rounds are (query, answer) pairs, messages are dicts of role and content. `tokenizer` is a
`ChatGLMTokenizer` everywhere.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import tell

if TYPE_CHECKING:
    pass

# What a prompt takes from a message, and a thought, which it leaves out on purpose.
_MESSAGE = ("role", "content", "metadata", "tools", "thought")
ROLES = ("system", "user", "assistant", "observation")
TRAINING_TIME = ("[[训练时间]]", "2023年")  # a placeholder in the models' own training data


def check_rounds(history: Any) -> list[tuple[str, str]]:
    """A history as (query, answer) strings; None is []. ValueError naming a bad item."""
    if history is None:
        return []
    if isinstance(history, str | Mapping) or not isinstance(history, Sequence):
        kind = type(history).__name__
        raise ValueError(f"history: expected a list of (query, answer) pairs, got {kind}")
    rounds = []
    for i, item in enumerate(history):
        if isinstance(item, Mapping):
            raise ValueError(
                f"history[{i}]: expected a (query, answer) pair, got a message of the ChatGLM3 form"
            )
        if not isinstance(item, list | tuple) or len(item) != 2:
            raise ValueError(f"history[{i}]: expected a (query, answer) pair, got {item!r:.80}")
        rounds.append((str(item[0]), str(item[1])))
    return rounds


def check_messages(
    history: Any, name: str = "history", with_tools: Sequence[str] = ("system",)
) -> list[dict[str, Any]]:
    """A list of role messages, checked; None is []. with_tools: roles whose messages may have them.
    ValueError naming a malformed item.
    """
    if history is None:
        return []
    if isinstance(history, str | Mapping) or not isinstance(history, Sequence):
        raise ValueError(f"{name}: expected a list of messages, got {type(history).__name__}")
    for i, item in enumerate(history):
        if not isinstance(item, Mapping):
            raise ValueError(
                f"{name}[{i}]: expected a message {{'role', 'content'}}, got {item!r:.80}"
            )
        check_role(item.get("role"), f"{name}[{i}]: role")
        content = item.get("content")
        if content is None:
            raise ValueError(f"{name}[{i}]: content is missing")
        if isinstance(content, list | tuple | Mapping):
            kind = type(content).__name__
            raise ValueError(f"{name}[{i}]: content: expected text, got a {kind}")
        unused = [k for k, v in item.items() if k not in _MESSAGE and v not in (None, "", [], {})]
        if item["role"] not in with_tools and item.get("tools"):
            unused.append("tools, which a system message holds,")
        if unused:
            left_out = " and ".join(map(str, unused))
            tell.once(f"{name}: {left_out} of a message: not used in a prompt")
    return list(history)


def record_messages(
    first: str, query: str, rounds: Sequence[tuple[str, str]], system: str
) -> list[dict[str, Any]]:
    """The messages of a training record's prompt: see `Family.source_ids`."""
    said = [("system", system)] if system else []
    for i, (question, answer) in enumerate(rounds):
        said += [("user", first + question if i == 0 else question), ("assistant", answer)]
    said.append(("user", query if rounds else first + query))
    return [{"role": role, "content": content} for role, content in said]


def check_role(role: Any, name: str = "role") -> None:
    if role not in ROLES:
        raise ValueError(f"{name}: expected one of {' '.join(ROLES)}, got {role!r}")


def rounds_to_drop(length: Any, n_rounds: int, room: int) -> int:
    """Fewest oldest rounds to leave out so that `length(left out)` ids, without a query, fit."""
    dropped = bisect_left(range(n_rounds + 1), True, key=lambda n: length(n) <= room)
    if dropped > n_rounds:
        raise ValueError(
            f"max_source_length: leaves {room} ids, but the template without a query takes "
            f"{length(n_rounds)}"
        )
    return dropped
