"""Ragged batches: flat runs of tokens cut into segments, never padded. Records as ids, the order
in which they are trained, and what users pass as ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .families.context import Context, row_mask, row_positions

#: Label of a position that is not trained.
IGNORED = -100


@dataclass(eq=False)
class Batch:
    """A ragged batch: N tokens in S segments.

    ids (N) int32; lengths (S) int32, their sum is N; labels (N) int32, not shifted, -100 where not
    trained, or None; positions (N) int32, or None where every segment counts from 0. Raises
    ValueError naming the array.
    """

    ids: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray | None = None
    positions: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("ids", "lengths", "labels", "positions"):
            array = getattr(self, name)
            if array is None and name in ("labels", "positions"):
                continue
            array = np.ascontiguousarray(array, np.int32)
            shape = self.lengths.shape if name == "lengths" else self.ids.shape
            if array.ndim != 1 or array.shape != shape:
                raise ValueError(
                    f"{name}: expected one dimension as ids {self.ids.shape}, got {array.shape}"
                )
            setattr(self, name, array)
        if self.lengths.size == 0 or self.lengths.min() < 1 or self.lengths.sum() != self.ids.size:
            raise ValueError(
                f"lengths: expected at least 1 each and {self.ids.size} together, got "
                f"{self.lengths[:8].tolist()}"
            )

    @property
    def n_tokens(self) -> int:
        return self.ids.size

    @property
    def n_segments(self) -> int:
        return self.lengths.size

    @property
    def n_targets(self) -> int:
        """Trained positions. 0 means that there is no loss: the caller decides what that is."""
        return self.rows_and_targets()[0].size

    def rows_and_targets(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows, targets), both (M) int32: flat index t whose successor t+1 in the same segment is
        labelled, and that label.

        The shift by one happens here and nowhere else; the label of a segment's first token is
        never used.
        """
        if self.labels is None:
            return np.empty(0, np.int32), np.empty(0, np.int32)
        trained = self.labels != IGNORED
        trained[np.cumsum(self.lengths) - self.lengths] = False
        rows = np.flatnonzero(trained) - 1
        return rows.astype(np.int32), self.labels[rows + 1]

    @classmethod
    def from_padded(
        cls,
        input_ids: Any,
        attention_mask: Any = None,
        labels: Any = None,
        position_ids: Any = None,
    ) -> tuple[Batch, np.ndarray, np.ndarray]:
        """From arrays (S, T) with padding on either side, where `attention_mask` is 0; no mask
        means no padding.

        Returns (batch, row, column): token i of the batch stood at [row[i], column[i]] (int64), so
        `padded[row, column] = values` brings results back. Labels over padding are dropped with it.
        Raises ValueError for wrong shapes or dtypes, negative ids or labels (but -100), a row of
        padding alone, or a mask with a hole.
        """
        ids = _integers("input_ids", input_ids)
        if ids.ndim != 2 or ids.size == 0:
            raise ValueError(f"input_ids: expected shape (rows, tokens), got {ids.shape}")
        if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(f"input_ids: expected ids from 0 to 2^31 - 1, got {wrong}")
        keep = _real_tokens(attention_mask, ids.shape)
        if keep is None:  # no padding, the common case of small batches: no index arrays
            lengths = np.full(ids.shape[0], ids.shape[1])
            row, column = np.divmod(np.arange(ids.size), ids.shape[1])
        else:
            lengths = keep.sum(axis=1)
            row, column = np.nonzero(keep)

        def real(array: np.ndarray) -> np.ndarray:
            return array.ravel() if keep is None else array[keep]

        if labels is not None:
            labels = real(_integers("labels", labels, ids.shape))
            if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
                wrong = labels[(labels < 0) & (labels != IGNORED) | (labels > 2**31 - 1)]
                if wrong.size:
                    raise ValueError(f"labels: expected ids or {IGNORED}, got {wrong[0]}")
        positions = None
        if position_ids is not None:
            positions = real(_integers("position_ids", position_ids, ids.shape))
            if positions.min() < 0 or positions.max() > np.iinfo(np.int32).max:
                raise ValueError(f"position_ids: expected 0 or more, got {positions.min()}")
            usual = np.arange(row.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            if np.array_equal(positions, usual):
                positions = None
        return cls(real(ids), lengths, labels, positions), row, column


def _array(name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError:
        raise ValueError(
            f"{name}: expected rows of one length, got ragged ones; pad them first"
        ) from None


def _integers(name: str, value: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
    array = _array(name, value)
    if array.dtype.kind not in "iu" and array.size:
        raise ValueError(f"{name}: expected integers, got {array.dtype}")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape} as input_ids, got {array.shape}")
    return array


def _real_tokens(mask: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """The attention mask as bool (S, T), checked; None where there is no padding."""
    if mask is None:
        return None
    mask = _array("attention_mask", mask)
    if mask.shape != shape:
        raise ValueError(f"attention_mask: expected shape {shape} as input_ids, got {mask.shape}")
    if mask.dtype.kind not in "biuf" or not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"attention_mask: expected values 0 and 1, got {mask.dtype} with others")
    if mask.all():
        return None
    keep = mask.astype(bool)
    for row in range(shape[0]):
        places = np.flatnonzero(keep[row])
        if places.size == 0:
            raise ValueError(f"attention_mask: row {row} is padding alone")
        if places[-1] - places[0] + 1 != places.size:
            raise ValueError(
                f"attention_mask: row {row} has zeros between ones; padding stands at the ends only"
            )
    return keep


# Encoded records


@dataclass
class Encoded:
    """Records as ids, one after another.

    ids (N) int32; offsets (n+1) int64: record i is ids[offsets[i]:offsets[i+1]]; source_lengths (n)
    int32: its leading ids that are not trained (prompt with special ids); n_cut: records whose
    prompt was cut; ignored_id: the pad id where labels equal to it are left out of the loss
    (`ignore_pad_token_for_loss`); n_answers_cut: records whose answer was cut.
    """

    ids: np.ndarray
    offsets: np.ndarray
    source_lengths: np.ndarray
    n_cut: int
    ignored_id: int | None = None
    n_answers_cut: int = 0

    def __len__(self) -> int:
        return len(self.source_lengths)

    @property
    def lengths(self) -> np.ndarray:
        """Ids per record, (n) int64."""
        return np.diff(self.offsets)

    def source(self, row: int) -> np.ndarray:
        """Ids of the prompt."""
        return self.ids[self.offsets[row] : self.offsets[row] + self.source_lengths[row]]

    def target(self, row: int) -> np.ndarray:
        """Ids of the answer with its end id."""
        return self.ids[self.offsets[row] + self.source_lengths[row] : self.offsets[row + 1]]

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The given records as one batch, labels over the answers only."""
        spans = [slice(self.offsets[row], self.offsets[row + 1]) for row in rows]
        rows = np.asarray(rows)
        lengths = (self.offsets[rows + 1] - self.offsets[rows]).astype(np.int32)
        ids = np.concatenate([self.ids[span] for span in spans])
        # Distance of every token from the start of its segment, against the length of its source.
        starts = np.cumsum(lengths) - lengths
        within = np.arange(len(ids)) - np.repeat(starts, lengths)
        labels = np.where(
            within < np.repeat(self.source_lengths[rows], lengths), IGNORED, ids
        ).astype(np.int32)
        if self.ignored_id is not None:
            labels[labels == self.ignored_id] = IGNORED
        return Batch(ids, lengths, labels)


# Order


def _permutation(n: int, seed: int, stream: int) -> np.ndarray:
    """A permutation (n) int64 of (seed, stream, n) alone: raw Philox words, whose stream NumPy
    keeps over versions.
    """
    words = np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(n)
    return np.argsort(words, kind="stable")


def epoch_order(n: int, epoch: int, seed: int) -> np.ndarray:
    """Order (n) int64 of the records in epoch 0, 1, ..: a function of (seed, epoch, n) only."""
    return _permutation(n, seed, epoch)


def grouped_epoch_order(
    lengths: Sequence[int] | np.ndarray, epoch: int, seed: int, batch_size: int
) -> np.ndarray:
    """The order for `group_by_length`: a random order, cut into runs of up to 50 batches that are
    sorted, longest first.

    As in transformers, the longest record of all comes first, so that too much memory shows at
    once.
    """
    lengths = np.asarray(lengths)
    order = epoch_order(len(lengths), epoch, seed)
    run = batch_size * max(1, min(len(lengths) // (batch_size * 4), 50))
    runs = [order[start : start + run] for start in range(0, len(order), run)]
    runs = [part[np.argsort(-lengths[part], kind="stable")] for part in runs]
    if runs:
        longest = max(range(len(runs)), key=lambda i: lengths[runs[i][0]])
        runs[0][0], runs[longest][0] = runs[longest][0], runs[0][0]
    return np.concatenate(runs) if runs else order


def split_dev(n: int, ratio: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, dev) indices, each sorted int64: dev has ceil(ratio * n) records, chosen by `seed`.

    A ratio up to 1e-6 holds nothing out. Raises ValueError where nothing would be left to train on.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"dev_ratio: expected from 0 to below 1, got {ratio!r}")
    # Rounded first: 0.07 * 100 is 7.000000000000001.
    n_dev = math.ceil(round(ratio * n, 9)) if ratio > 1e-6 else 0
    if n_dev >= n:
        raise ValueError(f"dev_ratio: {ratio!r} of {n} records leaves none to train on")
    order = _permutation(n, seed, 2**64 - 1)  # a stream that no epoch has
    return np.sort(order[n_dev:]), np.sort(order[:n_dev])


def micro_batches(order: np.ndarray, batch_size: int, drop_last: bool = False) -> list[np.ndarray]:
    """The order cut into batches; a short last one is kept unless `drop_last`."""
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if drop_last and batches and len(batches[-1]) < batch_size:
        batches.pop()
    return batches


def updates_per_epoch(n: int, batch_size: int, accumulation: int, drop_last: bool = False) -> int:
    """ceil(micro-batches / accumulation): the short tail of an epoch is an update of its own."""
    n_micro = n // batch_size if drop_last else -(-n // batch_size)
    return -(-n_micro // accumulation)


def as_rows(name: str, value: Any) -> np.ndarray:
    """`value` as an integer array (rows, tokens); one row may come without its outer brackets."""
    if isinstance(value, Mapping):
        raise TypeError(f"{name}: got a whole encoding; pass it as **encoding, or its input_ids")
    if isinstance(value, str):
        raise TypeError(f"{name}: expected ids, got text; the tokenizer makes ids of it")
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(
            f"{name}: expected rows of one length, got ragged ones; pad them first"
        ) from None
    if array.ndim == 1 and array.dtype != object:
        array = array[None]
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{name}: expected shape (rows, tokens), got {array.shape}")
    if array.dtype.kind not in "iub":
        raise ValueError(f"{name}: expected integers, got {array.dtype}")
    return array


def given_rows(
    input_ids: Any, attention_mask: Any, position_ids: Any, labels: Any, context: Context | None
) -> tuple[np.ndarray, ...]:
    """(input_ids, attention_mask, position_ids, labels) as `Batch.from_padded` takes them, None
    where they are None.

    Of a model with a context (families/context.py) attention_mask may also be bool (rows, 1,
    tokens, tokens), True where one id may not see another, as its tokenizer gives it, and
    position_ids (rows, 2, tokens): checked, and left out, since the core derives both. ValueError
    for others than that.
    """
    if input_ids is None:
        raise ValueError("input_ids: expected an array of ids (rows, tokens), got None")
    ids = as_rows("input_ids", input_ids)
    labels = None if labels is None else as_rows("labels", labels)
    if context is None:
        mask, places = (
            None if value is None else as_rows(name, value)
            for name, value in (("attention_mask", attention_mask), ("position_ids", position_ids))
        )
        return ids, mask, places, labels
    mask = None if attention_mask is None else np.asarray(attention_mask)
    hidden = mask if mask is not None and mask.ndim == 4 else None
    if hidden is not None:
        if hidden.shape != (len(ids), 1, ids.shape[1], ids.shape[1]):
            raise ValueError(
                f"attention_mask: expected shape {(len(ids), 1, ids.shape[1], ids.shape[1])} or "
                f"{ids.shape}, got {hidden.shape}"
            )
        hidden = hidden.astype(bool)
        mask = ~hidden[:, 0, -1]
    elif mask is not None:
        mask = as_rows("attention_mask", mask)
    keep = _real_tokens(mask, ids.shape)
    given = None if position_ids is None else np.asarray(position_ids)
    if given is not None and given.shape != (len(ids), 2, ids.shape[1]):
        raise ValueError(
            f"position_ids: expected shape {(len(ids), 2, ids.shape[1])}, position and block of "
            f"each id, got {given.shape}"
        )
    for row, line in enumerate(ids):
        real = np.flatnonzero(keep[row]) if keep is not None else np.arange(ids.shape[1])
        try:
            positions = row_positions(line[real].tolist(), context)
        except ValueError as error:
            raise ValueError(f"input_ids: row {row} has {error}") from None
        if given is not None and not np.array_equal(given[row][:, real], positions):
            raise ValueError(
                f"position_ids: row {row} has others than those that follow from its ids: leave "
                "them out"
            )
        if hidden is not None:
            wanted = row_mask(line[real].tolist(), context)
            if not np.array_equal(hidden[row, 0][np.ix_(real, real)], wanted):
                raise ValueError(
                    f"attention_mask: row {row} hides others than this model does, which reads all "
                    f"before id {context.sop} (<sop>) in both directions: leave it out"
                )
    return ids, mask, None, labels


def check_ids(name: str, ids: np.ndarray, vocabulary: int, ignored: int | None = None) -> None:
    """ValueError with id, row and column of the first one that the vocabulary does not have."""
    if ids.min() >= 0 and ids.max() < vocabulary:
        return
    wrong = (ids < 0) | (ids >= vocabulary)
    if ignored is not None:
        wrong &= ids != ignored
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"{name}: id {ids[row, column]} at row {row}, column {column} is outside the "
            "vocabulary of "
            f"{vocabulary} ids (0 to {vocabulary - 1})"
        )


def padded(
    values: np.ndarray, row: np.ndarray, column: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Values (N, C) of the ragged tokens at their places in (B, T, C), 0 elsewhere."""
    if values.shape[0] == shape[0] * shape[1]:
        return values.reshape(*shape, -1)
    out = np.zeros((*shape, values.shape[1]), values.dtype)
    out[row, column] = values
    return out
