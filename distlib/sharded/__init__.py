"""Sharded data parallelism: ZeRO stages 1 to 3 and MiCS. docs/sharding.md draws the paths."""

from distlib.memory import MemoryReport
from distlib.sharded.options import MixedPrecision
from distlib.sharded.suggest import Suggestion, suggest_partition
from distlib.sharded.wrapper import ShardedDataParallel

__all__ = ["MemoryReport", "MixedPrecision", "ShardedDataParallel", "Suggestion", "suggest_partition"]
