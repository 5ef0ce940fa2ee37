"""Messages of a pipeline on GPUs through host memory: right on any machine, whatever the group's devices can reach.

    compute   | forward 0 | forward 1 |  backward 0 ...          a stream of the device
    out              '-- copy 0 --'                              to pinned memory, on a stream of its own
    host             . . . . . . . . . send 0                    once the copy has passed: at the next call, or in take
    in                          '-- copy --'                     what came, from pinned memory; compute waits for it

`send` and `post` never wait. `take` waits for this rank's own copies, hands them over, and then for the message: so
nobody waits for what has not been sent. The host waits for the device there, and nowhere else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distlib import streams
from distlib.comm.slots import Room
from distlib.pipeline.channels import require_on, words
from distlib.pipeline.program import Spec
from distlib.pipeline.transport import Tensors, Transport


@dataclass(frozen=True)
class _Leaving:
    """A message that is being copied to the host. given: what it is copied from, held until `copied` has passed."""

    source: int
    target: int
    micro_batch: int
    given: Tensors
    copies: Tensors
    copied: streams.Event


class StagedTransport:
    """What `Transport` is, for tensors on `device`; those that stay on the host go as they are.

    host: carries the copies. Errors are its own, raised by whichever call hands a message over.
    """

    direct = False

    def __init__(self, host: Transport, device: torch.device) -> None:
        self._host, self._device = host, device
        self._out, self._in = streams.new(device), streams.new(device)
        self._leaving: deque[_Leaving] = deque()
        self._on_host: dict[tuple[int, int, int], int] = {}

    def begin(self, step: int) -> None:
        """As Transport's."""
        self._host.begin(step)

    def rooms(self, source: int, target: int, micro_batch: int, specs: Sequence[Spec]) -> tuple[Room, ...]:
        """As Transport's: what leaves is copied from the device."""
        return ()

    def send(self, source: int, target: int, micro_batch: int, tensors: Sequence[Tensor], on_host: int = 0) -> None:
        """As Transport's. Copies what the current stream has computed; the message leaves when that is done."""
        require_on(self._device, tensors[on_host:], words(source, target, micro_batch))
        streams.follow(self._out, streams.current(self._device))
        with streams.on(self._out), torch.no_grad():
            copies = (*tensors[:on_host], *map(self._copied, tensors[on_host:]))
            copied = streams.record(self._out)
        self._leaving.append(_Leaving(source, target, micro_batch, tuple(tensors), copies, copied))
        self._hand_over(wait=False)

    def _copied(self, tensor: Tensor) -> Tensor:
        flat = streams.pinned(tensor.numel(), tensor.dtype, self._device)
        return flat.view(tensor.shape).copy_(tensor, non_blocking=True)

    def post(self, source: int, target: int, micro_batch: int, specs: Sequence[Spec], on_host: int = 0) -> None:
        """As Transport's."""
        self._hand_over(wait=False)
        self._host.post(source, target, micro_batch, specs)
        self._on_host[source, target, micro_batch] = on_host

    def take(self, source: int, target: int, micro_batch: int) -> Tensors:
        """As Transport's. The current stream waits for the copies to the device, the host does not."""
        self._hand_over(wait=True)
        arrived = self._host.take(source, target, micro_batch)
        stay = self._on_host.pop((source, target, micro_batch))
        current = streams.current(self._device)
        with streams.on(self._in):  # their memory is this stream's: nothing that compute did with it can be under way
            there = tuple(self._to_device(tensor) for tensor in arrived[stay:])
        streams.follow(current, self._in)
        for tensor in there:
            streams.keep(tensor, current)
        return (*arrived[:stay], *there)

    def _to_device(self, tensor: Tensor) -> Tensor:
        # A slot of the sender is not pinned, and goes back to it as soon as it was read.
        flat = streams.pinned(tensor.numel(), tensor.dtype, self._device)
        return flat.view(tensor.shape).copy_(tensor).to(self._device, non_blocking=True)

    def _hand_over(self, wait: bool) -> None:
        """Gives the host's transport what has been copied, in order. wait: all of it."""
        while self._leaving:
            first = self._leaving[0]
            if not streams.has_passed(first.copied):
                if not wait:
                    return
                assert first.copied is not None
                first.copied.synchronize()
            self._leaving.popleft()
            self._host.send(first.source, first.target, first.micro_batch, first.copies)

    def finish(self) -> None:
        """As Transport's."""
        self._hand_over(wait=True)
        self._host.finish()
        assert not self._on_host, "the host's transport would have named them"

    @property
    def nbytes(self) -> int:
        """As Transport's."""
        return self._host.nbytes

    def abort(self, message: str) -> None:
        """As Transport's. What was about to leave does not."""
        self._leaving.clear()
        self._host.abort(message)

    def close(self) -> None:
        """As Transport's."""
        self._host.close()
