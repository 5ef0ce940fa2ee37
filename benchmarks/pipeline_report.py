"""Rows of a report that hold plain numbers, such as bubbles, beside rows that hold seconds or bytes."""

from __future__ import annotations

from dataclasses import dataclass

from report import Bar, Row
from report_bytes import ByteReport


class Gap(Bar):
    """How far apart the medians of two variants are, whichever is larger."""

    @property
    def operation(self) -> str:
        return f"|{self.first} - {self.second}|"

    @property
    def axis(self) -> str:
        return "difference"

    def show(self, value: float) -> str:
        return f"{value:.4f}"


@dataclass(frozen=True)
class Plain(Row):
    """Numbers without a unit, one per run."""

    def spread(self, variant: str) -> float:
        return (max(self.samples[variant]) - min(self.samples[variant])) / 2

    def value(self, bar: Bar) -> float:
        if isinstance(bar, Gap):
            return abs(self.median(bar.first) - self.median(bar.second))
        return super().value(bar)


class PipelineReport(ByteReport):
    """A report whose rows are in seconds, in bytes or without a unit."""

    def cells(self) -> list[tuple[str, ...]]:
        lines = []
        for line, (row, bar) in zip(super().cells(), self.comparisons(), strict=True):
            if isinstance(row, Plain):
                medians = " / ".join(_number(row.median(name), row.spread(name)) for name in (bar.first, bar.second))
                line = (*line[:3], medians, *line[4:])
            lines.append(line)
        return lines


def _number(value: float, spread: float) -> str:
    return f"{value:.4g}" + (f"±{spread:.2g}" if spread else "")
