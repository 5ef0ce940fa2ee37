"""The graph walk of a split backward: weights that it must not defer."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional

from distlib.pipeline.split_backward import WeightQueue, prepare


class ComputesItsWeight(nn.Module):
    """A weight that is computed once, and used on two ways that do not lie behind each other."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.v = nn.Parameter(torch.randn(6, 1)), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.g * self.v
        return functional.linear(x, weight) + functional.linear(torch.tanh(x), weight)


def test_a_computed_weight_with_two_users_comes_in_the_input_pass() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 6), ComputesItsWeight(), nn.Linear(6, 6))
    module = copy.deepcopy(plain)
    report, x = prepare(module), torch.randn(4, 6)
    plain(x).square().sum().backward()
    queue = WeightQueue(report)
    queue.backward(module(x).square().sum())
    queue.run()
    assert set(queue.kept.values()) == {"computed once from its parameter, used several times"}
    for (name, a), b in zip(plain.named_parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-6, atol=1e-6, msg=name)
