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
from collections.abc import Iterator
from functools import cache
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


@cache
def results(section: str, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Runs these names; one dict a test."""
    world, like, *more = section.split()
    command = [sys.executable, str(FOLDER / "runner.py"), "--backend", BACKEND, "--world", world, "--like", like]
    command += ["--gpu-tests"] * ("cpu" in more) + ["--limit", "60", *names]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "DISTLIB_NODES")
    env = {name: value for name, value in os.environ.items() if name not in launched}
    path = os.pathsep.join([str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    run = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**env, **threads, "PYTHONPATH": path},
        start_new_session=True,
    )
    try:
        written, errors = run.communicate()
    except BaseException:
        os.killpg(run.pid, signal.SIGKILL)  # the runner and its ranks
        run.communicate()
        raise
    assert run.returncode == 0, f"the runner ended with {run.returncode}:\n{errors[-4000:]}"
    return {result["name"]: result for result in map(json.loads, written.splitlines())}


@pytest.mark.slow
@pytest.mark.skipif(not torch.__version__.startswith(LISTED_FOR), reason=f"the list is for torch {LISTED_FOR}")
@pytest.mark.timeout(600)  # the first test of a section waits for all of the section
@pytest.mark.parametrize(("section", "name"), cases())
def test_passes_as_on_gloo(section: str, name: str, request: pytest.FixtureRequest) -> None:
    selected = [
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == request.path and getattr(item, "callspec", None) and item.callspec.params["section"] == section
    ]
    result = results(section, tuple(selected))[name]
    assert result["outcome"] == "pass", f"{result['outcome']} after {result['seconds']} s: {result['detail']}"
