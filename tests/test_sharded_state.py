"""Whole parameters in and out: state dicts, loading, summoning; attributes; what a wrapper leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import process_group, run_ranks
from sharded_models import adamw, loss_of, part_of, tiny
from test_sharded_features import NO_CORE, Block, Net, data, square
from torch import nn

import distlib
from distlib.sharded import MixedPrecision
from distlib.shards import shard_of

BF16 = MixedPrecision(torch.bfloat16)


def settings() -> list[dict[str, Any]]:
    return [
        {"stage": 3},
        {"stage": 1, "mixed_precision": BF16},
        {"stage": 3, "mixed_precision": BF16},
        {"stage": 3, "partition_size": 1},
        {"stage": 3, "partition_size": 1, "shard_optimizer": "world", "mixed_precision": BF16},
    ]


def assert_state(model: Any, want: dict[str, torch.Tensor]) -> None:
    have = model.full_state_dict()
    assert list(have) == list(want)
    assert all(torch.equal(have[name], value) for name, value in want.items())


def state(rank: int, n: int) -> None:
    with process_group(rank, n):
        for options in settings():
            mixed = "mixed_precision" in options
            source = tiny(seed=rank)  # rank 0's values count
            model: Any = distlib.ShardedDataParallel(source, **options)
            first, other = tiny(seed=0).state_dict(), tiny(seed=7).state_dict()
            assert_state(model, first)
            only = model.full_state_dict(rank0_only=True)
            assert list(only) == (list(first) if rank == 0 else [])
            assert list(model.state_dict()) == list(first)

            def output(m: Any = model) -> torch.Tensor:
                with torch.no_grad():
                    return m(part_of(0, 0, n)[0])

            def expected(values: dict[str, torch.Tensor], cast: bool = mixed) -> torch.Tensor:
                plain = tiny()
                plain.load_state_dict(values)
                plain = plain.bfloat16() if cast else plain
                with torch.no_grad():
                    return plain(part_of(0, 0, n)[0])

            if mixed:
                model.module.scale = torch.tensor(0.5)  # see test_sharded_precision
                for values in (first, other):
                    values["scale"] = torch.tensor(0.5)
                source.scale = torch.tensor(0.5)
            pieces = {name: value.clone() for name, value in model.state_dict().items()}
            before = output()
            model.load_state_dict(other)
            assert_state(model, other)
            assert not torch.equal(output(), before)
            model.load_state_dict(pieces)
            assert_state(model, first)
            assert torch.equal(output(), before)

            with model.summon_full_params():
                for name, p in model.named_parameters():
                    assert torch.equal(p, first[name]), name
                    with torch.no_grad():
                        p.copy_(other[name])
            assert_state(model, other)
            changed = output()
            assert not torch.equal(changed, before)
            with model.summon_full_params(writeback=False), torch.no_grad():
                model.head.weight.zero_()
            assert_state(model, other)
            assert torch.equal(output(), changed)
            if not mixed:
                torch.testing.assert_close(changed, expected(other), rtol=1e-6, atol=1e-6)

            optimizer = adamw(model.parameters())  # and it still trains
            loss_of(model, *part_of(0, rank, n)).backward()
            optimizer.step()
            assert not torch.equal(output(), changed)


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=NO_CORE)])
def test_whole_parameters_in_and_out(nodes: int) -> None:
    run_ranks(2, state, env={"DISTLIB_NODES": str(nodes)})


def summoned(rank: int, n: int, stage: int) -> None:
    with process_group(rank, n):
        plain = tiny()
        tokens = part_of(0, 0, n)[0]
        model: Any = distlib.ShardedDataParallel(tiny(), stage=stage)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="was called itself.*summon_full_params"):
                model.module(tokens)
            with model.summon_full_params(writeback=False):
                with pytest.raises(RuntimeError, match="gradients would stay on copies"):
                    model(tokens)
                with torch.no_grad():
                    expected = plain(tokens)
                    if rank == 0:  # alone, again and again
                        for _ in range(3):
                            torch.testing.assert_close(model.module(tokens), expected)
                            torch.testing.assert_close(model(tokens), expected)
                    model.head.weight.mul_(2)  # computes with what was written, which is not kept
                    plain.head.weight.mul_(2)
                    torch.testing.assert_close(model.module(tokens), plain(tokens))
                    plain.head.weight.div_(2)
            torch.testing.assert_close(model(tokens).detach(), expected)
            loss_of(model, *part_of(0, rank, n)).backward()
            model.zero_grad()


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=NO_CORE)])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_summoned_computes_alone(stage: int, nodes: int) -> None:
    run_ranks(2, summoned, stage, env={"DISTLIB_NODES": str(nodes)})


def refusals(rank: int, n: int) -> None:
    with process_group(rank, n):
        model: Any = distlib.ShardedDataParallel(tiny())
        wrong = {**tiny().state_dict(), "head.weight": torch.zeros(2, 2)}
        with pytest.raises(ValueError, match=r"'head.weight': a tensor of shape \(2, 2\).*shape \(17, 13\)"):
            model.load_state_dict(wrong)
        with pytest.raises(ValueError, match="assign=True"):
            model.load_state_dict(tiny().state_dict(), assign=True)
        with pytest.raises(RuntimeError, match="unknown"):
            model.load_state_dict({**tiny().state_dict(), "unknown": torch.zeros(1)})
        for change in (lambda: model.to(torch.float64), model.half, lambda: model.to("meta")):
            with pytest.raises(RuntimeError, match=r"'scalar' cannot go from torch.float32 on cpu"):
                change()
        model.to("cpu").float()
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            __import__("copy").deepcopy(model)


def test_what_cannot_be_loaded_or_moved_is_refused_by_name() -> None:
    run_ranks(2, refusals)


def attributes(rank: int, n: int) -> None:
    """Attributes of parameters stay; nothing but the pieces is between the user and the module."""
    with process_group(rank, n):
        net = Net().double()
        net.last.weight.decay = "none"
        model: Any = distlib.ShardedDataParallel(net, units=[Block])
        assert model.last.weight.decay == "none" and model.way is net.way
        for step in range(2):
            square(model, step, rank).backward()
        assert model.last.weight.decay == "none"
        inside: list[Any] = []
        model.blocks[0].register_forward_pre_hook(lambda block, _: inside.append(block.up.weight.shape))
        square(model, 0, rank)
        assert inside == [torch.Size([11, 7])]
        assert model.blocks[0].up.weight.dim() == 1
        shard = shard_of(model.blocks[0].up.weight)
        assert shard is not None and (shard.name, shard.shape) == ("blocks.0.up.weight", torch.Size([11, 7]))


def test_attributes_and_names() -> None:
    run_ranks(2, attributes)


def gone(rank: int, n: int) -> None:
    with process_group(rank, n):
        net = Net().double()
        model: Any = distlib.ShardedDataParallel(net, units=[Block])
        full = model.full_state_dict()
        del model
        with pytest.raises(RuntimeError, match=r"ShardedDataParallel that is gone.*full_state_dict"):
            net.blocks[0](data(0, rank))
        fresh = Net().double()
        fresh.load_state_dict(full)
        again: Any = distlib.ShardedDataParallel(fresh, units=[Block], stage=2)
        square(again, 0, rank).backward()
        with pytest.raises(ValueError, match="wrapped in ShardedDataParallel already"):
            distlib.ShardedDataParallel(nn.Sequential(again))


def test_a_module_whose_wrapper_is_gone_says_so() -> None:
    run_ranks(2, gone)


def statistics(rank: int, n: int) -> None:
    """Running statistics begin as rank 0's, and are each rank's own, as in training without a wrapper."""
    with process_group(rank, n):
        net = nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4)).double()
        net[1].running_mean.fill_(float(rank))
        model: Any = distlib.ShardedDataParallel(net)
        assert torch.equal(model.module[1].running_mean, torch.zeros(4, dtype=torch.float64))
        model(data(0, rank)).sum().backward()
        plain = nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4)).double()
        values = model.full_state_dict()
        plain.load_state_dict({**values, "1.running_mean": torch.zeros(4), "1.running_var": torch.ones(4)})
        plain(data(0, rank))
        assert torch.allclose(plain[1].running_mean, values["1.running_mean"])


def test_running_statistics_are_a_ranks_own() -> None:
    run_ranks(2, statistics)


# ------------------------------------------------------------ nothing to train


UNTRAINED: list[Callable[[], nn.Module]] = [
    nn.Tanh,
    lambda: nn.BatchNorm1d(3, affine=False),
    lambda: nn.Linear(3, 3).requires_grad_(False),
]


def untrained(rank: int, n: int, stages: tuple[int, ...]) -> None:
    with process_group(rank, n):
        for stage in stages:
            for make in UNTRAINED:
                model = distlib.ShardedDataParallel(make(), stage=stage)
                x = torch.randn(4, 3, requires_grad=True)
                with model.no_sync():
                    model(x).sum().backward()
                model.hold()
                model(x).sum().backward()
                model.release()
                with torch.no_grad():
                    model(x)
                with model.partial_backward():
                    model(x).sum().backward()
                with model.weight_backward():
                    pass
                assert x.grad is not None and model.clip_grad_norm_(1.0) == 0
                assert list(model.full_state_dict()) == list(model.state_dict()) == list(make().state_dict())
                model.load_state_dict(model.full_state_dict())
                with model.summon_full_params():
                    assert sum(p.numel() for p in model.parameters()) in (0, 12)
                assert model.memory_report().counted["gradients"] == 0


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=NO_CORE)])
@pytest.mark.parametrize("n", [1, 2])
def test_a_module_without_trained_parameters_runs(n: int, nodes: int) -> None:
    run_ranks(n, untrained, (1, 2, 3), env={"DISTLIB_NODES": str(min(n, nodes))})


def hooked(rank: int, n: int) -> None:
    with process_group(rank, n):
        module = tiny()
        module.head.weight.register_hook(lambda gradient: gradient * 2)
        with pytest.warns(UserWarning, match="hooks on the parameters 'embed.weight' will not run"):
            distlib.ShardedDataParallel(module)


def test_hooks_on_parameters_are_warned_of() -> None:
    run_ranks(1, hooked)
