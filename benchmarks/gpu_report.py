"""Reports of GPU benchmarks: rows that are compared, beside checks (bits, counts, shares) that hold or do not."""

from __future__ import annotations

from dataclasses import dataclass, field

from report import Bar, Row, show_time
from report_bytes import ByteReport


@dataclass(frozen=True)
class Check:
    """One thing found out, in words. met: None where it is only to be reported."""

    what: str
    ranks: int
    measured: str
    wanted: str = "report"
    met: bool | None = None

    def cells(self) -> tuple[str, ...]:
        """A line of the table, under report.HEADINGS."""
        verdict = {True: "met", False: "NOT met", None: ""}[self.met]
        return (self.what, str(self.ranks), "", "", self.measured, self.wanted, verdict)


class Ceiling(Bar):
    """A bar near 1, shown with three digits."""

    def show(self, value: float) -> str:
        return f"{value:.3f}x"


@dataclass(frozen=True)
class GpuReport(ByteReport):
    """Rows first, then rows without a comparison (times to be reported), then checks."""

    checks: list[Check] = field(default_factory=list)

    def cells(self) -> list[tuple[str, ...]]:
        lines = list(super().cells())
        for row in self.rows:
            if not row.bars:
                lines += [reported(row, variant) for variant in row.samples]
        return lines + [check.cells() for check in self.checks]

    def missed(self) -> int:
        return super().missed() + sum(check.met is False for check in self.checks)


def reported(row: Row, variant: str) -> tuple[str, ...]:
    """The line of a time that is compared with nothing."""
    return (row.what, str(row.ranks), variant, "", show_time(row.median(variant), row.spread(variant)), "report", "")
