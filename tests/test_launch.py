"""The scripts in launch/: clean for shellcheck, and what they run, by stand-ins that print what they are given."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from distlib.doctor.variables import OBSOLETE

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
STAND_IN = """\
#!{python} -I
import json, os, sys
print(json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], dict(os.environ)]))
"""
PROGRAMS = ("torchrun", "mpirun", "srun", "python", "scontrol")


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with stand-ins for what the scripts start, and for nvidia-smi, which finds four GPUs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in PROGRAMS:
        (folder / name).write_text(STAND_IN.format(python=sys.executable))
    (folder / "nvidia-smi").write_text("#!/bin/sh\nfor i in 0 1 2 3; do echo GPU $i; done\n")
    for program in folder.iterdir():
        program.chmod(0o755)
    return folder


def run(
    programs: Path, script: str, *arguments: str, **environ: str
) -> tuple[str, list[str], dict[str, str], subprocess.CompletedProcess[str]]:
    """What the script started: the program, its arguments, its environment; and how the script ended."""
    done = subprocess.run(
        [LAUNCH / script, *arguments],
        env={"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(programs), **environ},
        cwd=programs,
        capture_output=True,
        text=True,
        timeout=30,
    )
    program, given, seen = json.loads(done.stdout) if done.returncode == 0 else ("", [], {})
    return program, given, seen, done


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert tool, "shellcheck is missing. Fix: pip install '.[test]'"
    done = subprocess.run([tool, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK) and "set -euo pipefail" in script.read_text()


def test_the_page_tells_of_every_file() -> None:
    page = (LAUNCH.parent / "docs/launching.md").read_text()
    files = {str(path.relative_to(LAUNCH)) for path in LAUNCH.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert {name for name in files if f"`launch/{name}`" not in page} == set()


# ---- torchrun ----------------------------------------------------------------------------------------------


def test_torchrun_on_one_host(programs: Path) -> None:
    program, given, seen, _ = run(programs, "torchrun.sh", "s.py", "--x", "a b")
    assert (program, given) == ("torchrun", ["--standalone", "--nproc-per-node", "4", "s.py", "--x", "a b"])
    assert seen["OMP_NUM_THREADS"] == str(max(1, (os.cpu_count() or 1) // 4))
    _, given, seen, _ = run(programs, "torchrun.sh", "s.py", RANKS="3", OMP_NUM_THREADS="7")
    assert given[2] == "3" and seen["OMP_NUM_THREADS"] == "7"


def test_torchrun_on_several_hosts(programs: Path) -> None:
    _, given, _, _ = run(programs, "torchrun_hosts.sh", "s.py", HOSTS="2", FIRST_HOST="10.0.0.5")
    assert " ".join(given) == (
        "--nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint 10.0.0.5:29400 --rdzv-id distlib s.py"
    )


def test_torchrun_elastic(programs: Path) -> None:
    environ = {"HOSTS": "2:4", "FIRST_HOST": "h", "CHECKPOINT": "/c", "RESTARTS": "5", "JOB": "j", "PORT": "1"}
    _, given, _, _ = run(programs, "torchrun_elastic.sh", "s.py", "--save", "/c", **environ)
    assert " ".join(given) == (
        "--nnodes 2:4 --nproc-per-node 4 --max-restarts 5 --rdzv-backend c10d --rdzv-endpoint h:1 --rdzv-id j "
        f"--no-python {LAUNCH}/resume.sh /c s.py --save /c"
    )


def test_torchrun_understands_what_it_is_given() -> None:
    """The options of all three scripts, read by torchrun's own parser."""
    from torch.distributed.run import get_args_parser

    elastic = "--nnodes 2:4 --nproc-per-node 4 --max-restarts 5 --rdzv-backend c10d --rdzv-endpoint h:1 --rdzv-id j"
    read = get_args_parser().parse_args([*elastic.split(), "--no-python", "resume.sh", "/c", "s.py"])
    assert (read.nnodes, read.max_restarts, read.training_script) == ("2:4", 5, "resume.sh")
    assert get_args_parser().parse_args(["--standalone", "--nproc-per-node", "4", "s.py"]).standalone


def test_a_script_goes_on_from_its_checkpoint(programs: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "c"
    _, given, _, _ = run(programs, "resume.sh", str(checkpoint), "s.py", "--steps", "2")
    assert given == ["s.py", "--steps", "2"]
    checkpoint.mkdir()
    _, given, _, _ = run(programs, "resume.sh", str(checkpoint), "s.py")
    assert given == ["s.py"]  # an empty folder is no checkpoint
    (checkpoint / "manifest.json").touch()
    _, given, _, done = run(programs, "resume.sh", str(checkpoint), "s.py", "--steps", "2")
    assert given == ["s.py", "--steps", "2", "--resume", str(checkpoint)] and "going on from" in done.stderr


def test_a_checkpoint_has_the_file_that_is_looked_for(tmp_path: Path) -> None:
    import torch

    import distlib

    distlib.save(tmp_path / "c", model=torch.nn.Linear(2, 2), step=1)
    assert (tmp_path / "c" / "manifest.json").is_file()


# ---- mpirun ------------------------------------------------------------------------------------------------


def exported(given: list[str]) -> list[str]:
    return [name for option, name in zip(given, given[1:], strict=False) if option == "-x"]


def test_mpirun(programs: Path) -> None:
    program, given, seen, _ = run(programs, "mpirun.sh", "s.py", "1", RANKS="2")
    assert program == "mpirun" and given[:4] == ["-np", "2", "--bind-to", "none"]
    assert given[-3:] == ["python", "s.py", "1"]
    assert exported(given) == ["PATH", "OMP_NUM_THREADS"] and int(seen["OMP_NUM_THREADS"]) >= 1
    _, given, seen, _ = run(programs, "mpirun.sh", "s.py", RANKS="16", HOSTFILE="h", DISTLIB_MASTER_ADDR="a")
    assert given[4:6] == ["--hostfile", "h"] and "DISTLIB_MASTER_ADDR" in exported(given)
    assert "OMP_NUM_THREADS" not in seen  # how many cores the other hosts have is not known here


def test_mpirun_on_gpu_hosts_with_efa(programs: Path) -> None:
    _, given, seen, done = run(
        programs, "mpirun_efa.sh", "s.py", "1", HOSTFILE="h", LD_LIBRARY_PATH="/opt/amazon/efa/lib", NCCL_DEBUG="INFO"
    )
    options = given[: given.index("-x")]
    wanted = ["--hostfile", "h", "--map-by", "ppr:8:node", "--bind-to", "none"]
    assert [option for option in options if option != "--allow-run-as-root"] == [
        *wanted,
        *("--mca", "pml", "ob1", "--mca", "btl", "self,sm,tcp"),
    ]
    assert exported(given) == ["PATH", "LD_LIBRARY_PATH", "NCCL_DEBUG"] and given[-3:] == ["python", "s.py", "1"]
    assert done.stderr == ""


@pytest.mark.parametrize("name", OBSOLETE)
def test_obsolete_variables_are_not_handed_on(programs: Path, name: str) -> None:
    variable, value = name.replace("*", "FORK_SAFE"), OBSOLETE[name] or "1"
    _, given, seen, done = run(programs, "mpirun_efa.sh", "s.py", HOSTFILE="h", RANKS="2", **{variable: value})
    assert variable not in seen and variable not in exported(given) and "-np" in given
    assert f"unset {variable}={value}" in done.stderr


def test_what_is_not_obsolete_is_kept(programs: Path) -> None:
    kept = {"FI_PROVIDER": "tcp", "NCCL_PROTO": "LL128", "FI_EFA_USE_HUGE_PAGE": "0"}
    _, given, seen, done = run(programs, "mpirun_efa.sh", "s.py", HOSTFILE="h", **kept)
    assert kept.items() <= seen.items() and "FI_EFA_USE_HUGE_PAGE" in exported(given) and done.stderr == ""


# ---- Slurm -------------------------------------------------------------------------------------------------


def test_srun(programs: Path) -> None:
    program, given, _, _ = run(programs, "srun.sh", "--nodes", "2", "--", "s.py", "1")
    assert (program, given) == ("srun", ["--kill-on-bad-exit=1", "--nodes", "2", "python", "s.py", "1"])


JOB = {"SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(LAUNCH.parent)}


def test_sbatch(programs: Path) -> None:
    program, given, seen, _ = run(programs, "sbatch.sh", "s.py", "1", **JOB)
    assert (program, given) == ("srun", ["--kill-on-bad-exit=1", "--cpus-per-task=8", "python", "s.py", "1"])
    assert seen["OMP_NUM_THREADS"] == "8"
    _, given, _, _ = run(programs, "sbatch.sh", "s.py", **JOB, CHECKPOINT="/c")
    assert given[2:] == [f"{LAUNCH}/resume.sh", "/c", "s.py"]
    directives = re.findall(r"^#SBATCH (--[a-z-]+)", (LAUNCH / "sbatch.sh").read_text(), re.MULTILINE)
    assert {"--gpus-per-node", "--requeue", "--signal", "--open-mode", "--propagate"} <= set(directives)


@contextmanager
def started_sbatch(programs: Path, srun: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
    """sbatch.sh with another stand-in for srun, once that says that it runs. All of it ends with the block."""
    (programs / "srun").write_text(f"#!/bin/bash\ntouch running\n{srun}\n")
    running = subprocess.Popen(
        [LAUNCH / "sbatch.sh", "s.py"],
        env={"PATH": f"{programs}:/usr/bin:/bin", **JOB, **environ},
        cwd=programs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        until, ended = time.monotonic() + 20, False
        while not (programs / "running").exists():
            assert time.monotonic() < until and not ended
            ended = running.poll() is not None
            time.sleep(0.01)
        yield running
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.communicate()


@pytest.mark.parametrize("checkpoint", ["/c", ""])
def test_a_job_whose_time_is_up_is_queued_again(programs: Path, checkpoint: str) -> None:
    srun = "until [[ -e end ]]; do sleep 0.02; done; exit 3"
    with started_sbatch(programs, srun, CHECKPOINT=checkpoint) as running:
        running.send_signal(signal.SIGUSR1)
        if checkpoint:
            program, given, _ = json.loads((running.stdout or sys.stdin).readline())
            assert (program, given) == ("scontrol", ["requeue", "77"])
        else:
            time.sleep(0.2)
        assert running.poll() is None  # the signal has not ended the ranks
        (programs / "end").touch()
        out, err = running.communicate(timeout=20)
    assert running.returncode == 3 and out == "" and ("queued again" in err) == bool(checkpoint)


def test_ranks_that_fail_fail_the_job(programs: Path) -> None:
    with started_sbatch(programs, "exit 5") as running:
        running.communicate(timeout=20)
    assert running.returncode == 5


# ---- what is missing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "arguments", "environ", "complaint"),
    [
        ("torchrun_hosts.sh", ["s.py"], {"HOSTS": "2"}, "set FIRST_HOST"),
        ("torchrun_hosts.sh", ["s.py"], {}, "set HOSTS"),
        ("torchrun_elastic.sh", ["s.py"], {"HOSTS": "1:2", "FIRST_HOST": "h"}, "set CHECKPOINT"),
        ("mpirun.sh", ["s.py"], {}, "set RANKS"),
        ("mpirun_efa.sh", ["s.py"], {}, "set HOSTFILE"),
        ("mpirun_efa.sh", [], {"HOSTFILE": "h"}, "usage:"),
        ("mpirun_efa.sh", ["s.py"], {"HOSTFILE": "h", "PER_HOST": "all"}, "PER_HOST=all must be"),
        ("torchrun.sh", [], {}, "usage:"),
        ("torchrun.sh", ["s.py"], {"RANKS": "0"}, "RANKS=0 must be a number of ranks"),
        ("torchrun.sh", ["s.py"], {"RANKS": "two"}, "RANKS=two must be a number of ranks"),
        ("torchrun_hosts.sh", [], {"HOSTS": "2", "FIRST_HOST": "h"}, "usage:"),
        ("torchrun_hosts.sh", ["s.py"], {"HOSTS": "1:2", "FIRST_HOST": "h"}, "HOSTS=1:2 must be a number of hosts"),
        ("torchrun_hosts.sh", ["s.py"], {"HOSTS": "2", "FIRST_HOST": "h", "RANKS": "-1"}, "RANKS=-1 must be"),
        ("torchrun_elastic.sh", [], {"HOSTS": "1:2", "FIRST_HOST": "h", "CHECKPOINT": "/c"}, "usage:"),
        (
            "torchrun_elastic.sh",
            ["s.py"],
            {"HOSTS": "2", "FIRST_HOST": "h", "CHECKPOINT": "/c"},
            "HOSTS=2 must be MIN:MAX",
        ),
        ("mpirun.sh", [], {"RANKS": "2"}, "usage:"),
        ("mpirun.sh", ["s.py"], {"RANKS": "two"}, "RANKS=two must be a number of ranks"),
        ("sbatch.sh", [], {"SLURM_CPUS_PER_TASK": "8"}, "usage:"),
        ("srun.sh", ["s.py"], {}, "usage:"),
        ("resume.sh", ["/c"], {}, "usage:"),
        ("smoke_test.sh", ["warp"], {}, "unknown part warp"),
    ],
)
def test_what_is_missing_is_named(
    programs: Path, script: str, arguments: list[str], environ: dict[str, Any], complaint: str
) -> None:
    *_, done = run(programs, script, *arguments, **environ)
    assert done.returncode and complaint in done.stderr


def test_the_smoke_test_names_what_fails(programs: Path) -> None:
    (programs / "torchrun").write_text("#!/bin/sh\nexit 1\n")
    *_, done = run(programs, "smoke_test.sh")
    assert done.returncode == 1 and "distlib doctor found errors under torchrun" in done.stderr
    (programs / "torchrun").write_text('#!/bin/sh\ncase "$*" in *doctor*) ;; *) exit 1 ;; esac\n')
    *_, done = run(programs, "smoke_test.sh")
    assert done.returncode == 1 and "train_lm.py failed" in done.stderr
    *_, done = run(programs, "smoke_test.sh", "efa", LD_LIBRARY_PATH="/nowhere")
    assert done.returncode == 1 and "fi_info is not on PATH" in done.stderr


@pytest.mark.parametrize(
    ("missing", "complaint"),
    [("libcuda.so.1", ""), ("libhwloc.so.15", "misses libraries"), (None, "no libnccl-net.so in LD_LIBRARY_PATH")],
)
def test_the_smoke_test_looks_at_the_plugin(programs: Path, missing: str | None, complaint: str) -> None:
    for name, text in (("fi_info", "libfabric: 2.1"), ("ldd", f"{missing} => not found"), ("torchrun", "fine")):
        (programs / name).write_text(f"#!/bin/sh\necho '{text}'\n")
        (programs / name).chmod(0o755)
    if missing:
        (programs / "libnccl-net.so").touch()
    # Not by run(): what this script prints is for people.
    environ = {"PATH": f"{programs}:/usr/bin:/bin", "LD_LIBRARY_PATH": f"/nowhere:{programs}"}
    done = subprocess.run([LAUNCH / "smoke_test.sh", "efa"], env=environ, capture_output=True, text=True, timeout=30)
    assert (done.returncode == 0) == (complaint == "") and complaint in done.stderr, done
    assert ("smoke test passed" in done.stdout) == (complaint == "")


@pytest.mark.parametrize("is_there", [True, False])
def test_the_smoke_test_looks_for_the_runtime_that_the_plugin_opens(programs: Path, is_there: bool) -> None:
    loads = "exit 0" if is_there else "exit 1"  # where python cannot load libcudart.so
    for name, text in (("fi_info", "libfabric: 2.4"), ("ldd", "libm.so.6 => /lib"), ("torchrun", "fine")):
        (programs / name).write_text(f"#!/bin/sh\necho '{text}'\n")
        (programs / name).chmod(0o755)
    (programs / "python").write_text(f'#!/bin/sh\ncase "$*" in *libcudart.so*) {loads} ;; esac\n')
    (programs / "libnccl-net.so").write_bytes(b"\0libcudart.so\0")
    environ = {"PATH": f"{programs}:/usr/bin:/bin", "LD_LIBRARY_PATH": str(programs)}
    done = subprocess.run([LAUNCH / "smoke_test.sh", "efa"], env=environ, capture_output=True, text=True, timeout=30)
    assert (done.returncode == 0) == is_there and ("opens libcudart.so" in done.stderr) != is_there, done
