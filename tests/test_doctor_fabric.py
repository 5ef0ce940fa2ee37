"""The doctor and the fabric of a cluster: devices, plugins and kernel modules, found in made-up folders."""

from __future__ import annotations

import _ctypes
import os
import shutil
from pathlib import Path

import pytest

from distlib.doctor.fabric import fabric, plugin_version
from distlib.doctor.facts import Fabric


def make_device(root: Path, name: str, driver: str, verbs: str, state: str = "4: ACTIVE") -> Path:
    """An RDMA device as the kernel shows it."""
    device = root / "sys/class/infiniband" / name
    folder = root / "sys/drivers" / driver
    for path in (device / "device/infiniband_verbs" / verbs, device / "ports/1", folder):
        path.mkdir(parents=True, exist_ok=True)
    (device / "device/driver").symlink_to(folder)
    (device / "ports/1/state").write_text(state + "\n")
    (device / "ports/1/rate").write_text("400 Gb/sec (4X NDR)\n")
    (device / "ports/1/link_layer").write_text("InfiniBand\n")
    return device


def test_devices_plugins_and_modules_are_found(tmp_path: Path) -> None:
    make_device(tmp_path, "rdmap0", "efa", "uverbs0")
    make_device(tmp_path, "mlx5_0", "mlx5_core", "uverbs1", "1: DOWN")
    for path in ("dev/infiniband/uverbs0", "dev/gdrdrv", "opt/amazon/ofi-nccl/lib/libnccl-net.so"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"\x7fELF\0Initializing aws-ofi-nccl 1.21.1\0more")
    (tmp_path / "sys/module/efa_nv_peermem").mkdir(parents=True)
    own = tmp_path / "own"
    own.mkdir()
    (own / "libnccl-net-ofi.so").touch()
    found = fabric({"LD_LIBRARY_PATH": f"/nowhere:{own}:{own}", "FI_PROVIDER": "efa", "HOME": "/root"}, tmp_path)
    assert found.devices == {"mlx5_0": "mlx5_core", "rdmap0": "efa"}
    assert found.ports == {"mlx5_0": "DOWN, 400 Gb/sec, InfiniBand", "rdmap0": "ACTIVE, 400 Gb/sec, InfiniBand"}
    assert found.closed == ["mlx5_0"]
    assert found.plugins == {
        f"{own}/libnccl-net-ofi.so": "",
        f"{tmp_path}/opt/amazon/ofi-nccl/lib/libnccl-net.so": "1.21.1",
    }
    assert list(found.plugins)[0].startswith(str(own))  # LD_LIBRARY_PATH comes first
    assert found.gpudirect == ["efa_nv_peermem"] and found.gdrcopy
    assert found.variables == {"FI_PROVIDER": "efa"}


def test_plugins_are_tried_as_nccl_would_load_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NVIDIA's base images are: CUDA's runtime is there, but not under the name that the plugin opens."""
    make_device(tmp_path, "rdmap0", "efa", "uverbs0")
    good, picky, broken = (tmp_path / f"libnccl-net{name}.so" for name in ("", "-picky", "-broken"))
    library = Path(_ctypes.__file__).read_bytes()
    good.write_bytes(library)
    picky.write_bytes(library + b"\0libcudart-here.so\0")
    broken.write_bytes(b"\x7fELF")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setattr("distlib.doctor.fabric._RUNTIME", "libcudart-here.so")  # this machine may have the other
    found = fabric(os.environ, tmp_path)
    assert set(found.plugins) == set(map(str, (good, picky, broken)))
    assert set(found.faults) == {str(picky), str(broken)}
    assert (
        found.faults[str(picky)].startswith("libcudart-here.so: cannot open") and "short" in found.faults[str(broken)]
    )
    (tmp_path / "libcudart-here.so").write_bytes(library)
    assert set(fabric(os.environ, tmp_path).faults) == {str(broken)}
    shutil.rmtree(tmp_path / "sys")  # without EFA nobody needs the plugin
    assert fabric(os.environ, tmp_path).faults == {}


def test_a_host_without_a_fabric(tmp_path: Path) -> None:
    found = fabric({}, tmp_path)
    assert found.model_copy(update={"libfabric": None}) == Fabric()
    assert plugin_version(tmp_path / "none.so") == ""


def test_libfabric_is_asked_itself_where_its_tool_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("distlib.doctor.fabric._TOOL_FOLDERS", ())
    monkeypatch.setattr("distlib.doctor.fabric._ASK_LIBFABRIC", "import sys; print('libfabric: 2.6 of', sys.argv[1])")
    assert fabric({"LD_LIBRARY_PATH": str(tmp_path)}, tmp_path).libfabric is None
    (tmp_path / "libfabric.so.1").touch()
    assert fabric({"LD_LIBRARY_PATH": str(tmp_path)}, tmp_path).libfabric == "2.6"
