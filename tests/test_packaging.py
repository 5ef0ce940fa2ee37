"""The package as installed: builds with and without compilers, the namesake, public names, import time."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import distlib
import distlib_autoload
from distlib import _clash

ROOT = Path(__file__).resolve().parent.parent


def _python(*arguments: str, path: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own that finds modules in `path` first."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(path), **environ},
        cwd=path,
        capture_output=True,
        text=True,
        timeout=110,
    )


# ---- the build ---------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree with our setup.py and a core of two small files and a header."""
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").write_text("A stand-in.\n")
    for folder in ("distlib", "csrc/core", "csrc/cpu"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("distlib/__init__.py", "distlib/_clash.py", "distlib_autoload.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "csrc/cpu/two.hpp").write_text("int two();\n")
    (tmp_path / "csrc/cpu/two.cpp").write_text('#include "cpu/two.hpp"\nint two() { return 2; }\n')
    (tmp_path / "csrc/core/four.cpp").write_text(
        '#include "cpu/two.hpp"\n'
        'extern "C" __attribute__((visibility("default"))) int four() { return 2 * two(); }\n'
    )
    return tmp_path


def _build(tree: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    clear = {name: "" for name in ("DISTLIB_NATIVE", "DISTLIB_CUDA", "CXX", "NVCC")}
    return _python("setup.py", "-q", "build_ext", "--inplace", path=tree, **{**clear, **environ})


def _info(tree: Path) -> dict[str, Any]:
    return runpy.run_path(str(tree / "distlib" / "_build_info.py"))


def _library(tree: Path) -> Path | None:
    return next((tree / "distlib").glob("_native*.so"), None)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the core is for Linux")
def test_the_core_is_compiled_and_later_only_what_changed(tree: Path) -> None:
    first = _build(tree)
    assert first.returncode == 0, first.stderr
    library = _library(tree)
    assert library is not None and ctypes.CDLL(str(library)).four() == 4
    assert _info(tree)["NATIVE"]["built"] and _info(tree)["NATIVE"]["why_not"] == ""
    assert "csrc/core/four.cpp" in first.stdout and "csrc/cpu/two.cpp" in first.stdout
    assert ".cpp" not in _build(tree).stdout

    (tree / "csrc/cpu/two.cpp").write_text('#include "cpu/two.hpp"\nint two() { return 3; }\n')
    second = _build(tree)
    assert "csrc/cpu/two.cpp" in second.stdout and "csrc/core/four.cpp" not in second.stdout
    (tree / "csrc/cpu/two.hpp").write_text("int two();  // changed\n")
    os.utime(tree / "csrc/cpu/two.hpp", (0, 0))  # as copying tools do
    third = _build(tree)
    assert "csrc/cpu/two.cpp" in third.stdout and "csrc/core/four.cpp" in third.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the core is for Linux")
@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [
        ("no compiler", "none of c++, g++, clang++ is on PATH"),
        ("wrong CXX", "CXX='no-such-compiler' is not on PATH"),
        ("error", "error: "),
        ("no sources", "csrc/core and csrc/cpu hold no .cpp file"),
        ("unwanted", "DISTLIB_NATIVE=0 was set"),
    ],
)
def test_without_a_core_the_build_succeeds_and_records_why(tree: Path, obstacle: str, reason: str) -> None:
    assert _build(tree).returncode == 0 and _library(tree)
    environ: dict[str, str] = {}
    if obstacle == "no compiler":
        environ = {"PATH": str(tree / "nothing-here")}
    elif obstacle == "wrong CXX":
        environ = {"CXX": "no-such-compiler"}
    elif obstacle == "error":
        (tree / "csrc/cpu/two.cpp").write_text("int two() { return; }\n")
    elif obstacle == "no sources":
        for source in tree.glob("csrc/*/*.cpp"):
            source.unlink()
    else:
        environ = {"DISTLIB_NATIVE": "0"}
    done = _build(tree, **environ)
    assert done.returncode == 0, done.stderr
    assert "going on without _native" in done.stderr and reason in done.stderr
    assert not _info(tree)["NATIVE"]["built"] and reason in _info(tree)["NATIVE"]["why_not"]
    assert _library(tree) is None, "an older core must not stay behind"

    if obstacle != "unwanted":
        forced = _build(tree, **{**environ, "DISTLIB_NATIVE": "1"})
        assert forced.returncode != 0 and "DISTLIB_NATIVE=1, but" in forced.stderr and reason in forced.stderr


FAKE_NVCC = """#!{python}
import subprocess, sys
if sys.argv[1] == "--version":
    print("Cuda compilation tools, release 0.0")
elif sys.argv[1] == "--list-gpu-arch":
    print("compute_75\\ncompute_90")
else:
    sys.exit(subprocess.call(["c++", "-fPIC", "-xc++" if "-c" in sys.argv else "-xnone"]
             + [a for a in sys.argv[1:] if not a.startswith(("-gencode", "-fmad", "-cudart", "-Xcompiler"))]))
"""


def test_cuda_is_compiled_where_nvcc_is_and_never_silently_missing(tree: Path) -> None:
    inert = _build(tree, DISTLIB_CUDA="1")
    assert inert.returncode != 0
    assert "DISTLIB_CUDA=1, but it cannot be built" in inert.stderr and "no .cu file" in inert.stderr
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/six.cu").write_text('extern "C" int six() { return 6; }\n')
    missing = _build(tree, DISTLIB_CUDA="1", CUDA_HOME=str(tree / "nowhere"))
    assert missing.returncode != 0 and "nowhere/bin/nvcc" in missing.stderr and "nvcc" in missing.stderr

    nvcc = tree / "nvcc"
    nvcc.write_text(FAKE_NVCC.format(python=sys.executable))
    nvcc.chmod(0o755)
    done = _build(tree, DISTLIB_CUDA="1", NVCC=str(nvcc))
    assert done.returncode == 0, done.stderr
    assert ctypes.CDLL(str(tree / "distlib/_cuda.so")).six() == 6
    record = _info(tree)["CUDA"]
    assert record["built"] and "release 0.0" in record["compiler"]
    assert record["flags"].endswith("code=sm_90 -gencode=arch=compute_90,code=compute_90")  # what it knows, and PTX
    assert _build(tree, DISTLIB_CUDA="0", NVCC=str(nvcc)).returncode == 0
    assert not (tree / "distlib/_cuda.so").exists()


@pytest.mark.parametrize("variable", ["DISTLIB_NATIVE", "DISTLIB_CUDA"])
def test_a_wish_that_is_not_understood_is_an_error(tree: Path, variable: str) -> None:
    done = _build(tree, **{variable: "yes"})
    assert done.returncode != 0 and f"{variable}='yes'" in done.stderr


def test_the_core_includes_no_torch_header() -> None:
    sources = [path for path in ROOT.glob("csrc/**/*") if path.is_file()]
    including = [str(p) for p in sources if "#include <torch/" in p.read_text() or "ATen/" in p.read_text()]
    assert sources and including == []


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_names_the_python_it_misses(tmp_path: Path) -> None:
    command = ["make", "-C", str(ROOT), "venv", "PYTHON=", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "no Python >= 3.10" in done.stderr


# ---- the namesake ------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of installed packages that holds distlib-train's package and entry point."""
    (tmp_path / "distlib").mkdir()
    for name in ("distlib/__init__.py", "distlib/_clash.py", "distlib_autoload.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    record = tmp_path / "distlib_train-0.1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: distlib-train\nVersion: 0.1.0\n")
    (record / "entry_points.txt").write_text("[torch.backends]\ndistlib = distlib_autoload:register\n")
    return tmp_path


def _install_namesake_over(site: Path) -> None:
    (site / "distlib/__init__.py").write_text("__version__ = '0.3.9'\n")
    (site / "distlib/database.py").touch()


def _import_torch(site: Path, before: str = "pass") -> subprocess.CompletedProcess[str]:
    """`import torch` where `site` has the only package called distlib: without an editable install."""
    program = f"{before}; import sys; sys.path.remove({str(ROOT)!r}) if {str(ROOT)!r} in sys.path else None; "
    return _python("-c", program + "import torch; print(torch.ones(2).sum().item())", path=site)


def test_no_clash_is_seen_where_there_is_none(site: Path) -> None:
    assert _clash.traces(str(site / "distlib")) == []
    assert _clash.traces(str(ROOT / "distlib")) == []


@pytest.mark.parametrize("trace", ["distlib/database.py", "distlib/scripts.py", "distlib-0.3.9.dist-info"])
def test_import_refuses_to_share_a_folder_with_the_namesake(site: Path, trace: str) -> None:
    (site / trace).touch()
    done = _python("-c", "import distlib", path=site)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "ClashError" in last and trace in last and "packaging library" in last
    for step in ("pip uninstall -y distlib", "pip install --force-reinstall --no-deps distlib-train"):
        assert step in last
    assert issubclass(_clash.ClashError, ImportError)


@pytest.mark.parametrize("state", ["overwritten", "uninstalled", "clash"])
def test_import_torch_survives_the_namesake_with_one_warning(site: Path, state: str) -> None:
    _install_namesake_over(site)
    if state == "uninstalled":  # by `pip uninstall distlib`: our other files stay, as a namespace
        (site / "distlib/__init__.py").unlink()
        (site / "distlib/database.py").unlink()
    if state == "clash":  # ours again over theirs
        shutil.copy(ROOT / "distlib/__init__.py", site / "distlib/__init__.py")
    done = _import_torch(site)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2.0\n"
    assert done.stderr.count("RuntimeWarning") == 1
    assert _clash.FIX in done.stderr and str(site / "distlib") in done.stderr


def test_warnings_as_errors_do_not_break_import_torch(site: Path) -> None:
    _install_namesake_over(site)
    done = _import_torch(site, "import warnings; warnings.simplefilter('error', RuntimeWarning)")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2.0\n" and _clash.FIX in done.stderr


def test_both_places_tell_the_same_fix() -> None:
    assert distlib_autoload.FIX == _clash.FIX
    assert distlib_autoload.DISTRIBUTION == _clash.DISTRIBUTION == distlib.__distribution__


# ---- the package -------------------------------------------------------------------------------------------


def test_public_names_resolve() -> None:
    for name in distlib.__all__:
        assert getattr(distlib, name) is not None
        assert name in dir(distlib)
    with pytest.raises(AttributeError, match="no attribute 'all_reduce'.*registered_empty"):
        distlib.all_reduce  # noqa: B018


@pytest.mark.parametrize("first", ["torch", "distlib", "torch.distributed"])
def test_the_backend_is_known_whatever_is_imported_first(first: str) -> None:
    program = f"import {first}, distlib, torch.distributed as d; print('distlib' in d.Backend.backend_list)"
    done = _python("-W", "error::RuntimeWarning", "-c", program, path=ROOT)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.alone
def test_import_distlib_costs_little_over_import_torch() -> None:
    program = (
        "import time, torch, sys; before = time.process_time(); import distlib; "
        "print(time.process_time() - before); "
        "print([m for m in ('rich', 'typer', 'pydantic', 'distlib.data_parallel') if m in sys.modules])"
    )
    runs = [_python("-c", program, path=ROOT, TORCH_DEVICE_BACKEND_AUTOLOAD="0") for _ in range(3)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert min(float(run.stdout.splitlines()[0]) for run in runs) < 0.3  # seconds of CPU
    assert runs[0].stdout.splitlines()[1] == "[]"


def _installed() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("distlib-train")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("distlib-train is not installed here, only imported from its source folder")


def test_what_is_installed_is_what_is_imported() -> None:
    installed = _installed()
    assert installed.version == distlib.__version__
    found = {(point.group, point.name, point.value) for point in installed.entry_points}
    assert ("torch.backends", "distlib", "distlib_autoload:register") in found
    assert ("console_scripts", "distlib", "distlib.cli:main") in found


def test_import_torch_alone_registers_the_backend() -> None:
    _installed()
    program = "import torch.distributed as d; print('distlib' in d.Backend.backend_list)"
    done = _python("-W", "error", "-c", program, path=ROOT)
    assert done.stdout == "True\n", done.stderr
