"""Prompts that are read in both directions: what a row's positions and its mask follow from.

The core derives them from the ids itself (csrc/glm.h, rope_2d); here they are as arrays, for
encodings that say them and for callers that give them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Context(NamedTuple):
    """Ids that cut a row: all before the first `sop` is its context. What follows stands at the
    place of the first `gmask`, or where there is none of the first `mask`; sop_in_place: but for
    the first sop after a gmask.
    """

    sop: int
    gmask: int
    mask: int
    sop_in_place: bool = False


def row_positions(ids: Sequence[int], context: Context) -> np.ndarray:
    """int64 (2, T): position and block of each id of a row without padding. ValueError where it has
    no sop, or neither gmask nor mask.
    """
    ids = list(ids)
    if context.sop not in ids:
        raise ValueError(f"no id {context.sop} (<sop>), which ends what is read in both directions")
    mask = next((m for m in (context.gmask, context.mask) if m in ids), None)
    if mask is None:
        raise ValueError(
            f"neither id {context.gmask} ([gMASK]) nor {context.mask} ([MASK]), where the answer "
            "stands"
        )
    length, place = ids.index(context.sop), np.arange(len(ids))
    position = np.where(place < length, place, ids.index(mask))
    if context.sop_in_place and mask == context.gmask:
        position[length] = length
    return np.stack([position, np.maximum(0, place - length + 1)])


def row_mask(ids: Sequence[int], context: Context) -> np.ndarray:
    """bool (T, T), True where the id of the row may not see that of the column. Raises as
    `row_positions`.
    """
    length = row_positions(ids, context)[1].tolist().index(1)
    place = np.arange(len(ids))
    return (place[None] > place[:, None]) & (place[None] >= length)
