"""Rows of ids and the cache of their keys and values, and what generation needs of a model.

A row is a list of ids; the core's cache holds a leading part of it, and every step feeds what it
lacks. So a prompt, one more token and a new round of a conversation are the same call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from .. import _core
from ..batch import as_rows, check_ids
from ..families.context import Context
from ..task import Task
from .config import GenerationConfig

CHUNK = 1024  # tokens fed at a time: bounds the memory of a long prompt
CAPACITY_STEP = 256  # positions by which caches are sized
COPIED = 32  # ids that another row must have more of a prompt's beginning to be copied from


class ModelConfig(Protocol):
    """What generation reads of a model's config."""

    family: str
    seq_length: int
    num_layers: int
    multi_query_group_num: int
    kv_channels: int
    padded_vocab_size: int

    @property
    def eos_token_ids(self) -> list[int]: ...
    @property
    def context(self) -> Context | None: ...


class Model(Protocol):
    """What generation needs of a model."""

    core: _core.Model
    cached_row: CachedRow | None  # kept between chats
    prefix_is_fresh: bool
    prompt_template: str  # "auto", or the one it was trained with
    task: Task | None  # what it was trained for
    opened: Any  # where it came from

    @property
    def config(self) -> ModelConfig: ...
    @property
    def generation_config(self) -> GenerationConfig: ...


# (places among the rows that are fed) -> `choice` of core.next for them
Choose = Callable[[Sequence[int]], "dict[str, Any] | None"]


class CachedRow:
    """Rows of ids, and the core's cache of a leading part of each. One row in chat, many in
    generate. All rows begin with the ids of `opening`, which are computed once.

    Where a model reads a prompt in both directions (`Family.context`), all of that is one piece:
    fed in one call, kept whole or not at all, and there is no opening.
    """

    def __init__(
        self,
        model: Model,
        rows: int,
        capacity: int,
        opening: Sequence[int] = (),
        adapter: int = 0,
    ):
        """adapter: of all rows, a number of the core's (`keep_lora`); 0: none."""
        self.model = model
        self.opening = len(opening)
        context = model.config.context
        self._context_end = None if context is None else context.sop
        self.ids: list[list[int]] = [list(opening) for _ in range(rows)]
        self.held = [self.opening] * rows  # ids of each row that the cache holds
        self._ones = np.ones(rows, np.int32)
        self._places = [0], np.zeros(1, np.int32)  # the rows of the last step, for the core
        shared = np.asarray(opening, np.int32)
        self.cache = model.core.cache(rows, self._capacity(capacity), shared.size)
        self.adapters = [adapter] * rows
        if adapter:
            self.cache.adapt(-1, adapter)
        for start in range(0, shared.size, CHUNK):
            model.core.extend_shared(self.cache, shared[start : start + CHUNK])

    def _capacity(self, needed: int) -> int:
        rounded = -(-needed // CAPACITY_STEP) * CAPACITY_STEP
        return min(rounded, self.model.config.seq_length)

    def _hold(self, row: int, length: int) -> None:
        """Forget what the cache holds of a row after its first `length` ids, or those too."""
        if self._context_end is not None and self._context_end not in self.ids[row][:length]:
            length = 0
        self.cache.rewind(row, length - self.opening)
        self.held[row] = length

    def shorten(self, row: int, length: int) -> None:
        """Only the first `length` ids of a row stay."""
        del self.ids[row][length:]
        if self.held[row] > length:
            self._hold(row, length)

    def forget(self) -> None:
        """Empty the cache; the ids stay, and are fed again when they are needed."""
        for row in range(len(self.held)):
            self._hold(row, self.opening)

    def make_room(self, needed: int) -> None:
        """At least `needed` positions for each row after the opening; what the cache holds
        stays.
        """
        if self.cache.capacity < needed:
            self.cache.grow(self._capacity(needed))

    def shares(self, row: int, ids: Sequence[int], adapter: int = 0) -> int:
        """How many of the first of `ids` the cache holds of a row, as they are with an adapter."""
        old, most = self.ids[row], min(self.held[row], len(ids))
        if self.adapters[row] != adapter:
            return self.opening
        shared = self.opening
        while shared < most and old[shared] == ids[shared]:
            shared += 1
        return shared

    def best(self, rows: Sequence[int], ids: Sequence[int], adapter: int = 0) -> int:
        """Of some rows the one that holds most of the beginning of `ids`, the first of equals."""
        return max(rows, key=lambda row: self.shares(row, ids, adapter))

    def become(self, row: int, ids: Sequence[int], adapter: int = 0) -> int:
        """Make `ids` the row's, keeping what the cache holds of the beginning they share, or
        another row's where that holds much more. Returns how many ids it then holds.
        """
        shared = self.shares(row, ids, adapter)
        if shared < self.held[row]:
            self._hold(row, shared)
        if self.adapters[row] != adapter:
            self._hold(row, self.opening)
            self.cache.adapt(row, adapter)
            self.adapters[row] = adapter
        if self._context_end is None and len(self.ids) > 1 and len(ids) - shared > COPIED:
            other = self.best(range(len(self.ids)), ids, adapter)
            there = self.shares(other, ids, adapter)
            if there - shared >= COPIED:
                self.cache.copy(other, row, there - self.opening)
                self.held[row] = shared = there
        self.ids[row] = list(ids)
        return self.held[row]

    def fork(self, parents: Sequence[int]) -> None:
        """Row i becomes a copy of what row parents[i] was."""
        self.cache.reorder(list(parents))
        self.ids = [list(self.ids[p]) for p in parents]
        self.held = [self.held[p] for p in parents]
        self.adapters = [self.adapters[p] for p in parents]

    def extend(self, rows: Sequence[int], choose: Choose | None = None) -> np.ndarray:
        """Feed what the cache lacks of each row; scores float32 (len(rows), V) of each row's next
        token, or, with `choose`, the ids (len(rows),) that the core chose.

        Cuts fall at multiples of CHUNK of each row, wherever other rows are.
        """
        lacks = [len(self.ids[row]) - self.held[row] for row in rows]
        if lacks.count(1) == len(rows) <= CHUNK:  # a step of decoding
            if rows != self._places[0]:
                self._places = list(rows), np.array(rows, np.int32)
            tokens = np.array([self.ids[row][-1] for row in rows], np.int32)
            ones = self._ones[: len(rows)]
            found = self._feed(range(len(rows)), self._places[1], tokens, ones, choose)
            for row in rows:
                self.held[row] += 1
            return found
        for row, lack in zip(rows, lacks, strict=True):
            if lack == 0:  # nothing new: its last token once more
                self._hold(row, self.held[row] - 1)
        vocabulary = self.model.config.padded_vocab_size
        shape = (len(rows),) if choose else (len(rows), vocabulary)
        found = np.empty(shape, np.int32 if choose else np.float32)
        waiting = list(range(len(rows)))
        while waiting:
            turn, ids, lengths = [], [], []
            for i in waiting:
                piece = self._piece(rows[i])
                if turn and len(ids) + len(piece) > CHUNK:
                    continue  # a shorter one may find room
                turn.append(i)
                ids += piece
                lengths.append(len(piece))
            of = [rows[i] for i in turn]
            after = self._feed(
                turn, of, np.array(ids, np.int32), np.array(lengths, np.int32), choose
            )
            for i, length, of_row in zip(turn, lengths, after, strict=True):
                self.held[rows[i]] += length
                if self.held[rows[i]] == len(self.ids[rows[i]]):
                    found[i] = of_row
                    waiting.remove(i)
        return found

    def go_on(self, rows: Sequence[int], most: int, ends: Sequence[int]) -> tuple[list[int], int]:
        """Several steps of decoding whose ids are those with the highest scores: (the last id of
        each row, to be appended as after one step, how many ids each got). At least one, at most
        `most`, and none after one of `ends`.
        """
        places, last = np.array(rows, np.int32), [self.ids[row][-1] for row in rows]
        ids, ones = np.array(last, np.int32), self._ones[: len(rows)]
        found = self.model.core.go_on(self.cache, places, ids, ones, most, ends)
        for row, new in zip(rows, found.T.tolist(), strict=True):
            self.held[row] += len(new)
            self.ids[row] += new[:-1]
        return found[-1].tolist(), len(found)

    def lacks(self, row: int) -> int:
        """How many ids of a row the cache lacks."""
        return len(self.ids[row]) - self.held[row]

    def next_piece(self, row: int) -> tuple[int, bool]:
        """(ids of the next piece of what the cache lacks of a row, whether it is the last)."""
        piece, lacks = len(self._piece(row)), max(self.lacks(row), 1)
        return min(max(piece, 1), CHUNK), piece >= lacks or lacks == 1

    def feed_piece(self, row: int) -> None:
        """Feed that piece."""
        piece = self._piece(row)
        ids, lengths = np.array(piece, np.int32), np.array([len(piece)], np.int32)
        self._feed([0], [row], ids, lengths, lambda places: None)
        self.held[row] += len(piece)

    def _piece(self, row: int) -> list[int]:
        """The next ids of a row that the cache lacks, up to the next multiple of CHUNK."""
        held = self.held[row]
        cut = self.opening + ((held - self.opening) // CHUNK + 1) * CHUNK
        ids = self.ids[row]
        if self._context_end in ids[cut:] and self._context_end not in ids[:cut]:
            cut = ids.index(self._context_end) + 1
        return ids[held:cut]

    def _feed(
        self,
        places: Sequence[int],
        rows: Sequence[int] | np.ndarray,
        ids: np.ndarray,
        lengths: np.ndarray,
        choose: Choose | None,
    ) -> np.ndarray:
        core = self.model.core
        if choose is None:
            return core.extend(self.cache, rows, ids, lengths)
        choice = choose(places)
        if choice is None:
            return core.next(self.cache, rows, ids, lengths)
        return core.next(self.cache, rows, ids, lengths, choice)


class PastKeyValues:
    """What a model has seen, row by row: opaque, to be passed back to `stream_chat` for the next
    round, or to the model for the tokens that follow.

    It stays valid when the loop was left early and when another round went another way meanwhile:
    the ids say what was shown, and whatever the cache lacks of them is fed again. The cache is made
    when it is first used.
    """

    def __init__(
        self,
        model: Model,
        rows_of_ids: Sequence[list[int]],
        rows: CachedRow | None = None,
        width: int | None = None,
    ):
        self.model = model
        self.rows_of_ids = list(rows_of_ids)
        self.width = max(map(len, self.rows_of_ids)) if width is None else width  # padding too
        self._rows = rows

    @property
    def ids(self) -> list[int]:
        """Of the only, or first, row."""
        return self.rows_of_ids[0]

    @property
    def rows(self) -> CachedRow:
        """The rows of the cache."""
        if self._rows is None:
            longest = max(map(len, self.rows_of_ids))
            self._rows = CachedRow(self.model, len(self.rows_of_ids), longest + CAPACITY_STEP)
        return self._rows

    def __len__(self) -> int:
        return len(self.ids)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many positions there are, padding too."""
        return self.width

    def go_on(self, new: np.ndarray) -> tuple[np.ndarray, PastKeyValues]:
        """(scores float32 (B, T, V) of the ids `new` (B, T) that follow, what has been seen then).
        ValueError beyond the model's positions.
        """
        ids = [[*old, *more] for old, more in zip(self.rows_of_ids, new.tolist(), strict=True)]
        longest, limit = max(map(len, ids)), self.model.config.seq_length
        if longest > limit:
            raise ValueError(
                f"past_key_values: a row would have {longest} tokens, the model has positions for "
                f"{limit} (seq_length)"
            )
        later = PastKeyValues(self.model, ids, self.rows, self.width + new.shape[1])
        if new.shape[1] > 1:  # the cache gives a row's last scores only
            lengths = np.array([len(row) for row in ids], np.int32)
            ends = np.cumsum(lengths)[:, None]
            last = (ends - np.arange(new.shape[1], 0, -1)).astype(np.int32)
            flat = np.concatenate(ids).astype(np.int32)
            scores, _ = self.model.core.forward(flat, lengths, rows=last.reshape(-1))
            return scores.reshape(*new.shape, -1), later
        if not self.rows.cache.current:
            self.rows.forget()
        self.rows.make_room(longest)
        for row, whole in enumerate(ids):
            self.rows.become(row, whole)
        return self.rows.extend(list(range(len(ids))))[:, None], later


def check_past(past: Any, model: Model, rows: int) -> None:
    """TypeError for what is no PastKeyValues, ValueError for one of another model or number of
    rows.
    """
    if not isinstance(past, PastKeyValues):
        raise TypeError(
            f"past_key_values: expected what the model returned, got {type(past).__name__}"
        )
    if past.model is not model:
        raise ValueError("past_key_values: made by another model")
    if len(past.rows_of_ids) != rows:
        raise ValueError(f"past_key_values: holds {len(past.rows_of_ids)} rows, got {rows}")


def scores_after(
    model: Model, past: Any, input_ids: Any, attention_mask: Any, position_ids: Any
) -> tuple[np.ndarray, PastKeyValues]:
    """`go_on` of what `past` holds with what `model(..)` was given, checked: a mask covers all ids
    and hides those that the first call's did; positions count on.
    """
    if input_ids is None:
        raise ValueError("input_ids: expected an array of ids (rows, tokens), got None")
    ids = as_rows("input_ids", input_ids)
    check_ids("input_ids", ids, model.config.padded_vocab_size)
    rows, new = ids.shape
    check_past(past, model, rows)
    held = np.array([len(row) for row in past.rows_of_ids])
    if attention_mask is not None:
        mask = as_rows("attention_mask", attention_mask) != 0
        if mask.shape != (rows, past.width + new):
            raise ValueError(
                f"attention_mask: expected shape {(rows, past.width + new)}, for what "
                f"past_key_values holds and what follows, got {mask.shape}"
            )
        wrong = (mask.sum(axis=1) != held + new) | ~mask[:, past.width :].all(axis=1)
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"attention_mask: row {row} has {mask[row].sum()} ids, expected the {held[row]} "
                f"that past_key_values holds and the {new} that follow"
            )
    if position_ids is not None:
        usual = held[:, None] + np.arange(new)
        given = as_rows("position_ids", position_ids)
        if given.shape not in (usual.shape, (1, new)) or (given != usual).any():
            raise ValueError(
                f"position_ids: expected {usual[0, 0]} .. in row 0, where past_key_values ends, "
                f"got {given[0, :4].tolist()}"
            )
    return past.go_on(ids)
