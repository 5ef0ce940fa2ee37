"""Uneven inputs: ranks that ran out of inputs shadow the collectives of those that did not.

    rank 0   forward backward step | forward backward step | forward backward step |
    rank 1   forward backward step | (joined) shadow       | (joined) shadow       | takes rank 0's weights

Within torch's `Join`, each forward first tells the joined ranks what will follow it (see `Announcement`), so
they know whether to take part in a broadcast of buffers and in a backward. One forward is followed by one
backward, or is made under no_sync() or without gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.algorithms.join import Join, JoinHook, _JoinConfig

from distlib.comm.group import Group
from distlib.data_parallel import replicas

if TYPE_CHECKING:
    from distlib.data_parallel.wrapper import DataParallel


@dataclass(frozen=True)
class Announcement:
    """What ranks learn at the start of a forward within join().

    Attributes:
        active: group ranks that still have inputs.
        buffers: whether buffers are broadcast before the forward.
        backward: whether a backward that averages gradients follows it.
    """

    active: list[int]
    buffers: bool
    backward: bool

    @staticmethod
    def exchange(
        group: Group, device: torch.device, joined: bool, buffers: bool = False, backward: bool = False
    ) -> Announcement:
        """Every rank of the group must call it; joined ranks have nothing to announce."""
        numbers = torch.zeros(group.size + 2, dtype=torch.int64, device=device)
        if not joined:
            numbers[group.rank] = 1
            numbers[-2] = int(buffers)
            numbers[-1] = int(backward)
        group.all_reduce(numbers, op="sum")
        *flags, with_buffers, with_backward = numbers.tolist()
        active = [rank for rank, flag in enumerate(flags) if flag]
        for what, count in (("broadcast buffers", with_buffers), ("average gradients", with_backward)):
            if count not in (0, len(active)):
                raise RuntimeError(
                    f"rank {group.rank}: within join(), {count} of the {len(active)} ranks that have inputs "
                    f"will {what} in this forward; use train(), eval(), no_sync() and no_grad() alike"
                )
        return Announcement(active, bool(with_buffers), bool(with_backward))


class UnevenInputs(Join):
    """`torch.distributed.algorithms.Join` over one model, which it leaves even if the loop raises."""

    def __init__(self, model: DataParallel, *args: Any, **kwargs: Any) -> None:
        super().__init__([model], *args, **kwargs)
        self._model = model

    def __exit__(self, *exception: Any) -> None:
        try:
            super().__exit__(*exception)
        finally:
            if self._model._uneven is not None:
                self._model._uneven.leave()


class ShadowHook(JoinHook):
    """What torch's `Join` calls on a rank without inputs."""

    def __init__(self, model: DataParallel, divide_by_initial_world_size: bool = True, **unknown: Any) -> None:
        if unknown:
            raise ValueError(
                f"join() has no option {', '.join(map(repr, unknown))}; it has 'divide_by_initial_world_size'"
            )
        self._model = model
        self._divide = divide_by_initial_world_size
        self._awaited = False
        model._uneven = self

    def announce(self, buffers: bool, backward: bool) -> int:
        """At the start of a forward on a rank with inputs. Gives the rank to copy buffers from.

        Raises:
            RuntimeError: the last forward announced a backward that never came; joined ranks wait for it.
        """
        model = self._model
        if self._awaited and model._reducer.pending:
            message = (
                f"rank {model._group.rank}: within join(), a forward was not followed by its backward; make "
                "extra forwards under model.no_sync() or torch.no_grad()"
            )
            model._group.abort(message)
            raise RuntimeError(message)
        work = Join.notify_join_context(model)
        if work is not None:
            work.wait()
        told = Announcement.exchange(model._group, model.join_device, False, buffers, backward)
        self.heed(told)
        self._awaited = told.backward
        return told.active[0]

    def heed(self, told: Announcement) -> None:
        """What the announcement means for the next backward: who leads, and by how many to divide."""
        reducer = self._model._reducer
        reducer.source = told.active[0]
        reducer.scale = 1.0 if self._divide else self._model._group.size / len(told.active)

    def main_hook(self) -> None:
        """Shadow one forward, and the backward that follows it."""
        model = self._model
        told = Announcement.exchange(model._group, model.join_device, joined=True)
        self.heed(told)
        if told.buffers:
            model._module_buffers.broadcast(told.active[0])
        if told.backward:
            model._reducer.shadow()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Give all ranks the weights of one that trained to the end, and leave the context."""
        model = self._model
        group = model._group
        last = torch.tensor([group.rank if is_last_joiner else -1], dtype=torch.int64, device=model.join_device)
        group.all_reduce(last, op="max")
        tensors = [p.detach() for p in model.module.parameters()] + model._module_buffers.tensors()
        replicas.broadcast(group, tensors, int(last), model._device)
        self.leave()

    def leave(self) -> None:
        """Outside the context all ranks have inputs."""
        model = self._model
        model._join_config = _JoinConfig.construct_disabled_join_config()
        model._uneven = None
        model._reducer.source, model._reducer.scale = 0, 1.0
