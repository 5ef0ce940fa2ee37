"""Gradients of a sharded model between steps: micro-steps, zeroing in between, clipping, several models."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ranks import process_group, run_ranks
from test_sharded_features import NO_CORE, Block, Net, adamw, assert_equal, by_rank, data, square, straight
from torch import nn

import distlib


def pair(**options: Any) -> tuple[nn.Module, Any]:
    """The plain module, and the sharded one with the same values."""
    torch.manual_seed(0)
    plain = Net(way=options.pop("way", straight)).double()
    torch.manual_seed(0)
    return plain, distlib.ShardedDataParallel(Net(way=plain.way).double(), units=[Block], **options)


def whole_gradients(plain: nn.Module, model: Any) -> Iterator[tuple[str, torch.Tensor | None, torch.Tensor | None]]:
    """By parameter: the plain gradient's part that this rank holds, and the piece's."""
    for (name, want), piece in zip(plain.named_parameters(), model.parameters(), strict=True):
        shard = distlib.shards.shard_of(piece)
        part = None if want.grad is None else want.grad.view(-1)[shard.offset : shard.offset + shard.numel]
        yield name, part, piece.grad


def assert_gradients(plain: nn.Module, model: Any, what: object) -> None:
    for name, want, have in whole_gradients(plain, model):
        assert (want is None) == (have is None), (what, name)
        if want is not None and have is not None:
            close = torch.allclose(have.view(-1), want, rtol=1e-9, atol=1e-12)
            assert close, f"{what}, {name}: {have.view(-1)} is not {want}"


def backwards(plain: nn.Module, model: Any, rank: int, n: int, step: int, sync: bool = True, scale: float = 1) -> None:
    """One backward of both."""
    for r in range(n):
        (square(plain, step, r) * scale / n).backward()
    if sync:
        (square(model, step, rank) * scale).backward()
        return
    with model.no_sync():
        (square(model, step, rank) * scale).backward()


def micro_steps(rank: int, n: int, plain: nn.Module, model: Any) -> None:
    """Two windows of three micro-steps and an optimizer step."""
    optimizers = [adamw(plain.parameters()), adamw(model.parameters())]
    for step in range(0, 6, 3):
        for micro in range(3):
            backwards(plain, model, rank, n, step + micro, sync=micro == 2, scale=1 / 3)
        assert_gradients(plain, model, "micro-steps")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(model, plain, "micro-steps")


def zeroed(rank: int, n: int, plain: nn.Module, model: Any) -> None:
    """zero_grad between micro-steps, after a first window whose gradients were kept or dropped."""
    for keep in (True, False):
        for none in (True, False):
            backwards(plain, model, rank, n, 0)
            if not keep:
                plain.zero_grad()
                model.zero_grad()
            backwards(plain, model, rank, n, 1, sync=False)
            plain.zero_grad(set_to_none=none)
            model.zero_grad(set_to_none=none)
            backwards(plain, model, rank, n, 2, sync=False)
            backwards(plain, model, rank, n, 3)
            assert_gradients(plain, model, f"zeroed, keep={keep}, set_to_none={none}")
            plain.zero_grad()
            model.zero_grad()


def zeroed_in_part(rank: int, n: int, plain: nn.Module, model: Any) -> None:
    """One module's gradients are dropped between micro-steps."""
    backwards(plain, model, rank, n, 0, sync=False)
    for module in (plain.blocks[1], plain.last, model.blocks[1], model.last):
        module.zero_grad()
    backwards(plain, model, rank, n, 1)
    assert_gradients(plain, model, "zeroed in part")


def kept(rank: int, n: int, plain: nn.Module, model: Any) -> None:
    """Backwards that average, one after the other, without zero_grad; then a gradient that the user made."""
    for step in range(3):
        backwards(plain, model, rank, n, step)
    assert_gradients(plain, model, "kept")
    for (_, want), piece in zip(plain.named_parameters(), model.parameters(), strict=True):
        want.grad, piece.grad = torch.ones_like(want), torch.ones_like(piece)
    backwards(plain, model, rank, n, 3)
    assert_gradients(plain, model, "a gradient of the user's")


def summed_losses(rank: int, n: int, plain: nn.Module, model: Any) -> None:
    for r in range(n):
        (sum(square(plain, step, r) for step in range(3)) / n).backward()
    sum(square(model, step, rank) for step in range(3)).backward()
    assert_gradients(plain, model, "losses summed")


def clipped(rank: int, n: int, plain: nn.Module, model: Any) -> None:
    for norm_type in (2.0, 1.0, float("inf")):
        for limit in (0.01, 1e6):
            backwards(plain, model, rank, n, 0)
            want = nn.utils.clip_grad_norm_(plain.parameters(), limit, norm_type)
            have = model.clip_grad_norm_(limit, norm_type)
            torch.testing.assert_close(have, want, rtol=1e-9, atol=0)
            assert_gradients(plain, model, f"clipped to {limit} by {norm_type}")
            plain.zero_grad()
            model.zero_grad()
    with model.no_sync():
        square(model, 0, rank).backward()
    with pytest.raises(RuntimeError, match=r"not\s+averaged yet"):
        model.clip_grad_norm_(1.0)
    square(model, 0, rank).backward()
    next(p for p in model.parameters() if p.numel()).grad.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="nan"):
        model.clip_grad_norm_(1.0, error_if_nonfinite=True)


def changed_in_a_window(rank: int, n: int, plain: nn.Module, model: Any) -> None:
    """Sums that are not finished cannot be scaled: the next micro-step says so."""
    with model.no_sync():
        square(model, 0, rank).backward()
    for piece in model.parameters():
        piece.grad.copy_(torch.ones_like(piece))
    with pytest.raises(RuntimeError, match=r"grad of .* was changed between\s+micro-steps"):
        square(model, 1, rank).backward()
    model.zero_grad()
    plain.zero_grad()
    backwards(plain, model, rank, n, 2)
    assert_gradients(plain, model, "after a refused micro-step")


SCENES = [micro_steps, zeroed, zeroed_in_part, kept, summed_losses, clipped, changed_in_a_window]


def every_scene(rank: int, n: int, settings: list[dict[str, Any]], names: list[str]) -> None:
    with process_group(rank, n):
        for options in settings:
            for scene in SCENES:
                if not names or scene.__name__ in names:
                    plain, model = pair(**options)
                    try:
                        scene(rank, n, plain, model)
                    except AssertionError as error:
                        raise AssertionError(f"{scene.__name__} {options}: {error}") from error


def some_ranks_only(rank: int, n: int, settings: list[dict[str, Any]]) -> None:
    """Parameters that only some ranks use, with micro-steps and zeroing."""
    with process_group(rank, n):
        for options in settings:
            for scene in (micro_steps, zeroed, kept):
                plain, model = pair(way=by_rank, **options)
                scene(rank, n, plain, model)


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=NO_CORE)])
def test_gradients_between_steps(nodes: int) -> None:
    env = {"DISTLIB_NODES": str(nodes)}
    run_ranks(2, every_scene, [{"stage": stage} for stage in (1, 2, 3)], [], timeout=120, env=env)
    settings = [{"stage": 3, "partition_size": 1}, {"stage": 1, "partition_size": 1}]
    run_ranks(2, every_scene, settings, ["micro_steps", "zeroed", "clipped"], timeout=120, env=env)


def test_gradients_between_steps_with_replicas() -> None:
    kinds = [(3, "world"), (1, "world"), (3, "partition")]
    settings = [{"stage": s, "partition_size": 2, "shard_optimizer": o} for s, o in kinds]
    run_ranks(4, every_scene, settings, ["micro_steps", "zeroed", "zeroed_in_part", "clipped"], timeout=120)


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=NO_CORE)])
def test_parameters_of_some_ranks_only(nodes: int) -> None:
    run_ranks(2, some_ranks_only, [{"stage": s} for s in (1, 2, 3)], timeout=60, env={"DISTLIB_NODES": str(nodes)})


# ------------------------------------------------------------ two models


def adversaries(rank: int, n: int, stage: int) -> None:
    """A generator and a critic, each with its optimizer: the critic's gradients of the generator's step are dropped."""
    with process_group(rank, n):
        generators, critics = pair(stage=stage), pair(stage=stage, partition_size=1)
        optimizers = [[adamw(m.parameters()) for m in models] for models in (generators, critics)]
        for step in range(3):
            for kind, (make, judge) in enumerate(zip(generators, critics, strict=True)):
                shares = range(n) if kind == 0 else [rank]
                for fool in (False, True):
                    for r in shares:
                        fake = make(data(step, r), step, r)
                        real = judge(data(step, r, 1), step, r)
                        verdict = judge(fake if fool else fake.detach(), step, r)
                        loss = verdict.square().mean() if fool else (real - 1).square().mean() - verdict.mean()
                        (loss / len(shares)).backward()
                    (optimizers[0] if fool else optimizers[1])[kind].step()
                    for models in (generators, critics):
                        models[kind].zero_grad()
        for plain, model in (generators, critics):
            assert_equal(model, plain, "adversaries", rtol=1e-7)


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=NO_CORE)])
def test_two_models_with_two_optimizers(nodes: int) -> None:
    run_ranks(2, adversaries, 3, timeout=60, env={"DISTLIB_NODES": str(nodes)})


# ------------------------------------------------------------ parameter groups, schedules


def groups_and_schedules(rank: int, n: int) -> None:
    with process_group(rank, n):
        plain, model = pair()
        kinds: list[Any] = [plain, model]
        optimizers, schedules = [], []
        for m in kinds:
            decay = [p for name, p in m.named_parameters() if name.endswith("weight") and "blocks" in name]
            rest = [p for name, p in m.named_parameters() if not (name.endswith("weight") and "blocks" in name)]
            optimizer = torch.optim.AdamW(
                [{"params": decay, "weight_decay": 0.3}, {"params": rest, "lr": 1e-3}], lr=0.02, foreach=True
            )
            optimizers.append(optimizer)
            schedules.append(torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=6))
        for step in range(4):
            backwards(plain, model, rank, n, step)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        assert_equal(model, plain, "groups")
        last = list(model.blocks[2].down.parameters())
        torch.optim.SGD(last, lr=0.0)
        assert [distlib.shards.shard_of(p).name for p in last] == ["blocks.2.down.weight", "blocks.2.down.bias"]


def test_parameter_groups_and_schedules() -> None:
    run_ranks(2, groups_and_schedules)


def steps_after_a_logged_forward(rank: int, n: int, options: dict[str, Any]) -> None:
    """backward, a forward with gradients that nobody uses, step: no rank writes while another still reads, and nothing
    that the forward kept is taken for the parameters of the next step."""
    with process_group(rank, n):
        plain, model = pair(**options)
        optimizers = [adamw(plain.parameters()), adamw(model.parameters())]
        if rank == 0:  # what it reads after that is the last rank's
            model.blocks[2].register_forward_hook(lambda *_: time.sleep(0.05))
        for step in range(4):
            backwards(plain, model, rank, n, step)
            before = square(model, 50, 0).detach()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            lowest, highest = before.clone(), before.clone()
            torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
            assert lowest == highest, "a rank saw parameters that another was writing"
        assert_equal(model, plain, "steps after a logged forward")


def test_no_rank_writes_while_another_reads() -> None:
    run_ranks(2, steps_after_a_logged_forward, {"stage": 3})


@NO_CORE
def test_what_a_forward_kept_is_not_taken_for_the_next_step() -> None:
    options = {"stage": 3, "reshard_after_forward": 2}
    run_ranks(4, steps_after_a_logged_forward, options, env={"DISTLIB_NODES": "2"})
