"""A vote of two classifiers: how much each one's probabilities count in their mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .names import listed

_GAIN = 1e-9  # nats a row: what a mean must gain over the better of the two to be taken


def vote_weight(y: Any, proba: Any, other: Any, labels: Any = None) -> float:
    """The weight of `proba` in the mean `weight * proba + (1 - weight) * other` whose log-loss over
    these rows is least, from 0 to 1. Neither classifier may have been trained on these rows: take
    rows held out, or each row's probabilities by a fold that has not seen it (`oof_proba_`).

    y: a label a row, (rows). proba, other: probabilities of the labels, (rows, labels), as
    `predict_proba` gives them. labels: those of the columns; None: the sorted labels of y.

    The log-loss is convex in the weight, so the place where its slope is 0 is found to the last
    bit. Where no mean is better than one of the two alone, it is 0 or 1; of equal ones, 0.

    Raises ValueError naming y, proba or other: shapes that do not fit, a label without a column,
    what is no probability.
    """
    rows = np.asarray(y)
    if rows.ndim != 1 or not len(rows):
        raise ValueError(f"y: expected one label a row, got shape {rows.shape}")
    try:
        names = sorted(set(rows.tolist())) if labels is None else np.asarray(labels).tolist()
    except TypeError:
        kinds = sorted({type(label).__name__ for label in rows.tolist()})
        raise ValueError(f"y: expected labels of one type, got {listed(kinds)}") from None
    column = {name: number for number, name in enumerate(names)}
    unknown = next((label for label in rows.tolist() if label not in column), None)
    if unknown is not None:
        raise ValueError(f"y: {unknown!r} is none of labels, which are {listed(names)}")
    codes = [column[label] for label in rows.tolist()]
    a = _of_labels("proba", proba, codes, names)
    b = _of_labels("other", other, codes, names)
    known = (a > 0) | (b > 0)  # a label that both rule out has no mean that does not
    a, b = a[known], b[known]
    ahead = a - b

    def slope(weight: float) -> float:
        """Of the log-likelihood; it falls from 0 to 1."""
        with np.errstate(divide="ignore"):
            return float((ahead / (b + weight * ahead))[ahead != 0].sum())

    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    best = high
    with np.errstate(divide="ignore"):
        at = [float(np.log(b + weight * ahead).sum()) for weight in (0.0, 1.0, best)]
    alone = 0 if at[0] >= at[1] - _GAIN * len(rows) else 1
    return float(alone) if at[2] <= at[alone] + _GAIN * len(rows) else best


def _of_labels(what: str, proba: Any, codes: Sequence[int], names: Sequence[Any]) -> np.ndarray:
    """The probability of each row's label, float64 (rows)."""
    table = np.asarray(proba, np.float64)
    wanted = len(codes), len(names)
    if table.shape != wanted:
        raise ValueError(
            f"{what}: expected {wanted} probabilities, for {wanted[0]} rows of y and labels "
            f"{listed(names)}, got {table.shape}"
        )
    wrong = ~((table >= 0) & (table <= 1 + 1e-6)) | (abs(table.sum(axis=1) - 1) > 1e-3)[:, None]
    if wrong.any():
        row = int(wrong.any(axis=1).argmax())
        shown = ", ".join(f"{value:.4g}" for value in table[row])
        raise ValueError(f"{what}: row {row} is no probabilities: {shown}")
    return table[np.arange(len(codes)), codes]
