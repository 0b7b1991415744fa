"""Changes to the scores of a row before one of its tokens is chosen: LogitsProcessor as in
transformers, and what settings ask for that the core does not do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from .config import GenerationConfig, as_list

Processor = Callable[..., Any]


class LogitsProcessor:
    """Base of processors: a subclass has __call__(input_ids int64 (1, t), scores float32 (1, V)),
    which returns scores.
    """

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no __call__")


class LogitsProcessorList(list):
    """Processors that run one after another."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Scores after all of them."""
        for processor in self:
            scores = processor(input_ids, scores, **kwargs)
        return scores


class Row(Protocol):
    """What a change may ask of a row: its ids, how many of them are new, how many there may be, and
    the number of its prompt.
    """

    ids: list[int]
    end: int
    number: int

    @property
    def index(self) -> int: ...


Change = Callable[[np.ndarray, Row], None]  # scores float32 (V), changed in place


def checked_processors(processors: Any) -> list[Processor]:
    """One processor or several as a list. TypeError naming what is none."""
    if callable(processors) and not isinstance(processors, list):
        processors = [processors]
    if not isinstance(processors or [], Sequence) or not all(map(callable, processors or [])):
        raise TypeError(f"logits_processor: expected functions, got {processors!r:.80}")
    return list(processors or [])


def changes_of(g: GenerationConfig, allowed: Any = None) -> list[Change]:
    """Those of the settings, in transformers' order. allowed: a function (number of the prompt, ids
    int64 (t,)) -> ids that may follow, or None.
    """
    found: list[Change] = []
    if g.bad_words_ids:
        found.append(_without_words(g.bad_words_ids, g.eos))
    if g.min_new_tokens:
        found.append(_no_end(g.eos, g.min_new_tokens))
    if allowed is not None:
        if not callable(allowed):
            raise TypeError(f"prefix_allowed_tokens_fn: expected a function, got {allowed!r:.80}")
        found.append(_only_allowed(allowed))
    if g.forced_bos_token_id is not None:
        first = g.forced_bos_token_id
        found.append(_forced([first], lambda row: len(row.ids) == 1))
    if g.forced_eos_token_id is not None:
        last = as_list(g.forced_eos_token_id)
        found.append(_forced(last, lambda row: len(row.ids) + 1 == row.end))
    if g.suppress_tokens is not None:
        found.append(_suppressed(as_list(g.suppress_tokens), False))
    if g.begin_suppress_tokens is not None:
        found.append(_suppressed(as_list(g.begin_suppress_tokens), True))
    return found


def _without_words(words: Sequence[Sequence[int]], ends: Sequence[int]) -> Change:
    """A word that is one end id is left out, as in transformers."""
    lists = [[int(i) for i in word] for word in words]
    single = [w[0] for w in lists if len(w) == 1 and w[0] not in ends]
    longer = [w for w in lists if len(w) > 1]

    def change(scores: np.ndarray, row: Row) -> None:
        scores[single] = -np.inf
        for word in longer:
            if row.ids[1 - len(word) :] == word[:-1]:
                scores[word[-1]] = -np.inf

    return change


def _no_end(ends: Sequence[int], least: int) -> Change:
    def change(scores: np.ndarray, row: Row) -> None:
        if row.index < least:
            scores[list(ends)] = -np.inf

    return change


def _only_allowed(allowed: Callable[[int, np.ndarray], Any]) -> Change:
    def change(scores: np.ndarray, row: Row) -> None:
        ids = allowed(row.number, np.asarray(row.ids, np.int64))
        ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids)).reshape(-1)
        if not ids.size or ids.dtype.kind not in "iu":
            raise ValueError(
                f"prefix_allowed_tokens_fn: expected ids for row {row.number} at token "
                f"{len(row.ids)}, got {ids.tolist()!r:.80}"
            )
        kept = scores[ids]
        scores[:] = -np.inf
        scores[ids] = kept

    return change


def _forced(ids: Sequence[int], when: Callable[[Row], bool]) -> Change:
    def change(scores: np.ndarray, row: Row) -> None:
        if when(row):
            scores[:] = -np.inf
            scores[list(ids)] = 0

    return change


def _suppressed(ids: Sequence[int], only_first: bool) -> Change:
    def change(scores: np.ndarray, row: Row) -> None:
        if not only_first or row.index == 0:
            scores[list(ids)] = -np.inf

    return change
