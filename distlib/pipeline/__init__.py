"""Pipeline parallelism. `distlib.PipelineParallel` runs it; here are schedules as tables of actions, made, checked and
simulated before the first step.

schedule = prepare(generate("zb-h1", ranks=4, micro_batches=8))
verify(schedule)
print(draw(simulate(schedule, Costs(forward=1, backward=1, weight=1, comm=0.1))))
"""

from distlib.pipeline.actions import Action, Kind, Schedule, ScheduleError, load_csv, parse, save_csv
from distlib.pipeline.auto import auto
from distlib.pipeline.micro_batches import Whole
from distlib.pipeline.partition import Split, split_layers
from distlib.pipeline.passes import forward_only, fuse, gather, lower, prepare, reduce, unfuse
from distlib.pipeline.random import micro_batch_seeds
from distlib.pipeline.schedules import NAMES, generate, peak_activations
from distlib.pipeline.simulate import Costs, Simulation, simulate
from distlib.pipeline.timeline import draw, save_png
from distlib.pipeline.verify import verify

__all__ = [
    "NAMES",
    "Action",
    "Costs",
    "Kind",
    "Schedule",
    "ScheduleError",
    "Simulation",
    "Split",
    "Whole",
    "auto",
    "draw",
    "forward_only",
    "fuse",
    "gather",
    "generate",
    "load_csv",
    "lower",
    "micro_batch_seeds",
    "parse",
    "peak_activations",
    "prepare",
    "reduce",
    "save_csv",
    "save_png",
    "simulate",
    "split_layers",
    "unfuse",
    "verify",
]
