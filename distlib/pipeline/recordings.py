"""Recorded runs of one model, each made once: dividing it, weighing activations and steps ask for the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distlib.pipeline.recent import Recent
from distlib.pipeline.record import Program, record, signature


class Recordings:
    """Programs of a model, by signature.

    ghost: the whole model without data; no one else may record it meanwhile. leaves: names of modules that are called
    as one.
    """

    def __init__(self, ghost: nn.Module, leaves: Sequence[str]) -> None:
        self.ghost, self.leaves = ghost, tuple(leaves)
        self._programs: Recent[Program] = Recent()

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], dtype: torch.dtype | None = None) -> Program:
        """The model's run on these inputs under the caller's grad mode and autocast; see `record`, also for errors.
        ValueError, too, for an input that is neither a tensor nor hashable. Equal programs are one
        object, as long as they are among those used last: do not change it."""
        key = signature(args, kwargs, self.ghost), dtype
        return self._programs.get(key, lambda: record(self.ghost, args, kwargs, self.leaves, dtype))
