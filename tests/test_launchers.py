"""Launchers: recorded environments are read; what is missing or contradictory is named, with the fix."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distlib import launchers
from distlib.launchers import Launch, LaunchError, detect, expand_counts, expand_hostlist

Env = dict[str, str]

# Recorded; variables that nobody reads are left out.
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "host-a",
    "MASTER_PORT": "29401",
    "TORCHELASTIC_RUN_ID": "job7",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "PMIX_NAMESPACE": "prterun-host-a-77@1",
    "PMIX_RANK": "3",
}
INTEL_MPI = {
    "PMI_RANK": "2",
    "PMI_SIZE": "4",
    "MPI_LOCALRANKID": "0",
    "MPI_LOCALNRANKS": "2",
    "I_MPI_ROOT": "/opt/intel/mpi",
}
SRUN = {
    "SLURM_JOB_ID": "200505",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "11",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_TASKS_PER_NODE": "4(x2),3",
    "SLURM_JOB_NODELIST": "gnode[010,020,025]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}
SBATCH = {  # the batch script itself: no srun, hence no step
    "SLURM_JOB_ID": "200505",
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_NODELIST": "gnode[10,20]",
}
SALLOC = SBATCH | {"SLURM_STEP_ID": "4294967290"}  # salloc's interactive shell: a reserved step
SRUN_OF_DAEMON = SRUN | {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "1(x3)"}
SAGEMAKER = {
    "SM_HOSTS": '["algo-1","algo-2"]',
    "SM_CURRENT_HOST": "algo-2",
    "SM_NUM_GPUS": "8",
    "SM_RESOURCE_CONFIG": '{"current_host":"algo-2","hosts":["algo-1","algo-2"]}',
}
SLURM_PORT = 10_000 + 61 * 200505 % 20_000


@pytest.mark.parametrize(
    ("env", "launch"),
    [
        pytest.param({}, Launch("single", 0, 1, 0, 1, None, None), id="plain python"),
        pytest.param(TORCHRUN, Launch("torchrun", 5, 8, 1, 4, "host-a", 29401, "job7"), id="torchrun"),
        pytest.param(OPENMPI, Launch("openmpi", 3, 4, 1, 2, None, None, "prterun-host-a-77@1"), id="mpirun"),
        pytest.param(INTEL_MPI, Launch("mpich", 2, 4, 0, 2, None, None), id="intel mpi"),
        pytest.param(
            INTEL_MPI | {"MASTER_ADDR": "a", "MASTER_PORT": "1234"},
            Launch("mpich", 2, 4, 0, 2, "a", 1234),
            id="mpi with a master",
        ),
        pytest.param(
            OPENMPI | {"DISTLIB_MASTER_ADDR": "10.1.2.3", "MASTER_ADDR": "a"},
            Launch("openmpi", 3, 4, 1, 2, "10.1.2.3", None, "prterun-host-a-77@1"),
            id="mpi with a master address",
        ),
        pytest.param(SRUN, Launch("slurm", 9, 11, 1, 3, "gnode010", SLURM_PORT, "200505.0"), id="srun"),
        pytest.param(
            SRUN | {"SLURM_STEP_NODELIST": "n7,n8,n9", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3"},
            Launch("slurm", 9, 11, 1, 3, "n7", SLURM_PORT, "200505.0"),
            id="srun on some of the job's hosts",
        ),
        pytest.param(
            SRUN | {"MASTER_ADDR": "ib-host", "MASTER_PORT": "4000"},
            Launch("slurm", 9, 11, 1, 3, "ib-host", 4000, "200505.0"),
            id="srun with a master",
        ),
        pytest.param(
            SRUN | {"SLURM_JOB_NODELIST": "", "SLURM_STEP_ID": "3"},
            Launch("slurm", 9, 11, 1, 3, "10.0.0.7", SLURM_PORT + 3, "200505.3"),
            id="srun without host names",
        ),
        pytest.param(
            SRUN
            | {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_NODEID": "0"}
            | {"SLURM_TASKS_PER_NODE": "4", "SLURM_JOB_NODELIST": "gnode010"},
            Launch("slurm", 3, 4, 1, 4, "127.0.0.1", SLURM_PORT, "200505.0"),
            id="srun on one host",
        ),
        pytest.param(SBATCH, Launch("single", 0, 1, 0, 1, None, None), id="plain sbatch"),
        pytest.param(SALLOC, Launch("single", 0, 1, 0, 1, None, None), id="salloc's shell"),
        pytest.param(
            SRUN_OF_DAEMON | TORCHRUN,
            Launch("torchrun", 5, 8, 1, 4, "host-a", 29401, "job7"),
            id="torchrun inside srun",
        ),
        pytest.param(
            SRUN_OF_DAEMON | OPENMPI,
            Launch("openmpi", 3, 4, 1, 2, None, None, "prterun-host-a-77@1"),
            id="mpirun inside srun",
        ),
        pytest.param(
            SRUN | {"PMI_RANK": "9", "PMI_SIZE": "11"},
            Launch("slurm", 9, 11, 1, 3, "gnode010", SLURM_PORT, "200505.0"),
            id="srun --mpi=pmi2",
        ),
        pytest.param(
            SRUN
            | {"RANK": "9", "WORLD_SIZE": "11", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3"}
            | {"MASTER_ADDR": "a", "MASTER_PORT": "1"},
            Launch("torchrun", 9, 11, 1, 3, "a", 1),
            id="torch's variables by hand, agreeing with srun",
        ),
        pytest.param(
            SRUN | {"WORLD_SIZE": "11"},
            Launch("slurm", 9, 11, 1, 3, "gnode010", SLURM_PORT, "200505.0"),
            id="srun, WORLD_SIZE exported",
        ),
        pytest.param(SAGEMAKER, Launch("sagemaker", 1, 2, 0, 1, "algo-1", 7777), id="sagemaker, plain script"),
        pytest.param(
            {"SM_RESOURCE_CONFIG": '{"current_host":"algo-1","hosts":["algo-1"]}'},
            Launch("sagemaker", 0, 1, 0, 1, "algo-1", 7777),
            id="sagemaker, one container",
        ),
        pytest.param(
            SAGEMAKER | TORCHRUN,
            Launch("sagemaker", 5, 8, 1, 4, "host-a", 29401, "job7"),
            id="sagemaker with torchrun",
        ),
        pytest.param(
            SAGEMAKER | OPENMPI,
            Launch("sagemaker", 3, 4, 1, 2, None, None, "prterun-host-a-77@1"),
            id="sagemaker with mpirun",
        ),
    ],
)
def test_recorded_environments(env: Env, launch: Launch) -> None:
    assert detect(env) == launch
    assert launchers.launcher_name(env) == launch.launcher


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            {"RANK": "0"},
            r"torchrun: WORLD_SIZE is not set \(seen: RANK\). Fix: start the script with `torchrun",
        ),
        ({k: v for k, v in TORCHRUN.items() if k != "RANK"}, r"torchrun: RANK is not set"),
        (
            {k: v for k, v in TORCHRUN.items() if k != "LOCAL_WORLD_SIZE"},
            r"torchrun: LOCAL_WORLD_SIZE is not set",
        ),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"}, r"torchrun: MASTER_PORT is not set"),
        (TORCHRUN | {"MASTER_ADDR": ""}, r"torchrun: MASTER_ADDR is not set"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, r"torchrun: MASTER_PORT=70000 is not a port"),
        (TORCHRUN | {"RANK": "8"}, r"torchrun: RANK=8 must be below WORLD_SIZE=8. Fix"),
        (TORCHRUN | {"RANK": "-1"}, r"torchrun: RANK='-1' is not a whole number"),
        (TORCHRUN | {"RANK": "²"}, r"torchrun: RANK='²' is not a whole number"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, r"torchrun: LOCAL_RANK=4 must be below LOCAL_WORLD_SIZE=4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, r"torchrun: LOCAL_WORLD_SIZE=9 exceeds WORLD_SIZE=8"),
        ({"WORLD_SIZE": "2"}, r"single: WORLD_SIZE=2 promises other ranks"),
        ({"LOCAL_RANK": "1"}, r"single: LOCAL_RANK=1 promises other ranks"),
        (
            OPENMPI | {"OMPI_COMM_WORLD_SIZE": ""},
            r"openmpi: OMPI_COMM_WORLD_SIZE is not set .*Fix: .*mpirun -np N",
        ),
        (OPENMPI | {"OMPI_COMM_WORLD_RANK": "4"}, r"openmpi: OMPI_COMM_WORLD_RANK=4 must be below"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, r"mpich: MPI_LOCALRANKID is not set .*Fix: .*mpiexec -n N"),
        (
            SRUN | {"SLURM_NTASKS": ""},
            r"slurm: SLURM_STEP_NUM_TASKS or SLURM_NTASKS is not set .*Fix: .*srun",
        ),
        (SRUN | {"SLURM_NODEID": "3"}, r"slurm: SLURM_TASKS_PER_NODE=4\(x2\),3 has no node SLURM_NODEID=3"),
        (SRUN | {"SLURM_TASKS_PER_NODE": "4x2"}, r"slurm: SLURM_TASKS_PER_NODE: '4x2' is not of the form"),
        (
            SRUN | {"SLURM_JOB_NODELIST": "g[3-1]"},
            r"slurm: SLURM_JOB_NODELIST: \[3-1\] is not a list of ranges",
        ),
        (SRUN | {"SLURM_JOB_ID": ""}, r"slurm: SLURM_JOB_ID or SLURM_JOBID is not set"),
        (
            SAGEMAKER | {"SM_CURRENT_HOST": "algo-3"},
            r"sagemaker: SM_CURRENT_HOST=algo-3 is not among SM_HOSTS",
        ),
        (SAGEMAKER | {"SM_HOSTS": "algo-1,algo-2"}, r"sagemaker: SM_HOSTS='algo-1,algo-2' is not JSON"),
        (
            SAGEMAKER | {"SM_RESOURCE_CONFIG": "[]"},
            r"sagemaker: SM_RESOURCE_CONFIG='\[\]' is not a JSON dict",
        ),
        ({"SM_HOSTS": '["algo-1"]'}, r"sagemaker: SM_CURRENT_HOST is not set"),
        (
            {k: v for k, v in TORCHRUN.items() if "ELASTIC" not in k} | SRUN,
            r"torchrun says rank 5 of 8, slurm says rank 9 of 11. Fix: unset .*RANK",
        ),
        (OPENMPI | INTEL_MPI, r"openmpi says rank 3 of 4, mpich says rank 2 of 4"),
    ],
)
def test_what_is_missing_or_contradictory_is_named(env: Env, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        detect(env)


def test_jobs_that_follow_each_other_do_not_share_a_port() -> None:
    ports = {
        detect(SRUN | {"SLURM_JOB_ID": str(200_505 + job), "SLURM_STEP_ID": str(step)}).master_port
        for job in range(300)
        for step in range(20)
    }
    assert len(ports) == 6000 and min(ports) >= 10_000 and max(ports) < 32_768  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login", ["login"]),
        ("a,b-1,c.d", ["a", "b-1", "c.d"]),
        ("a[1-3]", ["a1", "a2", "a3"]),
        ("a[08-11,3]-ib", ["a08-ib", "a09-ib", "a10-ib", "a11-ib", "a3-ib"]),
        ("r[1-2]n[01-02],x", ["r1n01", "r1n02", "r2n01", "r2n02", "x"]),
        ("[1-2]", ["1", "2"]),
    ],
)
def test_hostlists_are_written_out(text: str, hosts: list[str]) -> None:
    assert expand_hostlist(text) == hosts


@pytest.mark.parametrize("text", ["", "a[", "a]1", "a[1-", "a[]", "a[1-x]", "a,,b", "a b", ",a", "a[2-1]", "a[[1]]"])
def test_malformed_hostlists_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a list of"):
        expand_hostlist(text)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 9)), min_size=1))
def test_counts_per_node_are_written_out(runs: list[tuple[int, int]]) -> None:
    text = ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in runs)
    assert expand_counts(text) == [count for count, times in runs for _ in range(times)]


def test_reading_the_environment_needs_neither_torch_nor_mpi() -> None:
    """Run as a file, since `import distlib` itself registers a backend with torch."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print(*{'torch', 'mpi4py'} & set(sys.modules))"
    for module in ("launchers.py", "topology.py"):
        path = Path(launchers.__file__).with_name(module)
        command = [sys.executable, "-I", "-c", code, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr
