"""What carries the messages of a pipeline, chosen by where its stages compute and what the ranks can reach.

| stages compute on | the group carries tensors of the device | messages                                   |
|-------------------|-----------------------------------------|--------------------------------------------|
| the CPU           |                                         | transport.py: slots of shared memory, gloo |
| GPUs              | yes                                     | direct.py: from device to device           |
| GPUs              | no                                      | staged.py: by copies in host memory        |
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from distlib import reach
from distlib.comm.group import Group
from distlib.comm.slots import Room
from distlib.pipeline.direct import DirectTransport
from distlib.pipeline.program import Spec
from distlib.pipeline.staged import StagedTransport
from distlib.pipeline.transport import Tensors, Transport


class Carrier(Protocol):
    """What the runtime asks of each; `Transport` says what the methods do. direct: tensors leave from the device."""

    @property
    def direct(self) -> bool: ...
    @property
    def nbytes(self) -> int: ...
    def begin(self, step: int) -> None: ...
    def rooms(self, source: int, target: int, micro_batch: int, specs: Sequence[Spec]) -> tuple[Room, ...]: ...
    def send(self, source: int, target: int, micro_batch: int, tensors: Sequence[Tensor], on_host: int = 0) -> None: ...
    def post(self, source: int, target: int, micro_batch: int, specs: Sequence[Spec], on_host: int = 0) -> None: ...
    def take(self, source: int, target: int, micro_batch: int) -> Tensors: ...
    def finish(self) -> None: ...
    def abort(self, message: str) -> None: ...
    def close(self) -> None: ...


def carrier(
    group: Group, placement: Sequence[int], edges: Iterable[tuple[int, int]], timeout: float, device: torch.device
) -> Carrier:
    """The channels of one rank; arguments and errors as of `Transport`. A collective of the group."""
    edges = list(edges)
    host = Transport(group, placement, edges, timeout)
    if device.type == "cpu":
        return host
    why = reach.why_not(group, device)
    if not why:
        return DirectTransport(host, group, placement, edges, timeout, device)
    if group.rank == 0:
        warnings.warn(
            f"the stages of this pipeline exchange their tensors on {device.type} through host memory, where the host "
            f"has to wait: {why}",
            stacklevel=2,
        )
    return StagedTransport(host, device)
