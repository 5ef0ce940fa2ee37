"""Budgets: the solver against brute force, and predicted bytes against counted ones."""

from __future__ import annotations

import ctypes
import itertools
import resource

import pytest
import torch
import torch.nn.functional as F
from activation_models import WIDTH, AttentionModel, Convolution, Residual, make, same, step
from hypothesis import given, settings
from hypothesis import strategies as st
from lm.model import GPT, next_token_loss
from ranks import run_ranks
from torch import nn

import distlib
from distlib.activations import ActivationReport, budget
from distlib.activations.budget import Chain, Choice, smallest, solve
from distlib.activations.size import parse_size


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are not what is tested here."""
    monkeypatch.setattr("distlib.activations.apply.ROUNDS", 1)


numbers = st.integers(0, 12)
choice = st.builds(
    lambda kept, forward, backward, eighths: Choice("", kept, forward, kept + backward, eighths / 8),
    *(numbers, numbers, numbers, st.integers(0, 80)),
)
chains = st.lists(st.tuples(st.lists(choice, min_size=1, max_size=4), numbers), max_size=5).flatmap(
    lambda blocks: st.builds(
        Chain, st.just([of for of, _ in blocks]), st.just([fixed for _, fixed in blocks]), numbers, numbers
    )
)


def plans(chain: Chain) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(of_block)) for of_block in chain.choices)))


@settings(max_examples=300, deadline=None)
@given(chains, st.integers(0, 80))
def test_the_plan_is_the_fastest_that_fits(chain: Chain, limit: int) -> None:
    fitting = [chain.seconds(plan) for plan in plans(chain) if chain.peak(plan) <= limit]
    if not fitting:
        with pytest.raises(ValueError, match=f"smallest possible peak is {smallest(chain)} bytes"):
            solve(chain, limit)
        return
    plan = solve(chain, limit)
    assert chain.peak(plan) <= limit
    assert chain.seconds(plan) == min(fitting)


@settings(max_examples=200, deadline=None)
@given(chains)
def test_the_smallest_peak_is_the_smallest_of_all_plans(chain: Chain) -> None:
    assert smallest(chain) == min(chain.peak(plan) for plan in plans(chain))
    assert chain.peak(solve(chain, smallest(chain))) == smallest(chain)


@settings(max_examples=100, deadline=None)
@given(chains, st.integers(0, 80))
def test_in_units_the_plan_still_fits(chain: Chain, limit: int) -> None:
    plan = budget._solve(chain, limit, unit=3) or budget._least(chain, limit)
    if plan is None:
        assert all(chain.peak(other) > limit for other in plans(chain))
    else:
        assert chain.peak(plan) <= limit


def test_a_long_chain_of_different_blocks_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(1, 1 << 40, (60, 3, 2), generator=generator).tolist()
    chain = Chain([[Choice("", k, k, k, s / 2**40) for k, s in of_block] for of_block in drawn], [0] * 60, 0)
    least, most = smallest(chain), chain.peak([0] * 60)
    monkeypatch.setattr(budget, "MOST_STATES", 1000)
    limit = (least + most) // 2
    plan = solve(chain, limit)
    assert least < chain.peak(plan) <= limit
    # The relaxation in which one block may be divided between two choices is a bound of what can be had.
    assert chain.seconds(plan) <= _relaxed(chain, limit) * 1.02


def _relaxed(chain: Chain, limit: int) -> float:
    """Lagrange: for any price of a byte, cost with the price paid back is a lower bound."""
    best = 0.0
    for exponent in range(-60, -20):
        price = 2.0**exponent * 8
        total = sum(min(c.seconds + price * c.kept for c in of_block) for of_block in chain.choices)
        best = max(best, total - price * limit)
    return best


def test_equal_numbers_of_fixed_bytes_and_choices_are_needed() -> None:
    with pytest.raises(ValueError, match="1 blocks have 2 fixed bytes"):
        Chain([[Choice("", 0, 0, 0, 0)]], [0, 0], 0)
    with pytest.raises(ValueError, match="block 0 has no choice"):
        Chain([[]], [0], 0)


@pytest.mark.parametrize(
    ("text", "nbytes"), [("2GiB", 2 << 30), ("1.5 MiB", 3 << 19), ("2GB", 2 * 10**9), ("4k", 4096), (17, 17)]
)
def test_sizes(text: str | int, nbytes: int) -> None:
    assert parse_size("budget", text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "2 GB/s", "-1", 0, True, None])
def test_sizes_that_are_none(text: object) -> None:
    with pytest.raises(ValueError, match="budget="):
        parse_size("budget", text)  # type: ignore[arg-type]


# ---------------------------------------------------------------- measured


def gpt() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    tokens = torch.randint(256, (4, 65))
    return GPT(5, 64, 2), tokens[:, :-1], tokens[:, 1:]


@pytest.mark.alone  # times that are measured choose among plans of one peak
@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_peak_is_as_predicted_and_within_the_budget(part: float) -> None:
    model, inputs, targets = gpt()
    plain = gpt()[0]

    def treat(one: nn.Module) -> ActivationReport:
        return distlib.checkpoint_activations(
            one, budget=part, example_inputs=inputs, loss=lambda logits: next_token_loss(logits, targets)
        )

    report = treat(model)
    assert all(p.grad is None for p in model.parameters())  # measuring leaves no trace
    assert report.budget is not None and report.predicted_step is not None
    for each in (plain, model):
        for _ in range(2):
            each.zero_grad(set_to_none=False)
            next_token_loss(each(inputs), targets).backward()
    assert same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    with report.measuring():
        next_token_loss(model(inputs), targets).backward()
    assert report.measured_peak is not None
    assert report.measured_peak == pytest.approx(report.predicted_step.peak, rel=0.1)
    assert report.measured_peak <= report.budget * 1.02
    for name, prediction in report.predicted.items():
        record = next(one.record for one in report._wrapped if one.name == name)
        assert record.kept == pytest.approx(prediction.kept, rel=0.1, abs=4 * inputs.numel() * 64)
        assert record.forwards[-1].seconds > 0 and record.backwards[-1].seconds > 0
    kinds = set(report.choices.values())
    if part == 0:
        assert "full" in kinds and "keep" not in kinds
        # Where a block has room for more, measured times decide: a busy machine disturbs one measurement, not all.
        assert kinds == {"full"} or any(set(treat(gpt()[0]).choices.values()) == {"full"} for _ in range(5))
    else:
        assert len(kinds) > 1 or kinds == {"selective"}
    assert "predicted" in str(report) and "measured" in str(report)


def test_a_larger_budget_is_never_predicted_slower() -> None:
    model, inputs, targets = gpt()
    from distlib.activations.measure import Measurement
    from distlib.activations.report import ActivationReport
    from distlib.activations.selective import make_policy
    from distlib.activations.wrapped import Setting, Wrapped
    from distlib.calls import as_call

    report = ActivationReport("budget")
    wrapped = [Wrapped(b, str(i), "full", Setting(report, make_policy(None), None)) for i, b in enumerate(model.blocks)]
    report.paused = True
    chain, order, _ = Measurement(model, wrapped, as_call(inputs), None, 1).chain(("keep", "selective", "full"), None)
    assert order == wrapped
    least, most = smallest(chain), chain.peak([0] * 5)
    times = [chain.seconds(solve(chain, least + (most - least) * i // 10)) for i in range(11)]
    assert times == sorted(times, reverse=True)
    kept = [next(c.kept for c in chain.choices[0] if c.name == kind) for kind in ("keep", "selective", "full")]
    assert kept[0] > kept[1] > kept[2] > 0


def test_budgets_that_cannot_be_met_name_the_smallest_and_leave_no_trace() -> None:
    model, inputs, targets = gpt()
    with pytest.raises(ValueError, match=r"budget=1024 bytes .* smallest possible peak is (\d+) bytes") as caught:
        distlib.checkpoint_activations(model, budget=1024, example_inputs=inputs)
    least = int(str(caught.value).split("smallest possible peak is ")[1].split()[0])
    assert all("forward" not in block.__dict__ for block in model.blocks)
    report = distlib.checkpoint_activations(model, budget=least, example_inputs=inputs)
    assert report.predicted_step is not None and report.predicted_step.peak <= least


def test_more_than_everything_is_said_to_save_nothing() -> None:
    model, inputs, _ = gpt()
    with pytest.warns(UserWarning, match="0 bytes are saved"):
        report = distlib.checkpoint_activations(model, budget="1GiB", example_inputs=inputs)
    assert set(report.choices.values()) == {"keep"}


def test_measuring_leaves_random_numbers_buffers_and_gradients_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Convolution() for _ in range(3)])
    x = torch.randn(2, 8, 16, 16)
    before = [b.clone() for b in model.buffers()]
    state = torch.get_rng_state()
    distlib.checkpoint_activations(model, budget=0.5, example_inputs=x)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(before, list(model.buffers()))


def test_measuring_leaves_tensors_where_they_hang() -> None:
    model = make("averages")
    before = [dict(block._buffers) for block in model]
    distlib.checkpoint_activations(model, budget=0.5, example_inputs=torch.randn(2, WIDTH))
    for block, held in zip(model, before, strict=True):
        assert block._buffers.keys() == held.keys()
        assert all(block._buffers[key] is buffer for key, buffer in held.items())


class Shares(nn.Module):
    def __init__(self, common: nn.Module) -> None:
        super().__init__()
        self.own, self.common = nn.Linear(WIDTH, WIDTH), common

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.common(F.gelu(self.own(x)).tanh())


def shared() -> nn.Module:
    """All blocks have one part in common."""
    torch.manual_seed(0)
    common = nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(*[Shares(common) for _ in range(3)])


def test_a_part_that_blocks_share_is_measured_and_left_alone() -> None:
    plain, treated, x = shared(), shared(), torch.randn(800, WIDTH)
    before = list(treated.named_parameters(remove_duplicate=False))
    report = distlib.checkpoint_activations(treated, budget=0.0, example_inputs=x)
    assert "full" in report.choices.values()
    after = list(treated.named_parameters(remove_duplicate=False))
    assert [(name, id(p)) for name, p in after] == [(name, id(p)) for name, p in before]
    assert all(p.grad is None for p in treated.parameters())
    for seed in range(2):
        assert same(step(plain, x, seed), step(treated, x, seed))


@pytest.mark.parametrize("name", ["dropout", "attention", "averages", "frozen"])
def test_plans_compute_the_same(name: str) -> None:
    from activation_models import MODELS

    plain, treated, inputs = make(name), make(name), MODELS[name][1]
    distlib.checkpoint_activations(treated, budget=0.4, example_inputs=inputs)
    for seed in range(2):
        assert same(step(plain, inputs, seed), step(treated, inputs, seed))


def test_blocks_that_run_twice_or_never_are_refused() -> None:
    class Twice(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Residual() for _ in range(3))
            self.times = times

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in list(self.blocks)[: 3 if self.times else 2]:
                x = block(x)
            return self.blocks[0](x) if self.times else x

    x = torch.randn(2, WIDTH)
    with pytest.raises(ValueError, match="'blocks.0' runs more than once"):
        distlib.checkpoint_activations(Twice(1), budget=0.5, example_inputs=x)
    with pytest.raises(ValueError, match=r"\['blocks.2'\] do not run"):
        distlib.checkpoint_activations(Twice(0), budget=0.5, example_inputs=x)


def test_a_loss_without_gradient_is_refused() -> None:
    model = AttentionModel().requires_grad_(False)
    with pytest.raises(ValueError, match="has no gradient: pass loss="):
        distlib.checkpoint_activations(model, budget=0.5, example_inputs=torch.randn(2, 4, WIDTH))


def resident(rank: int, n: int, policy: str, folder: str) -> int:
    """Bytes by which the peak of this process grows in a step."""
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is larger is mapped, and given back at once
    torch.manual_seed(0)
    model = nn.Sequential(*[Residual() for _ in range(8)])
    x = torch.randn(64, 256, WIDTH)
    if policy != "none":
        distlib.checkpoint_activations(model, policy, **({"folder": folder} if policy == "offload" else {}))
    nn.Sequential(Residual())(x[:1]).sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model(x).square().mean().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def test_the_peak_of_the_process_falls(tmp_path) -> None:
    """Bytes of the operating system, not of our own count. 4 MiB and more per tensor: the allocator maps each."""

    def peak(policy: str) -> int:
        return run_ranks(1, resident, policy, str(tmp_path))[0]

    alone = peak("none")
    # 8 blocks keep more than 50 MiB each with dropout's masks; one block's, the inputs and temporaries are left.
    assert peak("full") < 0.35 * alone
    assert peak("offload") < 0.5 * alone


def test_loss_is_as_in_training() -> None:
    """With the loss the peak outside of the blocks counts too."""
    model, inputs, targets = gpt()
    wide = nn.Linear(64, 4000)
    model.head = wide
    small = distlib.checkpoint_activations(model, budget=0.0, example_inputs=inputs, loss=lambda y: y[..., :2].sum())
    first = small.predicted_step
    small.remove()
    large = distlib.checkpoint_activations(
        model, budget=0.0, example_inputs=inputs, loss=lambda y: F.cross_entropy(y.flatten(0, 1), targets.flatten())
    )
    assert large.predicted_step is not None and first is not None
    assert large.predicted_step.peak >= first.peak + 4 * 256 * 4000
