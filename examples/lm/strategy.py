"""How a run is divided over ranks: a plan, from --plan FILE or from --strategy and its kin. The rest does not ask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import distlib

if TYPE_CHECKING:
    from lm.settings import Settings


def plan_of(settings: Settings) -> distlib.Plan:
    """The plan of the run. Raises ValueError for a file that holds none, OSError for one that cannot be read."""
    if settings.plan is not None:
        if not settings.plan.exists():
            raise ValueError(f"--plan {settings.plan}: no such file; examples/plans/ has some")
        return distlib.Plan.from_file(settings.plan)
    divided: dict[str, dict[str, Any]] = {
        "replicated": {},
        # ZeRO divides one copy over all ranks; MiCS keeps a copy in every partition group: by default, on every host.
        "sharded": {"stage": settings.stage},
        "mics": {"stage": settings.stage, "partition_size": settings.partition_size or "node"},
    }
    return distlib.Plan(**divided[settings.strategy], microbatches=settings.accumulate, clip=settings.clip)
