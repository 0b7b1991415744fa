"""What ends an answer beside its end ids and its length; names as transformers has them.

A criterion is a function of (ids int64 (1, t), scores), true where the row is to end. It is asked
after each token, row by row; scores is None, or a tuple of float32 (1, V) with `output_scores`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .config import as_list

Criterion = Callable[..., Any]


class StoppingCriteria:
    """Base of criteria: a subclass has __call__(input_ids, scores, **kwargs)."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no __call__")


class StoppingCriteriaList(list):
    """Criteria of which one is enough."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> np.ndarray:
        """Bool (rows,)."""
        done = np.zeros(len(input_ids), bool)
        for criterion in self:
            done |= np.asarray(criterion(input_ids, scores, **kwargs), bool)
        return done


class MaxLengthCriteria(StoppingCriteria):
    """Ends a row of `max_length` ids, prompt included."""

    def __init__(self, max_length: int, max_position_embeddings: int | None = None):
        self.max_length = max_length
        self.max_position_embeddings = max_position_embeddings

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> np.ndarray:
        return np.full(len(input_ids), np.shape(input_ids)[-1] >= self.max_length)


class MaxTimeCriteria(StoppingCriteria):
    """Ends all rows `max_time` seconds after `initial_timestamp` (of `time.time()`; else now)."""

    def __init__(self, max_time: float, initial_timestamp: float | None = None):
        self.max_time = max_time
        self.initial_timestamp = time.time() if initial_timestamp is None else initial_timestamp

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> np.ndarray:
        return np.full(len(input_ids), time.time() - self.initial_timestamp > self.max_time)


class EosTokenCriteria(StoppingCriteria):
    """Ends a row whose last id is one of those given."""

    def __init__(self, eos_token_id: int | Sequence[int]):
        self.eos_token_id = as_list(eos_token_id)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> np.ndarray:
        return np.isin(np.asarray(input_ids)[:, -1], self.eos_token_id)


class StopStringCriteria(StoppingCriteria):
    """Ends a row whose last id completes one of the texts, which may have begun in the prompt."""

    def __init__(self, tokenizer: Any, stop_strings: str | Sequence[str]):
        self.tokenizer = tokenizer
        self.stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        # Ids that can reach into the longest text: a character may take four, and some are silent.
        self._window = 4 * max(map(len, self.stop_strings), default=0) + 8

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> np.ndarray:
        return np.array([self._ends(list(row[-self._window :])) for row in np.asarray(input_ids)])

    def _ends(self, ids: list[int]) -> bool:
        before, text = self.tokenizer.decode(ids[:-1]), self.tokenizer.decode(ids)
        known = len(os.path.commonprefix((before, text)))
        return any(text.rfind(s) >= 0 and text.rfind(s) + len(s) > known for s in self.stop_strings)


def checked_criteria(criteria: Any) -> list[Criterion]:
    """One criterion or several as a list. TypeError naming what is none."""
    found = [criteria] if callable(criteria) and not isinstance(criteria, list) else criteria
    if not isinstance(found or [], Sequence) or not all(map(callable, found or [])):
        raise TypeError(f"stopping_criteria: expected functions, got {criteria!r:.80}")
    return list(found or [])
