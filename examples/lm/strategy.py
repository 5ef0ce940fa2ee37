"""How a run is divided over ranks: one call that wraps the model. The rest of the script does not know which it was."""

from __future__ import annotations

from torch import nn

import distlib
from lm.settings import Settings

Parallel = distlib.DataParallel | distlib.ShardedDataParallel


def wrap(plain: nn.Module, settings: Settings) -> Parallel:
    """The model, parallel as --strategy says. Every rank calls it with the same settings."""
    if settings.strategy == "replicated":
        return distlib.DataParallel(plain)
    # ZeRO divides one copy over all ranks; MiCS keeps a copy in every partition group: by default, on every host.
    partition = None if settings.strategy == "sharded" else settings.partition_size or "node"
    return distlib.ShardedDataParallel(plain, stage=settings.stage, partition_size=partition)
