"""What a model's forward pass gives back, and the loss in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..generation.cache import PastKeyValues

_LOSS_ROWS = 64  # rows of logits that are widened at a time


@dataclass
class CausalLMOutput:
    """What `model(...)` returns. B rows, T tokens, V vocabulary, H hidden size, L layers.

    logits float32 (B, T, V), 0 over padding; loss float (mean over the labelled tokens of the
    batch, nats) or None; past_key_values: what to pass back with the tokens that follow, or None
    where the cache is off; hidden_states: None or L + 1 float32 (B, T, H), before the final norm, 0
    over padding.
    """

    logits: np.ndarray
    loss: float | None = None
    past_key_values: PastKeyValues | None = None
    hidden_states: tuple[np.ndarray, ...] | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """(loss, logits, past_key_values, hidden_states) without those that are None."""
        found = (self.loss, self.logits, self.past_key_values, self.hidden_states)
        return tuple(v for v in found if v is not None)

    def __getitem__(self, key: int | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


def mean_loss(logits: np.ndarray, rows: np.ndarray, targets: np.ndarray) -> float:
    """Mean of lse(logits[row]) - logits[row, target] in double. Here, as the caller has the logits
    already: the core's `loss` would run the model a second time for it.
    """
    total = 0.0
    for start in range(0, rows.size, _LOSS_ROWS):
        part = slice(start, start + _LOSS_ROWS)
        scores = logits[rows[part]].astype(np.float64)
        top = scores.max(axis=1)
        lse = top + np.log(np.exp(scores - top[:, None]).sum(axis=1))
        total += float((lse - scores[np.arange(len(scores)), targets[part]]).sum())
    return total / rows.size
