"""Rows of a report that hold bytes instead of seconds, beside rows that hold seconds."""

from __future__ import annotations

from dataclasses import dataclass

from report import Report, Row


@dataclass(frozen=True)
class Bytes(Row):
    """Bytes of each variant, one per run."""

    def spread(self, variant: str) -> float:
        return (max(self.samples[variant]) - min(self.samples[variant])) / 2


@dataclass(frozen=True)
class ByteReport(Report):
    """A report whose rows are in seconds or in bytes, each in its own unit."""

    def cells(self) -> list[tuple[str, ...]]:
        lines = []
        for line, (row, bar) in zip(super().cells(), self.comparisons(), strict=True):
            if isinstance(row, Bytes):
                medians = " / ".join(_amount(row.median(name), row.spread(name)) for name in (bar.first, bar.second))
                line = (*line[:3], medians, *line[4:])
            lines.append(line)
        return lines


def _amount(size: float, spread: float) -> str:
    return f"{size / 2**20:.1f}" + (f"±{spread / 2**20:.1f}" if spread else "") + " MiB"
