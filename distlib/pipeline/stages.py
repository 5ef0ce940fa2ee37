"""From any model to pipeline stages: everything that a runtime needs, in the order in which it needs it.

leaves_of(module, "auto")         names of what lies in one stage each
ghost(module)                     the model without data, kept to record later signatures with
record(ghost, args, kwargs, ..)   one run as a program                         record.py
assign, cut                       leaf calls to stages, the program to parts
holdings, StageModule             who holds what, under the model's own names
stage(part, received, ..)         a stage plays its part of a micro-batch
"""

from distlib.pipeline.cut import Part, Port, assign, cut, edges
from distlib.pipeline.ghost import ghost, mirror
from distlib.pipeline.leaves import Chain, chain, leaves_of
from distlib.pipeline.stage_module import Holding, StageModule, holdings, tied

__all__ = [
    "Chain",
    "Holding",
    "Part",
    "Port",
    "StageModule",
    "assign",
    "chain",
    "cut",
    "edges",
    "ghost",
    "holdings",
    "leaves_of",
    "mirror",
    "tied",
]
