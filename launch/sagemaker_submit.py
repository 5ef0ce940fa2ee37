"""Submits a training job to Amazon SageMaker: as many hosts as you like, one rank per GPU on each.

    python launch/sagemaker_submit.py --image 123456789012.dkr.ecr.us-east-1.amazonaws.com/distlib:cuda13.0 \
        --role arn:aws:iam::123456789012:role/training --output s3://bucket/runs --hosts 2 \
        -- examples/train_lm.py --strategy mics --steps 100

What follows -- is the script with its arguments, as python would take them: a path in the image (its folder is
/opt/distlib), or below --code, a folder in S3 with your own scripts. --dry-run prints the request and sends nothing.
Sending needs boto3 and AWS credentials. In each container sagemaker_entry.py starts torchrun.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from typing import Any

MOST_HOURS = 672  # that a job may run
ENTRY = ["python3", "/opt/distlib/launch/sagemaker_entry.py"]


def main(arguments: list[str] | None = None) -> None:
    """Builds the request from the command line, then prints or sends it."""
    options = parse(arguments)
    asked = request(options)
    if options.dry_run:
        print(json.dumps(asked, indent=2))
        return
    try:
        import boto3
    except ModuleNotFoundError:
        raise SystemExit("sagemaker_submit: sending needs boto3: pip install boto3; --dry-run does without") from None
    answer = boto3.client("sagemaker", region_name=options.region).create_training_job(**asked)
    print(answer["TrainingJobArn"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; ends with a message if it is no good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", required=True, help="Dockerfile.cuda's, in ECR, built with RUN_AS=root")
    parser.add_argument("--role", required=True, help="ARN of the role that the job runs as")
    parser.add_argument("--output", required=True, help="s3://...: what the script leaves in /opt/ml/model comes here")
    parser.add_argument("--name", default=time.strftime("distlib-%Y%m%d-%H%M%S"), help="of the job; once an account")
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--instance", default="ml.p5.48xlarge", help="type of the hosts; those with EFA use it")
    parser.add_argument("--disk", type=int, default=200, help="GB of disk a host")
    parser.add_argument("--hours", type=float, default=24, help="of training at the most")
    parser.add_argument("--code", help="s3://... folder of scripts: becomes /opt/ml/input/data/code")
    parser.add_argument("--data", help="s3://... folder that becomes /opt/ml/input/data/train")
    parser.add_argument("--checkpoints", help="s3://... folder that /opt/ml/checkpoints is copied to; one host only")
    parser.add_argument("--lustre", metavar="ID:PATH", help="FSx for Lustre, at /opt/ml/input/data/shared on all hosts")
    parser.add_argument("--resume", metavar="FOLDER", help="where the script saves: it goes on from there, if it can")
    parser.add_argument("--spot", action="store_true", help="cheaper hosts that may go away; needs --resume")
    parser.add_argument("--subnets", nargs="+", default=[], help="of your VPC, with --security-groups")
    parser.add_argument("--security-groups", nargs="+", default=[], help="must let the hosts reach each other")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="environment of the ranks")
    parser.add_argument("--region", help="the account's own by default")
    parser.add_argument("--dry-run", action="store_true", help="print the request as JSON and send nothing")
    parser.add_argument("script", nargs="+", help="after --: the script and its arguments")
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"[a-zA-Z0-9](-?[a-zA-Z0-9]){0,62}", options.name):
        parser.error(f"--name {options.name}: letters, digits and single dashes between them, 63 at the most")
    if not re.fullmatch(r"arn:aws[a-z-]*:iam::[0-9]{12}:role/.+", options.role):
        parser.error(f"--role {options.role}: must be an ARN, such as arn:aws:iam::123456789012:role/training")
    for name in ("output", "code", "data", "checkpoints"):
        place = getattr(options, name)
        if place is not None and not place.startswith("s3://"):
            parser.error(f"--{name} {place}: must be a folder in S3, s3://BUCKET/FOLDER")
    if not options.instance.startswith("ml."):
        parser.error(f"--instance {options.instance}: SageMaker calls it ml.{options.instance}")
    if not 0 < options.hours <= MOST_HOURS:
        parser.error(f"--hours {options.hours:g}: must be more than 0, and {MOST_HOURS} (28 days) at the most")
    if options.hosts < 1:
        parser.error(f"--hosts {options.hosts}: there must be at least one")
    if options.spot and not options.resume:
        parser.error("--spot needs --resume: a job on such hosts is interrupted and must go on from somewhere")
    if options.checkpoints and options.hosts > 1:
        parser.error("--checkpoints: hosts write one checkpoint together, so they must see one folder. Use --lustre")
    if options.lustre and (":/" not in options.lustre or not options.subnets):
        parser.error("--lustre must be ID:/PATH, such as fs-0123456789abcdef0:/mount, and needs --subnets")
    if bool(options.subnets) != bool(options.security_groups):
        parser.error("--subnets and --security-groups go together")
    for pair in options.set:
        if "=" not in pair:
            parser.error(f"--set {pair}: must be NAME=VALUE")
    for argument in options.script:
        if len(argument) > 256:
            parser.error(f"SageMaker takes arguments of 256 characters at most, not {len(argument)}: {argument}")
    return options


def request(options: argparse.Namespace) -> dict[str, Any]:
    """What CreateTrainingJob is asked for."""
    seconds = int(options.hours * 3600)
    asked: dict[str, Any] = {
        "TrainingJobName": options.name,
        "RoleArn": options.role,
        "AlgorithmSpecification": {
            "TrainingImage": options.image,
            "TrainingInputMode": "FastFile",  # files are read from S3 as they are opened
            "ContainerEntrypoint": ENTRY,
            "ContainerArguments": options.script,
        },
        "ResourceConfig": {
            "InstanceType": options.instance,
            "InstanceCount": options.hosts,
            "VolumeSizeInGB": options.disk,
        },
        "OutputDataConfig": {"S3OutputPath": options.output},
        "StoppingCondition": {"MaxRuntimeInSeconds": seconds},
        # Encrypting what goes between containers would slow every collective.
        "EnableInterContainerTrafficEncryption": False,
        "EnableNetworkIsolation": False,
        "Environment": dict(pair.split("=", 1) for pair in options.set),
        "RetryStrategy": {"MaximumRetryAttempts": 3},  # after a fault of a host, not of the script
    }
    channels = [_s3(name, place) for name, place in (("code", options.code), ("train", options.data)) if place]
    channels += [_lustre("shared", options.lustre)] if options.lustre else []
    if channels:
        asked["InputDataConfig"] = channels
    if options.resume:
        asked["Environment"]["CHECKPOINT"] = options.resume  # for sagemaker_entry.py
    if options.checkpoints:
        asked["CheckpointConfig"] = {"S3Uri": options.checkpoints, "LocalPath": "/opt/ml/checkpoints"}
    if options.subnets:
        asked["VpcConfig"] = {"Subnets": options.subnets, "SecurityGroupIds": options.security_groups}
    if options.spot:
        asked["EnableManagedSpotTraining"] = True
        asked["StoppingCondition"]["MaxWaitTimeInSeconds"] = 2 * seconds
    return asked


def _s3(name: str, place: str) -> dict[str, Any]:
    """A folder in S3 that every container finds as /opt/ml/input/data/NAME."""
    source = {"S3DataType": "S3Prefix", "S3Uri": place, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}}


def _lustre(name: str, place: str) -> dict[str, Any]:
    """A file system that all containers write to, as /opt/ml/input/data/NAME."""
    identity, _, path = place.partition(":")
    source = {
        "FileSystemId": identity,
        "FileSystemType": "FSxLustre",
        "FileSystemAccessMode": "rw",
        "DirectoryPath": path,
    }
    return {"ChannelName": name, "InputMode": "File", "DataSource": {"FileSystemDataSource": source}}


if __name__ == "__main__":
    main()
