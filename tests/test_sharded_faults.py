"""A sharded model when something is wrong: what cannot work is refused by name; where a rank fails, all ranks hear."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import process_group, run_ranks, run_ranks_raw, store
from test_sharded_features import NO_CORE, Block, Net, assert_equal, by_rank_units, penalty, square
from torch import nn
from torch.utils.checkpoint import checkpoint

import distlib
from distlib.comm.work import CollectiveError
from distlib.sharded import MixedPrecision

SDP = distlib.ShardedDataParallel


def net(**options: Any) -> Any:
    return SDP(Net().double(), units=[Block], **options)


# ------------------------------------------------------------ refused at construction


class Tensor(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def refusals(rank: int, n: int, nodes: int) -> None:
    with process_group(rank, n):
        cases: list[tuple[Any, dict[str, Any], str]] = [
            (lambda: Tensor(torch.ones(2, dtype=torch.complex64)), {}, "'weight' is complex"),
            (lambda: nn.Sequential(nn.LazyLinear(3)), {}, r"'0\.weight' has no shape yet"),
            (lambda: nn.Sequential(nn.Embedding(3, 3, sparse=True)), {}, r"'0\.weight' would have sparse gradients"),
            (lambda: Tensor(torch.eye(3).to_sparse()), {}, "'weight' has layout"),
            (Net, {"partition_size": 3}, "partition_size=3 does not divide 2 ranks"),
            (Net, {"stage": 4}, "stage=4"),
            (Net, {"offload": "cpu"}, 'offload="cpu"'),
            (Net, {"units": [nn.LSTM]}, "no LSTM"),
            (Net, {"units": "none"}, "units='none'"),
            (Net, {"units": Block}, r'must be "auto" or a list of module classes, such as units=\[Block\]'),
            (lambda: nn.Linear, {}, r"module=.*must be a torch\.nn\.Module; make one: Linear\(\.\.\.\)"),
            (lambda: [nn.Linear(2, 2)], {}, r"must be a torch\.nn\.Module; of several, make one: torch\.nn\.Seq"),
            (Net, {"offload": True}, "offload=True: must be a folder"),
            (Net, {"mixed_precision": torch.bfloat16}, r"mixed_precision=torch\.bfloat16: must be a distlib\.Mixed"),
            (Net, {"mixed_precision": "bf16"}, r"mixed_precision='bf16': .*MixedPrecision\(param=torch\.bfloat16\)"),
            (Net, {"stage": 2, "ownership": "whole"}, "needs stage=1"),
            (Net, {"mixed_precision": MixedPrecision(torch.bfloat16), "stage": 5}, "stage=5"),
            (Net, {"reshard_after_forward": 2}, "reshard_after_forward=2"),
        ]
        if nodes == 1:
            cases += [
                (Net, {"gather_dtype": torch.int8}, "gather_dtype=torch.int8 has no effect"),
                (Net, {"hierarchical": True}, "hierarchical=True has no effect"),
            ]
        for make, options, said in cases:
            with pytest.raises(ValueError, match=said):
                SDP(make(), **options)
        square(net(), 0, rank).backward()  # the groups are as good as before


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=NO_CORE)])
def test_what_cannot_work_is_refused_at_construction(nodes: int) -> None:
    run_ranks(2, refusals, nodes, env={"DISTLIB_NODES": str(nodes)})


def differences(rank: int, n: int) -> None:
    with process_group(rank, n):
        pairs: list[tuple[list[dict[str, Any]], str]] = [
            ([{"stage": 1}, {"stage": 2}], "option stage: 1 on rank 0; 2 on rank 1"),
            ([{"partition_size": 1}, {"partition_size": 2}], "option partition_size: 1 on rank 0; 2 on rank 1"),
            ([{"prefetch": 1}, {"prefetch": 2}], "option prefetch"),
            ([{}, {"mixed_precision": MixedPrecision(torch.float16)}], "option mixed_precision"),
            ([{"shard_optimizer": "world"}, {}], "option shard_optimizer"),
        ]
        for options, said in pairs:
            with pytest.raises(RuntimeError, match=said):
                net(**options[rank])
        with pytest.raises(RuntimeError, match=r"parameter 1\.weight: shape \(3, 3\).* on rank 0; shape \(4, 3\)"):
            SDP(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3 + rank)))
        frozen = Net().double()
        frozen.last.weight.requires_grad_(rank == 0)
        with pytest.raises(RuntimeError, match=r"trained last\.weight: True on rank 0; False on rank 1"):
            SDP(frozen, units=[Block])
        with pytest.raises(RuntimeError, match="units"):
            SDP(Net(), units=[Block] if rank else "auto")
        square(net(), 0, rank).backward()


def test_ranks_that_differ_are_named() -> None:
    run_ranks(2, differences)


# ------------------------------------------------------------ refused in training


def misuse(rank: int, n: int, nodes: int) -> None:
    with process_group(rank, n):
        model = net()
        model.last.weight.requires_grad_(False)
        with pytest.raises(RuntimeError, match=r"'last\.weight' was frozen .*after wrapping: its place"):
            square(model, 0, rank)
        model.last.weight.requires_grad_(True)
        kept = model.last.bias
        model.last.bias = nn.Parameter(torch.zeros(7, dtype=torch.float64))
        with pytest.raises(RuntimeError, match=r"parameter 'last\.bias' was replaced"):
            square(model, 0, rank)
        model.last.bias = kept
        with pytest.raises(RuntimeError, match=r"checkpoint modules inside of it, not the wrapper"):
            x = torch.ones(2, 7, dtype=torch.float64, requires_grad=True)
            checkpoint(model, x, 0, rank, use_reentrant=False).sum().backward()
        square(model, 0, rank).backward()
        if nodes > 1:
            with pytest.raises(RuntimeError, match="create_graph=True"):
                penalty(model, 0, rank)
            square(model, 0, rank).backward()


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=NO_CORE)])
def test_misuse_in_training_is_refused_by_name(nodes: int) -> None:
    run_ranks(2, misuse, nodes, env={"DISTLIB_NODES": str(nodes)})


class Parts(nn.Sequential):
    """Its forward is never called: see the ways below."""

    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(7), nn.Linear(7, 7))

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self[1].weight)


def one_by_one(net: Any, x: torch.Tensor, *_: Any) -> torch.Tensor:
    for part in net.blocks[1]:
        x = part(x)
    return net.last(x)


def by_a_method(net: Any, x: torch.Tensor, *_: Any) -> torch.Tensor:
    return net.last(net.blocks[1].attend(x))


def the_norm_only(net: Any, x: torch.Tensor, *_: Any) -> torch.Tensor:
    return net.last(net.blocks[1][0](net.first(x)))


def a_mistake(net: Any, x: torch.Tensor, *_: Any) -> torch.Tensor:
    return net.last(net.blocks[0](x[:, :-1]))


def parts(way: Any, **options: Any) -> Any:
    return SDP(Net([Parts() for _ in range(2)], way).double(), **{"units": [Parts], **options})


def uncalled(rank: int, n: int, nodes: int) -> None:
    with process_group(rank, n):
        for stage in (1, 2, 3):
            inner = r"its part 'blocks\.1\.\d' \(.*\) ran, but the forward of 'blocks\.1' \(Parts\) was not called"
            for way, said in [
                (one_by_one, inner + r".* such as L.*, without Parts"),
                (by_a_method, r"another of its methods ran, but the forward of 'blocks\.1' \(Parts\)"),
            ]:
                with pytest.raises(RuntimeError, match=f"rank {rank}: .*{said}") as caught:
                    square(parts(way, stage=stage), 0, rank)
                assert caught.value.__cause__ is not None
            with pytest.raises(RuntimeError, match=r"normalized_shape|size mismatch|shapes") as caught:
                square(parts(a_mistake, stage=stage), 0, rank)  # a unit that is called: torch's own message
            assert caught.value.__cause__ is None
        square(net(), 0, rank).backward()


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=NO_CORE)])
def test_a_unit_that_is_not_called_is_named(nodes: int) -> None:
    run_ranks(2, uncalled, nodes, env={"DISTLIB_NODES": str(nodes)})


def gradient_of_a_piece(rank: int, n: int, stage: int) -> str:
    with process_group(rank, n):
        model = parts(the_norm_only, stage=stage, partition_size=1)  # pieces that look whole
        with pytest.raises(RuntimeError) as caught:
            square(model, 0, rank).backward()
        return str(caught.value)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gradient_that_would_not_be_averaged_is_named(stage: int) -> None:
    said = [str(o.value or o.text) for o in run_ranks_raw(2, gradient_of_a_piece, stage, timeout=40)]
    wanted = r"piece of 'blocks\.1\.0\.\w+' received a gradient.*Call the Parts itself"
    assert any(re.search(wanted, text) for text in said), said


def penalties(rank: int, n: int, together: bool) -> None:
    with process_group(rank, n):
        torch.manual_seed(0)
        plain = Net().double()
        torch.manual_seed(0)
        model = net()
        for step in range(3):
            for r in range(n):
                (square(plain, step, r) / n).backward()
            sum(p.square().sum() for p in plain.parameters()).backward()  # type: ignore[union-attr]
            loss = square(model, step, rank)
            own = sum(p.square().sum() for p in model.parameters())
            for each in [loss + own] if together else [loss, own]:
                each.backward()  # type: ignore[union-attr]
            for module in (plain, model):
                optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
                optimizer.step()
                optimizer.zero_grad()
        assert_equal(model, plain, "penalty")


@pytest.mark.parametrize("together", [False, True])
def test_penalties_on_pieces_are_no_mistake(together: bool) -> None:
    run_ranks(2, penalties, together)


def twice_in_reentrant_checkpoints(rank: int, n: int) -> str:
    with process_group(rank, n):
        model = net()

        def way(_: Any, x: torch.Tensor, *__: Any) -> torch.Tensor:
            x = model.first(x)
            for i in (0, 1, 2, 0):
                x = checkpoint(model.blocks[i], x, use_reentrant=True)
            return model.last(x)

        model.module.way = way
        with pytest.raises(RuntimeError) as caught:
            square(model, 0, rank).backward()
        return str(caught.value)


def test_a_unit_reused_in_reentrant_checkpoints_is_refused_by_name() -> None:
    said = [str(o.value or o.text) for o in run_ranks_raw(2, twice_in_reentrant_checkpoints, timeout=40)]
    assert any("received a second gradient" in text and "use_reentrant=False" in text for text in said), said
    # The first rank that raises ends the groups: another may hear of that instead.
    assert all("received a second gradient" in text or "backward stopped with an exception" in text for text in said)


# ------------------------------------------------------------ a rank that fails

TIMEOUT = 3.0  # seconds, where only the wait for the other rank can tell


def failing(rank: int, n: int, how: str) -> float:
    """Rank 1 fails in the second step. Others must raise; returns after how many seconds."""
    with process_group(rank, n):
        model = net()
        square(model, 0, rank).backward()
        if how == "one forward less":
            for group in filter(None, model.process_groups.values()):
                group.timeout = TIMEOUT
        bad = rank == 1

        def fail(*_: Any) -> None:
            if bad and how.startswith("raises"):
                raise KeyError("on purpose")
            if bad and how.startswith("killed"):
                os.kill(os.getpid(), signal.SIGKILL)

        if "forward" in how:
            model.blocks[1].register_forward_hook(fail)
        if "backward" in how:
            model.blocks[0].up.register_full_backward_hook(fail)
        start = time.monotonic()
        if bad and how == "one forward less":
            time.sleep(0.2)
        elif how == "one forward less":
            square(model, 1, rank)
        try:
            square(model, 1, rank).backward()
            square(model, 2, rank).backward()
        except CollectiveError as error:
            assert any(word in str(error) for word in ("rank 1", "rank 0")), error
            os.write(2, f"heard: {error}\n".encode())
            raise
        return time.monotonic() - start


FAULTS = ["raises in forward", "raises in backward", "killed in forward", "killed in backward", "one forward less"]


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=NO_CORE)])
@pytest.mark.parametrize("how", FAULTS)
def test_all_ranks_hear_of_a_rank_that_fails(how: str, nodes: int) -> None:
    env = {"DISTLIB_NODES": str(nodes)}
    outcomes = run_ranks_raw(2, failing, how, timeout=30, env=env)
    assert outcomes[0].kind == "exception", outcomes[0]
    assert "CollectiveError" in outcomes[0].text and "rank 1" in outcomes[0].text, outcomes[0]
    wanted = "signal" if "killed" in how else "exception"
    assert outcomes[1].kind == wanted, outcomes[1]
    assert all(outcome.seconds < 20 for outcome in outcomes)


def fails_at_the_end(rank: int, n: int, stage: int, how: str, path: str) -> list[list[float]]:
    """The last collectives of a backward fail. The module holds pieces again, and an emergency checkpoint is saved."""
    with process_group(rank, n):
        model, shared = net(stage=stage), store()
        square(model, 0, rank).backward()
        pieces = [(id(p), p.shape) for p in model.module.parameters()]

        def fail(*_: Any) -> None:
            shared.set(f"end/{rank}", "")
            shared.wait([f"end/{r}" for r in range(n)])  # whoever fails first tells the others
            raise KeyboardInterrupt if how == "interrupt" else CollectiveError("on purpose")

        model._runtime.reduction._synchronise = fail
        with pytest.raises(KeyboardInterrupt if how == "interrupt" else CollectiveError):
            square(model, 1, rank).backward()
        assert [(id(p), p.shape) for p in model.module.parameters()] == pieces
        distlib.save(path, model=model, step=2)
        return values(model)


def values(model: Any) -> list[list[float]]:
    return [p.flatten().tolist() for p in model.parameters()]


def loads(rank: int, n: int, stage: int, path: str) -> list[list[float]]:
    with process_group(rank, n):
        torch.manual_seed(1)
        model = net(stage=stage)
        assert distlib.load(path, model=model).step == 2
        return values(model)


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=NO_CORE)])
@pytest.mark.parametrize("how", ["error", "interrupt"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_backward_whose_end_fails_leaves_pieces(stage: int, how: str, nodes: int, tmp_path: Path) -> None:
    env, path = {"DISTLIB_NODES": str(nodes)}, str(tmp_path / "emergency")
    assert run_ranks(2, fails_at_the_end, stage, how, path, env=env) == run_ranks(2, loads, stage, path, env=env)


def another_way(rank: int, n: int) -> None:
    """Units of equal size in another order: gathers match in size, and their contents do not."""
    with process_group(rank, n):
        model = net(prefetch=0)
        model.module.way = another_order
        square(model, 0, rank).backward()


def another_order(model: Any, x: torch.Tensor, step: int, rank: int) -> torch.Tensor:
    x = model.first(x)
    for i in (0, 1, 2) if rank == 0 else (1, 0, 2):
        x = model.blocks[i](x)
    return model.last(x)


def fewer_units(rank: int, n: int) -> None:
    with process_group(rank, n):
        model = net(prefetch=0)
        model.module.way = by_rank_units
        for step in range(4):
            square(model, step, rank).backward()


@NO_CORE
def test_ranks_that_take_another_way_through_stage_3_over_hosts_are_told() -> None:
    for outcome in run_ranks_raw(2, another_way, timeout=30, env={"DISTLIB_NODES": "2"}):
        assert outcome.kind == "exception", outcome
        assert "way through the model in stage 3" in outcome.text, outcome
        assert "gather 1: blocks.0 on rank 0; blocks.1 on rank 1" in outcome.text, outcome
    for outcome in run_ranks_raw(2, fewer_units, timeout=30, env={"DISTLIB_NODES": "2"}):
        assert outcome.kind == "exception", outcome
        assert "CollectiveError" in outcome.text or "way through the model" in outcome.text, outcome
