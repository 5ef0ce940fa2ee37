"""A benchmark's results: ratios of medians beside their bars, as table, PNG, JSON and section of RESULTS.md.

A `Row` is one thing measured in several variants, interleaved in one run; a `Bar` compares two of them.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("MPLBACKEND", "Agg")  # matplotlib, where it is: pictures go to files
HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
HEADINGS = ("what", "ranks", "compared", "medians", "measured", "bar", "")


@dataclass(frozen=True)
class Bar:
    """`first` compared with `second`: the ratio of their medians, or in seconds their difference."""

    first: str
    second: str
    at_least: float | None = None
    at_most: float | None = None
    difference: bool = False

    @property
    def limit(self) -> float | None:
        return self.at_least if self.at_least is not None else self.at_most

    @property
    def operation(self) -> str:
        return f"{self.first} {'-' if self.difference else '/'} {self.second}"

    @property
    def text(self) -> str:
        sign = ">=" if self.at_least is not None else "<="
        return f"{sign} {self.show(self.limit)}" if self.limit is not None else "report"

    @property
    def axis(self) -> str:
        """What a picture's axis says."""
        return "seconds" if self.difference else "ratio"

    def show(self, value: float) -> str:
        return f"{value:+.3f} s" if self.difference else f"{value:.2f}x"

    def met(self, value: float) -> bool | None:
        """None where there is no limit, only a number to report."""
        if self.at_least is not None:
            return value >= self.at_least
        return value <= self.at_most if self.at_most is not None else None


@dataclass(frozen=True)
class Row:
    """Seconds of each variant, one per round; all variants ran in every round."""

    what: str
    ranks: int
    samples: dict[str, list[float]]
    bars: list[Bar]

    def median(self, variant: str) -> float:
        return statistics.median(self.samples[variant])

    def spread(self, variant: str) -> float:
        """Half the range between the quartiles, in seconds."""
        quartiles = statistics.quantiles(self.samples[variant], n=4)
        return (quartiles[2] - quartiles[0]) / 2

    def value(self, bar: Bar) -> float:
        first, second = self.median(bar.first), self.median(bar.second)
        return first - second if bar.difference else first / second


@dataclass(frozen=True)
class Report:
    """All rows of one benchmark. `name` is that of its files."""

    name: str
    title: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def comparisons(self) -> Iterator[tuple[Row, Bar]]:
        for row in self.rows:
            for bar in row.bars:
                yield row, bar

    def cells(self) -> list[tuple[str, ...]]:
        """The table as text, a line per comparison, under HEADINGS."""
        lines: list[tuple[str, ...]] = []
        for row, bar in self.comparisons():
            medians = " / ".join(show_time(row.median(name), row.spread(name)) for name in (bar.first, bar.second))
            value = row.value(bar)
            verdict = {True: "met", False: "NOT met", None: ""}[bar.met(value)]
            lines.append((row.what, str(row.ranks), bar.operation, medians, bar.show(value), bar.text, verdict))
        return lines

    def missed(self) -> int:
        return sum(bar.met(row.value(bar)) is False for row, bar in self.comparisons())


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--out", type=Path, default=HERE / "results", help="folder for the JSON and the PNG")
    result.add_argument("--record", action="store_true", help="append the table to RESULTS.md")
    return result


def publish(report: Report, options: argparse.Namespace) -> None:
    """Print the table, write `<out>/<name>.json` and `.png`, and append to RESULTS.md where asked to."""
    if importlib.util.find_spec("rich"):
        _print(report)
    else:
        print(report.title, text_table(HEADINGS, report.cells()), *report.notes, sep="\n")
    around = surroundings()
    save(report, around, options.out)
    if not any(True for _ in report.comparisons()):
        print(f"{report.name}.png is left out: there are no numbers to compare")
    elif importlib.util.find_spec("matplotlib"):
        _draw(report, options.out / f"{report.name}.png")
    else:
        print(f"{report.name}.png is left out: matplotlib is missing")
    if options.record:
        _append(report, around)


def save(report: Report, around: dict[str, str], out: Path) -> None:
    """Write `<out>/<name>.json`. Also for what is measured so far, by benchmarks that may be ended before their end."""
    out.mkdir(parents=True, exist_ok=True)
    document = {"surroundings": around, **asdict(report), "lines": report.cells()}
    unfinished = out / f"{report.name}.json.{os.getpid()}"
    unfinished.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(unfinished, out / f"{report.name}.json")


def text_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns of text under their headings, for where there is no rich."""
    widths = [max(map(len, column)) for column in zip(headings, *lines, strict=True)]
    rule = ["-" * width for width in widths]
    rows = [headings, rule, *lines]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEADINGS, title=report.title)
    for line in report.cells():
        table.add_row(*line, style="red" if line[-1] == "NOT met" else None)
    console = Console()
    if not console.is_terminal:
        console.width = 140  # a log has no edge to wrap at
    console.print(table, *report.notes, sep="\n")


def surroundings() -> dict[str, str]:
    """Machine, cards, versions and commit, in words; nothing that names the machine itself."""
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = [f"python {platform.python_version()}"]
    for package in ("torch", "numpy", "distlib-train"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    around = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{len(os.sched_getaffinity(0))} cores of {models[0] if models else platform.machine()}, "
        f"{memory:.0f} GiB, Linux {platform.release()}, load {os.getloadavg()[0]:.1f}",
        "versions": ", ".join(versions),
        "commit": _commit(),
    }
    cards = _cards()
    return {**around, "cards": cards} if cards else around


def _cards() -> str:
    """The GPUs that torch sees, their driver, and the CUDA that torch was built with; empty without one."""
    import torch

    if not torch.cuda.is_available():
        return ""
    names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    kinds = Counter(f"{known.name} ({known.total_memory / 2**30:.0f} GiB)" for known in names)
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) + (
        f", driver {_driver()}, torch's CUDA {torch.version.cuda}"
    )


def _driver() -> str:
    """The version of NVIDIA's driver: as the kernel tells it, else as nvidia-smi does, say in a container."""
    version = Path("/proc/driver/nvidia/version")
    told = re.search(r"Kernel Module(?: for \S+)?\s+([0-9.]+)", version.read_text() if version.exists() else "")
    if told or not shutil.which("nvidia-smi"):
        return told[1] if told else "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return (done.stdout.splitlines() or ["unknown"])[0]


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(HERE), *arguments], capture_output=True, text=True).stdout.strip()

    if stated := os.environ.get("DISTLIB_COMMIT"):  # of files that were copied here without their repository
        return stated
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!RESULTS.md", ":!results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")


def _append(report: Report, around: dict[str, str]) -> None:
    lines = [f"## {report.title}", ""]
    machine = "; ".join(around[name] for name in ("machine", "cards", "versions") if name in around)
    lines += [f"{around['date']}, commit {around['commit']}; {machine}.", ""]
    lines += [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in report.cells()]
    for note in report.notes:
        lines += ["", note]
    if any(True for _ in report.comparisons()):
        lines += ["", f"![{report.title}](results/{report.name}.png)"]
    lines += [""]
    if not RESULTS.exists():
        RESULTS.write_text("# Results\n\nMedians ± half the quartile range, first / second.\n\n")
    with RESULTS.open("a") as file:
        file.write("\n".join(lines) + "\n")


def show_time(seconds: float, spread: float) -> str:
    scale, unit = (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "us")
    digits = 0 if seconds * scale >= 100 else 1 if seconds * scale >= 10 else 2
    return f"{seconds * scale:.{digits}f}±{spread * scale:.{digits}f} {unit}"


_COLOURS = {True: "#4a9a5b", False: "#c0504d", None: "#8c8c8c"}
_KEY = "black line: the bar; green: met, red: not met, grey: only reported"


def _draw(report: Report, path: Path) -> None:
    """A bar per comparison, in a panel for each kind of number."""
    import matplotlib.pyplot as plt

    figure = _figure(report)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _figure(report: Report) -> Any:
    import matplotlib.pyplot as plt

    panels: dict[tuple[type[Bar], bool], list[tuple[Row, Bar]]] = {}
    for row, bar in report.comparisons():
        panels.setdefault((type(bar), bar.difference), []).append((row, bar))
    counts = [len(pairs) for pairs in panels.values()]
    figure, grid = plt.subplots(
        len(panels),
        1,
        figsize=(10, 0.6 + sum(0.7 + 0.28 * count for count in counts)),
        height_ratios=[1 + count for count in counts],
        squeeze=False,
        layout="constrained",
    )
    for axes, pairs in zip(grid[:, 0], panels.values(), strict=True):
        _panel(axes, pairs[::-1])
    figure.suptitle(f"{report.title}\n{_KEY}", fontsize=9)
    return figure


def _panel(axes: Any, pairs: list[tuple[Row, Bar]]) -> None:
    ends = []
    for height, (row, bar) in enumerate(pairs):
        value = row.value(bar)
        axes.barh(height, value, color=_COLOURS[bar.met(value)])
        ends.append(max(value, bar.limit or 0.0, 0.0))
        text = f" {bar.show(value)}" + (f" ({bar.text})" if bar.limit is not None else "")
        axes.annotate(text, (ends[-1], height), va="center", fontsize=8)
        if bar.limit is not None:
            axes.plot([bar.limit] * 2, [height - 0.45, height + 0.45], color="black", linewidth=2)
    labels = [f"{r.what}, {r.ranks} rank{'s' * (r.ranks > 1)}: {b.operation}" for r, b in pairs]
    axes.set_yticks(range(len(pairs)), labels, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylim(-0.6, len(pairs) - 0.4)
    axes.set_xlim(right=1.7 * max(ends))  # room for the words behind the longest bar
    axes.set_xlabel(pairs[0][1].axis, fontsize=8)
