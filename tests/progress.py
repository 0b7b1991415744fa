"""A line for each test file once all its tests have run, in place of a dot for each test. Seconds
are the tests' own, so with two workers they add up to more than the clock shows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest


@dataclass
class File:
    waiting: int = 0
    seconds: float = 0.0
    outcomes: Counter = field(default_factory=Counter)


class Progress:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.files: dict[str, File] = {}
        self.done = 0

    def expect(self, nodeids: list[str]) -> None:
        counts = Counter(nodeid.split("::")[0] for nodeid in nodeids)
        self.files = {name: File(waiting=count) for name, count in counts.items()}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:
            self.expect([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)  # pytest-xdist: every worker collects the same
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        if not self.files:
            self.expect(ids)

    def pytest_report_teststatus(self, report):
        if report.passed or report.skipped:
            return report.outcome if report.when == "call" or report.skipped else "", "", ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = self.files[report.nodeid.split("::")[0]]
        file.seconds += report.duration
        if report.when == "call" or not report.passed:
            file.outcomes[report.outcome] += 1
        if report.failed:
            self.write(f"{'':8} FAILED {report.nodeid}")
        if report.when != "teardown":
            return
        file.waiting -= 1
        if not file.waiting:
            self.done += 1
            told = ", ".join(f"{n} {outcome}" for outcome, n in sorted(file.outcomes.items()))
            name = report.nodeid.split("::")[0]
            place = f"[{self.done:2}/{len(self.files)}]"
            self.write(f"{place:8} {name:32} {file.seconds:6.1f} s  {told}")

    def write(self, line: str) -> None:
        reporter = self.config.pluginmanager.getplugin("terminalreporter")
        reporter.ensure_newline()
        reporter.write_line(line)
        reporter.flush()
