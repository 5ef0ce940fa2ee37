"""`shape_header=True`: the rank of the first stage has the batch, and the others are told what it looks like."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pipeline_models import CASES, Case, reference_step
from ranks import process_group, run_ranks, run_ranks_raw
from torch import Tensor, nn

import distlib
from distlib import native
from distlib.comm.work import CollectiveError
from distlib.pipeline.micro_batches import Whole, divide
from distlib.pipeline.shape_header import Looks, dense, packed

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
    given = dense(divide(inputs, {"y": torch.arange(5), "name": "z"}, 2))
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
    again = dense(divide(inputs, {"y": torch.arange(5), "name": "z"}, 2))
    assert packed(Looks.of(again)) == packed(looks)


def test_tensors_are_made_dense_and_what_is_shared_stays_so() -> None:
    row, wide = torch.arange(4.0).expand(6, 4), torch.randn(6, 1000)[:, :3]
    shared = torch.arange(3.0).expand(5, 3)
    given = divide({"row": row, "wide": wide, "a": Whole(shared), "b": Whole(shared)}, row, 2)
    for old, new in zip(given, dense(given), strict=True):
        for name, tensor in new.kwargs.items():
            assert torch.equal(tensor, old.kwargs[name])
            assert tensor.untyped_storage().nbytes() <= max(tensor.nbytes, row.nbytes)
            assert tensor.stride() == torch.empty_like(tensor, device="meta").stride()
        assert new.kwargs["a"] is new.kwargs["b"]
    full = divide(torch.randn(4, 3), None, 2)
    assert all(new.args[0] is old.args[0] for old, new in zip(full, dense(full), strict=True))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"x": torch.ones(4, 2), "y": Whole(torch.eye(3).to_sparse())}, "layout torch.sparse_coo on cpu cannot"),
        ({"x": torch.ones(4, 2), "y": Whole(torch.ones(3, device="meta"))}, "on meta cannot be sent"),
        ({"x": torch.ones(4, 2), "call": lambda: 1}, "cannot be pickled to be told to the other ranks"),
    ],
)
def test_what_cannot_be_described_is_refused(inputs: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        packed(Looks.of(dense(divide(inputs, None, 2))))


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
        (2, ["zb-v"], "first"),
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


class Positions(nn.Module):
    """Every block reads positions and a mask, which are expanded; the output has an input in it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(29, 12), nn.Embedding(9, 12)
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(ids)
        for block in self.blocks:
            x = torch.tanh(block(x + self.positions(positions))) * mask.unsqueeze(-1)
        return (x.mean(-1) - labels.reshape(labels.shape) / 29).square().mean(), positions


def odd_inputs(rank: int, n: int) -> list[float]:
    """Expanded, sliced and transposed inputs, and one that is given twice, beside every rank being given them."""
    with distlib.init():
        losses = []
        for header in (True, False):
            torch.manual_seed(0)
            module = Positions()
            numbers = torch.Generator().manual_seed(3)
            ids = torch.randint(29, (8, 6), generator=numbers).t()[:, :-1]  # 6 rows, transposed and sliced
            given = {
                "ids": ids,
                "positions": torch.arange(7).expand(6, 7),
                "mask": torch.ones(6, 1).expand(6, 7),
                "labels": ids,
            }
            model = distlib.PipelineParallel(
                module, microbatches=2, example_inputs=given, costs="estimated", shape_header=header
            )
            for _ in range(2):
                batch = given if rank == 0 or not header else None
                losses.append(float(model.train_step(batch)))
                first = float(next(iter(model.parameters())).grad.double().square().sum())
                losses.append(first)
        return losses


def test_inputs_of_any_strides_that_later_stages_read_arrive() -> None:
    for found in run_ranks(2, odd_inputs):
        assert found[:4] == found[4:]


def prepared(rank: int, n: int) -> list[float]:
    """Batches that are prepared ahead, and used twice."""
    with distlib.init():
        case = CASES["skips"]
        model, plain = piped(case), case.made()
        batches = [
            model.prepare(*(case.batch(ROWS, step) if rank == 0 else (None, None)), {}, train=True) for step in range(3)
        ]
        wrong = []
        for step in (0, 2, 1, 2):
            loss = model.train_step(batches[step])
            expected = reference_step(plain, case, ROWS, step, MICRO)
            wrong.append(abs(float(loss / expected) - 1))
        with pytest.raises(ValueError, match="give it alone"):
            model.train_step(batches[0], torch.ones(3))
        return wrong


def test_batches_may_be_prepared_ahead_and_used_twice() -> None:
    for wrong in run_ranks(2, prepared):
        assert max(wrong) < 1e-6


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
        weights = {"raise": False}

        def weigh(target: Tensor) -> float:
            if weights["raise"]:
                raise KeyError
            return float(target.shape[0])

        model, plain = piped(case, weigh=weigh), case.made()
        inputs, target = case.batch(ROWS, 0)
        said = []

        def fails(kind: type[Exception], *given: Any) -> None:
            with pytest.raises(kind if rank == 0 else ValueError) as caught:
                model.train_step(*(given if rank == 0 else ()))
            said.append(str(caught.value))

        def goes_on() -> None:
            loss = model.train_step(*((inputs, target) if rank == 0 else ()))
            assert abs(float(loss / reference_step(plain, case, ROWS, 0, MICRO)) - 1) < 1e-6

        fails(ValueError, inputs[:2], target[:2])
        fails(ValueError, inputs, target[:3])
        fails(ValueError, None, None)
        goes_on()
        weights["raise"] = True
        fails(KeyError, inputs, target)  # whatever it is, and though it has no words
        weights["raise"] = False
        goes_on()
        return said


def test_a_batch_that_is_refused_is_refused_on_all_ranks() -> None:
    first, *others = run_ranks(3, refused)
    assert "cannot be divided into 3" in first[0] and "target has a tensor" in first[1] and "no tensor" in first[2]
    for said in others:
        assert said[:3] == [f"rank 0: {text}" for text in first[:3]]
        assert said[3].startswith("rank 0: KeyError")


def refused_last(rank: int, n: int) -> str:
    with distlib.init():
        case = CASES["language"]
        model, plain = piped(case), case.made()
        inputs, target = case.batch(ROWS, 0)
        with pytest.raises(ValueError) as caught:
            model.train_step(inputs if rank == 0 else None, target[:5] if rank == 2 else None)
        loss = model.train_step(inputs if rank == 0 else None, target if rank == 2 else None)
        assert abs(float(loss / reference_step(plain, case, ROWS, 0, MICRO)) - 1) < 1e-6
        return str(caught.value)


def test_a_target_that_does_not_fit_on_the_last_rank_is_refused_on_all_ranks() -> None:
    *others, last = run_ranks(3, refused_last)
    assert "the target has a tensor of shape [5, 7], the inputs have 7 rows" in last
    assert others == [f"rank 2: {last}"] * 2


class Unreadable(float):
    """A number that can be pickled, and not be read again."""

    def __reduce__(self) -> Any:
        return _unreadable, ()


def _unreadable() -> None:
    raise OSError("not here")


def unreadable(rank: int, n: int) -> str:
    with distlib.init():
        case = CASES["skips"]
        model = piped(case)
        inputs, target = case.batch(ROWS, 0)
        inputs["power"] = Unreadable(1.0)
        with pytest.raises(OSError if rank else CollectiveError) as caught:
            model.train_step(*((inputs, target) if rank == 0 else ()))
        return str(caught.value)


def test_a_description_that_cannot_be_read_ends_all_ranks() -> None:
    first, second = run_ranks(2, unreadable)
    assert second == "not here"
    assert "rank 1 cannot read what a batch looks like: OSError: not here" in first


def slow(rank: int, n: int) -> float:
    with process_group(rank, n, timeout=30):
        case = CASES["language"]
        model = piped(case, timeout=60)
        assert model._header is not None
        model._header._group.timeout = 1.0  # of all that does not say how long it waits
        if rank == 0:
            time.sleep(2)  # its data are late
        return float(model.train_step(*(case.batch(ROWS, 0) if rank == 0 else ())))


def test_the_others_wait_for_the_first_ranks_data_as_long_as_for_messages() -> None:
    first, second = run_ranks(2, slow)
    assert first == second


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
