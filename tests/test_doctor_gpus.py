"""The doctor on GPU clusters: every problem from made-up facts; what is read from drivers, tools, folders and logs."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from test_doctor import TWO_HOSTS, facts, on_two_hosts, printed, same, told

from distlib.cuda import library
from distlib.doctor import gather, gpus, machine
from distlib.doctor.check_gpus import code_for
from distlib.doctor.check_job import check_job
from distlib.doctor.checks import check
from distlib.doctor.examine import _report_of_job, each_has_a_gpu
from distlib.doctor.facts import GIB, Fabric, Gpu, Gpus, NcclSaid, Node, Report, SelfTest
from distlib.doctor.nccl_log import parse, recorded
from distlib.doctor.show import lines
from distlib.doctor.variables import BETTER_LEFT_ALONE, OBSOLETE

H200 = Gpu(name="H200", memory=141 * GIB, capability="9.0", identity="GPU-1")
EFA = {"rdmap0": "efa"}
PLUGIN = {"/opt/x/libnccl-net.so": "1.21.1"}
COMPILED = {
    "build__cuda_compiler": "Build cuda_13.0.r13.0/compiler.36424714_0",
    "build__cuda_architectures": ["sm_80", "sm_90", "sm_100", "compute_100"],
}
B300 = Gpu(name="B300", capability="12.0")

# Changes to the healthy host -> level and topic of the one problem, words of what is wrong, words of the fix.
PROBLEMS: list[tuple[dict[str, Any], str, str]] = [
    (
        {"gpus": Gpus(has_driver=True, driver="535.104.05", driver_cuda="12.2")},
        "warning gpu: torch is built for CUDA 13.0, driver 535.104.05 serves CUDA 12.2 at most",
        "Match torch's CUDA with the driver",
    ),
    (
        {"versions__nccl_loaded": "2.21.5", "versions__nccl_file": "/usr/lib/libnccl.so.2"},
        "warning torch: torch was built with NCCL 2.29.1, but loads 2.21.5 from /usr/lib/libnccl.so.2",
        "LD_LIBRARY_PATH",
    ),
    (
        {"build__cuda_built": False, "build__cuda_why_not": "no nvcc on PATH"},
        "warning cuda part: there are GPUs, but the CUDA part of distlib is not compiled: no nvcc on PATH",
        "DISTLIB_CUDA=1 pip install",
    ),
    (
        {"build__cuda_error": "libcudart.so.13: cannot open shared object file"},
        "error cuda part: the CUDA part cannot be used: libcudart.so.13",
        "DISTLIB_CUDA=1 pip install",
    ),
    (
        {"build__cuda_architectures": ["sm_100", "compute_100"], "gpus__devices": [H200]},
        "error cuda part: compiled for sm_100, compute_100: nothing that H200 (compute capability 9.0) can run",
        "architecture among setup.py's",
    ),
    (
        {**COMPILED, "gpus__devices": [H200], "gpus__driver": "550.54", "gpus__driver_cuda": "12.4"},
        "error cuda part: compiled by CUDA 13.0, but driver 550.54 serves CUDA 12.4 at most",
        "Update the driver",
    ),
    (
        {
            **COMPILED,
            "build__cuda_compiler": "Build cuda_13.2.r13.2/compiler.1",
            "gpus__devices": [B300],
            "gpus__driver_cuda": "13.0",
        },
        "error cuda part: compiled by CUDA 13.2, but driver  serves CUDA 13.0",
        "nvcc 13.0",
    ),
    (
        {"gpus__strangers": [(0, 1), (0, 2)]},
        "warning gpu: GPUs 0 and 1 cannot access each other's memory, and 1 more pairs",
        "nvidia-smi topo -p2p r",
    ),
    ({"gpus__memory_errors": [3]}, "warning gpu: could not be corrected on GPU 3", "nvidia-smi -q -d ECC"),
    (
        {"gpus__devices": [H200, H200], "machine__shm": 64 << 20},
        "warning memory: /dev/shm is 64 MiB, and there are 2 GPUs",
        "--shm-size=1g",
    ),
    ({"fabric__closed": ["rdmap0"]}, "warning fabric: may not use rdmap0", "vpc.amazonaws.com/efa"),
    (
        {
            "fabric": Fabric(
                devices={"mlx5_0": "mlx5_core"}, ports={"mlx5_0": "DOWN, 10 Gb/sec"}, gpudirect=["nvidia_peermem"]
            )
        },
        "warning fabric: no RDMA port is active: mlx5_0: DOWN, 10 Gb/sec",
        "ibstat",
    ),
    (
        {"fabric": Fabric(devices={"mlx5_0": "mlx5_core"}), "gpus__driver": "550.54"},
        "warning fabric: nvidia_peermem is not loaded",
        "modprobe nvidia-peermem",
    ),
    (
        {"fabric__plugins": {"/opt/x/libnccl-net.so": "1.6.0"}},
        "warning fabric: aws-ofi-nccl 1.6.0 is older than 1.7",
        "current release",
    ),
    (
        {"fabric__plugins": {"/opt/x/libnccl-net-ofi.so": "1.21.1"}},
        "warning fabric: the plugin is called libnccl-net-ofi.so",
        "NCCL_NET_PLUGIN=ofi",
    ),
    (
        {"fabric__faults": {"/opt/x/libnccl-net.so": "libhwloc.so.15: cannot open shared object file"}},
        "warning fabric: NCCL cannot load /opt/x/libnccl-net.so: libhwloc.so.15: cannot open",
        "EFA installer",
    ),
    (
        {
            "fabric__faults": {
                f"/opt/x/{name}.so": "libcudart.so: cannot open shared object file"
                for name in ("libnccl-net", "libnccl-net-ofi")
            },
            "fabric__said": NcclSaid(network="Socket"),
        },
        "warning fabric: NCCL cannot load /opt/x/libnccl-net.so, /opt/x/libnccl-net-ofi.so: libcudart.so: cannot open",
        "ln -s libcudart.so.13 ",
    ),
    ({"fabric__libfabric": None}, "warning fabric: no libfabric is found", "LD_LIBRARY_PATH"),
    ({"fabric__variables": {"NCCL_NET": "Socket"}}, "warning fabric: NCCL_NET=Socket is set", "Unset NCCL_NET."),
    ({"fabric__variables": {"NCCL_NET_PLUGIN": "none"}}, "warning fabric: this host has EFA", "Unset NCCL_NET_PLUGIN."),
    (
        {"fabric__variables": {"NCCL_NET_PLUGIN": "hpcx"}},
        "warning fabric: NCCL_NET_PLUGIN=hpcx names a plugin that is not on the library path",
        "LD_LIBRARY_PATH",
    ),
    (
        {"fabric__said": NcclSaid(network="Socket")},
        "warning fabric: NCCL's log has no NET/OFI line: it used Socket",
        "NCCL_DEBUG=INFO",
    ),
    (
        {"fabric__said": NcclSaid(network="Socket", has_ofi_line=True)},
        "warning fabric: NCCL used TCP sockets, though there is rdmap0",
        "NCCL_DEBUG=INFO",
    ),
    (
        {"fabric__said": NcclSaid(network="Libfabric", has_ofi_line=True, provider="tcp")},
        "warning fabric: the plugin took libfabric's provider tcp",
        "Unset FI_PROVIDER",
    ),
]


@pytest.mark.parametrize(("changes", "expected", "fix"), PROBLEMS, ids=[problem for _, problem, _ in PROBLEMS])
def test_each_fault_is_one_problem_with_a_fix(changes: dict[str, Any], expected: str, fix: str) -> None:
    (problem,) = check(facts(**changes))
    assert same(problem, expected), told(problem)
    assert fix in problem.fix and problem.why


@pytest.mark.parametrize(
    "changes",
    [
        {**COMPILED, "gpus__devices": [H200], "gpus__driver_cuda": "13.0"},
        {**COMPILED, "gpus__devices": [H200], "gpus__driver_cuda": "13.2", "versions__nccl_loaded": "2.30.1"},
        {**COMPILED, "gpus__devices": [B300], "gpus__driver_cuda": "13.0"},
        {"fabric__said": NcclSaid(network="Libfabric", has_ofi_line=True, provider="efa", plugin="1.21.1")},
        {"fabric__variables": {"NCCL_NET_PLUGIN": "ofi"}, "fabric__plugins": {"/x/libnccl-net-ofi.so": "1.21.1"}},
        {"fabric__variables": {"NCCL_NET": "AWS Libfabric", "NCCL_NET_PLUGIN": "/x/libnccl-net.so"}},
        {"gpus__devices": [H200, H200], "machine__shm": 8 * GIB},
        {"machine__shm": 64 << 20},  # one GPU: nobody to share memory with
        {"fabric": Fabric(devices={"mlx5_0": "mlx5_core"}), "gpus__driver": "580.1", "gpus__driver_is_open": True},
        {"fabric": Fabric(devices={"mlx5_0": "mlx5_core"}, gpudirect=["nvidia_peermem"]), "gpus__driver": "550.1"},
        {"gpus__devices": [], "gpus__has_driver": False, "build__cuda_built": False},
    ],
)
def test_a_healthy_cluster_has_no_problem(changes: dict[str, Any]) -> None:
    assert check(facts(**changes)) == []


def test_problem_topics_are_lines_of_the_report() -> None:
    found = [problem for changes, _, _ in PROBLEMS for problem in check(facts(**changes))]
    assert {problem.topic for problem in found} <= {topic for topic, _, _ in lines(Report(facts=facts()))}


@pytest.mark.parametrize("name", OBSOLETE)
def test_each_obsolete_variable_is_told_of(name: str) -> None:
    variable, value = name.replace("*", "FORK_SAFE"), OBSOLETE[name] or "1"
    (problem,) = check(facts(fabric__variables={variable: value}))
    assert variable in problem.what and problem.fix == f"Unset {variable}."


@pytest.mark.parametrize("name", BETTER_LEFT_ALONE)
def test_what_nccl_chooses_better_is_told_of(name: str) -> None:
    (problem,) = check(facts(fabric__variables={name: "8"}))
    assert problem.what == f"{name} is set" and f"Unset {name}" in problem.fix


def test_channels_are_told_of_by_the_names_that_nccl_reads() -> None:
    assert {"NCCL_MIN_NCHANNELS", "NCCL_MIN_CTAS"} <= set(BETTER_LEFT_ALONE)


# ---- which GPUs the CUDA part runs on ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "architectures", "way"),
    [
        ("9.0", ["sm_80", "sm_90"], "machine code"),
        ("8.6", ["sm_80"], "machine code"),  # a newer minor of the same major
        ("8.0", ["sm_86"], ""),  # not an older one
        ("12.0", ["sm_80", "compute_100"], "ptx"),
        ("8.9", ["sm_90", "compute_90"], ""),
        ("9.0", ["sm_90a"], "machine code"),
        ("10.0", ["sm_90a", "compute_90a"], ""),  # for one architecture alone
        ("10.3", ["sm_100f"], "machine code"),
        ("12.0", ["compute_100f"], ""),
        ("9.0", ["compute_80", "sm_90"], "machine code"),
        ("9.0", [], ""),
    ],
)
def test_code_for_a_gpu(capability: str, architectures: list[str], way: str) -> None:
    assert code_for(capability, architectures) == way


@pytest.mark.parametrize(
    ("flags", "architectures"),
    [
        (
            "-O3 -gencode=arch=compute_80,code=sm_80 -gencode arch=compute_100,code=[sm_100,compute_100]",
            ["sm_80", "sm_100", "compute_100"],
        ),
        ("-gencode=arch=compute_90a,code=sm_90a", ["sm_90a"]),
        ("-arch=sm_90 -std=c++17", ["sm_90", "compute_90"]),
        ("-O3 -arch=all-major", []),
    ],
)
def test_architectures_from_the_flags_of_nvcc(flags: str, architectures: list[str]) -> None:
    assert gpus.architectures(flags) == architectures


def test_the_record_of_the_build_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "-O3 -gencode=arch=compute_90,code=sm_90 -gencode=arch=compute_90,code=compute_90"
    record = types.ModuleType("distlib._build_info")
    record.NATIVE = {"built": False, "why_not": "no"}  # type: ignore[attr-defined]
    record.CUDA = {"built": True, "why_not": "", "compiler": "Build cuda_13.0.r13.0/c", "flags": flags}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "distlib._build_info", record)
    monkeypatch.setattr(library, "why_not", lambda: "it was built, but cannot be loaded: libx.so")
    found = gather.build()
    assert found.cuda_built and found.cuda_architectures == ["sm_90", "compute_90"]
    assert found.cuda_compiler.endswith("r13.0/c") and found.cuda_error.endswith("loaded: libx.so")


# ---- what drivers and tools say ----------------------------------------------------------------------------


def test_the_driver() -> None:
    old = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12"
    new = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (root@x)"
    assert gpus.parse_driver(old) == ("535.104.05", False)
    assert gpus.parse_driver(new) == ("580.95.05", True)
    assert gpus.parse_driver("") == ("", False)


def test_links_between_gpus() -> None:
    matrix = (
        "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m\n"
        "GPU0\t X \tNV18\tSYS\tPXB\t0-47\t0\n"
        "GPU1\tNV18\t X \tPHB\tSYS\t0-47\t0\n"
        "GPU2\tSYS\tPHB\t X \tSYS\t48-95\t1\n"
        "NIC0\tPXB\tSYS\tSYS\t X \n\nLegend:\n  X    = Self\n  NV#  = Connection of NVLinks\n"
    )
    assert gpus.parse_links(matrix) == {"NV18": 1, "SYS": 1, "PHB": 1}
    assert gpus.parse_links("\tGPU0\tCPU Affinity\nGPU0\t X \t0-7\n") == {}
    assert gpus.parse_links("") == {}


@pytest.mark.parametrize("whole_host", [True, False])
def test_gpus_as_torch_and_the_driver_see_them(monkeypatch: pytest.MonkeyPatch, whole_host: bool) -> None:
    known = types.SimpleNamespace(name="H200", total_memory=141 * GIB, major=9, minor=0, uuid="u-0")
    asked: list[str] = []

    def smi(*command: str) -> str:
        asked.append(command[1])
        return "GPU0 GPU1\nGPU0 X NV18\nGPU1 NV18 X\n" if command[1] == "topo" else "0, 0\n1, 4\n"

    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_properties": lambda index: known,
        "can_device_access_peer": lambda one, other: False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpus, "find", lambda name: "/bin/nvidia-smi")
    monkeypatch.setattr(gpus, "output_of", smi)
    found = gpus.gpus(whole_host)
    assert found.devices == [Gpu(name="H200", memory=141 * GIB, capability="9.0", identity="u-0")] * 2
    assert re.fullmatch(r"([0-9]+\.[0-9])?", found.driver_cuda)
    if whole_host:
        assert found.strangers == [(0, 1)] and found.links == {"NV18": 1} and found.memory_errors == [1]
    else:
        assert (found.strangers, found.links, found.memory_errors, asked) == ([], {}, [], [])


def test_memory_errors() -> None:
    assert gpus.parse_memory_errors("0, 0\n1, 2\n2, [N/A]\n") == [1]
    assert gpus.parse_memory_errors("") == []


def test_nccl_in_this_process() -> None:
    assert [gpus.nccl_version(code) for code in (22907, 21805, 2804)] == ["2.29.7", "2.18.5", "2.8.4"]
    assert gpus.loaded_nccl("") == ("", "")
    mapped = "7f0-7f1 r-xp 00000000 08:01 12 /x/nvidia/nccl/lib/libnccl.so.2\n7f1-7f2 r-xp 0 08:01 1 /x/libc.so.6\n"
    assert gpus.loaded_nccl(mapped) == ("", "/x/nvidia/nccl/lib/libnccl.so.2")  # named, but not really loaded


def test_shared_memory_has_a_size(tmp_path: Path) -> None:
    assert (machine.shared_memory_size(tmp_path) or 0) > 0
    assert machine.shared_memory_size(tmp_path / "none") is None


# ---- NCCL's log --------------------------------------------------------------------------------------------

LOG_OF_EFA = """\
a:1:1 [0] NCCL INFO NCCL version 2.29.7+cuda13.0
a:1:1 [0] NCCL INFO NET/OFI Initializing aws-ofi-nccl 1.21.1
a:1:1 [0] NCCL INFO NET/OFI Selected provider is efa, fabric is efa-direct (found 32 nics)
a:1:1 [0] NCCL INFO Initialized NET plugin Libfabric
a:1:1 [0] NCCL INFO Using network Libfabric
a:1:1 [0] NCCL INFO Channel 00/0 : 0[0] -> 8[0] [send] via NET/Libfabric/0/GDRDMA
"""


def test_the_log_of_nccl() -> None:
    assert parse(LOG_OF_EFA) == NcclSaid(
        network="Libfabric", has_ofi_line=True, plugin="1.21.1", provider="efa", gpudirect=True
    )
    sockets = "a:1:1 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.1<0>\na:1:1 [0] NCCL INFO Using network Socket\n"
    assert parse(sockets) == NcclSaid(network="Socket")
    assert parse("") is None


def test_nccl_is_made_to_log_for_the_selftest_only() -> None:
    environ = {"NCCL_DEBUG": "WARN", "HOME": "/root"}
    with recorded(environ) as said:
        assert environ["NCCL_DEBUG"] == "INFO" and said() is None
        Path(environ["NCCL_DEBUG_FILE"]).write_text(LOG_OF_EFA)
        found = said()
    assert found is not None and found.network == "Libfabric"
    assert environ == {"NCCL_DEBUG": "WARN", "HOME": "/root"}


def test_a_log_that_the_user_wants_is_left_alone(tmp_path: Path) -> None:
    environ = {"NCCL_DEBUG": "WARN", "NCCL_DEBUG_FILE": str(tmp_path / "mine")}
    with recorded(environ) as said:
        assert environ["NCCL_DEBUG"] == "WARN" and said() is None


# ---- a job -------------------------------------------------------------------------------------------------


def test_ranks_that_share_a_gpu() -> None:
    everyone = on_two_hosts(gpus__devices=[H200], gpus__mine="GPU-1")
    for rank, f in enumerate(everyone):
        f.launched.rank = rank
        if rank < 2:
            f.gpus.devices, f.gpus.mine = [H200, H200], f"GPU-{rank}"
    (problem,) = check_job(everyone, TWO_HOSTS)
    assert same(problem, "warning gpu: 2 ranks use 1 GPU: ranks 2, 3 share one"), told(problem)
    assert problem.hosts == ["b"] and problem.fix.startswith("Start 1 rank on this host")


@pytest.mark.parametrize(
    ("used", "can"), [(["a", "b"], True), (["a", "a"], False), (["a", ""], False), (["", ""], False)]
)
def test_nccl_is_tried_where_each_rank_has_a_gpu(used: list[str], can: bool) -> None:
    assert each_has_a_gpu([facts(gpus__mine=gpu) for gpu in used]) is can


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"versions__nccl_loaded": "2.30.1"}, "error torch: NCCL differs: 2.29.1 on ranks 0-1, 2.30.1 on ranks 2-3"),
        ({"gpus__driver": "580.95"}, "warning gpu: NVIDIA driver differs"),
        ({"fabric__libfabric": "2.6.0"}, "warning fabric: libfabric differs"),
        ({"fabric__plugins": {"/opt/x/libnccl-net.so": "1.9.1"}}, "warning fabric: aws-ofi-nccl differs"),
    ],
)
def test_what_differs_between_hosts(changes: dict[str, Any], expected: str) -> None:
    (problem,) = check_job(on_two_hosts(**changes), TWO_HOSTS)
    assert same(problem, expected), told(problem)


def test_a_selftest_that_failed_still_tells_of_the_hosts() -> None:
    everyone = on_two_hosts(gpus__memory_errors=[1])
    report = _report_of_job(everyone, TWO_HOSTS, SelfTest(ranks=4, in_job=True, error="NCCL error: x"))
    assert [problem.topic for problem in report.problems] == ["self-test", "gpu"]
    assert report.problems[1].hosts == ["b"] and report.nodes == TWO_HOSTS


def test_the_report_of_a_gpu_host() -> None:
    host = facts(
        **COMPILED,
        gpus=Gpus(devices=[H200] * 8, driver="580.95.05", driver_is_open=True, driver_cuda="13.0", links={"NV18": 28}),
        fabric=Fabric(
            devices={f"rdmap{i}": "efa" for i in range(32)},
            ports={"rdmap0": "ACTIVE, 100 Gb/sec"},
            plugins=PLUGIN,
            libfabric="2.6",
            gdrcopy=True,
            gpudirect=["efa_nv_peermem"],
            said=parse(LOG_OF_EFA),
        ),
        machine__shm=8 * GIB,
        versions__nccl_loaded="2.30.1",
    )
    text = " ".join(printed(Report(facts=host, nodes=[Node(host="a", ranks=[0])]), 100).split())
    for words in (
        "8 x H200 (141.0 GiB, capability 9.0)",
        "driver 580.95.05 (open), serves CUDA 13.0",
        "28 pairs by NV18; all access each other's memory",
        "compiled by CUDA 13.0 for sm_80, sm_90, sm_100, compute_100",
        "NCCL 2.29.1 (2.30.1 in use)",
        "rdmap0 (efa, ACTIVE, 100 Gb/sec), rdmap1 (efa)",
        "and 24 more",
        "NCCL plugin /opt/x/libnccl-net.so (aws-ofi-nccl 1.21.1), libfabric 2.6",
        "GPUDirect by efa_nv_peermem, gdrcopy",
        "NCCL used Libfabric (NET/OFI), from the GPUs' own memory",
        "/dev/shm 8.0 GiB, which NCCL uses",
    ):
        assert words in text, (words, text)
