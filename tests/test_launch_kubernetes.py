"""Kubernetes manifests: only fields that their APIs have, what NCCL and EFA need, and names that fit together."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

FOLDER = Path(__file__).resolve().parent.parent / "launch/kubernetes"
SCHEMAS = json.loads(Path(__file__).with_name("launch_schemas.json").read_text())
FILES = sorted(FOLDER.glob("*.yaml"))
Json = dict[str, Any]


def load(name: str) -> Json:
    return yaml.safe_load((FOLDER / name).read_text())


def faults(manifest: Json) -> list[str]:
    """Where a manifest is not what the schema of its kind says."""
    schema = {"$ref": f"#/$defs/{manifest['kind']}", "$defs": SCHEMAS["$defs"]}
    return [error.message for error in Draft202012Validator(schema).iter_errors(manifest)]


def worker(name: str) -> tuple[Json, Json]:
    """The pod and the container in which ranks run."""
    manifest = load(name)
    if manifest["kind"] == "MPIJob":
        pod = manifest["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]
    else:
        pod = manifest["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    return pod, pod["containers"][0]


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_manifests_follow_their_schemas(file: Path) -> None:
    documents = list(yaml.safe_load_all(file.read_text()))
    assert documents and [fault for document in documents for fault in faults(document)] == []


def test_the_schemas_themselves_are_sound() -> None:
    Draft202012Validator.check_schema(SCHEMAS)

    def objects(node: Any) -> list[Json]:
        if isinstance(node, list):
            return [found for each in node for found in objects(each)]
        if not isinstance(node, dict):
            return []
        here = [node] if node.get("type") == "object" else []
        return here + [found for each in node.values() for found in objects(each)]

    assert len(objects(SCHEMAS)) > 20
    assert all("additionalProperties" in each for each in objects(SCHEMAS))  # nothing slips through


WRONG: list[tuple[str, Callable[[Json], Any], str]] = [
    ("trainjob.yaml", lambda m: m["spec"]["trainer"].update(numNode=2), "'numNode' was unexpected"),
    ("trainjob.yaml", lambda m: m["spec"].pop("runtimeRef"), "'runtimeRef' is a required"),
    ("trainjob.yaml", lambda m: m["spec"]["trainer"].update(image="distlib:latest"), "should not be valid"),
    ("trainjob.yaml", lambda m: m["spec"]["trainer"]["env"][0].update(value=8), "is not of type 'string'"),
    ("runtime.yaml", lambda m: m["spec"]["mlPolicy"]["torch"].update(numProcPerNode="auto"), "'numProcPerNode' was"),
    ("runtime.yaml", lambda m: m["spec"]["template"]["spec"].update(maxRestarts=3), "'maxRestarts' was unexpected"),
    ("runtime.yaml", lambda m: m.update(apiVersion="kubeflow.org/v1"), "'trainer.kubeflow.org/v1alpha1' was expected"),
    ("mpijob.yaml", lambda m: m["spec"].update(cleanPodPolicy="Running"), "'cleanPodPolicy' was unexpected"),
    ("mpijob.yaml", lambda m: m["spec"]["mpiReplicaSpecs"].pop("Worker"), "'Worker' is a required"),
    ("mpijob.yaml", lambda m: m["spec"].update(slotsPerWorker="8"), "is not of type 'integer'"),
]


@pytest.mark.parametrize(("name", "spoil", "complaint"), WRONG, ids=[complaint for *_, complaint in WRONG])
def test_the_schemas_refuse(name: str, spoil: Callable[[Json], Any], complaint: str) -> None:
    manifest = copy.deepcopy(load(name))
    spoil(manifest)
    assert any(complaint in fault for fault in faults(manifest)), faults(manifest)


@pytest.mark.parametrize("name", ["runtime.yaml", "mpijob.yaml"])
def test_ranks_get_gpus_efa_and_shared_memory(name: str) -> None:
    pod, container = worker(name)
    limits = container["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 8 and limits["vpc.amazonaws.com/efa"] == 32
    assert re.fullmatch(r"\d+Mi", limits["hugepages-2Mi"]) and int(limits["hugepages-2Mi"][:-2]) % 2 == 0
    assert "memory" in limits  # Kubernetes wants cpu or memory beside huge pages
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["medium"] == "Memory"
    assert "IPC_LOCK" in container["securityContext"]["capabilities"]["add"]


def test_when_a_pod_fails_all_start_again() -> None:
    """Ranks of other pods wait for it: a pod that started again alone would find nobody."""
    runtime = load("runtime.yaml")["spec"]["template"]["spec"]
    job = runtime["replicatedJobs"][0]["template"]["spec"]
    assert runtime["failurePolicy"]["maxRestarts"] >= 1 and job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    (shown,) = re.findall(r"args: \[(.*resume\.sh.*)\]", (FOLDER / "trainjob.yaml").read_text())
    arguments = shown.split(", ")
    assert arguments[0] == "--no-python" and arguments[2] == arguments[-1] and arguments[-2] == "--save"


def test_the_job_finds_its_runtime() -> None:
    runtime, job = load("runtime.yaml"), load("trainjob.yaml")
    wanted = job["spec"]["runtimeRef"]
    assert (wanted["kind"], wanted["name"]) == (runtime["kind"], runtime["metadata"]["name"])
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    ancestor = replicated["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"]
    assert ancestor == "trainer" and worker("runtime.yaml")[1]["name"] == "node"  # by these Trainer finds the container
    assert f"jobset-name={job['metadata']['name']}" in (FOLDER / "trainjob.yaml").read_text()


def test_the_mpi_job_fits_its_image() -> None:
    """Paths, port and user of the manifest are those of Dockerfile.cuda and its configuration of ssh."""
    job, dockerfile = load("mpijob.yaml"), (FOLDER.parent.parent / "Dockerfile.cuda").read_text()
    launcher = job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]
    _, container = worker("mpijob.yaml")
    sshd = (FOLDER.parent / "container/sshd_config").read_text()
    ssh = (FOLDER.parent / "container/ssh_config").read_text()
    port = re.findall(r"^ *Port (\d+)$", sshd + ssh, re.MULTILINE)
    assert len(port) == 2 and port[0] == port[1] and int(port[0]) > 1023  # who is not root may serve it
    keys = job["spec"]["sshAuthMountPath"]
    assert f"HostKey {keys}/id_rsa" in sshd and f"AuthorizedKeysFile {keys}/authorized_keys" in sshd
    assert f"sshd_config {container['args'][-1]}\n" in dockerfile
    users = {launcher["securityContext"]["runAsUser"], container["securityContext"]["runAsUser"]}
    assert users == {1000} and "--uid 1000" in dockerfile
    environment = re.findall(r"(PATH|LD_LIBRARY_PATH)=(\S+)", sshd)
    assert len(environment) == 2
    for name, folders in environment:
        assert folders.split(":")[0] in dockerfile.split("ENV PATH")[-1], name
    environ = {each["name"]: each["value"] for each in launcher["env"]}
    assert environ["HOSTFILE"] == "/etc/mpi/hostfile"  # where the operator mounts it


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_what_manifests_run_is_in_the_image(file: Path) -> None:
    named = set(re.findall(r"/opt/distlib/([\w./]+)", file.read_text()))
    assert all((FOLDER.parent.parent / path).is_file() for path in named)
    images = set(re.findall(r"image: (\S+)", file.read_text()))
    assert images == {"registry.example.com/distlib:cuda13.0"}
