"""Habits of a script for whole parameters that pieces turn into silent mistakes: each is refused, or warned of."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from ranks import process_group, run_ranks, run_ranks_raw
from torch import nn
from torch.nn.utils import clip_grad_norm_  # as a script imports it: before anything is wrapped

import distlib

SDP = distlib.ShardedDataParallel
X = torch.arange(16.0).view(2, 8) / 8


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


# ------------------------------------------------------------ an optimizer made too early


def made_before(rank: int, n: int) -> None:
    with process_group(rank, n):
        for stage in (1, 2, 3):
            for make in (torch.optim.SGD, distlib.optim.AdamW):
                module = net()
                early = make(module.parameters(), lr=0.1)
                model = SDP(module, stage=stage)
                model(X).sum().backward()
                with pytest.raises(RuntimeError, match=rf"this {make.__name__} has the parameters .* Wrap first, then"):
                    early.step()
                before = model.full_state_dict()["0.weight"]
                make(model.parameters(), lr=0.1).step()  # the other optimizers are as good as ever
                assert not torch.equal(model.full_state_dict()["0.weight"], before)
        del model
        gc.collect()
        early.step()  # nothing is wrapped any more: what others do with these tensors is theirs


@pytest.mark.parametrize("n", [1, 2])
def test_an_optimizer_of_the_parameters_before_is_refused(n: int) -> None:
    run_ranks(n, made_before)


# ------------------------------------------------------------ clipping by torch


def clipping(rank: int, n: int) -> None:
    with process_group(rank, n):
        plain = net()
        plain(X).sum().backward()
        want = clip_grad_norm_(plain.parameters(), 0.3)
        for options in ({"stage": 3}, {"stage": 1, "ownership": "whole"}):
            model = SDP(net(), **options)  # type: ignore[arg-type]
            model(X).sum().backward()
            grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            for clip in (clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
                said = r"this rank's piece of '0\.weight': it takes the norm .*Call model\.clip_grad_norm_\(max_norm\)"
                with pytest.raises(RuntimeError, match=said):
                    clip(model.parameters(), 0.3)
            with pytest.raises(RuntimeError, match=r"piece of '2\.bias'"):
                clip_grad_norm_(list(model.parameters())[-1], 0.3)
            after = [p.grad for p in model.parameters() if p.grad is not None]
            assert all(torch.equal(a, b) for a, b in zip(grads, after, strict=True))  # nothing was scaled
            assert model.clip_grad_norm_(0.3).item() == pytest.approx(want.item(), rel=1e-5)
        alone = SDP(net(), partition_size=1)  # this rank's pieces are all there is
        alone(X).sum().backward()
        assert clip_grad_norm_(alone.parameters(), 0.3).item() == pytest.approx(want.item(), rel=1e-5)
        again = net()  # whole parameters are clipped as ever, a generator or one tensor too
        again(X).sum().backward()
        assert torch.equal(clip_grad_norm_(iter(list(again.parameters())), 0.3), want)
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(again.parameters(), plain.parameters(), strict=True))
        assert clip_grad_norm_(again[0].weight, 100.0) > 0


def test_clipping_by_torch_is_refused_on_pieces() -> None:
    run_ranks(2, clipping)


# ------------------------------------------------------------ saving pieces


def saving(rank: int, n: int) -> None:
    with process_group(rank, n):
        model = SDP(net())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.full_state_dict()
        with pytest.warns(UserWarning, match=r"this rank's pieces: .* call full_state_dict\(\) on all ranks") as seen:
            pieces = model.state_dict()
            model.state_dict()
        assert len(seen) == 1 and seen[0].filename == __file__
        assert list(pieces) == list(net().state_dict())
        model.load_state_dict(pieces)
        with pytest.raises(
            TypeError, match=r"distlib\.save\(path, model=model\) on all ranks, or .*full_state_dict\(\)"
        ):
            copy.deepcopy(model)
        with pytest.raises(TypeError, match=r"pickle or copy its \.module, or save its state_dict\(\)"):
            copy.deepcopy(distlib.DataParallel(net()))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            whole = SDP(net(), partition_size=1).state_dict()  # all of the model is here
        assert whole["0.weight"].numel() == 64


def test_a_state_dict_of_pieces_says_so() -> None:
    run_ranks(2, saving)


# ------------------------------------------------------------ sparse gradients


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(8, 4))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens, self.table, sparse=True)


def sparse(rank: int, n: int) -> None:
    with process_group(rank, n):
        for stage in (1, 2, 3):
            model = SDP(Sparse(), stage=stage)
            with pytest.raises(RuntimeError, match=rf"rank {rank}: parameter 'table' received a sparse .*sparse=False"):
                model(torch.tensor([1, 2])).sum().backward()


def test_sparse_gradients_are_refused_by_name() -> None:
    run_ranks(2, sparse)


# ------------------------------------------------------------ a forward of one rank


def alone(rank: int, n: int) -> str:
    with process_group(rank, n, timeout=3):
        model = SDP(net())
        names = {role: group and group.name for role, group in model.process_groups.items()}
        assert names == {
            "world": "world",
            "partition": "partition of ranks 0-1",
            "reduction": "reduction of ranks 0-1",
            "replication": None,
        }
        assert {"partition of ranks 0-1", "world"} <= {row.group for row in distlib.ledger().rows}
        if rank == 0:
            model(X)
        else:
            torch.distributed.barrier()
        return ""


def test_a_forward_of_one_rank_says_what_every_rank_must_do() -> None:
    first, _ = run_ranks_raw(2, alone)
    assert "'partition of ranks 0-1'" in first.text
    assert "Every rank must run the same forwards of ShardedDataParallel; for one rank alone enter summ" in first.text
