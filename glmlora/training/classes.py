"""Rows with labels: folds that keep their shares, weights of classes, scores of predictions.

Labels are codes here: whole numbers from 0, (n) int64, of `classes`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

SCORES = ("accuracy", "macro_f1", "log_loss")
THRESHOLDS = ("accuracy", "f1")


def stratified_folds(codes: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Of each row the number of its fold, (n) int64 from 0: each label's rows are shared out over
    the folds as evenly as they can be, by a random order. ValueError for more folds than rows.
    """
    if not 2 <= folds <= len(codes):
        raise ValueError(f"folds: expected from 2 to the {len(codes)} rows, got {folds}")
    rng = np.random.Generator(np.random.Philox(seed))
    shuffled = rng.permutation(len(codes))
    order = shuffled[np.argsort(codes[shuffled], kind="stable")]  # a label's rows stand together
    fold = np.empty(len(codes), np.int64)
    fold[order] = np.arange(len(codes)) % folds
    return fold


def stratified_split(codes: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which rows are held out, bool (n): of each label `share` of its rows, rounded, at least one
    where it has two or more.

    ValueError for a label with one row, which cannot be on both sides.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    held_out = np.zeros(len(codes), bool)
    for code in np.unique(codes):
        rows = rng.permutation(np.flatnonzero(codes == code))
        if len(rows) < 2:
            raise ValueError(
                f"validation: a label has one row (row {rows[0]}), and one is held out of each: "
                "give it more rows, or leave validation out"
            )
        held_out[rows[: min(len(rows) - 1, max(1, round(share * len(rows))))]] = True
    return held_out


def class_weights(weights: Any, codes: np.ndarray, classes: np.ndarray) -> np.ndarray | None:
    """The weight of each class, (classes) float64, None where all are equal.

    weights: None, "balanced" (rows / (classes * rows of the class), as in scikit-learn), or a dict
    from class to a number above 0; 1 for classes that it leaves out. ValueError naming a class.
    """
    if weights is None:
        return None
    if isinstance(weights, str) and weights == "balanced":
        counts = np.bincount(codes, minlength=len(classes))
        return len(codes) / (len(classes) * np.maximum(counts, 1))
    if not isinstance(weights, Mapping):
        raise ValueError(
            f"class_weight: expected None, 'balanced' or a dict of weights, got {weights!r:.80}"
        )
    known = classes.tolist()
    for name, weight in weights.items():
        if name not in known:
            raise ValueError(f"class_weight: {name!r} is no label of y, which has {known}")
        if isinstance(weight, bool) or not (
            isinstance(weight, int | float | np.number) and 0 < weight < math.inf
        ):
            raise ValueError(f"class_weight: {name!r}: expected a number above 0, got {weight!r}")
    return np.array([float(weights.get(name, 1.0)) for name in known])


def resampled(codes: np.ndarray, weights: np.ndarray | None, seed: int) -> np.ndarray:
    """Numbers of rows, int64, each as often as its class's weight over the smallest one says: the
    fraction that is left is a draw among the rows of the class. Every row is there at least once.
    """
    if weights is None:
        return np.arange(len(codes))
    rng = np.random.Generator(np.random.Philox(seed))
    rows = []
    for code in np.unique(codes):
        of_class = rng.permutation(np.flatnonzero(codes == code))
        wanted = round(len(of_class) * weights[code] / weights[np.unique(codes)].min())
        rows.append(np.resize(of_class, max(len(of_class), wanted)))
    return np.sort(np.concatenate(rows))


def label_scores(codes: np.ndarray, proba: np.ndarray) -> dict[str, float]:
    """accuracy, macro_f1 (the mean over the labels that are there or predicted) and log_loss (nats)
    of probabilities (n, classes).
    """
    predicted = proba.argmax(axis=1)
    likelihood = proba[np.arange(len(codes)), codes]
    f1 = [
        f1_score(codes == code, predicted == code) for code in np.union1d(codes, predicted).tolist()
    ]
    return {
        "accuracy": float((predicted == codes).mean()),
        "macro_f1": float(np.mean(f1)),
        "log_loss": float(-np.log(np.clip(likelihood, np.finfo(float).eps, 1)).mean()),
    }


def f1_score(truth: np.ndarray, predicted: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN) of two bool arrays (n); 0 where nothing is true or predicted."""
    hits = int((truth & predicted).sum())
    others = int((truth ^ predicted).sum())
    return 2 * hits / (2 * hits + others) if hits or others else 0.0


def best_threshold(truth: np.ndarray, proba: np.ndarray, by: str) -> float:
    """The probability from which on a row is taken as true that is best by "accuracy" or "f1".

    truth bool (n), proba (n). It lies half-way between two rows' probabilities; of equally good
    ones it is the nearest to 0.5.
    """
    order = np.argsort(-proba, kind="stable")
    values, hits = proba[order], np.cumsum(truth[order])
    n, positives = len(truth), int(truth.sum())
    taken = np.arange(n + 1)  # the first `taken` rows are predicted true
    hits = np.concatenate([[0], hits])
    if by == "f1":
        score = 2 * hits / np.maximum(taken + positives, 1)
    else:
        score = (hits + (n - positives) - (taken - hits)) / n
    between = (np.concatenate([[1.0], values]) + np.concatenate([values, [0.0]])) / 2
    possible = between > np.concatenate([values, [-1.0]])  # it parts what is taken from the next
    places = np.where(possible, between, np.nan)
    best = np.flatnonzero(np.where(possible, score, -1) >= score[possible].max() - 1e-12)
    return float(places[best[np.argmin(abs(places[best] - 0.5))]])
