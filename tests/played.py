"""The oracle of pipeline stages: parts played one after the other in one process, against the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distlib.pipeline.program import Program
from distlib.pipeline.record import record
from distlib.pipeline.stages import (
    Part,
    StageModule,
    cut,
    ghost,
    holdings,
    leaves_of,
)


class Played:
    """Parts on stages that are made of `module`, in one process."""

    def __init__(self, module: nn.Module, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.stages = [StageModule(module, held.names) for held in holdings(parts, module)]

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.sent: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        self.received: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        output = None
        for part, stage in zip(self.parts, self.stages, strict=True):
            for port in part.receives:
                tensors = self.sent[port.source, port.target]
                assert [(tuple(t.shape), t.dtype) for t in tensors] == [spec[:2] for spec in port.specs]
                self.received[port.source, port.target] = tuple(
                    t.detach().requires_grad_(spec.requires_grad) for t, spec in zip(tensors, port.specs, strict=True)
                )
            sends, output = stage(part, [self.received[p.source, p.target] for p in part.receives], args, kwargs)
            assert (output is not None) == part.last
            for port, tensors in zip(part.sends, sends, strict=True):
                self.sent[port.source, port.target] = tensors
        return output

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        for part in reversed(self.parts):
            tensors, gradients = [], []
            for port in reversed(part.sends):  # the furthest first, as in the whole model
                for k, spec in enumerate(port.specs):
                    gradient = self.received[port.source, port.target][k].grad
                    assert (gradient is not None) == spec.requires_grad, (port, k)  # never a gradient for nobody
                    if gradient is not None:
                        tensors.append(self.sent[port.source, port.target][k])
                        gradients.append(gradient)
            if tensors:
                torch.autograd.backward(tensors, gradients)


def loss_of(output: Any) -> Tensor:
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    return sum((t.double() * torch.linspace(-1, 2, t.numel()).view(t.shape)).sum() for t in tensors)


def recorded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], split: Any = "auto") -> Program:
    return record(ghost(module), args, kwargs, leaves_of(module, split))


def bounds(calls: int, stages: int) -> list[int]:
    return [k * stages // calls for k in range(calls)]


def assert_same(found: Any, wanted: Any, tolerance: float = 0.0) -> None:
    flat, spec = pytree.tree_flatten(found)
    expected, wanted_spec = pytree.tree_flatten(wanted)
    assert spec == wanted_spec
    for a, b in zip(flat, expected, strict=True):
        if not isinstance(b, Tensor):
            assert a == b
            continue
        assert a.dtype == b.dtype and a.requires_grad == b.requires_grad
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def compare(
    module: nn.Module, inputs: Callable[[], Any], split: Any = "auto", tolerance: float = 0.0, program: Any = None
) -> list[tuple[Part, ...]]:
    """Against the plain module, in every number of stages. Returns the parts of each."""
    program = program or recorded(module, *inputs(), split)
    calls = len(program.leaf_calls)
    plain = copy.deepcopy(module)
    torch.manual_seed(5)
    expected = plain(*inputs()[0], **inputs()[1])
    loss = loss_of(expected)
    if isinstance(loss, Tensor):
        loss.backward()
    found = []
    for stages in range(1, calls + 1):
        mine = copy.deepcopy(module)
        parts = cut(program, bounds(calls, stages), stages)
        played = Played(mine, parts)
        args, kwargs = inputs()
        torch.manual_seed(5)
        output = played.forward(args, kwargs)
        assert_same(output, expected)
        assert_same((args, kwargs), inputs())  # nothing was written to them
        if isinstance(loss, Tensor):
            played.backward(loss_of(output))
        for (name, a), b in zip(mine.named_parameters(), plain.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            if b.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=tolerance)
        assert_same(dict(mine.named_buffers()), dict(plain.named_buffers()))
        found.append(parts)
    return found
