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


@dataclass(frozen=True)
class Ranks:
    """What is known of the ranks. device: "cpu", "cuda" or another accelerator; None where it is not known."""

    mesh: Mesh
    device: str | None

    @property
    def share(self) -> bool:
        """Whether partition groups have one mapping of whole parameters each, so that gathers move nothing."""
        return self.mesh.partition_size == 1 or (
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
        'offload="cpu"',
        lambda p: p.offload == "cpu" and p.engine == "distlib",
        "GPUs: the optimizer state of CPU ranks is in the CPU's memory already",
        lambda p, r: r.device != "cpu",
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
        lambda p, r: r.device in (None, "cpu"),
        "Leave it out",
    ),
)
