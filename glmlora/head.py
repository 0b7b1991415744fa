"""A linear head over features: multinomial logistic regression, trained in seconds.

The features of a table are computed once (`model.features`); all heads over them share one
decomposition, in whose axes the rows are uncorrelated. There the diagonal tells how curved the loss
can be (Boehning 1992, "Multinomial logistic regression algorithm", section 2), and a quasi-Newton
method needs some ten steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .training.classes import stratified_folds

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)  # of the weights' prior, for a row of one unit length
_STEPS = 500
_SMALL = 1e-7  # of the gradient, a row: then the head is done
_MEMORY = 10  # steps that tell the curvature


@dataclass(frozen=True)
class Head:
    """weight float32 (features, classes), bias float32 (classes), of features as they come.
    strength: that of the prior it was trained with, nan where that is not known.
    """

    weight: np.ndarray
    bias: np.ndarray
    strength: float = math.nan

    def log_proba(self, features: np.ndarray) -> np.ndarray:
        """Logarithms float64 (rows, classes) of the probabilities. ValueError for another number of
        features.
        """
        if features.ndim != 2 or features.shape[1] != len(self.weight):
            raise ValueError(
                f"features: expected (rows, {len(self.weight)}), got {features.shape}: made by "
                "another model"
            )
        return _log_softmax(features.astype(np.float64) @ self.weight + self.bias)


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    above = scores - scores.max(axis=-1, keepdims=True)
    return above - np.log(np.exp(above).sum(axis=-1, keepdims=True))


class _Axes:
    """Rows of features in the axes of their decomposition, each feature scaled to a deviation of 1,
    a row to unit length on average.
    """

    def __init__(self, features: np.ndarray):
        wide = features.astype(np.float64)
        self.mean, self.scale = wide.mean(axis=0), wide.std(axis=0)
        self.scale[self.scale <= 1e-9 * (np.abs(self.mean) + 1)] = np.inf  # says nothing
        self.scale *= np.sqrt(max(np.isfinite(self.scale).sum(), 1))
        scaled = (wide - self.mean) / self.scale
        rows, columns = scaled.shape
        if rows <= columns:
            power, left = np.linalg.eigh(scaled @ scaled.T)
            kept = power > 1e-10 * max(power[-1], 1e-300)
            length = np.sqrt(power[kept])
            self.rows = left[:, kept] * length
            self.axes = scaled.T @ (left[:, kept] / length)
        else:
            power, right = np.linalg.eigh(scaled.T @ scaled)
            self.axes = right[:, power > 1e-10 * max(power[-1], 1e-300)]
            self.rows = scaled @ self.axes

    def head(self, weight: np.ndarray, bias: np.ndarray, strength: float) -> Head:
        """The same of features as they come."""
        plain = (self.axes @ weight) / self.scale[:, None]
        offset = bias - self.mean @ plain
        return Head(plain.astype(np.float32), offset.astype(np.float32), strength)


def _solve(
    rows: np.ndarray, wanted: np.ndarray, weights: np.ndarray, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (axes, classes) and biases that make the weighted loss and the prior least. wanted:
    (rows, classes), 1 at each row's class. By L-BFGS (Nocedal and Wright 2006, algorithm 7.5).
    """
    columns = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)  # the last is the biases'
    prior = np.full((columns.shape[1], 1), 1 / strength)
    prior[-1] = 0
    curved = 0.25 * (weights[:, None] * columns**2).sum(axis=0)[:, None] + prior

    def loss_of(head: np.ndarray) -> tuple[float, np.ndarray]:
        """The loss and its gradient (columns, classes)."""
        found = _log_softmax(columns @ head)
        loss = (prior * head**2).sum() / 2 - (weights * (found * wanted).sum(axis=1)).sum()
        off = weights[:, None] * (np.exp(found) - wanted)
        return float(loss), columns.T @ off + prior * head

    head = np.zeros((columns.shape[1], wanted.shape[1]))
    loss, gradient = loss_of(head)
    past: list[tuple[np.ndarray, np.ndarray, float]] = []  # moves, what they changed, 1 / both
    for _ in range(_STEPS):
        if np.abs(gradient).max() <= _SMALL * len(rows):
            break
        down, shares = gradient.copy(), []
        for moved, changed, unit in reversed(past):
            shares.append(unit * (moved * down).sum())
            down -= shares[-1] * changed
        down /= curved
        if past:
            _, changed, unit = past[-1]
            down /= unit * (changed**2 / curved).sum()
        for (moved, changed, unit), share in zip(past, reversed(shares), strict=True):
            down += (share - unit * (changed * down).sum()) * moved
        slope, size = (gradient * down).sum(), 1.0
        while size > 1e-9:
            new_loss, new_gradient = loss_of(head - size * down)
            if new_loss <= loss - 1e-4 * size * slope:
                break
            size /= 2
        else:
            break  # rounding hides what is left
        moved, changed = -size * down, new_gradient - gradient
        past = [*past[1 - _MEMORY :], (moved, changed, 1 / (moved * changed).sum())]
        head, loss, gradient = head + moved, new_loss, new_gradient
    return head[:-1], head[-1]


def fit_head(
    features: np.ndarray,
    classes: np.ndarray,
    number: int,
    sample_weight: np.ndarray | None = None,
    strengths: Sequence[float] = STRENGTHS,
    folds: int = 5,
    seed: int = 0,
) -> Head:
    """A head of `number` classes over features (rows, D), trained on the rows' classes, whole
    numbers from 0. Of several strengths that with the least log-loss over `folds` parts, each
    left out once, is taken. ValueError for features that are not finite, or rows that differ.
    """
    classes = np.asarray(classes)
    if features.ndim != 2 or len(features) != len(classes) or not len(classes):
        raise ValueError(
            f"features: expected (rows, D) and as many classes, got {features.shape} and "
            f"{classes.shape}"
        )
    if not np.isfinite(features).all():
        row = int((~np.isfinite(features).all(axis=1)).argmax())
        raise ValueError(f"features: row {row} is not finite")
    weights = np.ones(len(classes)) if sample_weight is None else np.asarray(sample_weight, float)
    wanted: np.ndarray = np.eye(number)[classes]
    axes, chosen = _Axes(features), strengths[0]
    if len(strengths) > 1 and len(classes) > 1:
        loss = np.zeros(len(strengths))
        fold = stratified_folds(classes, min(folds, len(classes)), seed)
        for part in range(fold.max() + 1):
            kept, out = fold != part, fold == part
            for at, strength in enumerate(strengths):
                w, b = _solve(axes.rows[kept], wanted[kept], weights[kept], strength)
                found = (_log_softmax(axes.rows[out] @ w + b) * wanted[out]).sum(axis=1)
                loss[at] -= (weights[out] * found).sum()
        chosen = strengths[int(loss.argmin())]
    return axes.head(*_solve(axes.rows, wanted, weights, chosen), chosen)
