"""What a sharded module holds when: whole parameters during the forward of a unit, pieces at all other times."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from ranks import process_group, run_ranks
from test_sharded_features import NO_CORE
from torch import nn

import distlib
from distlib.shards import shard_of

SDP = distlib.ShardedDataParallel
COUNT = 40  # blocks so small that they are one unit


class Counting(dict[str, Any]):
    """A module's parameters, which counts how often one is put in its place."""

    puts = 0

    def __setitem__(self, key: str, value: Any) -> None:
        Counting.puts += 1
        super().__setitem__(key, value)


class Small(nn.Module):
    """Calls its blocks in the order of `order`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(COUNT))
        self.last = nn.Linear(4, 4)
        self.order = list(range(COUNT))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in self.order:
            x = torch.tanh(x + self.blocks[i](x))
        return self.last(x)


def in_pieces(model: Any) -> bool:
    """Whether all that the module holds are pieces."""
    return all(shard_of(p) is not None for p in model.module.parameters())


def whole(model: Any, name: str) -> torch.Tensor:
    return model.full_state_dict()[name]


def counted(rank: int, n: int) -> None:
    with process_group(rank, n):
        module = Small()
        for part in module.modules():
            part._parameters = Counting(part._parameters)
        model = SDP(module, stage=3)
        assert len(list(model.parameters())) == 2 * (COUNT + 1)
        for training in (True, False):
            Counting.puts = 0
            with torch.set_grad_enabled(training):
                out = model(torch.ones(2, 4))
            assert in_pieces(model)
            assert Counting.puts == 2 * 2 * (COUNT + 1)  # each parameter whole once, and a piece once
            if training:
                out.sum().backward()
                assert in_pieces(model)


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=NO_CORE)])
def test_a_forward_puts_each_parameter_of_a_joined_unit_in_its_place_twice(nodes: int) -> None:
    run_ranks(2, counted, env={"DISTLIB_NODES": str(nodes)})


def each_way(rank: int, n: int) -> None:
    with process_group(rank, n):
        module = Small()
        model: Any = SDP(module, stage=3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.ones(2, 4)
        ways = {
            "all": list(range(COUNT)),
            "the last first": list(range(COUNT))[::-1],
            "without the last": list(range(COUNT - 1)),
            "some twice": [0, 3, 3, 0, COUNT - 1, 0],
        }
        for way, order in ways.items():
            module.order = order
            with model.summon_full_params(writeback=False), torch.no_grad():
                expected = module(x)
            assert in_pieces(model), way
            with torch.no_grad():
                torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6, msg=way)
            assert in_pieces(model), way
            before = whole(model, "blocks.0.weight")
            model(x).square().mean().backward()
            assert in_pieces(model), way
            optimizer.step()
            optimizer.zero_grad()
            assert not torch.equal(whole(model, "blocks.0.weight"), before), way


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=NO_CORE)])
def test_pieces_are_back_whichever_modules_of_a_unit_were_called(nodes: int) -> None:
    run_ranks(2, each_way, env={"DISTLIB_NODES": str(nodes)})


def raising(rank: int, n: int) -> None:
    with process_group(rank, n):
        model: Any = SDP(Small(), stage=3)
        x = torch.ones(2, 4)

        def fail(*_: Any) -> None:
            raise ValueError("a hook of the model's own")

        for place in (model.module.blocks[7], model.module.blocks[COUNT - 1], model.module.last):
            for register in (place.register_forward_hook, place.register_forward_pre_hook):
                hook = register(fail)
                for grad in (True, False):
                    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="a hook of the model's own"):
                        model(x)
                    assert in_pieces(model)
                hook.remove()
        model(x).sum().backward()
        with contextlib.suppress(ZeroDivisionError), model.summon_full_params(writeback=False):
            assert not in_pieces(model)
            model.module.blocks[1](x)
            assert model.module.blocks[1].weight.shape == (4, 4)
            raise ZeroDivisionError
        assert in_pieces(model)
        model.module.blocks[1](x)  # outside of a forward of the model
        assert in_pieces(model)


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=NO_CORE)])
def test_pieces_are_back_after_an_exception(nodes: int) -> None:
    run_ranks(2, raising, env={"DISTLIB_NODES": str(nodes)})


class Between(Small):
    """Reads a parameter of a unit after its module's forward, while others of the same unit are still to come."""

    def forward(self, x: torch.Tensor) -> Any:
        x = self.blocks[0](x)
        penalty = self.blocks[0].weight.square().sum()
        for block in self.blocks[1:]:
            x = x + block(x)
        return self.last(x), penalty


def between(rank: int, n: int) -> None:
    with process_group(rank, n):
        out, penalty = SDP(Between(), stage=3)(torch.ones(2, 4))
        with pytest.raises(
            RuntimeError, match=rf"rank {rank}: this rank's piece of 'blocks\.0\.weight' received a grad"
        ):
            (out.sum() + penalty).backward()


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=NO_CORE)])
def test_what_is_read_between_two_modules_of_a_unit_is_a_piece(nodes: int) -> None:
    """Whole it would be gone in the backward, where memory is freed."""
    run_ranks(2, between, env={"DISTLIB_NODES": str(nodes)})


class Chain(nn.Module):
    """Calls the next of its kind, which is a module of the same unit, and then itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.next: list[nn.Module] = []  # no child

    def forward(self, x: torch.Tensor, again: bool = True) -> torch.Tensor:
        x = torch.tanh(self.linear(x))
        for other in self.next:
            x = other(x)
        return self.linear(self(x, False) if again else x)


def nested(rank: int, n: int) -> None:
    with process_group(rank, n):
        torch.manual_seed(0)
        blocks = [Chain() for _ in range(3)]
        blocks[0].next = [blocks[1]]
        plain = nn.Sequential(*blocks, nn.Linear(4, 2))
        x = torch.ones(2, 4)
        expected = plain(x)
        expected.sum().backward()
        gradient = blocks[1].linear.weight.grad
        model = SDP(nn.Sequential(plain), stage=3)
        out = model(x)
        torch.testing.assert_close(out, expected)
        assert in_pieces(model)
        out.sum().backward()
        assert in_pieces(model)
        found = dict(model.named_parameters())["0.1.linear.weight"]
        shard = shard_of(found)
        assert shard is not None and gradient is not None
        own = gradient.view(-1)[shard.offset : shard.offset + shard.numel]
        torch.testing.assert_close(found.grad if shard.numel else own, own)


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=NO_CORE)])
def test_modules_of_a_unit_may_call_each_other_and_themselves(nodes: int) -> None:
    run_ranks(2, nested, env={"DISTLIB_NODES": str(nodes)})


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.up(x))


def compiled(rank: int, n: int, what: str) -> None:
    with process_group(rank, n):
        losses = []
        for compiles in (False, True):
            torch.manual_seed(0)
            blocks: list[Any] = [Scaled() for _ in range(3)]
            if compiles and what == "blocks":
                blocks = [torch.compile(block, backend="aot_eager") for block in blocks]
            model = SDP(nn.Sequential(*blocks, nn.Linear(8, 2)), units=[type(blocks[0])])
            run = torch.compile(model, backend="aot_eager") if compiles and what == "wrapper" else model
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            for step in range(3):
                loss = run(torch.full((2, 8), step + 1.0)).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        assert losses[:3] == pytest.approx(losses[3:], rel=1e-5) and losses[0] != losses[2]


@pytest.mark.parametrize("what", ["wrapper", "blocks"])
@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=NO_CORE)])
def test_compiled_it_trains_the_same(nodes: int, what: str) -> None:
    run_ranks(2, compiled, what, env={"DISTLIB_NODES": str(nodes)}, timeout=90)
