"""Messages of a pipeline on GPUs from device to device: ordered by streams, and the host waits for nothing.

    compute   | forward 0 | forward 1 |~~~~| backward 0 ...      ~ waits for the message, if it is not there yet
    send to 1        '-- 0 --'                                   each message after what it sends, in the table's order
    recv from 1         '----- gradient ---'                     each after what compute held when it was posted

A receive that waits on a stream holds up what was started on that stream after it. That cannot end in a circle: all
messages of a table have one order (passes.lower), every rank starts its sends and receives in that order, and what a
message needs, the computation before it and messages that this one took, is before it in the same order. So of the
messages that are not over, the first one can always complete, even if a rank had one stream for all.
"""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distlib.comm.group import Group
from distlib.comm.slots import Room
from distlib.comm.work import CollectiveError, Work
from distlib.pipeline.channels import require_on, words
from distlib.pipeline.header import Header
from distlib.pipeline.program import Spec
from distlib.pipeline.transport import Tensors, Transport

Message = tuple[int, int, int]
_LOOK_SECONDS = 0.0005  # between looks at a message


class DirectTransport:
    """What `Transport` is, for tensors on `device`, which all ranks of `group` must be able to exchange (reach.py).

    host: carries the tensors that are on the CPU, the generators' states. placement: of each stage, its rank. All ranks
    make it together: every two that will send each other anything do so now, in one order, because what connects late
    would connect in the order of a step.

    An error of a message is raised by the first call after it is known: a later send, post, take or finish.
    """

    direct = True

    def __init__(
        self,
        host: Transport,
        group: Group,
        placement: Sequence[int],
        edges: Sequence[tuple[int, int]],
        timeout: float,
        device: torch.device,
    ) -> None:
        self._host, self._group, self._device = host, group, device
        self._placement, self._timeout = tuple(placement), timeout
        self._tagged = group.takes_tags(device)
        self._going: list[tuple[Message, Work]] = []
        self._before: list[tuple[Message, Work]] = []  # of the step before, not known to be away
        self._coming: dict[Message, tuple[int, Tensors, list[Work]]] = {}
        self._open(edges)

    def _open(self, edges: Sequence[tuple[int, int]]) -> None:
        ends = [(self._placement[a], self._placement[b]) for a, b in edges]
        ends += [(self._placement[-1], rank) for rank in range(self._group.size)]  # the loss
        word = torch.zeros(1, device=self._device)
        for source, target in sorted({pair for a, b in ends if a != b for pair in ((a, b), (b, a))}):
            if self._group.rank == source:
                self._group.send(word, target, timeout=self._timeout)
            elif self._group.rank == target:
                self._group.recv(torch.empty_like(word), source, timeout=self._timeout)

    def begin(self, step: int) -> None:
        """As Transport's, for what goes through host memory."""
        self._host.begin(step)

    def rooms(self, source: int, target: int, micro_batch: int, specs: Sequence[Spec]) -> tuple[Room, ...]:
        """As Transport's: what goes from device to device needs none."""
        return ()

    def send(self, source: int, target: int, micro_batch: int, tensors: Sequence[Tensor], on_host: int = 0) -> None:
        """As Transport's."""
        message = (source, target, micro_batch)
        require_on(self._device, tensors[on_host:], words(*message))
        if on_host:
            self._host.send(*message, tensors[:on_host])
        with self._telling(message):
            self._going = [(m, work) for m, work in self._going if not _is_over(work)]
            tag = self._tag(source, target, [Spec.of(tensor) for tensor in tensors[on_host:]])
            for tensor in tensors[on_host:]:
                if tensor.numel():
                    work = self._group.send(
                        tensor.detach(), self._placement[target], tag, async_op=True, timeout=self._timeout
                    )
                    assert work is not None
                    self._going.append((message, work))

    def post(self, source: int, target: int, micro_batch: int, specs: Sequence[Spec], on_host: int = 0) -> None:
        """As Transport's. Memory for the message is the current stream's."""
        message = (source, target, micro_batch)
        if on_host:
            self._host.post(*message, specs[:on_host])
        tag = self._tag(source, target, specs[on_host:])
        works = []
        with self._telling(message):
            tensors = tuple(torch.empty(s.shape, dtype=s.dtype, device=self._device) for s in specs[on_host:])
            for tensor in tensors:
                if tensor.numel():
                    work = self._group.recv(tensor, self._placement[source], tag, async_op=True, timeout=self._timeout)
                    assert work is not None
                    works.append(work)
        self._coming[message] = (on_host, tensors, works)

    def take(self, source: int, target: int, micro_batch: int) -> Tensors:
        """As Transport's, but that the current stream waits and not the host."""
        message = (source, target, micro_batch)
        if message not in self._coming:
            raise RuntimeError(f"{words(*message)}: take() without a post() before it")
        on_host, tensors, works = self._coming.pop(message)
        states = self._host.take(*message) if on_host else ()
        with self._telling(message):
            for work in works:
                work.wait()
        return (*states, *tensors)

    def _tag(self, source: int, target: int, specs: Sequence[Spec]) -> int:
        """Of messages of a channel with these shapes and dtypes: where tags are compared, one that is taken for another
        is an error."""
        if not self._tagged:
            return 0
        return zlib.crc32(f"{source} {target} {Header.of(0, specs).checksum}".encode()) & (1 << 20) - 1

    def finish(self) -> None:
        """The end of a step: raises what is known to have failed. Its messages may be under way still; those of the
        step before are not, so that a host that is ahead does not keep more and more memory for them."""
        self._host.finish()
        for message, work in self._before:
            with self._telling(message):
                while not _is_over(work):
                    time.sleep(_LOOK_SECONDS)
        self._before, self._going = self._going, []
        if self._coming:
            forgotten = "; ".join(words(*message) for message in self._coming)
            raise RuntimeError(f"the step ended before these messages were taken: {forgotten}")

    @property
    def nbytes(self) -> int:
        """As Transport's: what goes from device to device takes none of it."""
        return self._host.nbytes

    def abort(self, message: str) -> None:
        """As Transport's."""
        self._host.abort(message)

    def close(self) -> None:
        """As Transport's."""
        self._coming.clear()
        self._host.close()

    @contextlib.contextmanager
    def _telling(self, message: Message) -> Iterator[None]:
        """Errors inside name the message, and end the transport on all ranks."""
        try:
            yield
        except CollectiveError as error:
            self.abort(str(error))
            raise CollectiveError(f"{words(*message)}: {error}", error.code) from error


def _is_over(work: Work) -> bool:
    """Whether a message is away. Raises what went wrong; never waits."""
    if not work.is_completed():
        return False
    error = work.exception()
    if error is not None:
        raise error
    return True
