"""Loss curves of a run. Needs matplotlib (the extra `plot`); nothing else of the package does."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import tell
from ..files.write import atomic_file

SMOOTHING = 0.9


def smoothed(values: Sequence[float], weight: float = SMOOTHING) -> list[float]:
    """Exponential average, started at the first value: s = weight * s + (1 - weight) * v."""
    out: list[float] = []
    for value in values:
        out.append(weight * out[-1] + (1 - weight) * value if out else value)
    return out


def plot_loss(
    output_dir: str | os.PathLike,
    log_history: Sequence[Mapping[str, Any]],
    keys: Sequence[str] = ("loss",),
) -> list[Path]:
    """Draw `training_<key>.png` (100 dpi) for each key of the records: raw and smoothed over steps.

    Returns the files written. A key without records is a warning; without matplotlib one warning
    says how to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        tell.warn(
            "plot_loss: matplotlib is not installed, so no curve is drawn: "
            "pip install 'glmlora[plot]'"
        )
        return []
    written = []
    for key in keys:
        points = [(r["step"], r[key]) for r in log_history if key in r]
        if not points:
            tell.warn(f"No metric {key} to plot.")
            continue
        steps, values = zip(*points, strict=True)
        # A figure of its own: pyplot would change what a notebook shows.
        figure = Figure()
        axes = figure.add_subplot()
        axes.plot(steps, values, alpha=0.4, label="original")
        axes.plot(steps, smoothed(values), label="smoothed")
        axes.set_title(f"training {key} of {os.fspath(output_dir)}")
        axes.set_xlabel("step")
        axes.set_ylabel(key)
        axes.legend()
        path = Path(output_dir) / f"training_{key}.png"
        with atomic_file(path) as file:
            figure.savefig(file, format="png", dpi=100)
        written.append(path)
    return written
