"""Counters of the server in Prometheus' text format."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict

BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds

HELP = {
    "requests": ("counter", "Requests that were answered, by path and status."),
    "prompt_tokens": ("counter", "Tokens of prompts."),
    "cached_tokens": ("counter", "Of these, those that were not computed again."),
    "completion_tokens": ("counter", "Tokens of answers."),
    "cancelled": ("counter", "Answers whose callers went away."),
    "queue_seconds": ("histogram", "From a request to its place in the batch."),
    "first_token_seconds": ("histogram", "From a request to its first token."),
    "request_seconds": ("histogram", "From a request to its end."),
}


class Metrics:
    """Counts and histograms; any thread may add to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], float] = defaultdict(float)
        self._buckets: dict[str, list[int]] = {}
        self._sums: dict[str, float] = defaultdict(float)

    def add(self, name: str, value: float = 1, **labels: object) -> None:
        """To a counter."""
        shown = ",".join(f'{key}="{labels[key]}"' for key in labels)
        with self._lock:
            self._counts[name, shown] += value

    def observe(self, name: str, seconds: float) -> None:
        """In a histogram."""
        with self._lock:
            buckets = self._buckets.setdefault(name, [0] * (len(BOUNDS) + 1))
            buckets[bisect_left(BOUNDS, seconds)] += 1
            self._sums[name] += seconds

    def text(self, **gauges: float) -> str:
        """All of it; gauges: values of now, by their names."""
        lines = []
        with self._lock:
            for name, (kind, about) in HELP.items():
                full = f"glmlora_{name}" + ("_total" if kind == "counter" else "")
                lines += [f"# HELP {full} {about}", f"# TYPE {full} {kind}"]
                if kind == "counter":
                    found = [(s, v) for (n, s), v in self._counts.items() if n == name]
                    for shown, value in found or [("", 0)]:
                        lines.append(f"{full}{f'{{{shown}}}' if shown else ''} {value:.12g}")
                    continue
                total, buckets = 0, self._buckets.get(name, [0] * (len(BOUNDS) + 1))
                for bound, count in zip((*BOUNDS, "+Inf"), buckets, strict=True):
                    total += count
                    lines.append(f'{full}_bucket{{le="{bound}"}} {total}')
                lines += [f"{full}_sum {self._sums[name]:.12g}", f"{full}_count {total}"]
        for name, value in gauges.items():
            lines += [f"# TYPE glmlora_{name} gauge", f"glmlora_{name} {value:.12g}"]
        return "\n".join(lines) + "\n"
