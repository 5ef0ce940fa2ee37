"""`make gpu`: builds, tests and measures all that is about GPUs, within 8 minutes: one JSON, one table.

    python benchmarks/gpu_all.py                            # on a machine with a GPU; no network is needed
    python benchmarks/gpu_all.py --from gpu.json --record   # elsewhere: what such a run found, into RESULTS.md

The Python that runs it must have torch, numpy and psutil, and pytest for the tests. The exit code is 0 if everything
was built, every test passed or was skipped, and every benchmark ran to its end, whether or not its bars are met.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import gpu_outcomes
import gpu_tests
from gpu_cards import use_checkout

if TYPE_CHECKING:  # they need what may be missing
    from gpu_parts import Done, Part

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WORK = ROOT / "build" / "gpu"
NEEDED = ("torch", "numpy", "psutil")
TOTAL = 455.0  # seconds; what is left of 8 minutes is for starting, and for ending what hangs
BENCHMARKS = {"kernels": 75.0, "collectives": 35.0, "step": 115.0}  # of these, seconds that each gets at least
BUILD, TESTS = 95.0, 135.0


def parts_of(selection: gpu_tests.Selection, work: Path, total: float = TOTAL) -> list[Part]:
    """The parts in their order; each leaves what it found in `work`."""
    from gpu_parts import Part

    share = total / TOTAL
    path = os.pathsep.join([str(HERE), *selection.path, os.environ["PYTHONPATH"]])  # pytest's plugin, stand-ins
    environ = {"DISTLIB_OUTCOMES": str(work / "outcomes.jsonl"), "PYTHONPATH": path}
    environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # ranks are forked: who asks for a GPU before is not to start CUDA
    parts = [
        Part("build", [sys.executable, str(HERE / "gpu_build.py"), f"--json={work / 'build.json'}"], BUILD * share),
        Part("tests", gpu_tests.command(selection), TESTS * share, environ, selection.why_not),
    ]
    for name, seconds in BENCHMARKS.items():
        command = [sys.executable, str(HERE / f"gpu_{name}.py"), f"--out={work / name}"]
        parts.append(Part(name, command, seconds * share))
    return parts


def why_not(source: Path | None = None) -> str:
    """Why nothing can be run here, or results in a file cannot be shown; or ""."""
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        return f"{sys.executable} has no {', '.join(missing)}: install it, or say make gpu PYTHON=/path/to/another"
    if source is not None:
        return "" if source.is_file() else f"there is no {source}"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU here; `distlib doctor` says more"
    return ""


def run(out: Path, total: float = TOTAL) -> dict:
    """Runs all parts, within `total` seconds, and writes `out`/gpu.json, also what is known after each part. Returns
    what it holds."""
    from gpu_parts import Done, run_all
    from report import surroundings

    use_checkout()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    out.mkdir(parents=True, exist_ok=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # hangs are aborted
    selection, around = gpu_tests.select(), surroundings()
    parts = parts_of(selection, WORK, total)
    dones: list[Done] = []

    def write() -> dict:
        ahead = [Done(part.name, "left out", why="the run ended before it") for part in parts[len(dones) :]]
        document = found([*dones, *ahead], selection.notes, around)
        unfinished = out / f"gpu.json.{os.getpid()}"
        unfinished.write_text(json.dumps(document, indent=1) + "\n")
        os.replace(unfinished, out / "gpu.json")
        return document

    def tell(done: Done) -> None:
        dones.append(done)
        write()
        _tell(done)

    run_all(parts, total, WORK / "logs", tell)
    return write()


def found(dones: list[Done], notes: list[str], around: dict[str, str]) -> dict:
    """What parts have left in WORK, as one document."""
    from gpu_summary import collected, merged

    dones, documents = collected(dones, {name: WORK / name for name in BENCHMARKS})
    built = WORK / "build.json"
    build = json.loads(built.read_text()) if built.exists() else {}
    tests = gpu_outcomes.read(WORK / "outcomes.jsonl")
    return merged(dones, documents, tests, build, [*build.get("notes", []), *notes], around)


def _tell(done: Done) -> None:
    """While it runs, on stderr: stdout is for the table."""
    why = f": {done.why}" if done.why else ""
    spent = f"after {done.seconds:.0f} of {done.limit:.0f} s"
    print(f"{done.name} {done.outcome} {spent}{why}", file=sys.stderr, flush=True)
    if done.output:
        print(done.output, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for gpu.json")
    parser.add_argument("--from", dest="source", type=Path, help="show this gpu.json instead of running anything")
    parser.add_argument("--record", action="store_true", help="append the table to RESULTS.md")
    parser.add_argument("--seconds", type=float, default=TOTAL, help=f"for all parts together; default {TOTAL:g}")
    parser.add_argument("--commit", help="what these files are, where there is no git")
    options = parser.parse_args()
    if options.commit:
        os.environ["DISTLIB_COMMIT"] = options.commit
    reason = why_not(options.source)
    if reason:
        print(f"make gpu: {reason}", file=sys.stderr)
        return 2
    from gpu_summary import append, shown

    document = run(options.out, options.seconds) if options.source is None else json.loads(options.source.read_text())
    print(shown(document))
    if options.record:
        append(document)
    return 0 if document["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
