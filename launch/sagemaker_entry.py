"""What a SageMaker training container runs: reads which hosts there are, and starts torchrun on this one.

    python3 sagemaker_entry.py script.py [arguments of the script]

SageMaker describes the job in /opt/ml/input/config/resourceconfig.json. From it come torchrun's arguments, the network
interface, and SM_HOSTS, SM_CURRENT_HOST, SM_NUM_GPUS and SM_RESOURCE_CONFIG, by which distlib knows where it is. (AWS's
own PyTorch images set these and start torchrun themselves: there this file is not needed.)

    /opt/ml/input/data/code     scripts from S3: a relative script is looked for here first
    $CHECKPOINT                 where the script saves: if a checkpoint is there, the script gets --resume
    /opt/ml/output/failure      why this host failed: SageMaker shows it as the job's failure reason

Standard library only, so that it runs before anything else is found to be broken.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

PORT = "29400"


def main(arguments: list[str], root: Path = Path("/opt/ml")) -> int:
    """torchrun's exit code. Signals that SageMaker sends on stopping go on to torchrun."""
    try:
        command, environ = plan(arguments, root, dict(os.environ), gpu_count())
    except (OSError, ValueError) as error:
        return fail(root, f"sagemaker_entry: {error}", 2)
    print(" ".join(command), flush=True)
    running = subprocess.Popen(command, env=environ)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: running.send_signal(received))
    code = running.wait()
    if code:
        host = environ["SM_CURRENT_HOST"]
        return fail(root, f"torchrun ended with code {code} on {host}; the first error is in the log of the rank", code)
    return 0


def plan(arguments: list[str], root: Path, environ: dict[str, str], gpus: int) -> tuple[list[str], dict[str, str]]:
    """The command to run and its environment. ValueError if the configuration or the script is missing."""
    if not arguments:
        raise ValueError("no script is given. Fix: name it after -- in sagemaker_submit.py")
    file = root / "input/config/resourceconfig.json"
    config = json.loads(file.read_text())
    hosts, host, interface = (config.get(key) for key in ("hosts", "current_host", "network_interface_name"))
    if not hosts or host not in hosts:
        raise ValueError(f"{file} names no current_host among its hosts: {config}")
    hosts = sorted(hosts)  # every container must count them alike
    environ |= {
        "SM_HOSTS": json.dumps(hosts),
        "SM_CURRENT_HOST": host,
        "SM_NUM_GPUS": str(gpus),
        "SM_RESOURCE_CONFIG": json.dumps(config),
    }
    if interface:  # of the first contact; NCCL's data go over EFA where there is some
        environ |= {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    command = ["torchrun", "--nnodes", str(len(hosts)), "--node-rank", str(hosts.index(host))]
    command += ["--nproc-per-node", str(max(1, gpus))]
    command += ["--master-addr", hosts[0], "--master-port", PORT]
    return [*command, *with_resume(script(arguments, root), environ.get("CHECKPOINT", ""))], environ


def script(arguments: list[str], root: Path) -> list[str]:
    """The script from the channel "code" if it is there, else as given."""
    below = root / "input/data/code" / arguments[0]
    return [str(below), *arguments[1:]] if below.is_file() else arguments


def with_resume(arguments: list[str], checkpoint: str) -> list[str]:
    """With --resume added where the job was interrupted and has a checkpoint, as resume.sh does."""
    is_there = bool(checkpoint) and (Path(checkpoint) / "manifest.json").is_file()
    return [*arguments, "--resume", checkpoint] if is_there else arguments


def gpu_count() -> int:
    """GPUs of this host; 0 without a driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    listed = subprocess.run([tool, "--list-gpus"], capture_output=True, text=True, check=False)
    return len(listed.stdout.splitlines()) if listed.returncode == 0 else 0


def fail(root: Path, why: str, code: int) -> int:
    """Leaves `why` where SageMaker looks for it. Negative codes are signals."""
    print(why, file=sys.stderr, flush=True)
    file = root / "output/failure"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(why)
    return code if code > 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
