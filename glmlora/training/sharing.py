"""How several ranks, or one that is `deterministic`, make the gradient of an update.

An update has the same rows for any number of ranks, and each row its number in it, of which dropout
and noise are functions. Dealt out by tokens, rows lie in other micro-batches than one process would
make, and sums differ in their last bits. With `deterministic` the micro-batches are those of one
process, each one's gradient is made alone, and they are added up by a tree that depends on their
places alone: pairs of neighbours, pairs of these, and what is left over from the right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..batch import Batch, Encoded
from .ranks import Alone

#: Numbers of the gradients that are exchanged at a time.
CHUNK = 1 << 22


def deal(weights: Sequence[int] | np.ndarray, n: int) -> list[np.ndarray]:
    """Indices (int64, ascending) of the weights for each of n ranks: the heaviest first, each to
    the rank with the least so far.
    """
    weights = np.asarray(weights)
    if n == 1:
        return [np.arange(len(weights))]
    sums = [0] * n
    dealt: list[list[int]] = [[] for _ in range(n)]
    for i in np.argsort(-weights, kind="stable").tolist():
        rank = sums.index(min(sums))
        sums[rank] += int(weights[i])
        dealt[rank].append(i)
    return [np.array(sorted(part), np.int64) for part in dealt]


def deal_runs(weights: Sequence[int] | np.ndarray, n: int) -> list[range]:
    """Neighbouring indices of the weights for each of n ranks, in order: rank r ends where the sum
    is nearest to (r + 1) / n of all.
    """
    sums = np.concatenate([[0], np.cumsum(np.asarray(weights, np.int64))])
    ends = [int(np.abs(sums * n - sums[-1] * rank).argmin()) for rank in range(n)]
    return [range(a, b) for a, b in zip(ends, [*ends[1:], len(sums) - 1], strict=True)]


class Tree:
    """A sum of leaves 0, 1, .. that come in order, with gaps between runs, by pairs of neighbours:
    the same bits however the leaves were cut into runs.
    """

    def __init__(self) -> None:
        self.pieces: list[tuple[tuple[int, int], np.ndarray]] = []  # (level, number), sum

    def take(self, place: tuple[int, int], array: np.ndarray) -> None:
        """Add node `number` of `level`, the sum of 2^level leaves; the array is this tree's now."""
        level, number = place
        while self.pieces and number % 2 and self.pieces[-1][0] == (level, number - 1):
            _, left = self.pieces.pop()
            left += array
            level, number, array = level + 1, number // 2, left
        self.pieces.append(((level, number), array))

    def total(self) -> np.ndarray:
        """The sum of all, which is what the tree holds from now on."""
        while len(self.pieces) > 1:
            _, right = self.pieces.pop()
            place, left = self.pieces.pop()
            left += right
            self.pieces.append((place, left))
        return self.pieces[0][1]


class Part(NamedTuple):
    """A micro-batch of one rank: its place in the update, its rows of the data, and their numbers
    in the update.
    """

    place: int
    rows: np.ndarray
    numbers: np.ndarray


def labels_per_row(encoded: Encoded) -> np.ndarray:
    """Labelled tokens of each record, int64 (n)."""
    counts = []
    for start in range(0, len(encoded), 1024):
        batch = encoded.batch(np.arange(start, min(start + 1024, len(encoded))))
        row = np.searchsorted(np.cumsum(batch.lengths), batch.rows_and_targets()[0], side="right")
        counts.append(np.bincount(row, minlength=batch.n_segments))
    return np.concatenate(counts)


class Sharing:
    """Makes the gradients of updates in `core`, each rank a part of them.

    backward: of a batch and the numbers of its rows, the mean loss of its labelled tokens, which
    are some. most: tokens, rows and labelled tokens of the largest micro-batch. Raises ValueError
    where updates have too few rows for the ranks, or micro-batches for `deterministic` ones.
    """

    def __init__(
        self,
        ranks: Alone,
        core: Any,
        encoded: Encoded,
        backward: Callable[[Batch, np.ndarray], float],
        most: tuple[int, int, int],
        deterministic: bool,
    ):
        self.ranks, self.core, self.encoded = ranks, core, encoded
        self.deterministic = deterministic
        self._backward, self._most = backward, most
        self.labelled, self._lengths = labels_per_row(encoded), encoded.lengths
        self._dtype = core.read(core.trainable()[0], "exp_avg").dtype
        size = 0 if deterministic else min(CHUNK, core.gradient_size)
        self._buffer = np.empty(size, self._dtype)

    def __call__(self, group: Sequence[np.ndarray], grad_norm: float) -> tuple[float, int, int]:
        """(sum of losses, labelled tokens, tokens) of the update whose micro-batches are `group`.
        Its gradient is in the core of every rank then; without labelled tokens there is none.

        grad_norm: of the update before; RuntimeError where ranks have different ones.
        """
        kept = [rows for rows in group if self.labelled[rows].any()]
        tokens = sum(int(self._lengths[rows].sum()) for rows in group)
        labelled = sum(int(self.labelled[rows].sum()) for rows in kept)
        parts = self._runs(kept) if self.deterministic else self._dealt(kept)
        losses, tree = np.zeros(1 + max(len(kept), len(parts))), Tree()

        def work() -> None:
            for part in parts:
                losses[part.place] = self._loss_of(part)
                if self.deterministic:
                    gradient = np.empty(self.core.gradient_size, self._dtype)
                    self.core.read_gradients(gradient)
                    tree.take((0, part.place), gradient)

        self.ranks.share(work)
        said = self.ranks.agree(sum_of(losses), grad_norm)
        if len(set(said[:, 1].tolist())) > 1:
            raise RuntimeError(
                f"the ranks' weights have become different: the norms of their gradients were "
                f"{said[:, 1].tolist()}"
            )
        if not labelled:
            return 0.0, 0, tokens
        if self.deterministic:
            self.ranks.add(losses)
            loss = sum_of(losses)
            self._add(tree)
        else:
            loss = sum_of(said[:, 0])
            self.ranks.add_gradients(self.core, self._buffer)
        self.core.accumulated_tokens = labelled
        self.core.accumulated_rows = sum(map(len, kept))
        return loss, labelled, tokens

    def _loss_of(self, part: Part) -> float:
        """Of a micro-batch the sum of losses; its gradient is added, or is alone in the core."""
        batch = self.encoded.batch(part.rows)
        if self.deterministic:
            self.core.zero_grad()
        count = int(self.labelled[part.rows].sum())
        try:
            return self._backward(batch, part.numbers) * count if count else 0.0
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{error}; its last micro-batch has the records {part.rows.tolist()}, in this order"
            ) from None

    def _runs(self, kept: Sequence[np.ndarray]) -> list[Part]:
        """This rank's of the update's own micro-batches: neighbours."""
        run = deal_runs([self._lengths[rows].sum() for rows in kept], self.ranks.size)
        first = np.cumsum([0, *map(len, kept)])
        return [Part(i, kept[i], np.arange(first[i], first[i + 1])) for i in run[self.ranks.rank]]

    def _dealt(self, kept: Sequence[np.ndarray]) -> list[Part]:
        """Micro-batches of this rank's rows, none larger than the largest of the data's own."""
        rows = np.concatenate([np.empty(0, np.int64), *kept])
        mine = deal(self._lengths[rows], self.ranks.size)[self.ranks.rank]
        most_tokens, most_rows, most_labelled = self._most
        cut, tokens, labelled = [0], 0, 0
        for i, row in enumerate(rows[mine].tolist()):
            tokens += int(self._lengths[row])
            labelled += int(self.labelled[row])
            full = i - cut[-1] >= most_rows or tokens > most_tokens or labelled > most_labelled
            if full and i > cut[-1]:
                cut.append(i)
                tokens, labelled = int(self._lengths[row]), int(self.labelled[row])
        numbers = np.split(mine, cut[1:])
        parts = [Part(i, rows[part], part) for i, part in enumerate(numbers) if part.size]
        return [part for part in parts if self.labelled[part.rows].any()]

    def _add(self, tree: Tree) -> None:
        """The sum of all ranks' trees into the core."""
        total = np.empty(self.core.gradient_size, self._dtype)
        self.ranks.gather(tree.pieces, tree.take, total)
        if self.ranks.rank == 0:
            total = tree.total()
        self.ranks.copy(total)
        self.core.write_gradients(total)


def check_shares(ranks: Alone, rows: int, micro_batches: int, deterministic: bool) -> None:
    """ValueError where an update of so many rows in so many micro-batches has nothing to do for
    some ranks.
    """
    if deterministic and micro_batches < ranks.size:
        raise ValueError(
            f"deterministic: {ranks.size} ranks share the {micro_batches} micro-batches of an "
            f"update: gradient_accumulation_steps {ranks.size} or more (with a smaller "
            "per_device_train_batch_size the update is the same), or fewer ranks"
        )
    if rows < ranks.size:
        raise ValueError(
            f"mpiexec: {ranks.size} ranks share the {rows} rows of an update "
            "(per_device_train_batch_size x gradient_accumulation_steps, and no more than there "
            f"are): expected {ranks.size} rows or more, or fewer ranks"
        )


def sum_of(values: np.ndarray) -> float:
    """From the first to the last: the same bits in every version of NumPy and Python."""
    total = 0.0
    for value in values.tolist():
        total += value
    return total
