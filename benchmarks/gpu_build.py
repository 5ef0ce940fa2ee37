"""The build step of `make gpu`: compiles what this machine can compile, and takes the rest as it was carried here.

Without network and without installing anything: setup.py needs setuptools, a C++ compiler and pybind11's headers, of
which torch brings a copy, and nvcc for the kernels. A machine whose CUDA came as wheels has no nvcc: then a `_cuda.so`
built elsewhere must lie in distlib/, and so for `_native*.so`, of the same version of Python.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("native", "cuda")
NAMES = {"native": f"_native{sysconfig.get_config_var('EXT_SUFFIX')}", "cuda": "_cuda.so"}
SAY_WHETHER_THEY_WORK = """
import json, torch
from distlib import native
from distlib.cuda import blocks, library
native.core()
cuda = library.why_not()
if not cuda and torch.cuda.is_available():
    try:
        blocks.quantize(torch.ones(300, device="cuda")).cpu()
    except RuntimeError as error:  # no code for this card, or made by a CUDA that is newer than the driver
        cuda = str(error)
print(json.dumps({"native": native.why_not(), "cuda": cuda}))
"""


@dataclass(frozen=True)
class Here:
    """Of each part: why it cannot be compiled here ("" if it can), and whether a library lies in distlib/."""

    obstacle: dict[str, str]
    present: dict[str, bool]


@dataclass(frozen=True)
class Decision:
    """Of each part: "build", "keep" or "missing"; and why, in a sentence each, where it is not built."""

    action: dict[str, str]
    why: list[str]

    @property
    def environ(self) -> dict[str, str]:
        """What setup.py is told."""
        wish = {"build": "1", "keep": "keep", "missing": "0"}
        return {f"DISTLIB_{part.upper()}": wish[action] for part, action in self.action.items()}


def decide(here: Here) -> Decision:
    """What can be built is built, since compiled objects are kept; else what is there is used."""
    action, why = {}, []
    for part in PARTS:
        obstacle, name = here.obstacle[part], NAMES[part]
        action[part] = "keep" if here.present[part] else "missing"
        if not obstacle:
            action[part] = "build"
        elif here.present[part]:
            why.append(f"{name} is used as it was brought here: {obstacle}")
        else:
            why.append(f"{name} is missing: {obstacle}; or bring a distlib/{name} that was built elsewhere")
    return Decision(action, why)


def survey(root: Path = ROOT) -> Here:
    """What this machine has."""
    present = {part: (root / "distlib" / NAMES[part]).exists() for part in PARTS}
    setup = builder(root)
    if setup is None:
        return Here(dict.fromkeys(PARTS, "setuptools is missing: `pip install setuptools`"), present)
    needs: dict[str, tuple[str, ...]] = {"native": ("find_cxx", "find_pybind11"), "cuda": ("find_nvcc",)}
    obstacle = dict.fromkeys(PARTS, "")
    for part in PARTS:
        try:
            for need in needs[part]:
                setup[need]()
        except setup["CannotBuild"] as error:
            obstacle[part] = str(error)
    return Here(obstacle, present)


def builder(root: Path) -> dict[str, Any] | None:
    """The names in setup.py, which knows how to find compilers; None without setuptools. Builds nothing."""
    return runpy.run_path(str(root / "setup.py")) if importlib.util.find_spec("setuptools") else None


def architecture(nvcc: list[str]) -> str:
    """nvcc's -arch for the cards of this machine: theirs, if all are alike and nvcc knows them; else all."""
    import torch

    known = subprocess.run([*nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kinds = {"sm_{}{}".format(*torch.cuda.get_device_capability(index)) for index in range(count)}
    return kinds.pop() if len(kinds) == 1 and kinds <= set(known) else "all-major"


def strangers(root: Path, decision: Decision) -> list[str]:
    """Sentences about libraries that were brought here and are not known to be of these sources."""
    setup, info = builder(root), root / "distlib" / "_build_info.py"
    known = runpy.run_path(str(info)) if info.exists() else {}
    found = []
    for part in (part for part, action in decision.action.items() if action == "keep"):
        digest = known.get(part.upper(), {}).get("digest")
        if setup is None or digest != setup["digest"](setup["sources"](setup[f"{part.upper()}_SOURCES"])):
            found.append(f"{NAMES[part]} is not known to be of these sources: bring its build's _build_info.py too")
    return found


BUILD = """
import runpy, sys
from pathlib import Path
runpy.run_path("setup.py")["build_into"](Path(sys.argv[1]), sys.argv[2])
"""


def build(decision: Decision, jobs: dict[str, str], root: Path = ROOT) -> str:
    """Compiles, and puts beside the sources what came of it. Returns what went wrong, or "".

    Not by setup.py's commands: for these, setuptools must be new enough for all of pyproject.toml. And not in place:
    where a compiler fails, what was carried here stays.
    """
    if "build" not in decision.action.values():
        return ""
    folder = root / "build" / "gpu_build"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-c", BUILD, str(folder), NAMES["native"]]
    done = subprocess.run(command, cwd=root, env={**os.environ, **decision.environ, **jobs})
    if done.returncode:
        return f"the build failed (exit {done.returncode}); its output is above"
    for built in folder.iterdir():
        home = root / "distlib" / built.name
        unfinished = home.with_name(f"{built.name}.{os.getpid()}")
        shutil.copy2(built, unfinished)
        os.replace(unfinished, home)
    return ""


def useless() -> dict[str, str]:
    """Of each part: why it cannot be used, "" if it can. In a new process: this one may hold an older library."""
    done = subprocess.run([sys.executable, "-c", SAY_WHETHER_THEY_WORK], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return dict.fromkeys(PARTS, f"distlib cannot be imported: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="the file to write what was done to")
    parser.add_argument("--all-cards", action="store_true", help="compile for all kinds of cards, not this one's only")
    options = parser.parse_args()
    begin = time.monotonic()
    here = survey()
    decision = decide(here)
    notes = [*decision.why, *strangers(ROOT, decision)]
    jobs = {}
    if decision.action["cuda"] == "build" and not options.all_cards:
        setup = builder(ROOT)
        assert setup is not None, "decided to build"
        jobs["DISTLIB_CUDA_ARCH"] = architecture(setup["find_nvcc"]())
    failure = build(decision, jobs)
    broken = [f"{NAMES[part]} cannot be used: {why}" for part, why in useless().items() if why]
    notes += [failure] * bool(failure) + broken
    record = {"action": decision.action, **jobs, "notes": notes, "seconds": round(time.monotonic() - begin, 1)}
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    print(*notes, sep="\n")
    return 1 if failure or broken else 0


if __name__ == "__main__":
    sys.exit(main())
