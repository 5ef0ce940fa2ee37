"""The build that `make gpu` does: what is compiled, what was carried along, what does not run on the card."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import gpu_build
import pytest
import torch
from gpu_build import Decision, Here, decide

from distlib.cuda import blocks, library
from distlib.cuda.library import CudaError

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
ALONE = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no worker of xdist
AROUND = {"date": "today", "machine": "a machine", "versions": "torch 2", "commit": "abc"}


@pytest.mark.parametrize(
    ("obstacle", "present", "action", "said"),
    [
        (("", ""), (False, False), ("build", "build"), []),
        (("", ""), (True, True), ("build", "build"), []),  # fresh objects are kept, so it costs nothing
        (("", "no nvcc"), (False, True), ("build", "keep"), ["_cuda.so is used as it was brought here: no nvcc"]),
        (("", "no nvcc"), (True, False), ("build", "missing"), ["_cuda.so is missing: no nvcc; or bring"]),
        (("no g++", "no nvcc"), (True, True), ("keep", "keep"), ["_native", "_cuda.so is used"]),
        (("no g++", ""), (False, True), ("missing", "build"), ["is missing: no g++; or bring a distlib/_native"]),
    ],
)
def test_what_can_be_built_is_built_else_what_is_there_is_used(
    obstacle: tuple[str, str], present: tuple[bool, bool], action: tuple[str, str], said: list[str]
) -> None:
    decision = decide(Here(*(dict(zip(gpu_build.PARTS, facts, strict=True)) for facts in (obstacle, present))))
    assert tuple(decision.action.values()) == action
    assert len(decision.why) == len(said) and all(part in why for part, why in zip(said, decision.why, strict=True))
    wish = {"build": "1", "keep": "keep", "missing": "0"}
    assert list(decision.environ.items()) == [("DISTLIB_NATIVE", wish[action[0]]), ("DISTLIB_CUDA", wish[action[1]])]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with our setup.py and one source file of each kind, not built."""
    pytest.importorskip("setuptools")
    for folder in ("distlib", "csrc/core", "csrc/cpu", "csrc/cuda"):
        (tmp_path / folder).mkdir(parents=True)
    package = ("distlib/__init__.py", "distlib/_clash.py", "distlib_autoload.py")
    for name in ("setup.py", "pyproject.toml", "LICENSE", *package):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "README.md").write_text("A stand-in.\n")
    (tmp_path / "csrc/cuda/six.cu").write_text('extern "C" int six() { return 6; }\n')
    return tmp_path


def test_a_library_that_was_carried_here_survives_the_build_of_the_other_part(tree: Path) -> None:
    other = tree / "distlib" / gpu_build.NAMES["native"]
    nvcc = tree / "nvcc"
    nvcc.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "release 1.0" && exit\necho "error" >&2; exit 1\n')
    nvcc.chmod(0o755)
    both = Decision({"native": "keep", "cuda": "build"}, [])
    assert "the build failed" in gpu_build.build(both, {"NVCC": str(nvcc)}, tree), "there is nothing to keep"

    other.write_bytes(b"built elsewhere")
    (tree / "distlib/_cuda.so").write_bytes(b"older")
    assert "the build failed" in gpu_build.build(both, {"NVCC": str(nvcc), "DISTLIB_CUDA_ARCH": "sm_90"}, tree)
    assert (tree / "distlib/_cuda.so").read_bytes() == b"older", "what a compiler could not make anew stays"

    nvcc.write_text(NVCC)
    assert gpu_build.build(both, {"NVCC": str(nvcc), "DISTLIB_CUDA_ARCH": "sm_90"}, tree) == ""
    assert other.read_bytes() == b"built elsewhere"
    assert (tree / "distlib/_cuda.so").read_text().split() == ["-arch=sm_90"]
    assert gpu_build.build(Decision({"native": "keep", "cuda": "missing"}, []), {}, tree) == "", "nothing to do"


NVCC = """#!/bin/sh
[ "$1" = --version ] && echo "release 1.0" && exit
for word in "$@"; do case "$word" in -arch=*) arch=$word;; esac; last=$word; done
echo "$arch" > "$last"
"""


def test_a_library_tells_whether_it_is_of_these_sources(tree: Path) -> None:
    setup = gpu_build.builder(tree)
    assert setup is not None
    record = {"built": True, "why_not": "", "digest": setup["digest"](["csrc/cuda/six.cu"])}
    kept = Decision({"native": "missing", "cuda": "keep"}, [])
    assert "_cuda.so is not known to be of these sources" in gpu_build.strangers(tree, kept)[0]
    (tree / "distlib/_build_info.py").write_text(f"NATIVE = {{}}\nCUDA = {record}\n")
    assert gpu_build.strangers(tree, kept) == []
    (tree / "csrc/cuda/six.cu").write_text('extern "C" int six() { return 7; }\n')
    assert "_cuda.so is not known to be of these sources" in gpu_build.strangers(tree, kept)[0]


def test_a_library_that_does_not_run_on_this_card_is_told_by_the_build(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def quantize(values: torch.Tensor) -> torch.Tensor:
        raise CudaError("distlib_cuda_quantize", 35, "CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.zeros(*shape))
    monkeypatch.setattr(library, "why_not", lambda: "")
    monkeypatch.setattr(blocks, "quantize", quantize)
    exec(gpu_build.SAY_WHETHER_THEY_WORK, {})
    assert "driver version is insufficient" in json.loads(capsys.readouterr().out)["cuda"]


def test_pybind11_is_taken_from_torch_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = gpu_build.builder(ROOT)
    assert setup is not None
    real = importlib.util.find_spec
    hidden: set[str] = {"pybind11"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in hidden else real(name, *more))
    headers = Path(torch.__file__).parent / "include"
    if (headers / "pybind11").is_dir():
        folder, version = setup["find_pybind11"]()
        assert folder == headers and version.count(".") == 2
    hidden.add("torch")
    with pytest.raises(setup["CannotBuild"], match="pybind11 is missing: `pip install pybind11`"):
        setup["find_pybind11"]()


def test_only_the_cards_own_code_is_compiled_if_nvcc_knows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho sm_80\necho sm_90\n")
    nvcc.chmod(0o755)
    kinds = [(9, 0), (9, 0)]
    cuda = SimpleNamespace(
        is_available=lambda: bool(kinds), device_count=lambda: len(kinds), get_device_capability=lambda i: kinds[i]
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    assert gpu_build.architecture([str(nvcc)]) == "sm_90"
    for other in ([(9, 0), (8, 0)], [(12, 0)], []):
        kinds[:] = other
        assert gpu_build.architecture([str(nvcc)]) == "all-major"
