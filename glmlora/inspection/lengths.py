"""How long the prompts of a table are, and how long a model would take over them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..families.prompt import prompt_length
from ..tools.plan import plan, products_per_second

_ANSWER = 3  # tokens of a label and its end
_CHECKED = 50  # prompts whose length is counted both ways


def prompt_lengths(tokenizer: Any, prompts: Sequence[str]) -> np.ndarray:
    """Tokens of each prompt in the chat template of the tokenizer's family, as training and chats
    encode it, special ids included: int32 (rows,).

    Where no piece of the vocabulary reaches beyond a space, a word has the same number of tokens in
    every text, so each is encoded once; a few prompts are counted whole to see that it holds.
    """
    exact = range(0, len(prompts), max(1, len(prompts) // _CHECKED))
    whole = {row: prompt_length(tokenizer, prompts[row]) for row in exact}
    if len(prompts) > 2 * _CHECKED and _ends_at_spaces(tokenizer):
        words = _Words(tokenizer)
        if all(words.prompt(prompts[row]) == length for row, length in whole.items()):
            return np.fromiter(map(words.prompt, prompts), np.int32, len(prompts))
    lengths = (whole.get(row) or prompt_length(tokenizer, text) for row, text in enumerate(prompts))
    return np.fromiter(lengths, np.int32, len(prompts))


def _ends_at_spaces(tokenizer: Any) -> bool:
    """Whether a space stands in no piece but at its beginning."""
    return not any(re.search("[^ \u2581][ \u2581]", str(piece)) for piece in tokenizer.get_vocab())


class _Words(dict[str, int]):
    """Tokens of a word with the space before it."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._before = len(tokenizer.text_ids("x"))
        self._edges: dict[tuple[str, str], int] = {}

    def __missing__(self, word: str) -> int:
        self[word] = count = len(self._tokenizer.text_ids(f"x {word}")) - self._before
        return count

    def prompt(self, text: str) -> int:
        """Tokens of a whole prompt: its first and last word in the template, and those between."""
        words = text.split(" ")
        if "" in words:  # of a run of spaces, all but the first belong to the word that follows
            parts = re.findall("(?:^| ) *[^ ]*", text)
            words = [part.removeprefix(" ") if n else part for n, part in enumerate(parts)]
        if len(words) < 3:
            return prompt_length(self._tokenizer, text)
        edges = words[0], words[-1]
        if edges not in self._edges:
            self._edges[edges] = prompt_length(self._tokenizer, " ".join(edges))
        return self._edges[edges] + sum(map(self.__getitem__, words[1:-1]))


def suggested_length(lengths: np.ndarray, most: int) -> int:
    """The least multiple of 32, at most `most`, that holds 99 of 100 prompts whole."""
    enough = int(np.quantile(lengths, 0.99, method="inverted_cdf")) if len(lengths) else 1
    return min(-(-enough // 32) * 32, most)


@dataclass(frozen=True)
class Forecast:
    """How long this machine's CPU would take: a forecast, from products counted and from speeds
    measured beside whatever else runs, in floating-point operations a second.

    epoch_seconds: one epoch of LoRA over the table; predict_seconds: short answers to
    `predict_rows` rows.
    """

    training_speed: float
    prediction_speed: float
    epoch_seconds: float
    predict_seconds: float
    predict_rows: int


def forecast(
    model: str | os.PathLike, lengths: np.ndarray, asked: np.ndarray, max_source_length: int
) -> Forecast:
    """What an epoch over prompts of `lengths` tokens and answers to those of `asked` would take,
    longer prompts being cut at max_source_length.
    """

    def flops(lengths: np.ndarray, method: str, answer: int) -> float:
        tokens = np.minimum(lengths, max_source_length) + answer
        typical = max(answer + 1, round(float(tokens.mean())))
        counted = plan(model, 1, typical, method, labels=_ANSWER)
        return counted.flops / counted.tokens * float(tokens.sum())

    training, prediction = (products_per_second(model, method) for method in ("lora", "chat"))
    return Forecast(
        training,
        prediction,
        flops(lengths, "lora", _ANSWER) / training,
        flops(asked, "chat", 0) / prediction,
        len(asked),
    )
