"""`shape_header=True`: the rank of the first stage has the batch, and the others are told what it looks like."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pipeline_models import CASES, Case, reference_step
from ranks import run_ranks, run_ranks_raw
from torch import Tensor

import distlib
from distlib import native
from distlib.comm.work import CollectiveError
from distlib.pipeline.micro_batches import Whole, divide
from distlib.pipeline.shape_header import Like, Looks

ROWS, MICRO = 7, 3
CPU = torch.device("cpu")


def piped(case: Case, schedule: str = "1f1b", **options: Any) -> distlib.PipelineParallel:
    return distlib.PipelineParallel(
        case.made(),
        schedule=schedule,
        microbatches=MICRO,
        loss_fn=case.loss,
        example_inputs=case.batch(ROWS, 0)[0],
        costs="estimated",
        **{"shape_header": True, **options},
    )


# ---------------------------------------------------------------- descriptions


def test_micro_batches_of_a_description_look_like_those_that_were_described() -> None:
    x = torch.randn(5, 4, 6).transpose(1, 2).requires_grad_()
    inputs = {"x": x, "again": Whole(x), "mask": torch.ones(5, dtype=torch.bool), "power": 2.5, "none": None}
    given = divide(inputs, {"y": torch.arange(5), "name": "z"}, 2)
    looks = Looks.of(given)
    made = looks.empty([b.weight for b in given], CPU)
    assert [(b.rows, b.share, b.weight) for b in made] == [(b.rows, b.share, b.weight) for b in given]
    for old, new in zip(given, made, strict=True):
        assert list(new.kwargs) == list(old.kwargs)
        for name, value in old.kwargs.items():
            if not isinstance(value, Tensor):
                assert new.kwargs[name] == value
                continue
            assert (new.kwargs[name].shape, new.kwargs[name].stride()) == (value.shape, value.stride())
            assert (new.kwargs[name].dtype, new.kwargs[name].requires_grad) == (value.dtype, value.requires_grad)
        assert new.target["name"] == "z" and new.target["y"].shape == old.target["y"].shape
    assert made[0].kwargs["again"] is made[1].kwargs["again"]  # one tensor, as it was
    assert Looks.of(made) == looks
    assert Looks.of(divide(inputs, {"y": torch.arange(5), "name": "z"}, 2)).pack() == looks.pack()


def test_what_cannot_be_described_is_refused() -> None:
    with pytest.raises(ValueError, match="layout torch.sparse_coo"):
        Like.of(torch.eye(3).to_sparse(), 0)
    with pytest.raises(ValueError, match="cannot be told to the other ranks .*function"):
        Looks.of(divide({"x": torch.ones(4, 2), "call": lambda: 1}, None, 2)).pack()


# ---------------------------------------------------------------- the same numbers


def trains_alike(rank: int, n: int, names: list[str], schedules: list[str], target_on: str) -> list[str]:
    """Losses and gradients of one process, with a batch on the first rank only, and lengths that change."""
    wrong = []
    with distlib.init():
        for name in names:
            case = CASES[name]
            for schedule in schedules:
                model, plain = piped(case, schedule), case.made()
                assert model.needs_batch == (rank == 0)
                last = model._schedule.placement[-1]
                for step in range(3):
                    inputs, target = case.batch(ROWS, step)
                    own = target if rank == (0 if target_on == "first" else last) else None
                    torch.manual_seed(77 + step)
                    loss = model.train_step(inputs if rank == 0 else None, own)
                    torch.manual_seed(77 + step)
                    expected = reference_step(plain, case, ROWS, step, MICRO)
                    if abs(float(loss / expected) - 1) > 1e-6:
                        wrong.append(f"{name}, {schedule}, step {step}: {loss} instead of {expected}")
                own_gradients = dict(plain.named_parameters(remove_duplicate=False))
                for key, parameter in model.named_parameters():
                    wanted = own_gradients[key].grad
                    if not torch.allclose(parameter.grad, wanted, rtol=1e-4, atol=1e-6):
                        wrong.append(f"{name}, {schedule}: gradient of {key}")
                model.eval(), plain.eval()
                loss = model.eval_step(inputs if rank == 0 else None, own)
                expected = reference_step(plain, case, ROWS, 2, MICRO, train=False)
                if abs(float(loss / expected) - 1) > 1e-6:
                    wrong.append(f"{name}, {schedule}: evaluation")
                given = inputs if isinstance(inputs, dict) else {}
                output = model(*(() if given or rank else (inputs,)), **(given if rank == 0 else {}))
                with torch.no_grad():
                    whole = plain(**given) if given else plain(inputs)
                first, second = (o["y"] if isinstance(o, dict) else o for o in (output, whole))
                if not torch.allclose(first, second, atol=1e-5):
                    wrong.append(f"{name}, {schedule}: output")
    return wrong


@pytest.mark.parametrize(
    ("n", "schedules", "target_on"),
    [
        (1, ["1f1b"], "first"),
        (2, ["1f1b", "zb-h1", "zb-v"], "first"),
        (3, ["interleaved"], "first"),
        (3, ["1f1b"], "last"),
    ],
)
def test_numbers_are_those_of_one_process(n: int, schedules: list[str], target_on: str) -> None:
    names = ["lengths", "dropout", "skips", "tied"]  # skips: a mask that every stage reads
    for wrong in run_ranks(n, trains_alike, names, schedules, target_on, timeout=110):
        assert not wrong


def over_gloo(rank: int, n: int) -> list[str]:
    dist.init_process_group("gloo")
    try:
        case = CASES["skips"]
        model, plain = piped(case), case.made()
        inputs, target = case.batch(ROWS, 0)
        loss = model.train_step(*((inputs, target) if rank == 0 else ()))
        return [] if abs(float(loss / reference_step(plain, case, ROWS, 0, MICRO)) - 1) < 1e-6 else [str(loss)]
    finally:
        dist.destroy_process_group()


def test_it_works_over_gloo() -> None:
    assert run_ranks(2, over_gloo) == [[], []]


# ---------------------------------------------------------------- what it costs


def costs(rank: int, n: int) -> list[int]:
    """Bytes that were broadcast in each step."""
    with distlib.init():
        case = CASES["lengths"]
        model = piped(case)
        found = []
        for step in (0, 0, 1, 0, 1):
            distlib.ledger().reset()
            model.train_step(*(case.batch(ROWS, step) if rank == 0 else ()))
            found.append(sum(row.bytes for row in distlib.ledger().rows if row.op == "broadcast"))
        return found


def test_shapes_that_were_told_before_take_a_number() -> None:
    for found in run_ranks(2, costs)[1:]:
        first, again, longer, back, longer_again = found
        target = lambda length: sum(16 * -(-rows * length * 8 // 16) for rows in (3, 2, 2))  # noqa: E731
        assert again == back and target(5) - 16 < again - 16 <= target(5)
        assert target(6) - 16 < longer_again - 16 <= target(6)
        assert first > again + 100 and longer > longer_again + 100


def forgets(rank: int, n: int) -> bool:
    """An input that is no tensor changes in every step: descriptions are not kept for ever."""
    from distlib.pipeline import shape_header

    shape_header._MOST = 3
    with distlib.init():
        case = CASES["skips"]
        model, plain = piped(case), case.made()
        for step in range(8):
            inputs, target = case.batch(ROWS, step)
            inputs["power"] = 1.0 + step % 5
            loss = model.train_step(*((inputs, target) if rank == 0 else ()))
            expected = case.loss(plain(**inputs), target)
            assert abs(float(loss / expected) - 1) < 1e-4, step
        assert model._header is not None
        return len(model._header._told) <= 3 and len(model._header._heard) <= 3


def test_descriptions_are_not_kept_for_ever() -> None:
    assert run_ranks(2, forgets) == [True, True]


# ---------------------------------------------------------------- bad input and faults


def refused(rank: int, n: int) -> list[str]:
    with distlib.init():
        case = CASES["language"]
        model, plain = piped(case), case.made()
        inputs, target = case.batch(ROWS, 0)
        said = []
        for bad in ((inputs[:2], target[:2]), (inputs, target[:3]), (None, None)):
            with pytest.raises(ValueError) as caught:
                model.train_step(*(bad if rank == 0 else ()))
            said.append(str(caught.value))
        loss = model.train_step(*((inputs, target) if rank == 0 else ()))  # it goes on
        assert abs(float(loss / reference_step(plain, case, ROWS, 0, MICRO)) - 1) < 1e-6
        return said


def test_a_batch_that_is_refused_is_refused_on_all_ranks() -> None:
    first, *others = run_ranks(3, refused)
    assert "cannot be divided into 3" in first[0] and "target has a tensor" in first[1] and "no tensor" in first[2]
    assert all(said == [f"rank 0: {text}" for text in first] for said in others)


def gone(rank: int, n: int) -> tuple[str, float]:
    with distlib.init():
        case = CASES["language"]
        model = piped(case, timeout=20)
        model.train_step(*(case.batch(ROWS, 0) if rank == 0 else ()))
        if rank == 0:
            raise SystemExit(3)
        begin = time.monotonic()
        with pytest.raises(CollectiveError) as caught:
            model.train_step()
        return str(caught.value), time.monotonic() - begin


@pytest.mark.skipif(native.core() is None, reason=native.why_not())
def test_a_first_rank_that_is_gone_is_named() -> None:
    for outcome in run_ranks_raw(3, gone, timeout=60)[1:]:
        assert outcome.ok, outcome
        text, seconds = outcome.value
        assert "rank 0" in text and seconds < 15, (text, seconds)
