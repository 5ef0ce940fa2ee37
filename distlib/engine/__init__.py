"""One call from a plan and a module to training: `parallelize` makes an `Engine`."""

from distlib.engine.apply import parallelize
from distlib.engine.engine import Engine

__all__ = ["Engine", "parallelize"]
