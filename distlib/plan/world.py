"""What of a plan only the ranks can tell: numbers that must divide, hosts, devices. All problems at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distlib import native
from distlib.plan.checked import SettingsError
from distlib.plan.mesh import Mesh, World

if TYPE_CHECKING:
    from distlib.plan.plan import Plan

_NO_CUDA = "sharded models run on the CPU in this version"


@dataclass(frozen=True)
class Ranks:
    """What is known of the ranks. device: "cpu", "cuda", or None where it is not known."""

    mesh: Mesh
    device: str | None

    @property
    def share(self) -> bool:
        """Whether partition groups have one mapping of whole parameters each, so that gathers move nothing."""
        return (
            self.device == "cpu"
            and native.core() is not None
            and all(self.mesh.hosts(group) == 1 for group in self.mesh.partitions)
        )

    @property
    def has_two_levels(self) -> bool:
        """Whether partition groups span hosts, with equally many ranks, two or more, on each."""
        for group in self.mesh.partitions:
            within = self.mesh.topology.restrict(group)
            if len(within.nodes) < 2 or not within.is_uniform or len(within.nodes[0]) < 2:
                return False
        return True


@dataclass(frozen=True)
class Need:
    """One row. settings: `holds` in words. holds: whether the row concerns a plan. met: whether the ranks can do it."""

    settings: str
    holds: Callable[[Plan], bool]
    needs: str
    met: Callable[[Plan, Ranks], bool]
    fix: str


def check(plan: Plan, world: World) -> None:
    """Raises ValueError with every need of `plan` that the ranks of `world` do not meet."""
    try:
        mesh = Mesh.of(plan, world)
    except ValueError as error:
        raise SettingsError("Plan on these ranks", [str(error)]) from None
    device = getattr(world, "device", None)
    ranks = Ranks(mesh, None if device is None else device.type)
    wrong = [row for row in NEEDS if row.holds(plan) and not row.met(plan, ranks)]
    if wrong:
        problems = [f"{row.settings}: needs {row.needs}. {row.fix}" for row in wrong]
        raise SettingsError("Plan on these ranks", problems)


def markdown() -> str:
    """The table for docs/plan.md."""
    lines = ["| setting | needs | else |", "|---|---|---|"]
    lines += [f"| {row.settings} | {row.needs} | {row.fix} |" for row in NEEDS]
    return "\n".join(lines) + "\n"


def _is_secondary(plan: Plan, ranks: Ranks) -> bool:
    kept, p = int(plan.reshard_after_forward), ranks.mesh.partition_size
    return kept < p and p % kept == 0


NEEDS = (
    Need(
        "stage=1, 2 or 3",
        lambda p: p.stage > 0 and p.engine == "distlib",
        f"CPU ranks: {_NO_CUDA}",
        lambda p, r: r.device != "cuda",
        "Give stage=0, or run with CUDA_VISIBLE_DEVICES empty",
    ),
    Need(
        'offload="cpu"',
        lambda p: p.offload == "cpu" and p.engine == "distlib",
        f"optimizer state on a GPU, to be moved to the CPU's memory, and {_NO_CUDA}",
        lambda p, r: r.device is None,
        "Give a folder, or leave it out",
    ),
    Need(
        "hierarchical=True",
        lambda p: p.hierarchical is True,
        "partition groups that span hosts, with equally many ranks, two or more, on each",
        lambda p, r: r.has_two_levels,
        'Give "auto", or another partition_size',
    ),
    Need(
        "gather_dtype",
        lambda p: p.gather_dtype is not None,
        "partition groups that span hosts: on one host their ranks share whole parameters, and gathers move nothing",
        lambda p, r: not r.share,
        "Leave it out",
    ),
    Need(
        "reshard_after_forward= a number",
        lambda p: not isinstance(p.reshard_after_forward, bool),
        "partition groups that span hosts: on one host their ranks share whole parameters, and gathers move nothing",
        lambda p, r: not r.share,
        "Give True or False",
    ),
    Need(
        "reshard_after_forward= a number",
        lambda p: not isinstance(p.reshard_after_forward, bool),
        "a number that divides the partition group, and is smaller than it",
        _is_secondary,
        "Choose another, or True",
    ),
    Need(
        'activations "offload" without a folder',
        lambda p: p.activations.policy == "offload" and p.activations.folder is None,
        "GPUs: tensors of CPU ranks move to files",
        lambda p, r: r.device != "cpu",
        'Give activations={"policy": "offload", "folder": a folder on a disk}',
    ),
    Need(
        "activations.folder",
        lambda p: p.activations.folder is not None,
        "CPU ranks: tensors on a GPU move to pinned memory of its host",
        lambda p, r: r.device != "cuda",
        "Leave it out",
    ),
    Need(
        "clip, with pipeline=2 or more",
        lambda p: p.clip is not None and p.pipeline > 1,
        "CPU ranks: the norm over the stages of a pipeline is not computed on GPUs in this version",
        lambda p, r: r.device != "cuda",
        "Leave it out",
    ),
    Need(
        'precision "fp16", with pipeline=2 or more',
        lambda p: p.precision.dtype == "fp16" and p.pipeline > 1,
        "CPU ranks: the stages of a pipeline do not agree on a loss scale on GPUs in this version",
        lambda p, r: r.device != "cuda",
        'Take "bf16"',
    ),
)
