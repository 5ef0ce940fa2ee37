"""SageMaker: the request against AWS's own model of it, and what the container makes of the job's description."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from botocore.model import Shape
from botocore.validate import ParamValidator

from distlib.launchers import detect

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
SUBMIT, ENTRY = LAUNCH / "sagemaker_submit.py", LAUNCH / "sagemaker_entry.py"
submit = runpy.run_path(str(SUBMIT))
entry = runpy.run_path(str(ENTRY))

NEEDED = [
    *("--image", "123456789012.dkr.ecr.us-east-1.amazonaws.com/distlib:cuda13.0"),
    *("--role", "arn:aws:iam::123456789012:role/training"),
    *("--output", "s3://bucket/runs"),
]
VPC = ["--subnets", "subnet-1", "--security-groups", "sg-1"]
SCRIPT = ["--", "examples/train_lm.py", "--steps", "100"]
FULL = [
    *NEEDED,
    *("--name", "job-1", "--hosts", "4", "--code", "s3://b/code", "--data", "s3://b/data", "--spot"),
    *("--lustre", "fs-0123456789abcdef0:/mnt", "--resume", "/opt/ml/input/data/shared/run", "--set", "NCCL_DEBUG=INFO"),
    *VPC,
    *SCRIPT,
]


def dry_run(*arguments: str) -> dict[str, Any]:
    """The request that the script prints, run as a user runs it."""
    done = subprocess.run(
        [sys.executable, "-I", SUBMIT, "--dry-run", *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---- the request -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shape() -> Shape:
    """What CreateTrainingJob takes, as AWS publishes it."""
    model = botocore.session.get_session().get_service_model("sagemaker")
    found = model.operation_model("CreateTrainingJob").input_shape
    assert found is not None
    return found


def strays(value: Any, shape: Any, where: str = "") -> list[str]:
    """Texts that do not match the pattern, list or length that AWS gives for them, which botocore does not look at."""
    if shape.type_name == "structure":
        return [s for k, v in value.items() for s in strays(v, shape.members[k], f"{where}.{k}")]
    if shape.type_name == "list":
        assert len(value) <= shape.metadata.get("max", len(value)), where
        return [s for v in value for s in strays(v, shape.member, f"{where}[]")]
    if shape.type_name == "map":
        return [s for k, v in value.items() for s in strays(k, shape.key, where) + strays(v, shape.value, where)]
    if shape.type_name != "string":
        return []
    allowed = shape.enum and value in shape.enum or not shape.enum
    matches = re.fullmatch(shape.metadata.get("pattern", r"(?s).*"), value)
    return [] if allowed and matches and len(value) <= shape.metadata.get("max", len(value)) else [f"{where}={value}"]


@pytest.mark.parametrize(
    "arguments", [[*NEEDED, *SCRIPT], FULL, [*NEEDED, "--checkpoints", "s3://b/c", *SCRIPT]], ids=["few", "all", "one"]
)
def test_requests_are_what_aws_takes(shape: Shape, arguments: list[str]) -> None:
    asked = dry_run(*arguments)
    report = ParamValidator().validate(asked, shape)
    assert not report.has_errors(), report.generate_report()
    assert strays(asked, shape) == []


def test_the_validator_would_find_faults(shape: Shape) -> None:
    asked = dry_run(*NEEDED, *SCRIPT)
    wrong = {**asked, "RetryStrategy": {"MaximumRetries": 3}, "ResourceConfig": {"InstanceCount": "2"}}
    assert {"MaximumRetries", "InstanceCount"} <= set(
        re.findall(r"MaximumRetries|InstanceCount", ParamValidator().validate(wrong, shape).generate_report())
    )
    asked["RoleArn"], asked["ResourceConfig"]["InstanceType"] = "me", "ml.p9.huge"
    assert strays(asked, shape) == [".RoleArn=me", ".ResourceConfig.InstanceType=ml.p9.huge"]


def test_the_request_says_what_was_asked() -> None:
    asked = dry_run(*FULL)
    assert asked["TrainingJobName"] == "job-1" and asked["ResourceConfig"]["InstanceCount"] == 4
    assert asked["AlgorithmSpecification"]["ContainerArguments"] == SCRIPT[1:]
    assert asked["AlgorithmSpecification"]["ContainerEntrypoint"][1] == f"/opt/distlib/launch/{ENTRY.name}"
    assert asked["Environment"] == {"NCCL_DEBUG": "INFO", "CHECKPOINT": "/opt/ml/input/data/shared/run"}
    assert asked["EnableInterContainerTrafficEncryption"] is False
    assert asked["StoppingCondition"] == {"MaxRuntimeInSeconds": 86400, "MaxWaitTimeInSeconds": 172800}
    assert [channel["ChannelName"] for channel in asked["InputDataConfig"]] == ["code", "train", "shared"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--hosts", "0"], "there must be at least one"),
        (["--spot"], "--spot needs --resume"),
        (["--hosts", "2", "--checkpoints", "s3://b/c"], "Use --lustre"),
        (["--subnets", "s"], "go together"),
        (["--lustre", "fs-1", *VPC], "must be ID:/PATH"),
        (["--lustre", "fs-1:/x"], "needs --subnets"),
        (["--set", "NAME"], "must be NAME=VALUE"),
        (["--name", "my_job"], "--name my_job: letters, digits and single dashes"),
        (["--role", "training"], "--role training: must be an ARN"),
        (["--output", "/tmp/x"], "--output /tmp/x: must be a folder in S3"),
        (["--code", "src"], "--code src: must be a folder in S3"),
        (["--instance", "p5.48xlarge"], "SageMaker calls it ml.p5.48xlarge"),
        (["--hours", "0"], "--hours 0: must be more than 0, and 672 (28 days) at the most"),
        (["--hours", "900"], "--hours 900"),
    ],
)
def test_what_cannot_work_is_refused(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        submit["parse"]([*NEEDED, *arguments, *SCRIPT])
    assert complaint in capsys.readouterr().err
    with pytest.raises(SystemExit):
        submit["parse"]([*NEEDED, "--", "x" * 257])


def test_sending_without_boto3_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)  # as if it were not installed
    with pytest.raises(SystemExit, match="pip install boto3"):
        submit["main"]([*NEEDED, *SCRIPT])


def test_sending_is_one_call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sent: list[Any] = []

    class Client:
        def create_training_job(self, **asked: Any) -> dict[str, str]:
            sent.append(asked)
            return {"TrainingJobArn": "arn:job"}

    class Boto3:
        @staticmethod
        def client(service: str, region_name: str | None) -> Client:
            sent.append((service, region_name))
            return Client()

    monkeypatch.setitem(sys.modules, "boto3", Boto3)  # type: ignore[arg-type]
    submit["main"]([*NEEDED, "--name", "n", "--region", "eu-west-1", *SCRIPT])
    assert sent == [("sagemaker", "eu-west-1"), dry_run(*NEEDED, "--name", "n", *SCRIPT)]
    assert capsys.readouterr().out == "arn:job\n"


# ---- the container -----------------------------------------------------------------------------------------

CONFIG = {"hosts": ["algo-2", "algo-1"], "current_host": "algo-2", "network_interface_name": "eth0"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """/opt/ml of the second of two hosts."""
    file = tmp_path / "ml/input/config/resourceconfig.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(CONFIG))
    return tmp_path / "ml"


def test_torchrun_is_told_of_all_hosts(root: Path) -> None:
    command, environ = entry["plan"](["s.py", "--x"], root, {"PATH": "/bin"}, 8)
    assert " ".join(command) == (
        "torchrun --nnodes 2 --node-rank 1 --nproc-per-node 8 --master-addr algo-1 --master-port 29400 s.py --x"
    )
    assert environ["NCCL_SOCKET_IFNAME"] == environ["GLOO_SOCKET_IFNAME"] == "eth0" and environ["PATH"] == "/bin"
    assert entry["plan"](["s.py"], root, {}, 0)[0][6] == "1"  # a host without GPUs: one rank


def test_distlib_reads_what_the_container_sets(root: Path) -> None:
    """Alone, and as in a rank that torchrun made: its numbers count, and the place is known."""
    _, environ = entry["plan"](["s.py"], root, {}, 8)
    alone = detect(environ)
    assert (alone.launcher, alone.rank, alone.size, alone.master_addr) == ("sagemaker", 1, 2, "algo-1")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    rank = dict(zip(names, ("9", "16", "1", "8", "algo-1", "29400"), strict=True))
    launch = detect({**environ, **rank, "TORCHELASTIC_RUN_ID": "none"})
    assert (launch.launcher, launch.rank, launch.size, launch.local_rank) == ("sagemaker", 9, 16, 1)


def test_scripts_from_s3_and_checkpoints_are_found(root: Path) -> None:
    code, checkpoint = root / "input/data/code", root / "input/data/shared/run"
    for file in (code / "own.py", checkpoint / "manifest.json"):
        file.parent.mkdir(parents=True)
        file.touch()
    command, _ = entry["plan"](["own.py", "--x"], root, {"CHECKPOINT": str(checkpoint)}, 1)
    assert command[-4:] == [str(code / "own.py"), "--x", "--resume", str(checkpoint)]
    command, _ = entry["plan"](["examples/train_lm.py"], root, {"CHECKPOINT": str(root / "none")}, 1)
    assert command[-1] == "examples/train_lm.py"


@pytest.mark.parametrize(
    ("config", "arguments", "complaint"),
    [
        ({"hosts": ["a"], "current_host": "b"}, ["s.py"], "names no current_host among its hosts"),
        ({}, ["s.py"], "names no current_host"),
        (CONFIG, [], "no script is given"),
        (None, ["s.py"], "No such file"),
    ],
)
def test_a_host_that_cannot_start_says_why(
    root: Path, config: dict[str, Any] | None, arguments: list[str], complaint: str
) -> None:
    file = root / "input/config/resourceconfig.json"
    if config is None:
        file.unlink()
    else:
        file.write_text(json.dumps(config))
    assert entry["main"](arguments, root) == 2
    assert complaint in (root / "output/failure").read_text()


@contextmanager
def started_entry(root: Path, torchrun: str) -> Iterator[subprocess.Popen[str]]:
    """The entry point as a container runs it, with a stand-in for torchrun. Both end with the block."""
    folder = root / "bin"
    folder.mkdir()
    (folder / "torchrun").write_text(f"#!/bin/bash\n{torchrun}\n")
    (folder / "torchrun").chmod(0o755)
    code = "import sys, runpy, pathlib; m = runpy.run_path(sys.argv[1]); " + (
        "sys.exit(m['main'](sys.argv[3:], pathlib.Path(sys.argv[2])))"
    )
    command = [sys.executable, "-I", "-c", code, str(ENTRY), str(root), "s.py"]
    environ = {"PATH": f"{folder}:/usr/bin:/bin"}
    running = subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield running
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.communicate()


def test_failure_is_left_where_sagemaker_looks(root: Path) -> None:
    with started_entry(root, "exit 7") as running:
        running.communicate(timeout=30)
    assert running.returncode == 7
    assert (root / "output/failure").read_text().startswith("torchrun ended with code 7 on algo-2")


def test_success_leaves_no_failure(root: Path) -> None:
    with started_entry(root, 'echo "$SM_CURRENT_HOST of $SM_HOSTS"') as running:
        out, _ = running.communicate(timeout=30)
    assert running.returncode == 0 and 'algo-2 of ["algo-1", "algo-2"]' in out
    assert not (root / "output/failure").exists()


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether that process has a handler of its own for a signal. The entry point's comes right after torchrun."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():  # not on Linux
        time.sleep(0.1)
        return True
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status.read_text(), re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def test_a_stop_reaches_torchrun(root: Path) -> None:
    with started_entry(root, f"trap 'exit 9' TERM; touch {root}/up; while :; do sleep 0.02; done") as running:
        until = time.monotonic() + 20
        while not (root / "up").exists() or not catches(running.pid, signal.SIGTERM):
            assert time.monotonic() < until and running.poll() is None
            time.sleep(0.01)
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=20)
    assert running.returncode == 9
