"""A linear head over features: multinomial logistic regression, trained in seconds.

The features of a table are computed once (`model.features`); all heads over them share one
decomposition. In its axes the curvature of the loss is bounded by a diagonal (Boehning 1992,
"Multinomial logistic regression algorithm", section 2), so each step divides by that bound, with
Nesterov's momentum and its restart (O'Donoghue and Candes 2015).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .training.classes import stratified_folds

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)  # of the weights' prior, for a row of one unit length
_STEPS = 2000
_SMALL = 1e-7  # of the gradient, a row: then the head is done


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

    def of(self, features: np.ndarray) -> np.ndarray:
        """Other rows in these axes."""
        return ((features - self.mean) / self.scale) @ self.axes

    def head(self, weight: np.ndarray, bias: np.ndarray, strength: float) -> Head:
        """The same of features as they come."""
        plain = (self.axes @ weight) / self.scale[:, None]
        offset = bias - self.mean @ plain
        return Head(plain.astype(np.float32), offset.astype(np.float32), strength)


def _solve(
    rows: np.ndarray, wanted: np.ndarray, weights: np.ndarray, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (axes, classes) and biases that make the weighted loss and the prior least. wanted:
    (rows, classes), 1 at each row's class.
    """
    n, classes = wanted.shape
    # Bounds of the curvature; together, as two blocks, they bound half of it.
    bound = 0.5 * weights.max() * (rows**2).sum(axis=0)[:, None] + 1 / strength
    bound_of_bias = 0.5 * weights.sum()
    weight, bias = np.zeros((rows.shape[1], classes)), np.zeros(classes)
    w, b, pace = weight, bias, 1.0  # where the gradient is taken
    for _ in range(_STEPS):
        off = weights[:, None] * (np.exp(_log_softmax(rows @ w + b)) - wanted)
        down, down_of_bias = rows.T @ off + w / strength, off.sum(axis=0)
        if max(np.abs(down).max(initial=0), np.abs(down_of_bias).max()) <= _SMALL * n:
            break
        new, new_bias = w - 0.5 * down / bound, b - 0.5 * down_of_bias / bound_of_bias
        moved, moved_bias = new - weight, new_bias - bias
        if (down * moved).sum() + (down_of_bias * moved_bias).sum() > 0:
            pace = 1.0  # it went too far: again from here, without momentum
        faster = (1 + np.sqrt(1 + 4 * pace * pace)) / 2
        w, b = new + (pace - 1) / faster * moved, new_bias + (pace - 1) / faster * moved_bias
        weight, bias, pace = new, new_bias, faster
    return weight, bias


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
    chosen = strengths[0]
    if len(strengths) > 1 and len(classes) > 1:
        loss = np.zeros(len(strengths))
        fold = stratified_folds(classes, min(folds, len(classes)), seed)
        for part in range(fold.max() + 1):
            kept, out = fold != part, fold == part
            axes = _Axes(features[kept])
            left_out = axes.of(features[out])
            for at, strength in enumerate(strengths):
                w, b = _solve(axes.rows, wanted[kept], weights[kept], strength)
                found = (_log_softmax(left_out @ w + b) * wanted[out]).sum(axis=1)
                loss[at] -= (weights[out] * found).sum()
        chosen = strengths[int(loss.argmin())]
    axes = _Axes(features)
    return axes.head(*_solve(axes.rows, wanted, weights, chosen), chosen)
