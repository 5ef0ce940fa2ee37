"""Results of benchmarks, as people see them: rows that stay rows in Markdown, and pictures whose words fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import report
from pipeline_report import Gap, PipelineReport, Plain
from report import Bar, Row

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

ROWS = [
    Row("import", 1, {"a": [1.0, 1.1], "b": [1.0, 1.0]}, [Bar("a", "b", at_most=0.3, difference=True)]),
    Row(
        "step",
        2,
        {"ours": [1.0, 1.2], "theirs": [3.0, 3.1]},
        [Bar("theirs", "ours", at_least=4), Bar("ours", "theirs")],
    ),
    Plain(
        "bubble", 4, {"measured": [0.29, 0.3], "simulated": [0.27, 0.27]}, [Gap("measured", "simulated", at_most=0.03)]
    ),
]


def columns(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line)) - 1


def test_every_row_has_the_columns_of_its_heading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "RESULTS.md")
    report._append(PipelineReport("x", "X", ROWS), {"date": "d", "commit": "c", "machine": "m", "versions": "v"})
    lines = [line for line in (tmp_path / "RESULTS.md").read_text().splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4 and {columns(line) for line in lines} == {len(report.HEADINGS)}


def test_without_numbers_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "RESULTS.md")
    report.publish(report.Report("x", "X", []), report.parser("").parse_args(["--out", str(tmp_path), "--record"]))
    assert "png" not in (tmp_path / "RESULTS.md").read_text() and not list(tmp_path.glob("*.png"))


def test_recorded_results_are_tables() -> None:
    tables = re.findall(r"(?:^\|.*\n)+", (BENCHMARKS / "RESULTS.md").read_text(), re.MULTILINE)
    assert len(tables) > 8
    for table in tables:
        assert len({columns(line) for line in table.splitlines()}) == 1, table.splitlines()[0]


def test_words_of_a_picture_fit_and_units_are_not_mixed() -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, of the extra `bench`")
    figure = report._figure(PipelineReport("x", "X", ROWS))
    assert len(figure.axes) == 3  # seconds, ratios, bubbles
    figure.canvas.draw()
    for axes in figure.axes:
        frame = axes.get_window_extent()
        for text in axes.texts:
            words = text.get_window_extent()
            assert frame.x0 <= words.x0 and words.x1 <= frame.x1, text.get_text()
        assert axes.get_xlabel()
