"""torch's own distributed tests, from the installed wheel, pass on the backend `distlib` wherever they pass on gloo.

tests/torch_suite/passes_on_gloo.txt holds what passes on gloo (names only); tests/torch_suite/runner.py runs them. One
process of it per section of that file runs the names of the section that were selected, and each is a test here. With
DISTLIB_TORCH_SUITE=gloo they run on gloo instead, which shows whether the list is right for the installed torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent / "torch_suite"
BACKEND = os.environ.get("DISTLIB_TORCH_SUITE", "distlib")
LISTED_FOR = "2.13"


def listed() -> dict[str, list[str]]:
    """The names by section, as they are in the file."""
    sections: dict[str, list[str]] = {}
    for line in (FOLDER / "passes_on_gloo.txt").read_text().splitlines():
        if line.startswith("["):
            names = sections.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            names.append(line)
    return sections


NOT_LIKE_GLOO = {
    "test_ddp_profiling_torch_profiler": "wants profiler events that another thread ends, which only C++ can do safely"
}


def cases() -> Iterator[Any]:
    for section, names in listed().items():
        for name in names:
            reason = NOT_LIKE_GLOO.get(name)
            expected = BACKEND == "distlib" and reason
            marks = [pytest.mark.xfail(reason=reason, strict=True)] if expected else []
            yield pytest.param(section, name, id=f"{section.replace(' ', '-')}-{name}", marks=marks)


class Sections:
    """Runs the sections, and the next one beside the one whose results are waited for: their tests mostly wait."""

    def __init__(self, chosen: dict[str, list[str]]) -> None:
        self._chosen = chosen
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._results: dict[str, dict[str, Any]] = {}

    def result(self, section: str, name: str) -> dict[str, Any]:
        if section not in self._results:
            order = list(self._chosen)
            for other in order[order.index(section) :][:2]:
                if other not in self._running:
                    self._running[other] = _start(other, self._chosen[other])
            self._results[section] = _end(self._running[section])
        return self._results[section][name]

    def close(self) -> None:
        for run in self._running.values():
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)  # the runner and its ranks
                run.communicate()


def _start(section: str, names: list[str]) -> subprocess.Popen[str]:
    world, like, *more = section.split()
    command = [sys.executable, str(FOLDER / "runner.py"), "--backend", BACKEND, "--world", world, "--like", like]
    command += ["--gpu-tests"] * ("cpu" in more) + ["--limit", "60", *names]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "DISTLIB_NODES")
    env = {name: value for name, value in os.environ.items() if name not in launched}
    path = os.pathsep.join([str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**env, **threads, "PYTHONPATH": path},
        start_new_session=True,
    )


def _end(run: subprocess.Popen[str]) -> dict[str, Any]:
    """Its results, one dict a test, by name; for names without one, how the runner ended."""
    written, errors = run.communicate()
    lost = {"outcome": "lost", "seconds": "?", "detail": f"the runner ended with {run.returncode}:\n{errors[-4000:]}"}
    return defaultdict(lambda: lost, {result["name"]: result for result in map(json.loads, written.splitlines())})


@pytest.fixture(scope="module")
def sections(request: pytest.FixtureRequest) -> Iterator[Sections]:
    """Of the tests that were selected."""
    chosen: dict[str, list[str]] = {}
    for item in request.session.items:
        if item.path == request.path:
            chosen.setdefault(item.callspec.params["section"], []).append(item.callspec.params["name"])
    found = Sections(chosen)
    yield found
    found.close()


@pytest.mark.slow
@pytest.mark.skipif(not torch.__version__.startswith(LISTED_FOR), reason=f"the list is for torch {LISTED_FOR}")
@pytest.mark.timeout(600)  # the first test of a section waits for all of the section
@pytest.mark.parametrize(("section", "name"), list(cases()))
def test_passes_as_on_gloo(section: str, name: str, sections: Sections) -> None:
    result = sections.result(section, name)
    assert result["outcome"] == "pass", f"{result['outcome']} after {result['seconds']} s: {result['detail']}"
