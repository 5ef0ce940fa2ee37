"""Facts of GPUs: driver, memory, who reaches whose memory, code for which GPUs was compiled, which NCCL is loaded."""

from __future__ import annotations

import ctypes
import os
import re
import warnings
from itertools import combinations
from pathlib import Path

import torch

from distlib.doctor.facts import Gpu, Gpus
from distlib.doctor.tools import find, output_of, text_of

_DRIVER = Path("/proc/driver/nvidia/version")


def gpus(whole_host: bool) -> Gpus:
    """GPUs as torch sees them. `whole_host`: also what is the same for all ranks of a host and takes a second."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    driver, is_open = parse_driver(text_of(_DRIVER))
    found = Gpus(
        devices=[_gpu(index) for index in range(count)],
        has_driver=os.path.exists("/dev/nvidiactl"),
        driver=driver,
        driver_is_open=is_open,
        driver_cuda=_driver_cuda(),
        complaint=" ".join(str(warning.message) for warning in said),
    )
    if whole_host and count:
        pairs = combinations(range(count), 2)
        found.strangers = [(a, b) for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
        if smi := find("nvidia-smi"):
            found.links = parse_links(output_of(smi, "topo", "-m"))
            query = "--query-gpu=index,ecc.errors.uncorrected.volatile.total"
            found.memory_errors = parse_memory_errors(output_of(smi, query, "--format=csv,noheader"))
    return found


def _gpu(index: int) -> Gpu:
    known = torch.cuda.get_device_properties(index)
    return Gpu(
        name=known.name,
        memory=known.total_memory,
        capability=f"{known.major}.{known.minor}",
        identity=str(known.uuid),
    )


# ---- the driver --------------------------------------------------------------------------------------------


def parse_driver(text: str) -> tuple[str, bool]:
    """Version of the kernel's NVIDIA driver and whether it is the open one, from /proc/driver/nvidia/version."""
    match = re.search(r"Kernel Module(?: for \S+)?\s+([0-9.]+)", text)
    return (match[1] if match else "", "Open Kernel Module" in text)


def _driver_cuda() -> str:
    """The newest CUDA that the driver serves, "13.0"; empty without a driver."""
    try:
        ask = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion
    except (OSError, AttributeError):
        return ""
    version = ctypes.c_int(0)
    return f"{version.value // 1000}.{version.value % 1000 // 10}" if ask(ctypes.byref(version)) == 0 else ""


# ---- nvidia-smi --------------------------------------------------------------------------------------------


def parse_links(matrix: str) -> dict[str, int]:
    """How pairs of GPUs are joined, from `nvidia-smi topo -m`: {"NV18": 28} or {"PHB": 1, "SYS": 2}."""
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in matrix.splitlines()]
    rows = [row for row in rows if row and re.fullmatch(r"GPU[0-9]+", row[0])]
    header, *lines = rows or [[]]
    columns = [name for name in header if re.fullmatch(r"GPU[0-9]+", name)]
    found: dict[str, int] = {}
    for number, line in enumerate(lines):
        for kind in line[number + 2 : len(columns) + 1]:  # right of the diagonal: each pair once
            found[kind] = found.get(kind, 0) + 1
    return found


def parse_memory_errors(text: str) -> list[int]:
    """GPUs with memory errors that ECC could not correct since the driver was loaded."""
    pairs = [line.split(",") for line in text.splitlines() if line.count(",") == 1]
    return [int(index) for index, count in pairs if count.strip().isdigit() and int(count) > 0]


# ---- libraries ---------------------------------------------------------------------------------------------


def architectures(flags: str) -> list[str]:
    """What nvcc made code for, from its flags: machine code ("sm_90") and PTX ("compute_100"). Empty: unknown."""
    found: list[str] = []
    for codes in re.findall(r"(?:^|,|\s)-?code=(\[[^]]*\]|\"[^\"]*\"|[^\s]+)", flags):
        found += re.findall(r"(?:sm|compute)_[0-9]+[af]?", codes)
    for number in re.findall(r"-arch[= ]sm_([0-9]+[af]?)", flags):
        found += [f"sm_{number}", f"compute_{number}"]
    return list(dict.fromkeys(found))


def loaded_nccl(maps: str | None = None) -> tuple[str, str]:
    """Version and file of the NCCL in this process; empty if there is none, or torch has it built in.

    `maps`: /proc/self/maps's text.
    """
    text = text_of(Path("/proc/self/maps")) if maps is None else maps
    match = re.search(r"\s(/\S*/libnccl\.so\S*)$", text, re.MULTILINE)
    if match is None:
        return "", ""
    version = ctypes.c_int(0)
    try:
        ask = ctypes.CDLL(match[1], mode=os.RTLD_NOLOAD | os.RTLD_LAZY).ncclGetVersion
    except (OSError, AttributeError):
        return "", match[1]
    return (nccl_version(version.value) if ask(ctypes.byref(version)) == 0 else "", match[1])


def nccl_version(code: int) -> str:
    """NCCL's number of itself as people write it: 22907 -> "2.29.7" (and 2804 -> "2.8.4", before 2.9)."""
    base = 10_000 if code >= 10_000 else 1000
    return f"{code // base}.{code % base // 100}.{code % 100}"
