"""Pictures of a classifier, drawn on matplotlib's axes: its training, what it takes for what, and
how far its probabilities can be trusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def plot_training(axes: Any, log_history: Sequence[Mapping[str, Any]]) -> None:
    """The training loss of `log_history_`, of one run, and the log-loss of the rows held out; a
    ring is where the weights are kept.
    """
    for key, style, text in (
        ("loss", {"color": "C0", "alpha": 0.6}, "training, a token"),
        ("eval_log_loss", {"color": "C1", "marker": "o"}, "held out, a row"),
    ):
        points = [(line["step"], line[key]) for line in log_history if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=text, **style)
    if points:
        best = min(points, key=lambda point: point[1])
        axes.plot(*best, "o", markersize=13, fillstyle="none", color="C1")
    axes.set(title="loss", xlabel="update")
    axes.set_ylim(bottom=0)
    axes.legend()


def plot_confusion(
    axes: Any,
    truth: Sequence[Any],
    predicted: Sequence[Any],
    names: Mapping[Any, str] | None = None,
) -> None:
    """Rows by their label and what was predicted: numbers, and shares of each label's rows. names:
    what to write for a label.
    """
    labels = sorted({*np.asarray(truth).tolist(), *np.asarray(predicted).tolist()})
    counts = confusion(truth, predicted, labels)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        text = f"{counts[row, column]:,}\n{share:.1%}"
        color = "white" if share > 0.5 else "black"
        axes.text(column, row, text, ha="center", va="center", color=color)
    shown = [str((names or {}).get(label, label)) for label in labels]
    axes.set_xticks(range(len(labels)), shown)
    axes.set_yticks(range(len(labels)), shown)
    right = np.trace(counts) / max(counts.sum(), 1)
    axes.set(title=f"{right:.1%} right", xlabel="predicted", ylabel="truth")


def plot_calibration(axes: Any, truth: Any, proba: Any, bins: int = 10) -> None:
    """Of rows of about the same probability, the share that is true, beside the probability: on the
    dashed line it can be taken at its word. As `reliability`; bars are one standard error.
    """
    mean, share, rows = reliability(truth, proba, bins)
    axes.plot([0, 1], [0, 1], "--", color="gray", linewidth=1)
    error = np.sqrt(np.maximum(share * (1 - share), 0.25 / rows) / rows)
    axes.errorbar(mean, share, error, marker="o", capsize=3)
    axes.set(title="calibration", xlabel="probability", ylabel="share that is true")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))


def confusion(truth: Sequence[Any], predicted: Sequence[Any], labels: Sequence[Any]) -> np.ndarray:
    """Numbers of rows, int64 (labels, labels): by their label, then by what was predicted.
    ValueError for another number of predictions.
    """
    place = {label: number for number, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), np.int64)
    pairs = zip(np.asarray(truth).tolist(), np.asarray(predicted).tolist(), strict=True)
    for true, found in pairs:
        counts[place[true], place[found]] += 1
    return counts


def reliability(truth: Any, proba: Any, bins: int = 10) -> tuple[np.ndarray, ...]:
    """Rows in the order of their probability, in `bins` parts of equal size: of each part the mean
    probability, the share that is true (both float64), and the number of rows.

    truth: (rows), true or not; proba: (rows). ValueError for none, or another number.
    """
    true, given = np.asarray(truth, bool), np.asarray(proba, np.float64)
    if true.ndim != 1 or true.shape != given.shape or not len(true):
        raise ValueError(
            f"truth and proba: expected a value of each for a row, got {true.shape} and "
            f"{given.shape}"
        )
    parts = np.array_split(np.argsort(given, kind="stable"), min(bins, len(given)))
    mean = np.array([given[part].mean() for part in parts])
    share = np.array([true[part].mean() for part in parts])
    return mean, share, np.array([len(part) for part in parts])
