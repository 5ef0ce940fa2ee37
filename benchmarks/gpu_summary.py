"""What a run of `make gpu` found, merged into one document, one table, and a section of RESULTS.md.

docs/gpu.md says what the document holds.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gpu_parts import Done
from report import RESULTS, text_table

HEADINGS = ("part", "what", "ranks", "compared", "medians", "measured", "bar", "")
VERDICTS = {"met": True, "NOT met": False, "": None}
TITLE = "GPU: kernels, collectives, training steps"


def collected(dones: Sequence[Done], folders: Mapping[str, Path]) -> tuple[list[Done], dict[str, list[dict[str, Any]]]]:
    """The documents that benchmarks left in their folders. A part that left none that can be read has failed.

    folders: of the parts that leave documents, by name.
    """
    judged, documents = [], {}
    for done in dones:
        folder = folders.get(done.name)
        if folder is not None:
            try:
                documents[done.name] = [_document(path) for path in sorted(folder.glob("*.json"))]
            except ValueError as error:
                done = replace(done, outcome="failed", why="; ".join(filter(None, (done.why, str(error)))))
            if done.outcome == "passed" and not documents[done.name]:
                done = replace(done, outcome="failed", why="it wrote no results")
        judged.append(done)
    return judged, documents


def _document(path: Path) -> dict[str, Any]:
    """ValueError unless it is what report.publish writes."""
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    lines = document.get("lines") if isinstance(document, dict) else None
    width = len(HEADINGS) - 1
    if not isinstance(lines, list) or any(len(line) != width or line[-1] not in VERDICTS for line in lines):
        raise ValueError(f"{path.name} holds no lines of {width} cells that end in a verdict")
    return document


def merged(
    dones: Sequence[Done],
    documents: Mapping[str, Sequence[Mapping[str, Any]]],
    tests: Sequence[Mapping[str, Any]],
    build: Mapping[str, Any],
    notes: Sequence[str],
    surroundings: Mapping[str, str],
) -> dict[str, Any]:
    """One document of all that was found."""
    bars = []
    for part, found in documents.items():
        for document in found:
            for what, ranks, compared, medians, measured, bar, verdict in document["lines"]:
                bars.append({"part": part, "what": what, "ranks": int(ranks), "compared": compared, "medians": medians})
                bars[-1] |= {"measured": measured, "bar": bar, "met": VERDICTS[verdict]}
    said = [note for found in documents.values() for document in found for note in document.get("notes", [])]
    return {
        "surroundings": dict(surroundings),
        "ok": succeeded(dones, tests),
        "seconds": round(sum(done.seconds for done in dones), 1),
        "build": dict(build),
        "parts": [asdict(done) | {"seconds": round(done.seconds, 1), "limit": round(done.limit, 1)} for done in dones],
        "tests": list(tests),
        "bars": bars,
        "notes": [*notes, *said],
        "samples": {part: [document.get("rows", []) for document in found] for part, found in documents.items()},
    }


def succeeded(dones: Sequence[Done], tests: Sequence[Mapping[str, Any]]) -> bool:
    """Every part ran to its end, and some test passed. Whether bars are met does not matter, as in run_all.py."""
    return all(done.outcome == "passed" for done in dones) and any(test["outcome"] == "passed" for test in tests)


def lines_of(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table, under HEADINGS: parts, tests that did not pass, bars."""
    lines = []
    for part in document["parts"]:
        outcome = {"passed": "ok"}.get(part["outcome"], part["outcome"].upper())
        what = _what_of(part["name"], document)
        lines.append((part["name"], what, "", "", "", f"{part['seconds']:.0f} s", f"<= {part['limit']:.0f} s", outcome))
    for test in document["tests"]:
        if test["outcome"] in ("failed", "started"):
            verdict = "FAILED" if test["outcome"] == "failed" else "DID NOT END"
            lines.append(("tests", test["id"], "", "", "", "", "", verdict))
    for bar in document["bars"]:
        verdict = {True: "met", False: "NOT met", None: ""}[bar["met"]]
        cells = (bar["what"], str(bar["ranks"]), bar["compared"], bar["medians"], bar["measured"], bar["bar"])
        lines.append((bar["part"], *cells, verdict))
    return lines


def _what_of(part: str, document: Mapping[str, Any]) -> str:
    if part == "build":
        return ", ".join(f"{name}: {action}" for name, action in document["build"].get("action", {}).items())
    if part == "tests":
        counts = Counter("did not end" if t["outcome"] == "started" else t["outcome"] for t in document["tests"])
        return ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "none ran"
    bars = [bar for bar in document["bars"] if bar["part"] == part and bar["met"] is not None]
    return f"{sum(bar['met'] for bar in bars)} of {len(bars)} bars met" if bars else ""


def shown(document: Mapping[str, Any]) -> str:
    """All of it for a terminal: the machine, the table, notes, and why parts did not pass."""
    around = document["surroundings"]
    head = [TITLE, *(around[name] for name in ("cards", "machine", "versions") if name in around)]
    head.append(f"commit {around.get('commit', 'unknown')}, {around.get('date', '')}, {document['seconds']:.0f} s")
    whys = [f"{part['name']} {part['outcome']}: {part['why']}" for part in document["parts"] if part["why"]]
    table = text_table(HEADINGS, lines_of(document))
    return "\n".join([*head, "", table, "", *document["notes"], *whys])


def append(document: Mapping[str, Any], results: Path = RESULTS) -> None:
    """A section of RESULTS.md."""
    around = document["surroundings"]
    machine = "; ".join(around[name] for name in ("cards", "machine", "versions") if name in around)
    lines = [f"## {TITLE}", "", f"{around['date']}, commit {around['commit']}; {machine}.", ""]
    lines += [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines_of(document)]
    for note in document["notes"]:
        lines += ["", note]
    with results.open("a") as file:
        file.write("\n".join(lines) + "\n\n")
