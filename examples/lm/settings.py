"""The options of train_lm.py: one dataclass, its command line, and which numbers cannot be."""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import distlib
from lm.strategy import plan_of

AT_LEAST_ONE = (
    "steps", "batch", "accumulate", "context", "layers", "width", "heads", "validate_every",
    "validation_windows", "report_every",
)  # fmt: skip
STRATEGIES = ("replicated", "sharded", "mics")
IN_A_PLAN = ("strategy", "stage", "partition_size", "accumulate", "clip")


def option(default: Any, text: str, *more_names: str) -> Any:
    return field(default=default, metadata={"help": text, "names": more_names})


@dataclass(frozen=True)
class Settings:
    """Every field is an option of the command line, but the last, which has the names of those that were given."""

    data: Path | None = option(None, "a file, or a folder of text files; by default Python's standard library")
    out: Path | None = option(None, "write settings, loss curves and final numbers here, as JSON")
    steps: int = option(1000, "optimizer steps")
    batch: int = option(8, "windows in a step, over all ranks together", "--global-batch")
    plan: Path | None = option(None, "how ranks share the work: a distlib.Plan as YAML or JSON, see examples/plans/")
    strategy: str = option(
        "replicated", "for want of a plan, how ranks share the work: replicated, sharded (ZeRO) or mics"
    )
    stage: int = option(3, "what is sharded: 1 optimizer state, 2 gradients too, 3 parameters too")
    partition_size: int = option(0, "ranks that share one copy under mics; 0: those of a host")
    accumulate: int = option(1, "micro-batches that a rank does its part of a step in")
    context: int = option(128, "bytes in a window")
    layers: int = option(4, "transformer blocks")
    width: int = option(192, "width of the residual stream")
    heads: int = option(6, "attention heads in a block")
    tied: bool = option(False, "let the embedding be the output head, too")
    lr: float = option(2e-3, "peak learning rate")
    warmup: int = option(50, "steps of linear warm-up before the cosine")
    weight_decay: float = option(0.1, "AdamW's, on all but the norms")
    clip: float = option(1.0, "largest norm of a step's gradient")
    validate_every: int = option(250, "steps between validations")
    validation_windows: int = option(512, "windows in a validation, over all ranks together")
    report_every: int = option(20, "steps between reports of the loss")
    save: Path | None = option(
        None, "write a checkpoint (a folder) here at the end, and after every --save-every steps"
    )
    save_every: int = option(0, "steps between checkpoints; 0: only at the end")
    resume: Path | None = option(None, "continue from this checkpoint, on any number of ranks")
    prompt: str = option("def ", "what the generated sample begins with")
    sample: int = option(300, "bytes to generate at the end")
    seed: int = option(0, "of the weights, the order of the data, and the sample")
    given: tuple[str, ...] = field(default=(), compare=False)


def parse(arguments: list[str] | None = None) -> Settings:
    """Settings from the command line (None: this process's). Exits with a line for what is not an option."""
    parser = argparse.ArgumentParser(
        description="Train a GPT on bytes of text, on one process or many.",
        usage="%(prog)s [options]",
        allow_abbrev=False,
    )
    types: dict[str, Any] = {"int": int, "float": float, "str": str, "Path | None": Path}
    for option_field in fields(Settings)[:-1]:
        name = "--" + option_field.name.replace("_", "-")
        names = (name, *option_field.metadata["names"])
        text, default = option_field.metadata["help"], option_field.default
        if option_field.type == "bool":
            parser.add_argument(*names, action="store_true", default=argparse.SUPPRESS, help=text)
        else:
            shown = "" if default is None else f" ({default})"
            kind = types[str(option_field.type)]
            metavar = "FILE" if kind is Path else "TEXT" if kind is str else "N" if kind is int else "X"
            settings: dict[str, Any] = {"dest": option_field.name, "type": kind, "default": argparse.SUPPRESS}
            parser.add_argument(*names, help=text + shown, metavar=metavar, **settings)
    given = vars(parser.parse_args(arguments))
    return Settings(**given, given=tuple(given))


def check(settings: Settings, ranks: int) -> None:
    """Raises ValueError for numbers that cannot be. What depends on the data is checked where it is read."""
    for name in AT_LEAST_ONE:
        if getattr(settings, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(settings, name)} must be at least 1")
    if not (settings.lr > 0 and settings.clip > 0):
        raise ValueError(f"--lr {settings.lr} and --clip {settings.clip} must be more than 0")
    if min(settings.save_every, settings.warmup, settings.sample, settings.weight_decay, settings.seed) < 0:
        raise ValueError("--save-every, --warmup, --sample, --weight-decay and --seed must not be negative")
    if settings.strategy not in STRATEGIES:
        raise ValueError(f"--strategy {settings.strategy!r} must be one of {', '.join(STRATEGIES)}")
    for name in IN_A_PLAN:
        if settings.plan is not None and name in settings.given:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(settings, name)} has no effect with --plan: say it in "
                f"{settings.plan}"
            )
    if "partition_size" in settings.given and settings.strategy != "mics":
        raise ValueError(f"--partition-size {settings.partition_size} has no effect without --strategy mics")
    if settings.stage not in (1, 2, 3):
        raise ValueError(f"--stage {settings.stage} must be 1, 2 or 3")
    if "stage" in settings.given and settings.strategy == "replicated":
        raise ValueError(f"--stage {settings.stage} has no effect without --strategy sharded or mics")
    if settings.save_every and settings.save is None:
        raise ValueError(f"--save-every {settings.save_every} has no effect without --save FOLDER")
    if not settings.prompt:
        raise ValueError("--prompt must not be empty: the sample needs a byte to begin with")
    check_batch(settings.batch, ranks, plan_of(settings))
    for name, path in (("--out", settings.out), ("--save", settings.save)):
        if path is not None:
            require_place(name, path)
    if settings.save is not None and settings.save.is_file():
        raise ValueError(f"--save {settings.save} is a file; a checkpoint is a folder")


def require_place(name: str, path: Path) -> None:
    """Raises ValueError where `path` cannot be written, which would else be noticed after many steps."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{name} {path}: there is no folder {folder} to write it in")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{name} {path}: nothing can be written in {folder}: {error.strerror}") from error


def check_batch(batch: int, ranks: int, plan: distlib.Plan) -> None:
    """Raises ValueError for a batch that does not divide over all that see different data, in equal micro-batches."""
    replicas, left = divmod(ranks, plan.pipeline)
    if left:
        raise ValueError(f"pipeline={plan.pipeline} does not divide {ranks} ranks: start a multiple of {plan.pipeline}")
    unit = replicas * plan.microbatches
    if batch % unit:
        cut = f"{replicas} ranks" if plan.pipeline == 1 else f"{replicas} x {plan.pipeline} ranks"
        cut += f" x {plan.microbatches} micro-batches" if plan.microbatches > 1 else ""
        raise ValueError(f"--batch {batch} does not divide over {cut}: try --batch {math.ceil(batch / unit) * unit}")
