"""What was found in a table, as numbers and ids, as text for a terminal, as HTML for a notebook,
as a csv of every finding and as a picture.
"""

from __future__ import annotations

import csv
import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from ..files.write import atomic_file
from .lengths import Forecast
from .similar import SHINGLE, THRESHOLD

_WIDTH = 100
_BARS = 12  # of a histogram
_SHOWN = 6  # ids or groups of a finding in the text; the csv has all


@dataclass(frozen=True)
class Alike:
    """Rows with equal or near-equal texts. similarity: the lowest Jaccard similarity that links
    them, 1 for equal texts; labels: of each row, None where it has none.
    """

    ids: list[Any]
    similarity: float
    labels: list[str | None]


@dataclass(frozen=True)
class Leak:
    """A row of the test table whose text stands in the table, too, equal (1) or nearly so."""

    test_id: Any
    id: Any
    similarity: float


@dataclass(frozen=True)
class TestPart:
    """The test table: as the fields of the same names in Report."""

    __test__ = False  # for pytest: no class of tests

    table: str
    rows: int
    missing: dict[str, list[Any]]
    repeated_ids: list[str]
    lengths: np.ndarray
    cut: dict[Any, int]


@dataclass
class Report:
    """What `glmlora.inspect` found. An id is the value of `id_column`, or a row number from 0 where
    there is no such column or its values are not all different (`repeated_ids`).

    missing: by column, the ids of rows without a value. duplicates: groups of ids whose texts are
    equal but for case and spacing, and whose labels agree; near_duplicates: the same for near-equal
    texts; conflicts: groups of either kind with different labels, which are in neither of the
    others. leaks: test rows that stand in the table. all_compared: False where so many texts were
    alike that not all pairs were compared. labels: rows by label; label_spellings: those that
    differ in case, spaces or ".0" alone. lengths: int32 (rows,) of the prompts, in `unit`. cut: by
    id, how many tokens a prompt has beyond max_source_length. findings: a dict for each row of the
    csv.
    """

    table: str
    rows: int
    columns: list[str]
    id_column: str | None
    label_column: str | None
    text_columns: list[str]
    template: str
    constant_columns: dict[str, str]
    missing: dict[str, list[Any]]
    repeated_ids: list[str]
    max_source_length: int
    duplicates: list[list[Any]] = field(default_factory=list)
    near_duplicates: list[Alike] = field(default_factory=list)
    conflicts: list[Alike] = field(default_factory=list)
    leaks: list[Leak] = field(default_factory=list)
    all_compared: bool = True
    labels: dict[str, int] = field(default_factory=dict)
    label_spellings: list[str] = field(default_factory=list)
    sorted_by_label: bool = False
    unit: str = "characters"
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    cut: dict[Any, int] = field(default_factory=dict)
    suggested_max_source_length: int | None = None
    forecast: Forecast | None = None
    test: TestPart | None = None
    findings: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def note(
        self,
        finding: str,
        table: str,
        rows: Iterable[int],
        ids: Sequence[Any],
        other: Any = "",
        detail: str = "",
    ) -> None:
        """Keep a finding of these rows for the csv."""
        for row in rows:
            self.findings.append(
                dict(finding=finding, table=table, row=row, id=ids[row], like=other, detail=detail)
            )

    def to_csv(self, path: str | os.PathLike) -> None:
        """Write every finding, a line for each row it is about: finding, table ("table" or "test"),
        row (from 0), id, like (the id of the row that it is alike), detail (the column that is
        missing, the similarity, or the tokens that are cut). OSError as `open`.
        """
        with atomic_file(path, "w") as file:
            names = ["finding", "table", "row", "id", "like", "detail"]
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.findings)

    def plot(self, path: str | os.PathLike | None = None) -> Any:
        """A matplotlib Figure of prompt lengths and labels, written as png where a path is given.
        ImportError without matplotlib.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.2), layout="constrained")
        axes, labels = figure.subplots(1, 2, width_ratios=[3, 1])
        shown = [(self.table, self.lengths)]
        if self.test is not None:
            shown.append((self.test.table, self.test.lengths))
        edges = _edges([lengths for _, lengths in shown], 40)
        for name, lengths in shown:
            share = np.full(len(lengths), 100 / max(1, len(lengths)))
            axes.hist(lengths, edges, weights=share, alpha=0.6, label=name)
        if self.unit == "tokens":
            text = f"max_source_length {self.max_source_length}"
            axes.axvline(self.max_source_length, color="crimson", ls="--", label=text)
        axes.set_xlabel(f"prompt length, {self.unit}")
        axes.set_ylabel("% of rows")
        axes.legend()
        names = list(self.labels)[:_BARS]
        labels.barh(names[::-1], [self.labels[name] for name in names[::-1]])
        labels.set_xlabel(f"rows by {self.label_column or 'label'}")
        if path is not None:
            with atomic_file(path) as file:
                figure.savefig(file, format="png", dpi=100)
        return figure

    # As text

    def __str__(self) -> str:
        lines = [self._head(), ""]
        for name, found, text in self._checks():
            lines += _entry(f"{'!' if found else ' '} {name}", text)
        if self.labels:
            lines.append("")
            lines += _chart("  labels", [(k, n) for k, n in self._label_bars()], self._n_labels())
        lines.append("")
        bars = self._length_bars()
        lines += _chart(f"  prompt {self.unit}", [(name, n) for name, n, _ in bars], self.rows)
        for name, text in self._measures():
            lines += _entry(f"  {name}", text)
        return "\n".join(lines)

    def _head(self) -> str:
        parts = [f"{self.table}: {self.rows:,} rows"]
        if self.test is not None:
            parts.append(f"{self.test.table}: {self.test.rows:,} rows to predict")
        known = [("label", self.label_column), ("id", self.id_column)]
        parts += [f"{name} {column!r}" for name, column in known if column]
        return "; ".join([*parts, f"text {' + '.join(self.text_columns)}"])

    def _checks(self) -> list[tuple[str, bool, str]]:
        """(name, whether something was found, what) of each check."""
        kinds = f"{SHINGLE}-word shingles, Jaccard {THRESHOLD} or more"
        checks = [("missing values", _missing_text(self.missing, self.rows))]
        if self.id_column or self.repeated_ids:
            checks.append(("repeated ids", _some(self.repeated_ids)))
        doubles = sum(len(ids) - 1 for ids in self.duplicates)
        text = f"{doubles:,} rows too many: {_groups(self.duplicates)}" if doubles else ""
        checks.append(("duplicates", text))
        near = [group.ids for group in self.near_duplicates]
        text = f"{_count(near, 'group')}: {_groups(near, ' ~ ')} ({kinds})" if near else ""
        checks.append(("near-duplicates", text))
        if self.label_column:
            checks.append(("label conflicts", self._conflicts()))
        if self.test is not None:
            checks.append((f"leaks from {self.test.table}", self._leaks()))
            missing = _missing_text(self.test.missing, self.test.rows)
            checks.append((f"missing in {self.test.table}", missing))
            if self.test.repeated_ids:
                checks.append((f"repeated ids in {self.test.table}", _some(self.test.repeated_ids)))
        notes = self._notes()
        found = [(name, bool(text), text or "none") for name, text in checks]
        return found + [(name, True, text) for name, text in notes]

    def _conflicts(self) -> str:
        shown = []
        for group in self.conflicts[:_SHOWN]:
            pairs = zip(group.ids, group.labels, strict=True)
            sign = " = " if group.similarity == 1 else " ~ "
            shown.append(sign.join(f"{i} ({label})" for i, label in list(pairs)[:_SHOWN]))
        more = ", ..." if len(self.conflicts) > _SHOWN else ""
        if not shown:
            return ""
        what = "of equal or near-equal texts have different labels"
        return f"{_count(self.conflicts, 'group')} {what}: {', '.join(shown)}{more}"

    def _leaks(self) -> str:
        signs = [(k, "=" if k.similarity == 1 else "~") for k in self.leaks[:_SHOWN]]
        shown = ", ".join(f"{k.test_id} {sign} {k.id}" for k, sign in signs)
        more = ", ..." if len(self.leaks) > _SHOWN else ""
        count = _count(self.leaks, "row")
        return f"{count} to predict stand in {self.table}, too: {shown}{more}" if shown else ""

    def _notes(self) -> list[tuple[str, str]]:
        """What is not always worth a line."""
        notes = []
        if self.constant_columns:
            same = [f"{c} (always {v[:20]!r})" for c, v in self.constant_columns.items()]
            notes.append(("nothing to learn from", _some(same)))
        if self.label_spellings:
            both = _some([repr(value) for value in self.label_spellings])
            notes.append(("label spellings", f"{both} differ in case, spaces or .0 alone"))
        if len(self.labels) == 1:
            notes.append(("one label", "every row has the same: there is nothing to tell apart"))
        rare = [value for value, count in self.labels.items() if count < 5]
        if rare and len(self.labels) > 1:
            notes.append(("rare labels", f"{_some(rare)}: fewer than 5 rows each"))
        if self.sorted_by_label:
            text = "rows stand in blocks of one label: shuffle before you split off a validation"
            notes.append(("order", text))
        if not self.all_compared:
            text = "too many texts are alike: not all pairs were compared, there may be more"
            notes.append(("compared", text))
        return notes

    def _n_labels(self) -> int:
        return sum(self.labels.values())

    def _label_bars(self) -> list[tuple[str, int]]:
        first = list(self.labels.items())[:_BARS]
        rest = self._n_labels() - sum(count for _, count in first)
        return first + ([(f"{len(self.labels) - _BARS} others", rest)] if rest else [])

    def _length_bars(self) -> list[tuple[str, int, int]]:
        """(range, rows, rows of the test table) of each bar of the histogram."""
        other = self.test.lengths if self.test is not None else np.zeros(0, np.int32)
        edges = _edges([self.lengths, other], _BARS)
        own, theirs = np.histogram(self.lengths, edges)[0], np.histogram(other, edges)[0]
        names = [f"{a} to {b - 1}" for a, b in zip(edges[:-1], edges[1:], strict=True)]
        return list(zip(names, own.tolist(), theirs.tolist(), strict=True))

    def _measures(self) -> list[tuple[str, str]]:
        """Sentences about lengths and time."""
        shown = [(self.table, self.lengths, self.cut)]
        if self.test is not None:
            shown.append((self.test.table, self.test.lengths, self.test.cut))
        found = []
        for name, lengths, _ in shown:
            middle, high = np.quantile(lengths, (0.5, 0.99), method="inverted_cdf")
            text = f"median {middle:,}, 99 % up to {high:,}, longest {lengths.max():,}"
            found.append((f"{self.unit} in {name}", text))
        if self.unit == "characters":
            found.append(("to count tokens", "name the model directory (--model, or tokenizer=)"))
            return found
        for name, lengths, cut in shown:
            over, total = sum(cut.values()), int(lengths.sum())
            text = f"{len(cut):,} of {len(lengths):,} rows ({len(cut) / len(lengths):.1%})"
            if cut:
                text += f" lose {over:,} tokens ({over / total:.1%} of all)"
                text += f", one up to {max(cut.values()):,}"
            found.append((f"cut at {self.max_source_length} in {name}", text))
        if self.suggested_max_source_length is not None:
            length = self.suggested_max_source_length
            whole = np.count_nonzero(self.lengths <= length) / self.rows
            text = f"max_source_length {length}: {whole:.1%} of the rows stay whole"
            now = int(np.minimum(self.lengths, self.max_source_length).sum())
            more = int(np.minimum(self.lengths, length).sum()) / now - 1
            if abs(more) >= 0.005:
                text += f", for {abs(more):.0%} {'more' if more > 0 else 'fewer'} tokens"
            found.append(("suggested", text))
        if self.forecast is not None:
            cast = self.forecast
            text = (
                f"LoRA {_time(cast.epoch_seconds)} an epoch, short answers to "
                f"{cast.predict_rows:,} rows {_time(cast.predict_seconds)}, on this CPU with "
                f"{cast.flops_per_second / 1e9:,.0f} GFLOP/s as measured now: a forecast"
            )
            found.append(("time", text))
        return found

    # As HTML

    def _repr_html_(self) -> str:
        checks = "".join(
            f'<tr><td class="{"found" if found else "fine"}">{"!" if found else "&#10003;"}</td>'
            f"<td>{escape(name)}</td><td>{escape(text)}</td></tr>"
            for name, found, text in self._checks()
        )
        measures = "".join(
            f"<tr><td></td><td>{escape(name)}</td><td>{escape(text)}</td></tr>"
            for name, text in self._measures()
        )
        charts = _html_chart(
            f"prompt length, {self.unit}",
            [
                (name, [(n, self.rows), *self._test_bar(theirs)])
                for name, n, theirs in self._length_bars()
            ],
        )
        if self.labels:
            total = self._n_labels()
            bars = [(name, [(count, total)]) for name, count in self._label_bars()]
            charts += _html_chart(f"rows by {self.label_column}", bars)
        legend = ""
        if self.test is not None:
            legend = (
                f'<p class="legend"><i></i>{escape(self.table)} '
                f'<i class="test"></i>{escape(self.test.table)}</p>'
            )
        return (
            f'<div class="glmlora-report"><style>{_css()}</style>'
            f"<p><b>{escape(self._head())}</b></p><table>{checks}</table>"
            f'<div class="charts">{charts}</div>{legend}'
            f"<table>{measures}</table></div>"
        )

    def _test_bar(self, count: int) -> list[tuple[int, int]]:
        return [] if self.test is None else [(count, self.test.rows)]


# Pieces of text


def _edges(lengths: Sequence[np.ndarray], bars: int) -> np.ndarray:
    """Round limits of about `bars` ranges that hold all lengths: whole numbers, ascending."""
    there = [part for part in lengths if len(part)]
    low = min((int(part.min()) for part in there), default=0)
    high = max((int(part.max()) for part in there), default=0) + 1
    width = max(1, (high - low) / bars)
    unit = 10 ** max(0, math.floor(math.log10(width)))
    step = next(k * unit for k in (1, 2, 5, 10) if k * unit >= width)
    first = low // step * step
    return np.arange(first, -(-(high - first) // step) * step + first + 1, step)


def _entry(name: str, text: str) -> list[str]:
    """A name and what is said of it, aligned and wrapped."""
    if len(name) > 25:
        return [
            name,
            *textwrap.wrap(text, _WIDTH, initial_indent=" " * 26, subsequent_indent=" " * 26),
        ]
    first = f"{name:<26}"
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=" " * 26, break_long_words=False
    )


def _chart(name: str, bars: Sequence[tuple[str, int]], total: int) -> list[str]:
    """Bars of text, the name before the first of them."""
    widest = max(max((count for _, count in bars), default=1), 1)
    wide = min(24, max((len(text) for text, _ in bars), default=0))
    lines = []
    for text, count in bars:
        bar = "\u2588" * round(36 * count / widest) or ("\u258f" if count else "")
        shown = text if len(text) <= wide else text[: wide - 3] + "..."
        line = f"{name:<26}{shown:>{wide}} {bar:<36} {count:>7,} {count / max(1, total):>6.1%}"
        lines.append(line.rstrip())
        name = ""
    return lines


def _count(things: Sequence[Any], name: str) -> str:
    return f"{len(things):,} {name}{'' if len(things) == 1 else 's'}"


def _some(things: Sequence[Any]) -> str:
    more = f", ... ({len(things):,} in all)" if len(things) > _SHOWN else ""
    return ", ".join(str(thing) for thing in things[:_SHOWN]) + more


def _groups(groups: Sequence[Sequence[Any]], sign: str = " = ") -> str:
    return _some([sign.join(map(str, ids[:_SHOWN])) for ids in groups])


def _missing_text(missing: Mapping[str, Sequence[Any]], rows: int) -> str:
    parts = []
    for column, ids in missing.items():
        everywhere = len(ids) == rows
        parts.append(
            f"{column} in every row"
            if everywhere
            else f"{column} in {_count(ids, 'row')} ({_some(ids)})"
        )
    return "; ".join(parts)


def _time(seconds: float) -> str:
    """About so long."""
    for least, unit, name in ((86400 * 2, 86400, "days"), (7200, 3600, "hours"), (120, 60, "min")):
        if seconds >= least:
            return f"about {seconds / unit:.0f} {name}"
    return f"about {seconds:.0f} s" if seconds >= 1 else "under 1 s"


_STYLES = {  # below the class of the report; colours that read on white and on black
    "": "max-width: 66em; line-height: 1.4",
    "table": "border-collapse: collapse; border: 0; margin: .4em 0",
    "tr": "background: none !important",
    "td": "text-align: left !important; vertical-align: top; border: 0; overflow-wrap: anywhere;"
    "padding: .15em .7em .15em 0",
    "td:nth-child(2)": "white-space: nowrap; opacity: .75",
    ".found": "color: #f76707; font-weight: bold",
    ".fine": "color: #37b24d",
    "td:first-child": "width: 1em",
    ".charts": "display: flex; flex-wrap: wrap; gap: 2em; margin: .6em 0",
    ".row": "display: grid; grid-template-columns: 7em 10em auto; gap: .6em; align-items: center;"
    "font-size: .92em; white-space: nowrap",
    ".row > span:first-child": "text-align: right; white-space: nowrap; overflow: hidden;"
    "text-overflow: ellipsis",
    ".bar": "display: block; height: .55em; margin: 1px 0; border-radius: 2px; background: #4c8bf5",
    "i": "display: inline-block; width: .8em; height: .8em; border-radius: 2px;"
    "margin: 0 .3em 0 .8em; background: #4c8bf5",
    ".bar + .bar, i.test": "background: #f5a14c",
    ".legend": "font-size: .92em; margin: 0",
}


def _css() -> str:
    return " ".join(
        ", ".join(f".glmlora-report {part.strip()}".strip() for part in name.split(","))
        + f" {{{style}}}"
        for name, style in _STYLES.items()
    )


def _html_chart(title: str, bars: Sequence[tuple[str, Sequence[tuple[int, int]]]]) -> str:
    """Bars of HTML; (name, [(count, of how many) of each table]) of each."""
    widest = max((count / max(1, total) for _, parts in bars for count, total in parts), default=0)
    rows = []
    for name, parts in bars:
        shares = [count / max(1, total) for count, total in parts]
        drawn = "".join(
            f'<span class="bar" style="width:{100 * share / (widest or 1):.1f}%"></span>'
            for share in shares
        )
        counts = " / ".join(f"{count:,}" for count, _ in parts)
        percent = " / ".join(f"{share:.1%}" for share in shares)
        rows.append(
            f'<div class="row"><span title="{escape(name)}">{escape(name)}</span>'
            f"<span>{drawn}</span><span>{counts} ({percent})</span></div>"
        )
    return f"<div><b>{escape(title)}</b>{''.join(rows)}</div>"
