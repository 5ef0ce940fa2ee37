"""One call from a plan and a module to training: `parallelize` makes an `Engine`."""

from distlib.engine.engine import Engine
from distlib.engine.parallelize import parallelize

__all__ = ["Engine", "parallelize"]
