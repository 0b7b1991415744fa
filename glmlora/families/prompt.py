"""Texts and ids of prompts, and what becomes of an answer: for chat, streaming and training alike.

Family "v2" (ChatGLM2) writes rounds into one text; family "v3" (ChatGLM3) puts messages between
role ids. Training uses the same templates, so a tuned model is asked in the form it has learnt.
`tokenizer` is a `ChatGLMTokenizer` everywhere. Nothing that a model wrote is ever executed.
"""

from __future__ import annotations

import ast
import copy
import json
import warnings
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..tokenization import ChatGLMTokenizer

ROLES = ("system", "user", "assistant", "observation")
TRAINING_TIME = ("[[训练时间]]", "2023年")  # a placeholder in the models' own training data
TOOL_CALL_MAX = 1 << 16  # characters of a tool call that are parsed


# ChatGLM2: rounds in one text


def check_rounds(history: Any) -> list[tuple[str, str]]:
    """A ChatGLM2 history as (query, answer) strings; None is []. ValueError naming a bad item."""
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


def _asked(number: int, query: str) -> str:
    return f"[Round {number}]\n\n问：{query}\n\n答："


def build_prompt_v2(query: str, history: Any = None) -> str:
    """ChatGLM2's prompt text: past rounds numbered from 1, then the query and an open answer.

    history: list of (query, answer) pairs or None; what is not a string is formatted by `str`.
    Raises ValueError for an item that is no pair.
    """
    rounds = check_rounds(history)
    past = [_asked(i, q) + a + "\n\n" for i, (q, a) in enumerate(rounds, 1)]
    return "".join(past) + _asked(len(rounds) + 1, str(query))


# ChatGLM3: messages between role ids


def check_messages(history: Any, name: str = "history") -> list[dict[str, Any]]:
    """A list of role messages, checked; None is []. ValueError naming a malformed item."""
    if history is None:
        return []
    if isinstance(history, str | Mapping) or not isinstance(history, Sequence):
        raise ValueError(f"{name}: expected a list of messages, got {type(history).__name__}")
    for i, item in enumerate(history):
        if not isinstance(item, Mapping):
            raise ValueError(
                f"{name}[{i}]: expected a message {{'role', 'content'}}, got {item!r:.80}"
            )
        _check_role(item.get("role"), f"{name}[{i}]: role")
        if item.get("content") is None:
            raise ValueError(f"{name}[{i}]: content is missing")
    return list(history)


def _check_role(role: Any, name: str = "role") -> None:
    if role not in ROLES:
        raise ValueError(f"{name}: expected one of {' '.join(ROLES)}, got {role!r}")


def _content(message: Mapping[str, Any]) -> str:
    content = str(message["content"])
    if message["role"] == "system" and "tools" in message:
        content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
    return content


def message_ids(tokenizer: ChatGLMTokenizer, role: str, metadata: str, content: str) -> list[int]:
    """Ids of one ChatGLM3 message: role id, metadata with its newline, content, encoded separately.

    Role markers inside the texts stay plain text.
    """
    _check_role(role)
    header = tokenizer.text_ids(f"{metadata}\n")
    return [tokenizer.get_command(f"<|{role}|>"), *header, *tokenizer.text_ids(content)]


def _messages_ids(tokenizer: ChatGLMTokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    ids: list[int] = []
    for message in messages:
        metadata = message.get("metadata") or ""
        ids += message_ids(tokenizer, message["role"], metadata, _content(message))
    return ids


# Ids of a chat turn


def chat_ids(
    tokenizer: ChatGLMTokenizer, query: str, history: Any = None, role: str = "user"
) -> list[int]:
    """Ids of a whole prompt, `[gMASK] sop` in front.

    history: (query, answer) pairs for ChatGLM2, messages for ChatGLM3; it is not changed. Raises
    ValueError for a malformed history, or a role that the family does not have.
    """
    prefix = tokenizer.get_prefix_tokens()
    if tokenizer.family == "v2":
        _only_user(role)
        return prefix + tokenizer.text_ids(build_prompt_v2(query, history))
    past = _messages_ids(tokenizer, check_messages(history))
    return prefix + past + stream_ids(tokenizer, query, role=role)


def stream_ids(
    tokenizer: ChatGLMTokenizer, query: str, round_number: int = 1, role: str = "user"
) -> list[int]:
    """Ids of a later turn alone, for a cache that already holds what came before.

    round_number: number of this round, from 1 (used by ChatGLM2 only: its separator and round
    header without the dummy space that encoding puts in front).
    """
    if tokenizer.family == "v2":
        _only_user(role)
        ids = tokenizer.text_ids("\n\n" + _asked(round_number, str(query)))
        return ids[1:] if ids[0] == tokenizer.dummy_space_id else ids
    return message_ids(tokenizer, role, "", str(query)) + [tokenizer.get_command("<|assistant|>")]


def _only_user(role: str) -> None:
    if role != "user":
        raise ValueError(f"role: ChatGLM2 knows only 'user', got {role!r}")


def template_ids(
    tokenizer: ChatGLMTokenizer, messages: Any, add_generation_prompt: bool = False
) -> list[int]:
    """Ids of a list of role messages in the family's chat template, `[gMASK] sop` in front."""
    prefix = tokenizer.get_prefix_tokens()
    if tokenizer.family == "v2":
        return prefix + tokenizer.text_ids(_messages_as_rounds(messages, add_generation_prompt))
    ids = prefix + _messages_ids(tokenizer, check_messages(messages, "messages"))
    return ids + [tokenizer.get_command("<|assistant|>")] if add_generation_prompt else ids


def template_text(
    tokenizer: ChatGLMTokenizer, messages: Any, add_generation_prompt: bool = False
) -> str:
    """The text of `template_ids`: the rounds of ChatGLM2, or ChatGLM3's published template text."""
    if tokenizer.family == "v2":
        return _messages_as_rounds(messages, add_generation_prompt)
    parts = ["[gMASK]sop"]
    for message in check_messages(messages, "messages"):
        metadata = message.get("metadata") or ""
        parts.append(f"<|{message['role']}|>{metadata}\n {_content(message)}")
    return "".join(parts) + ("<|assistant|>" if add_generation_prompt else "")


def _messages_as_rounds(messages: Any, add_generation_prompt: bool) -> str:
    """Role messages as ChatGLM2's rounds; a system message goes in front of the next query."""
    text, system, query, number = "", "", None, 1
    for i, message in enumerate(check_messages(messages, "messages")):
        role, content = message["role"], str(message["content"])
        if role == "system" and query is None and "tools" not in message:
            system += content
        elif role == "user" and query is None:
            query, system = system + content, ""
        elif role == "assistant" and query is not None:
            text += _asked(number, query) + content + "\n\n"
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
    asked = text + _asked(number, query)
    return asked if add_generation_prompt else asked.removesuffix("答：")


# From the model's text to an answer


def process_response_v2(text: str) -> str:
    """ChatGLM2's answer: stripped, with the training-time placeholder filled in."""
    return text.strip().replace(*TRAINING_TIME)


def process_response_v3(
    output: str, history: Sequence[Mapping[str, Any]]
) -> tuple[str | dict[str, Any], list[dict[str, Any]]]:
    """ChatGLM3's answer and the history with it: a deep copy, the caller's list stays as it is.

    output: decoded text with role markers, end id removed. The answer is a string; or, where the
    model names a tool, {"name", "parameters"} if the history starts with a system message with
    `tools` and the text is one `tool_call(name=literal, ...)`; else {"name", "content"}.
    """
    history = copy.deepcopy(list(history))
    answer: str | dict[str, Any] = ""
    for part in output.split("<|assistant|>"):
        metadata, newline, content = part.partition("\n")
        if not newline:
            metadata, content = "", part
        name = metadata.strip()
        if not name:
            content = content.strip()
            history.append({"role": "assistant", "metadata": "", "content": content})
            answer = content.replace(*TRAINING_TIME)
            continue
        has_tools = history and history[0].get("role") == "system" and "tools" in history[0]
        history.append({"role": "assistant", "metadata": metadata, "content": content})
        parameters = _tool_call(content) if has_tools else None
        if parameters is None:
            answer = {"name": name, "content": content}
        else:
            answer = {"name": name, "parameters": parameters}
    return answer, history


def _tool_call(content: str) -> dict[str, Any] | None:
    """Arguments of one `tool_call(...)` between a code fence's lines; None for anything else."""
    code = "\n".join(content.split("\n")[1:-1]).strip()
    if len(code) > TOOL_CALL_MAX:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in a string warns
            call = ast.parse(code, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            return None
        names = [keyword.arg for keyword in call.keywords]
        if call.func.id != "tool_call" or call.args or None in names:
            return None
        if len(set(names)) != len(names):
            return None
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


# Training records


def encode_source(
    tokenizer: ChatGLMTokenizer,
    prompt: str,
    query: str | None,
    history: Any,
    max_source_length: int,
    truncation: str = "template",
    source_prefix: str | None = "",
    template: str = "auto",
) -> tuple[list[int], bool]:
    """Prompt ids of a training record, `[gMASK] sop` in front, and whether anything was cut.

    prompt, query: joined with nothing between. history: (query, answer) pairs. source_prefix: put
    before the whole text. template: "auto" is the family's own chat template; "vendored" is
    ChatGLM2's text for every family, as in the original training code.
    At most `max_source_length` ids. truncation "vendored" cuts the end, the answer marker with it,
    id for id as the original; "template" drops the oldest rounds while the rounds alone do not fit,
    then cuts the end of the query's text and encodes what is left: the marker stays.
    Raises ValueError for an unknown name or a length that the template alone exceeds.
    """
    _one_of("truncation", truncation, ("template", "vendored"))
    _one_of("template", template, ("auto", "vendored"))
    prefix = tokenizer.get_prefix_tokens()
    room = max_source_length - len(prefix)
    if room < 1:
        raise ValueError(
            f"max_source_length: expected more than {len(prefix)}, got {max_source_length}"
        )
    rounds = check_rounds(history)
    asked, first = f"{prompt}{query or ''}", source_prefix or ""
    if template == "vendored" or tokenizer.family == "v2":
        body, was_cut = _source_v2(tokenizer, first, asked, rounds, room, truncation)
    else:
        body, was_cut = _source_v3(tokenizer, first, asked, rounds, room, truncation)
    return prefix + body, was_cut


def _source_v2(
    tokenizer: ChatGLMTokenizer,
    first: str,
    query: str,
    rounds: list[tuple[str, str]],
    room: int,
    truncation: str,
) -> tuple[list[int], bool]:
    ids = tokenizer.text_ids(first + build_prompt_v2(query, rounds))
    if len(ids) <= room:
        return ids, False
    if truncation == "vendored":
        return ids[:room], True

    def frame(dropped: int) -> str:
        return first + build_prompt_v2("", rounds[dropped:])

    kept = frame(_rounds_to_drop(lambda n: len(tokenizer.text_ids(frame(n))), len(rounds), room))
    after = "\n\n答："
    return _fit(tokenizer, kept.removesuffix(after), query, after, room), True


def _source_v3(
    tokenizer: ChatGLMTokenizer,
    first: str,
    query: str,
    rounds: list[tuple[str, str]],
    room: int,
    truncation: str,
) -> tuple[list[int], bool]:
    def frame(dropped: int) -> list[int]:
        """Everything but the query's own text, up to where that text goes."""
        ids: list[int] = []
        for i, (q, a) in enumerate(rounds[dropped:]):
            ids += message_ids(tokenizer, "user", "", first + q if i == 0 else q)
            ids += message_ids(tokenizer, "assistant", "", a)
        return ids + message_ids(tokenizer, "user", "", "")

    def before(dropped: int) -> str:
        return first if dropped == len(rounds) else ""

    end = [tokenizer.get_command("<|assistant|>")]
    ids = frame(0) + tokenizer.text_ids(before(0) + query) + end
    if len(ids) <= room:
        return ids, False
    if truncation == "vendored":
        return ids[:room], True
    dropped = _rounds_to_drop(
        lambda n: len(frame(n)) + len(tokenizer.text_ids(before(n))) + len(end), len(rounds), room
    )
    kept = frame(dropped)
    text = _fit(tokenizer, before(dropped), query, "", room - len(kept) - len(end))
    return kept + text + end, True


def _rounds_to_drop(length: Any, n_rounds: int, room: int) -> int:
    """Fewest oldest rounds to leave out so that `length(left out)` ids, without a query, fit."""
    dropped = bisect_left(range(n_rounds + 1), True, key=lambda n: length(n) <= room)
    if dropped > n_rounds:
        raise ValueError(
            f"max_source_length: leaves {room} ids, but the template without a query takes "
            f"{length(n_rounds)}"
        )
    return dropped


def _fit(tokenizer: ChatGLMTokenizer, before: str, query: str, after: str, room: int) -> list[int]:
    """Ids of before + query + after with as many last pieces of the query left out as needed.

    The caller knows that before + after fit. A shortened text may fall into other pieces than the
    whole, so the rest is encoded anew, and shortened again in the rare case that it still exceeds.
    """
    text = before + query + after
    ids = tokenizer.text_ids(text)
    if len(ids) <= room:
        return ids
    starts = tokenizer.text_offsets(text)
    end = bisect_left(starts, len(before) + len(query))  # first piece after the query
    cut = len(before) + len(query)
    while len(ids) > room:
        end -= len(ids) - room
        cut = min(max(starts[end], len(before)), cut - 1) if end > 0 else len(before)
        cut = max(cut, len(before))
        ids = tokenizer.text_ids(text[:cut] + after)
        if cut == len(before):
            break
    return ids


def encode_target(
    tokenizer: ChatGLMTokenizer, response: str, max_target_length: int, template: str = "auto"
) -> list[int]:
    """Answer ids of a training record with the end id, which is never cut away.

    At most `max_target_length` ids. The answer is encoded apart from the prompt. In ChatGLM3's
    own template it begins with the empty metadata line that the model has to produce in a chat.
    """
    if max_target_length < 1:
        raise ValueError(f"max_target_length: expected at least 1, got {max_target_length}")
    ids = _answer_ids(tokenizer, response, template)
    return ids[: max_target_length - 1] + [tokenizer.eos_token_id]


def encode_label(
    tokenizer: ChatGLMTokenizer, response: str, max_target_length: int, template: str = "auto"
) -> list[int]:
    """Reference ids for prediction runs: `[gMASK] sop` and the answer, no end id; at most
    `max_target_length` ids, as in the original."""
    prefix = tokenizer.get_prefix_tokens()
    if max_target_length < len(prefix):
        raise ValueError(
            f"max_target_length: expected at least {len(prefix)}, got {max_target_length}"
        )
    ids = _answer_ids(tokenizer, response, template)
    return prefix + ids[: max_target_length - len(prefix)]


def _answer_ids(tokenizer: ChatGLMTokenizer, response: str, template: str) -> list[int]:
    _one_of("template", template, ("auto", "vendored"))
    ids = tokenizer.text_ids(str(response))
    if template == "auto" and tokenizer.family == "v3":
        return tokenizer.text_ids("\n") + ids
    return ids


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {value!r}")
