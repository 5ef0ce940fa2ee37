"""The doctor: every problem from made-up facts, what is gathered, and how it is shown."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import distlib
from distlib import words
from distlib.doctor import gather, machine
from distlib.doctor.check_job import check_job, check_selftest
from distlib.doctor.check_settings import SMALLEST, SWITCHES
from distlib.doctor.checks import check
from distlib.doctor.facts import (
    GIB,
    Build,
    Fabric,
    Facts,
    Gpu,
    Gpus,
    Kernel,
    Launched,
    Limits,
    Machine,
    Network,
    Node,
    Problem,
    Report,
    SelfTest,
    Versions,
)
from distlib.doctor.show import lines, show
from distlib.doctor.variables import INSTALL_SETTINGS, SETTINGS, is_obsolete

PACKAGE = Path(distlib.__file__).parent

# ---- facts, made up ----------------------------------------------------------------------------------------


def facts(**changes: Any) -> Facts:
    """A healthy GPU host; `changes` by path with __ for the dot: facts(versions__torch="2.5")."""
    healthy = Facts(
        versions=Versions(
            distlib="1.0",
            python="3.12.1",
            system="Linux 6.1 x86_64",
            torch="2.13.0+cu130",
            has_distributed=True,
            has_gloo=True,
            cuda="13.0",
            nccl="2.29.1",
            mpi4py="4.1.2",
            mpirun="mpirun (Open MPI) 5.0.11",
        ),
        gpus=Gpus(devices=[Gpu(name="H200")], has_driver=True),
        build=Build(is_built=True, compiler="c++ (Debian 12) 12.2.0", core_works=True, simd="avx512", cuda_built=True),
        launched=Launched(launcher="single"),
        machine=Machine(
            host="a", cores=8, affinity=list(range(8)), memory=64 * GIB, memory_available=60 * GIB, arena=64 * GIB
        ),
        limits=Limits(open_files=65536),
        kernel=Kernel(),
        network=Network(addresses={"eth0": "10.0.0.1", "lo": "127.0.0.1"}, by_name="127.0.1.1"),
        fabric=Fabric(
            devices={"rdmap0": "efa"}, plugins={"/opt/x/libnccl-net.so": "1.21.1"}, libfabric="2.1.0amzn3.0"
        ),
        settings={"DISTLIB_SIMD": "avx2", "DISTLIB_NODES": "2", "DISTLIB_ARENA_MB": "64", "DISTLIB_CORE": "1"},
    )
    for path, value in changes.items():
        *parents, name = path.split("__")
        model: Any = healthy
        for parent in parents:
            model = getattr(model, parent)
        setattr(model, name, copy.deepcopy(value))
    return healthy


# Changes to the healthy host -> level and topic of the one problem, words of what is wrong, words of the fix.
PROBLEMS: list[tuple[dict[str, Any], str, str]] = [
    ({"namesakes": ["/x/distlib-0.4.dist-info"]}, "warning distlib: packaging library", "pip uninstall -y distlib"),
    ({"versions__torch": "2.5.1"}, "error torch: torch 2.5.1 is older than 2.6", "torch>=2.6"),
    ({"versions__has_gloo": False}, "error torch: without gloo", "USE_GLOO=1"),
    (
        {"versions__has_gloo": False, "versions__has_distributed": False},
        "error torch: without torch.distributed",
        "USE_DISTRIBUTED=1",
    ),
    (
        {"build__core_works": False, "build__is_built": False, "build__core_why_not": "no C++ compiler: none of c++"},
        "warning core: no C++ compiler",
        "apt install g++",
    ),
    (
        {"build__core_works": False, "build__core_why_not": "DISTLIB_CORE=0 is set"},
        "warning core: DISTLIB_CORE=0",
        "Unset DISTLIB_CORE",
    ),
    (
        {"build__core_works": False, "build__core_why_not": "it was built, but cannot be loaded: undefined symbol"},
        "warning core: undefined symbol",
        "Reinstall it for this Python",
    ),
    (
        {"build__core_works": False, "build__core_why_not": "needs Linux", "versions__system": "Darwin 24 arm64"},
        "warning core: needs Linux",
        "gloo is the way",
    ),
    (
        {"build__core_works": False, "build__core_refuses": "DISTLIB_SIMD=sse cannot be used: this CPU has avx2."},
        "error core: DISTLIB_SIMD=sse cannot be used: this CPU has avx2",
        "unset it",
    ),
    (
        {"gpus__devices": [], "versions__cuda": None, "versions__nccl": None},
        "warning gpu: built for the CPU only",
        "pytorch.org",
    ),
    (
        {"gpus__devices": [], "gpus__complaint": "The NVIDIA driver on your system is too old"},
        "warning gpu: too old",
        "nvidia-smi",
    ),
    ({"versions__nccl": None}, "error gpu: without NCCL", "USE_NCCL=1"),
    (
        {"launched__error": "torchrun: WORLD_SIZE is not set. Fix: unset RANK."},
        "error launcher: WORLD_SIZE is not set",
        "Unset RANK.",
    ),
    ({"machine__cores_quota": 1.5}, "warning cores: 1.5 of the 8 cores", "OMP_NUM_THREADS to 1,"),
    ({"machine__memory_available": GIB // 2}, "warning memory: 0.5 GiB are available (the machine", "--memory"),
    (
        {"machine__memory_available": 300 << 20, "machine__memory_limit": 2 * GIB},
        "warning memory: only 300 MiB are available (the container's limit is 2.0 GiB)",
        "--memory",
    ),
    ({"limits__address_space": 40 * GIB}, "error limits: ulimit -v is 40.0 GiB; 2 ranks", "DISTLIB_ARENA_MB=16384"),
    ({"limits__address_space": 4 * GIB}, "error limits: ulimit -v is 4.0 GiB", "ulimit -v unlimited"),
    ({"limits__open_files": 256}, "warning limits: ulimit -n is 256", "ulimit -n 65536"),
    ({"limits__locked_memory": 64 << 10}, "warning limits: ulimit -l is 64 KiB", "memlock=-1"),
    ({"kernel__memfd": "Operation not permitted"}, "error kernel: memfd cannot be used: Op", "seccomp"),
    ({"kernel__futex": "Function not implemented"}, "error kernel: futex cannot be used", "DISTLIB_CORE=0"),
    ({"kernel__abstract_sockets": "refused"}, "error kernel: abstract sockets cannot be used", "DISTLIB_CORE=0"),
    ({"network__error": "DISTLIB_INTERFACE='ib7': no such interface"}, "error network: 'ib7'", "unset it"),
    ({"network__lookup": 10.01}, "warning network: the name server took 10 s", "RES_OPTIONS='timeout:1 attempts:1'"),
    ({"fabric__plugins": {}}, "warning fabric: EFA is here (rdmap0)", "aws-ofi-nccl 1.7"),
    ({"fabric__libfabric": "1.17.1"}, "warning fabric: libfabric 1.17.1", "aws-efa-installer"),
    ({"fabric__variables": {"FI_PROVIDER": "efa"}}, "warning fabric: obsolete: FI_PROVIDER=efa", "Unset FI_PROVIDER."),
    ({"fabric__variables": {"NCCL_BUFFSIZE": "1"}}, "warning fabric: NCCL_BUFFSIZE is set", "Unset NCCL_BUFFSIZE"),
    (
        {"fabric__variables": {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}},
        "warning gpu: CUDA_DEVICE_MAX_CONNECTIONS=1",
        "Unset CUDA_DEVICE_MAX_CONNECTIONS",
    ),
    ({"fabric__variables": {"CUDA_MODULE_LOADING": "lazy"}}, "warning gpu: CUDA_MODULE_LOADING=lazy", "sets EAGER"),
    ({"settings": {"DISTLIB_NODE": "2"}}, "error settings: DISTLIB_NODE is no setting", "mean DISTLIB_NODES?"),
    (
        {"settings": {"DISTLIB_XYZZY_PLUGH": "2"}},
        "error settings: DISTLIB_XYZZY_PLUGH is no",
        "There are DISTLIB_NODES,",
    ),
    ({"settings": {"DISTLIB_NODES": "two"}}, "error settings: DISTLIB_NODES='two'", "Correct it"),
    (
        {"settings": {"DISTLIB_ARENA_MB": "8"}},
        "error settings: DISTLIB_ARENA_MB='8' is no whole number from 64",
        "Corr",
    ),
    ({"settings": {"DISTLIB_STAGING_KB": "0"}}, "error settings: DISTLIB_STAGING_KB='0'", "Correct it"),
    ({"settings": {"DISTLIB_CHUNK_KB": "x"}}, "error settings: DISTLIB_CHUNK_KB='x'", "Correct it"),
    ({"settings": {"DISTLIB_FINGERPRINT": "off"}}, "error settings: DISTLIB_FINGERPRINT='off' is neither", "Correct"),
    (
        {"settings": {"DISTLIB_MASTER_ADDR": "a"}, "launched__launcher": "torchrun"},
        "warning settings: DISTLIB_MASTER_ADDR is set under torchrun",
        "--master-addr",
    ),
    (
        {"settings": {"DISTLIB_CUDA": "1"}, "build__cuda_built": False, "gpus": Gpus()},
        "warning settings: DISTLIB_CUDA=1 is set, but",
        "DISTLIB_CUDA=1 pip install",
    ),
]


def told(problem: Problem) -> str:
    return f"{problem.level} {problem.topic}: {problem.what}"


def same(problem: Problem, expected: str) -> bool:
    """Level and topic alike, and the expected words among what is wrong."""
    head, words_of_it = expected.split(": ", 1)
    return f"{problem.level} {problem.topic}" == head and words_of_it in problem.what


def test_a_healthy_host_has_no_problem() -> None:
    assert check(facts()) == []


@pytest.mark.parametrize(("changes", "expected", "fix"), PROBLEMS, ids=[problem for _, problem, _ in PROBLEMS])
def test_each_fault_is_one_problem_with_a_fix(changes: dict[str, Any], expected: str, fix: str) -> None:
    (problem,) = check(facts(**changes))
    assert same(problem, expected), told(problem)
    assert fix in problem.fix and problem.why


def test_what_does_not_matter_here_is_no_problem() -> None:
    without_core = {"build__core_works": False, "build__core_why_not": "DISTLIB_CORE=0 is set"}
    assert len(check(facts(**without_core, kernel__memfd="no", limits__address_space=GIB))) == 1
    assert check(facts(settings={"DISTLIB_CUDA": "1", "DISTLIB_NATIVE": "1", "DISTLIB_NODES": ""})) == []
    no_gpu = facts(gpus=Gpus(), versions__cuda=None, versions__nccl=None, fabric=Fabric(), build__cuda_built=False)
    assert check(no_gpu) == []


def test_problem_topics_are_lines_of_the_report() -> None:
    found = [problem for changes, _, _ in PROBLEMS for problem in check(facts(**changes))]
    job = Report(facts=facts(), nodes=[Node(host="a", ranks=[0])])
    assert {problem.topic for problem in found} <= {topic for topic, _, _ in lines(job)}


# ---- a job's facts -----------------------------------------------------------------------------------------

TWO_HOSTS = [Node(host="a", ranks=[0, 1]), Node(host="b", ranks=[2, 3])]


def on_two_hosts(**changes: Any) -> list[Facts]:
    """Facts of ranks 0 to 3, two a host; `changes` apply to those of host b."""
    named = {
        "network__chosen": "eth0",
        "network__master": "a",
        "network__reason": "on the way to a",
        "launched": Launched(launcher="torchrun", size=4, local_size=2),
        "settings": {},
    }
    return [facts(**named), facts(**named), *(facts(**{"machine__host": "b", **named, **changes}) for _ in "23")]


def test_a_healthy_job_has_no_problem() -> None:
    assert check_job(on_two_hosts(), TWO_HOSTS) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"versions__torch": "2.12.0"}, "error torch: torch differs: 2.13.0+cu130 on ranks 0-1, 2.12.0 on ranks 2-3"),
        ({"versions__nccl": "2.27.3"}, "error torch: NCCL differs"),
        ({"versions__distlib": "0.9"}, "error distlib: distlib differs: 1.0 on ranks 0-1, 0.9 on ranks 2-3"),
        ({"versions__python": "3.11.7"}, "warning distlib: Python differs"),
        ({"settings": {"DISTLIB_NODES": "2"}}, "warning settings: DISTLIB_NODES differs: none on ranks 0-1, 2 on"),
        ({"machine__affinity": [3]}, "warning cores: 2 ranks share 1 core"),
        ({"launched__threads": 8}, "warning cores: 2 ranks with 16 threads in all, on 8 cores"),
        ({"network__chosen": None}, "error network: the address for other hosts is 127.0.1.1 (this host's name)"),
        ({"network__chosen": "lo"}, "error network: the address for other hosts is 127.0.0.1 (on the way to a)"),
        ({"limits__open_files": 256}, "warning limits: ulimit -n is 256"),
    ],
)
def test_each_fault_of_a_job_is_one_problem(changes: dict[str, Any], expected: str) -> None:
    (problem,) = check_job(on_two_hosts(**changes), TWO_HOSTS)
    assert same(problem, expected), told(problem)
    assert problem.hosts == ([] if "differs" in expected else ["b"])


def test_a_fault_of_every_host_is_told_once() -> None:
    everywhere = [facts(limits__open_files=256, network__chosen="eth0") for _ in range(4)]
    (problem,) = check_job(everywhere, TWO_HOSTS)
    assert problem.hosts == []


def test_ranks_bound_to_cores_of_their_own_are_not_crowded() -> None:
    bound = [facts(machine__affinity=[core], launched__size=2, settings={}) for core in range(2)]
    assert check_job(bound, [Node(host="a", ranks=[0, 1])]) == []


def test_ranks_of_one_host_that_share_no_memory() -> None:
    apart = [Node(host="a", ranks=[0, 1]), Node(host="a", ranks=[2, 3])]
    (problem,) = check_job([facts(settings={}) for _ in range(4)], apart)
    assert same(problem, "warning job: all on a, but sharing no memory: ranks 0-1; ranks 2-3")
    assert check_job([facts(settings={"DISTLIB_NODES": "2"}) for _ in range(4)], apart) == []


def test_the_selftest_tells_what_failed() -> None:
    assert not list(check_selftest(SelfTest(ranks=2, in_job=False, right=["all_reduce"])))
    (failed,) = check_selftest(SelfTest(ranks=2, in_job=True, error="rank 0 of 2: port in use. Fix: take another."))
    assert same(failed, "error self-test: rank 0 of 2: port in use") and failed.fix == "Take another."
    (wrong,) = check_selftest(SelfTest(ranks=2, in_job=True, wrong=["broadcast on rank 1"]))
    assert same(wrong, "error self-test: wrong results: broadcast on rank 1")


# ---- gathering ---------------------------------------------------------------------------------------------


def test_the_table_of_settings_is_what_the_sources_read() -> None:
    folders = {PACKAGE: "*.py", PACKAGE.parent / "csrc": "*.cpp"}
    files = [file for folder, pattern in folders.items() for file in folder.rglob(pattern)]
    if len(files) < 10 or not (PACKAGE.parent / "setup.py").exists():
        pytest.skip("needs the sources")
    read = {
        name
        for file in files
        if "doctor" not in file.parts
        for name in re.findall(r"[\"'](DISTLIB_[A-Z_]+)[\"']", file.read_text())
    }
    assert read == set(SETTINGS)
    text = "".join(file.read_text() for file in files)
    numbers = re.findall(r"settings\.integer\([\"'](DISTLIB_\w+)[\"'],[^)]*?, ([0-9]+), ", text)
    assert {(name, SMALLEST[name]) for name, _ in numbers} == {(name, int(least)) for name, least in numbers}
    assert set(re.findall(r"settings\.switch\([\"'](DISTLIB_\w+)", text)) == {*SWITCHES, "DISTLIB_CORE"}
    setup = (PACKAGE.parent / "setup.py").read_text()
    assert set(re.findall(r"[\"'](DISTLIB_[A-Z_]+)[\"']", setup)) == set(INSTALL_SETTINGS)


def test_facts_of_this_process_survive_json() -> None:
    found = gather.gather()
    assert Facts.model_validate_json(found.model_dump_json()) == found
    assert found.kernel == Kernel() or not found.build.core_works
    assert found.versions.distlib == distlib.__version__ and found.machine.memory_available > 0


def test_the_namesake_is_found_where_python_looks(tmp_path: Path) -> None:
    assert gather.namesakes([str(tmp_path), "/nowhere", str(PACKAGE.parent)]) == []
    (tmp_path / "distlib-0.4.0.dist-info").mkdir()
    assert gather.namesakes([str(tmp_path)]) == [str(tmp_path / "distlib-0.4.0.dist-info")]


def test_obsolete_variables() -> None:
    assert is_obsolete("RDMAV_FORK_SAFE", "1") and is_obsolete("NCCL_PROTO", "Simple")
    assert not is_obsolete("NCCL_PROTO", "LL128") and not is_obsolete("FI_PROVIDER", "tcp")


@pytest.mark.parametrize("version", [1, 2])
def test_control_group_limits(tmp_path: Path, version: int) -> None:
    if version == 2:
        text, inner = "0::/job/step\n", tmp_path / "job" / "step"
        files = {"memory.max": "max", "cpu.max": "max 100000"}
        outer_files = {
            "memory.max": "1000",
            "memory.current": "300",
            "memory.stat": "anon 5\ninactive_file 100",
            "cpu.max": "150000 100000",
        }
    else:
        text, inner = "4:memory:/job/step\n1:name=systemd:/x\n", tmp_path / "memory" / "job" / "step"
        files = {"memory.limit_in_bytes": str(2**63 - 4096), "cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}
        outer_files = {
            "memory.limit_in_bytes": "1000",
            "memory.usage_in_bytes": "300",
            "memory.stat": "total_inactive_file 100",
            "cpu.cfs_quota_us": "150000",
            "cpu.cfs_period_us": "100000",
        }
    inner.mkdir(parents=True)
    for folder, contents in ((inner, files), (inner.parent, outer_files)):
        for name, content in contents.items():
            (folder / name).write_text(content + "\n")
    groups = machine.own_cgroups(text, tmp_path)
    assert groups[:2] == [inner, inner.parent]
    assert machine.memory_limit(groups) == (1000, 200) and machine.cores_quota(groups) == 1.5
    assert machine.memory_limit([]) == (None, 0) and machine.cores_quota([]) is None


# ---- words and showing -------------------------------------------------------------------------------------


def test_words() -> None:
    assert [words.size(n) for n in (0, 1023, 65536, 1 << 26, 3 << 40)] == ["0 B", "1023 B", "64 KiB", "64 MiB", "3 TiB"]
    assert [words.parse_size(t) for t in ("4096", "64KiB", "1 mib", "2G", "8b")] == [4096, 65536, 1 << 20, 2 << 30, 8]
    assert [words.duration(s) for s in (0.0000123, 0.0123, 1.5, 1234)] == ["12.3 µs", "12.3 ms", "1.5 s", "1234 s"]
    assert [words.ranks_text(r) for r in ([3], [0, 1, 2, 8])] == ["rank 3", "ranks 0-2, 8"]
    assert words.version_numbers("1.18.0amzn1") == (1, 18, 0) and words.version_numbers("git") == ()
    for wrong in ("", "0", "-1", "64XiB", "KiB"):
        with pytest.raises(ValueError, match="is not a number of bytes"):
            words.parse_size(wrong)


def printed(report: Report, width: int, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    show(report, Console(file=stream, width=width))
    stream.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_report_fits_its_width_and_ends_with_problems(width: int) -> None:
    result = SelfTest(
        ranks=2,
        in_job=False,
        right=["all_reduce"],
        small_bytes=4096,
        small_seconds=1e-5,
        large_bytes=1 << 26,
        registered_seconds=0.01,
        ordinary_seconds=0.02,
    )
    bad = facts(versions__torch="2.5", limits__open_files=9, settings={"DISTLIB_NODE": "[bold]x[/bold]"})
    report = Report(facts=bad, selftest=result, problems=check(bad))
    text = printed(report, width)
    assert all(len(line) <= width and line == line.rstrip() for line in text.splitlines()), text
    assert " ✗ torch" in text and " ! limits" in text and " ✓ memory" in text and "[bold]x" in text
    assert text.rstrip().endswith("2 errors, 1 warning") and report.exit_code == 1
    assert "all_reduce of 64 MiB: registered 6.7 GB/s, ordinary 3.4 GB/s" in text or width == 60


def test_the_report_in_ascii() -> None:
    text = printed(Report(facts=facts()), 80, "ascii")
    assert " + distlib" in text and text.rstrip().endswith("No problems found.")
