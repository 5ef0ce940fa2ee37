"""Facts of the network between hosts: RDMA devices, libfabric, NCCL's plugins, what lets a GPU send by itself."""

from __future__ import annotations

import json
import mmap
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from distlib.doctor.facts import Fabric
from distlib.doctor.tools import find, output_of, text_of
from distlib.doctor.variables import LOADING, QUEUES

_LIBRARY_FOLDERS = (  # where EFA's installer and deep-learning images put them, besides LD_LIBRARY_PATH
    "/opt/amazon/ofi-nccl/lib",
    "/opt/amazon/ofi-nccl/lib/x86_64-linux-gnu",
    "/opt/amazon/ofi-nccl/lib/aarch64-linux-gnu",
    "/opt/aws-ofi-nccl/lib",
    "/opt/amazon/efa/lib",
    "/opt/amazon/efa/lib64",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/local/lib",
)
_TOOL_FOLDERS = ("/opt/amazon/efa/bin", "/opt/amazon/bin")
_MODULES = ("nvidia_peermem", "efa_nv_peermem", "gdrdrv")
# In a process of its own: the library starts its providers as it is loaded.
_ASK_LIBFABRIC = """
import ctypes, sys
version = ctypes.CDLL(sys.argv[1]).fi_version()
print(f"libfabric: {version >> 16}.{version & 0xffff}")
"""
# By this name the plugin for EFA opens CUDA's runtime; wheels and NVIDIA's base images have it with a number only:
# https://github.com/aws/aws-ofi-nccl/issues/244
_RUNTIME = "libcudart.so"
# Also in a process of its own. The runtime that torch has loaded here is loaded there first, as it will be for NCCL.
_TRY_PLUGINS = """
import ctypes, json, sys
name, loaded, *plugins = sys.argv[1:]
if loaded:
    ctypes.CDLL(loaded)
faults = {}
for plugin in plugins:
    try:
        ctypes.CDLL(plugin)
        with open(plugin, "rb") as file:
            if b"\\0" + name.encode() + b"\\0" in file.read():
                ctypes.CDLL(name)
    except OSError as error:
        faults[plugin] = str(error)
print(json.dumps(faults))
"""


def fabric(environ: Mapping[str, str], root: Path = Path("/")) -> Fabric:
    """RDMA devices, NCCL's network plugins, libfabric, and variables that steer them. `root`: of the file system."""
    folders = _folders(environ, root)
    devices = _entries(root / "sys/class/infiniband")
    drivers = {d.name: os.path.basename(os.path.realpath(d / "device" / "driver")) for d in devices}
    plugins = {str(p): plugin_version(p) for f in folders for p in sorted(f.glob("libnccl-net*.so"))}
    return Fabric(
        devices=drivers,
        ports={d.name: state for d in devices if (state := _port(d))},
        closed=[d.name for d in devices if not _is_open_to_us(d, root)],
        plugins=plugins,
        faults=_faults(list(plugins)) if plugins and "efa" in drivers.values() else {},
        libfabric=_libfabric(folders),
        gpudirect=[name for name in _MODULES if (root / "sys/module" / name).is_dir()],
        gdrcopy=(root / "dev/gdrdrv").exists(),
        variables={
            n: v for n, v in sorted(environ.items()) if n.startswith(("FI_", "NCCL_", "RDMAV_", QUEUES, LOADING))
        },
    )


def _folders(environ: Mapping[str, str], root: Path) -> list[Path]:
    """Folders of libraries, each once: a plugin under two names of one folder is one."""
    named = [Path(folder) for folder in environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    usual = [root / folder.lstrip("/") for folder in _LIBRARY_FOLDERS]
    return list({path.resolve(): path for path in [*reversed(usual), *reversed(named)]}.values())[::-1]


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _port(device: Path) -> str:
    """The state of a device's first port: "ACTIVE, 400 Gb/sec, Ethernet"; empty if the kernel does not tell."""
    port = device / "ports" / "1"
    state = text_of(port / "state").partition(": ")[2]
    rate = text_of(port / "rate").partition(" (")[0]
    return ", ".join(part for part in (state, rate, text_of(port / "link_layer")) if part)


def _is_open_to_us(device: Path, root: Path) -> bool:
    """Whether programs here may use a device: a container sees it in /sys even if it was not given it."""
    nodes = [verb.name for verb in _entries(device / "device" / "infiniband_verbs")]
    return not nodes or all(os.access(root / "dev/infiniband" / node, os.R_OK | os.W_OK) for node in nodes)


def plugin_version(library: Path) -> str:
    """The version of aws-ofi-nccl that a plugin names itself by; empty if it is another plugin."""
    try:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            match = re.search(rb"aws-ofi-nccl ([0-9][0-9a-zA-Z.~-]*)", content)
            return match[1].decode() if match else ""
    except (OSError, ValueError):  # ValueError: an empty file cannot be mapped
        return ""


def _faults(plugins: list[str]) -> dict[str, str]:
    """Why plugins cannot be loaded, in the loader's words."""
    loaded = re.search(r"\s(/\S*/libcudart\.so\S*)$", text_of(Path("/proc/self/maps")), re.MULTILINE)
    said = output_of(sys.executable, "-I", "-c", _TRY_PLUGINS, _RUNTIME, loaded[1] if loaded else "", *plugins)
    return json.loads(said.splitlines()[-1]) if said else {}


def _libfabric(folders: list[Path]) -> str | None:
    """libfabric's version: by its tool, which most containers lack, else by the library itself."""
    tool = find("fi_info", *_TOOL_FOLDERS)
    said = output_of(tool, "--version") if tool else ""
    library = next((f / "libfabric.so.1" for f in folders if (f / "libfabric.so.1").exists()), None)
    if not said and library:
        said = output_of(sys.executable, "-I", "-c", _ASK_LIBFABRIC, str(library))
    match = re.search(r"^libfabric:\s*(\S+)", said, re.MULTILINE)
    return match[1] if match else None
