"""A plugin of pytest (-p gpu_outcomes): each test's outcome, one line of JSON each, in the file $DISTLIB_OUTCOMES.

A line is written when a test starts, too: of tests that were ended from outside, the last one is known by name. Where
xdist divides tests among processes, the one that hears of all of them writes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # who only reads a file needs no pytest
    import pytest

_phases: dict[str, list[pytest.TestReport]] = {}


def _write(line: dict[str, Any]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    with Path(os.environ["DISTLIB_OUTCOMES"]).open("a") as file:
        file.write(json.dumps(line) + "\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    _phases[nodeid] = []
    _write({"id": nodeid, "outcome": "started"})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    phases = _phases.setdefault(report.nodeid, [])
    phases.append(report)
    if report.when == "teardown":
        outcome, why = _verdict(phases)
        seconds = round(sum(phase.duration for phase in phases), 3)
        _write({"id": report.nodeid, "outcome": outcome, "seconds": seconds, "why": why})


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _write({"id": report.nodeid, "outcome": "failed", "seconds": 0.0, "why": report.longreprtext[-2000:]})
    elif report.skipped:
        _write({"id": report.nodeid, "outcome": "skipped", "seconds": 0.0, "why": _reason(report)})


def _verdict(phases: list[pytest.TestReport]) -> tuple[str, str]:
    for phase in phases:
        if phase.failed:
            return "failed", phase.longreprtext[-2000:]
    for phase in phases:
        if phase.skipped:
            expected = getattr(phase, "wasxfail", None)
            return ("skipped", _reason(phase)) if expected is None else ("expected failure", str(expected))
    return "passed", ""


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    where = report.longrepr  # (file, line, "Skipped: why") of a skip
    return str(where[2]).removeprefix("Skipped: ") if isinstance(where, tuple) else str(where)


def read(path: Path) -> list[dict[str, Any]]:
    """The outcomes in a file, one per test in order; "started" for the one that did not end."""
    text = path.read_text() if path.exists() else ""
    outcomes: dict[str, dict[str, Any]] = {}
    for line in text.split("\n")[:-1]:  # what follows the last end of a line was cut off when its process was killed
        outcome = json.loads(line)
        outcomes[outcome["id"]] = outcome
    return list(outcomes.values())
