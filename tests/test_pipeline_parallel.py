"""`PipelineParallel`: losses, gradients and outputs of a model in stages are those of the model in one process."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from pipeline_models import CASES, Language, Residual, reference_step
from ranks import run_ranks
from torch import nn

import distlib
from distlib.pipeline import load_csv
from distlib.pipeline.micro_batches import Whole, divide, join

pytestmark = pytest.mark.slow  # among the first files to be tested

ROWS, MICRO = 7, 3  # 7 rows in 3 micro-batches: 3, 2, 2


def _pipeline(case: Any, schedule: str = "1f1b", stages: int | None = None, **options: Any) -> Any:
    settings = {
        "microbatches": MICRO,
        "loss_fn": case.loss,
        "example_inputs": case.batch(ROWS, 0)[0],
        "costs": "estimated",
    }
    return distlib.PipelineParallel(case.made(), **{"stages": stages, "schedule": schedule, **settings, **options})


def _worst(model: nn.Module, plain: nn.Module) -> float:
    """The largest relative error of a gradient that this rank has."""
    own = dict(plain.named_parameters(remove_duplicate=False))
    worst = 0.0
    for name, parameter in model.named_parameters():
        expected = own[name].grad
        assert expected is not None and parameter.grad is not None, name
        assert parameter.grad.shape == expected.shape, name
        worst = max(worst, float((parameter.grad - expected).abs().max() / expected.abs().max().clamp(min=1e-6)))
    return worst


# ---------------------------------------------------------------- the same numbers

SCHEDULES = ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "auto"]


def _equals_plain(rank: int, n: int, names: list[str], schedules: list[str]) -> dict[str, str]:
    """By case and schedule, what differs from one process in two steps and an evaluation."""
    wrong = {}
    with distlib.init():
        for name in names:
            case = CASES[name]
            for schedule in schedules:
                model, plain = _pipeline(case, schedule), case.made()
                errors = []
                for step in range(2):
                    inputs, target = case.batch(ROWS, step)
                    torch.manual_seed(77 + step)
                    loss = model.train_step(inputs, target)
                    torch.manual_seed(77 + step)
                    expected = reference_step(plain, case, ROWS, step, MICRO)
                    errors.append(abs(float(loss / expected) - 1))
                errors.append(_worst(model, plain) / 10)  # gradients of both steps add up; within 1e-5
                model.eval(), plain.eval()
                evaluated = model.eval_step(inputs, target)
                expected = reference_step(plain, case, ROWS, 1, MICRO, train=False)
                errors.append(abs(float(evaluated / expected) - 1))
                if max(errors) > 1e-6:
                    wrong[f"{name}, {schedule}"] = f"{errors}"
    return wrong


@pytest.mark.parametrize(
    ("n", "schedules"), [(1, ["1f1b", "zb-v"]), (2, SCHEDULES), (3, ["1f1b", "interleaved", "zb-h2"])]
)
def test_losses_gradients_and_evaluation_are_those_of_one_process(n: int, schedules: list[str]) -> None:
    for wrong in run_ranks(n, _equals_plain, list(CASES), schedules, timeout=110):
        assert not wrong


def _outputs(rank: int, n: int) -> None:
    with distlib.init():
        case = CASES["skips"]
        model, plain = _pipeline(case).eval(), case.made().eval()
        for rows in (ROWS, 2, 1):  # fewer rows than micro-batches, too
            inputs, _ = case.batch(rows, rows)
            output, expected = model(**inputs), plain(**inputs)
            assert list(output) == list(expected)
            for key in expected:
                torch.testing.assert_close(output[key], expected[key])


def test_outputs_of_a_batch_are_on_every_rank() -> None:
    run_ranks(3, _outputs)


def _same_bits(rank: int, n: int) -> list[dict[str, bytes]]:
    found = []
    with distlib.init():
        case = CASES["dropout"]
        for _ in range(2):
            model = _pipeline(case, "zb-h1")
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            torch.manual_seed(1)
            for step in range(4):
                model.train_step(*case.batch(ROWS, step))
                optimizer.step()
                optimizer.zero_grad()
            found.append({name: p.detach().numpy().tobytes() for name, p in model.named_parameters()})
    return found


def test_two_runs_give_the_same_bits() -> None:
    for first, second in run_ranks(2, _same_bits):
        assert first == second


# ---------------------------------------------------------------- clipping, loss scale


def _clips(rank: int, n: int) -> None:
    with distlib.init():
        case = CASES["tied"]
        for schedule in ("1f1b", "zb-v"):
            model, plain = _pipeline(case, schedule), case.made()
            model.train_step(*case.batch(ROWS, 0), loss_scale=4.0)
            reference_step(plain, case, ROWS, 0, MICRO)
            for p in plain.parameters():
                p.grad *= 4
            for order in (2.0, 1.0, float("inf")):
                norm = model.clip_grad_norm_(1e9, order)
                expected = nn.utils.clip_grad_norm_(plain.parameters(), 1e9, order)
                assert float(norm) == pytest.approx(float(expected), rel=1e-5)
            model.clip_grad_norm_(0.1)
            nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
            assert _worst(model, plain) < 1e-4
            fused = distlib.optim.AdamW(model.parameters(), lr=0.0, max_norm=1e-3)
            fused.step()
            assert float(fused.grad_norm) == pytest.approx(0.1, rel=1e-4)


def test_norms_are_those_of_the_whole_model_and_tied_weights_count_once() -> None:
    run_ranks(2, _clips)


# ---------------------------------------------------------------- how a model is divided


def _divisions(rank: int, n: int) -> dict[str, list[str]]:
    found = {}
    with distlib.init():
        case = CASES["language"]
        inputs, target = case.batch(ROWS, 0)
        plain = case.made()
        expected = reference_step(plain, case, ROWS, 0, MICRO)
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(6, 12), Residual()), nn.Sequential(Residual(), nn.Linear(12, 3))]
        explicit = distlib.PipelineParallel(
            None, 2, "zb-h1", MICRO, nn.functional.mse_loss, split=blocks, example_inputs=torch.randn(ROWS, 6)
        )
        x, y = CASES["shared"].batch(ROWS, 0)
        losses = [float(explicit.train_step(x, y))]
        torch.manual_seed(0)
        whole = nn.Sequential(nn.Sequential(nn.Linear(6, 12), Residual()), nn.Sequential(Residual(), nn.Linear(12, 3)))
        unseen = distlib.PipelineParallel(whole, 2, "1f1b", MICRO, nn.functional.mse_loss, split=["1"])
        losses.append(float(unseen.train_step(x, y)))
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        assert {name for name, _ in explicit.named_parameters()} == {name for name, _ in unseen.named_parameters()}

        for split in ("auto", ["blocks.1"], ["head"]):
            model = _pipeline(case, split=split, costs="measured")
            assert float(model.train_step(inputs, target)) == pytest.approx(float(expected), rel=1e-6)
            found[str(split)] = [name for name, _ in model.named_parameters()]
            full = model.full_state_dict()
            assert list(full) == list(plain.state_dict())
            assert all(torch.equal(full[name], value) for name, value in plain.state_dict().items())
            model.load_state_dict({name: value + 1 for name, value in plain.state_dict().items()})
            assert all(torch.equal(p, plain.state_dict()[name] + 1) for name, p in model.state_dict().items())
    return found


def test_a_model_is_cut_where_it_is_told_and_every_parameter_lies_somewhere() -> None:
    first, second = run_ranks(2, _divisions)
    names = {name for name, _ in Language(6).named_parameters()}
    for split in first:
        assert set(first[split]) | set(second[split]) == names
        assert not set(first[split]) & set(second[split])
    assert second["['head']"] == ["head.weight"]
    assert first["['blocks.1']"][-1] == "blocks.0.up.bias"


def _meta(rank: int, n: int) -> dict[str, torch.Tensor]:
    with distlib.init():
        case = CASES["tied"]
        with torch.device("meta"):
            module = case.model()

        def init(part: nn.Module) -> None:
            for p in part.parameters(recurse=False):
                nn.init.normal_(p)

        torch.manual_seed(5)
        model = distlib.PipelineParallel(
            module,
            schedule="1f1b",
            microbatches=MICRO,
            loss_fn=case.loss,
            example_inputs=case.batch(ROWS, 0)[0],
            init=init,
        )
        assert not any(p.is_meta for p in model.parameters())
        assert float(model.train_step(*case.batch(ROWS, 0))) > 0
        return model.full_state_dict()


def test_a_model_on_meta_starts_with_the_same_values_on_any_number_of_stages() -> None:
    (one,), (two, also) = run_ranks(1, _meta), run_ranks(2, _meta)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]) and torch.equal(two[name], also[name])


def _frees(rank: int, n: int) -> tuple[int, int]:
    with distlib.init():
        case = CASES["language"]
        module = case.made()
        whole = sum(p.nbytes for p in module.parameters())
        model = distlib.PipelineParallel(
            module, 2, "1f1b", MICRO, case.loss, example_inputs=case.batch(ROWS, 0)[0], costs="estimated"
        )
        held = {p.data_ptr(): p.nbytes for m in (module, model) for p in m.parameters() if not p.is_meta}
        return sum(held.values()), whole


def test_a_rank_holds_its_stages_only() -> None:
    (first, whole), (second, _) = run_ranks(2, _frees)
    assert first + second == whole


def _csv(rank: int, n: int, path: str) -> float:
    with distlib.init():
        case = CASES["language"]
        model = _pipeline(case, load_csv(path))
        return float(model.train_step(*case.batch(ROWS, 0)))


def test_a_schedule_from_a_file_runs(tmp_path: Any) -> None:
    path = tmp_path / "hand.csv"
    path.write_text("rank 0,0F0,0F1,0B0,0F2,0B1,0W0,0W1,0BW2\nrank 1,1F0,1B0,1F1,1BW1,1W0,1F2,1BW2\n")
    losses = run_ranks(2, _csv, str(path))
    expected = reference_step(CASES["language"].made(), CASES["language"], ROWS, 0, MICRO)
    assert losses == pytest.approx([float(expected)] * 2, rel=1e-6)


# ---------------------------------------------------------------- bytes, time lines


def _bytes(rank: int, n: int) -> tuple[int, int, list[int]]:
    with distlib.init():
        case = CASES["language"]
        model = _pipeline(case)
        model.train_step(*case.batch(ROWS, 0))
        distlib.ledger().reset()
        model.train_step(*case.batch(ROWS, 0))
        rows = [row for row in distlib.ledger().rows if row.op in ("send", "recv")]
        loss, played = model.timed_step(*case.batch(ROWS, 0))
        assert [a for line in played.schedule.actions for a in line] and 0 <= played.bubble < 1
        return (
            sum(r.bytes for r in rows if r.op == "send"),
            sum(r.bytes for r in rows if r.op == "recv"),
            list(model.division.sent),
        )


def test_what_crosses_is_the_activation_and_its_gradient() -> None:
    (sent, received, _), (sent_back, received_there, _) = run_ranks(2, _bytes)
    activations = ROWS * 7 * 12 * 4  # rows, length, width, fp32
    assert received_there - 8 <= activations <= received_there  # and a loss
    assert (sent, sent_back) == (activations, activations + MICRO + 8)  # a byte each: whether there is a gradient
    assert received == activations + MICRO + 8


# ---------------------------------------------------------------- micro-batches, pure


def test_a_batch_is_divided_by_rows_and_joined_again() -> None:
    x, mask = torch.arange(10.0).view(5, 2), torch.eye(2)
    parts = divide({"x": x, "mask": Whole(x), "flag": True, "small": mask}, x[:, 0], 3)
    assert [p.rows for p in parts] == [2, 2, 1] and sum(p.share for p in parts) == pytest.approx(1)
    assert all(torch.equal(p.kwargs["mask"], x) and torch.equal(p.kwargs["small"], mask) for p in parts)
    assert torch.equal(join([p.kwargs["x"] for p in parts], [2, 2, 1]), x)
    assert torch.equal(torch.cat([p.target for p in parts]), x[:, 0])
    weighed = divide(x, x, 2, weigh=lambda target: float(target.sum()))
    assert [p.share for p in weighed] == pytest.approx([15 / 45, 30 / 45])


@pytest.mark.parametrize(
    ("inputs", "target", "count", "words"),
    [
        (torch.zeros(2, 3), None, 3, "2 rows cannot be divided into 3"),
        (5, None, 1, "no tensor with rows"),
        (torch.zeros(4, 3), torch.zeros(3), 2, "target has a tensor of shape"),
    ],
)
def test_batches_that_cannot_be_divided_are_refused(inputs: Any, target: Any, count: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        divide(inputs, target, count)


# ---------------------------------------------------------------- refusals


def _refuses(rank: int, n: int) -> None:
    case = CASES["language"]
    with distlib.init():
        for options, words in (
            ({"stages": 3}, "stages=3: schedule '1f1b' on 2 ranks has 2 stages"),
            ({"stages": 4}, "schedule='interleaved' gives ranks several"),
            ({"schedule": "zb-h3"}, "did you mean 'zb-h"),
            ({"split": ["blocks.1", "head"]}, "split has 2 names for 2 stages"),
            ({"split": ["blcks.1"]}, "blocks.1"),
            ({"costs": "guessed"}, 'give "measured" or "estimated"'),
            ({"example_inputs": None}, "positions hangs outside"),
            ({"limit": 1.0, "schedule": "gpipe"}, "micro-batches"),
        ):
            with pytest.raises(ValueError, match=words):
                _pipeline(case, **options).train_step(*case.batch(ROWS, 0))
        model = _pipeline(case)
        with pytest.raises(ValueError, match="2 rows cannot be divided into 3"):
            model.train_step(*case.batch(2, 0))
        with pytest.raises(RuntimeError, match="the model has no nonsense"):
            model.load_state_dict({"nonsense": torch.zeros(1)})
        assert float(model.train_step(*case.batch(ROWS, 0))) > 0  # none of it did harm


def test_what_cannot_be_is_refused_by_name() -> None:
    run_ranks(2, _refuses)


def _divided(rank: int, n: int) -> list[list[str]]:
    """Warnings of models of equal layers, and of one whose first layer weighs most."""
    found = []
    with distlib.init():
        for width in (32, 512):
            model = nn.Sequential(
                nn.Sequential(nn.Linear(32, width), nn.Linear(width, 32)), *(nn.Linear(32, 32) for _ in range(3))
            )
            with warnings.catch_warnings(record=True) as raised:
                warnings.simplefilter("always")
                distlib.PipelineParallel(
                    model,
                    microbatches=2,
                    loss_fn=lambda output, _: output.square().mean(),
                    example_inputs=torch.ones(64, 32),
                    costs="estimated",
                )
            found.append([str(one.message) for one in raised])
    return found


def test_a_split_that_cannot_be_even_is_warned_of_once() -> None:
    first, second = run_ranks(2, _divided)
    assert first[0] == [] and second == [[], []]
    (said,) = first[1]
    assert re.search(r"gives stage 0 87% of the time, .*: 0 alone has 87%. Take fewer stages", said)
