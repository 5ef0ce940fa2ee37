"""distlib: trains PyTorch models on many processes. `import distlib` registers the c10d backend "distlib".

The public names below are imported on first use, so that `import distlib` costs little over `import torch`.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from distlib import _clash

__version__ = "0.1.0"
__distribution__ = _clash.DISTRIBUTION  # how distlib_autoload tells this package from its namesake

if TYPE_CHECKING:
    from distlib import optim
    from distlib.activations import checkpoint_activations
    from distlib.checkpoint import export, load, save
    from distlib.comm.group import Group
    from distlib.comm.ledger import Ledger, ledger
    from distlib.comm.memory import registered_empty
    from distlib.data_parallel import DataParallel
    from distlib.engine import Engine, parallelize
    from distlib.pipeline.wrapper import PipelineParallel
    from distlib.plan import Plan
    from distlib.sharded import MemoryReport, MixedPrecision, ShardedDataParallel, suggest_partition
    from distlib.topology import Topology
    from distlib.world import World, init, shutdown

__all__ = [
    "DataParallel",
    "Engine",
    "Group",
    "Ledger",
    "MemoryReport",
    "MixedPrecision",
    "PipelineParallel",
    "Plan",
    "ShardedDataParallel",
    "Topology",
    "World",
    "__version__",
    "checkpoint_activations",
    "export",
    "init",
    "ledger",
    "load",
    "optim",
    "parallelize",
    "registered_empty",
    "save",
    "shutdown",
    "suggest_partition",
]

_HOME = {
    "DataParallel": "distlib.data_parallel",
    "Engine": "distlib.engine",
    "Group": "distlib.comm.group",
    "Ledger": "distlib.comm.ledger",
    "MemoryReport": "distlib.sharded",
    "MixedPrecision": "distlib.sharded",
    "PipelineParallel": "distlib.pipeline.wrapper",
    "Plan": "distlib.plan",
    "ShardedDataParallel": "distlib.sharded",
    "Topology": "distlib.topology",
    "World": "distlib.world",
    "checkpoint_activations": "distlib.activations",
    "export": "distlib.checkpoint",
    "init": "distlib.world",
    "ledger": "distlib.comm.ledger",
    "load": "distlib.checkpoint",
    "parallelize": "distlib.engine",
    "registered_empty": "distlib.comm.memory",
    "save": "distlib.checkpoint",
    "shutdown": "distlib.world",
    "suggest_partition": "distlib.sharded",
}


def __getattr__(name: str) -> object:
    if name == "optim":
        return importlib.import_module("distlib.optim")  # which also sets the attribute
    if name not in _HOME:
        raise AttributeError(f"module 'distlib' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_backend() -> None:
    """Makes `init_process_group("distlib")` known to torch; nothing where torch has no c10d."""
    import torch.distributed

    if torch.distributed.is_available():
        from distlib.comm.backend import register

        register()


_clash.check(os.path.dirname(os.path.abspath(__file__)))
_register_backend()
