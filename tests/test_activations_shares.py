"""A budget shared by micro-batches in flight: the solver against every plan, played action by action."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distlib.activations import shares
from distlib.activations.budget import Chain, Choice
from distlib.activations.budget import solve as solve_one
from distlib.activations.shares import Load, Moment, Pass, StageChain, combine, load, loads, solve
from distlib.pipeline import Kind, Schedule, generate
from distlib.pipeline.flight import moments as moments_of
from distlib.pipeline.passes import fuse

SCHEDULES = (("1f1b", 1), ("gpipe", 1), ("zb-h1", 1), ("zb-v", 2), ("interleaved", 2))

numbers = st.integers(0, 12)
choice = st.builds(
    lambda kept, forward, backward, split, deferred, eighths: Choice(
        "", kept, forward, kept + backward, eighths / 8, kept + split, deferred
    ),
    *(numbers, numbers, numbers, numbers, numbers, st.integers(0, 80)),
)


@st.composite
def stages(draw: st.DrawFn) -> StageChain:
    blocks = draw(st.lists(st.lists(choice, min_size=1, max_size=3), max_size=2))

    def one() -> Pass:
        return Pass([draw(numbers) for _ in blocks], draw(numbers), draw(numbers))

    return StageChain(blocks, one(), one(), one(), draw(numbers), draw(numbers), draw(numbers))


def moments(schedule: Schedule, rank: int) -> list[Moment]:
    return [Moment(m.kind.value, m.stage, dict(m.whole), dict(m.late)) for m in moments_of(schedule, rank)]


def played(chains: dict[int, StageChain], plans: dict[int, tuple[int, ...]], schedule: Schedule, rank: int) -> int:
    """The peak of a rank, action by action and block by block."""
    held: dict[tuple[int, int | None], int] = {}
    peak = 0
    for stage, kind, k, _ in schedule.actions[rank]:
        chain = chains[stage]
        chosen = [of_block[taken] for of_block, taken in zip(chain.choices, plans[stage], strict=True)]
        kept, deferred = sum(c.kept for c in chosen), sum(c.deferred for c in chosen)
        others = sum(nbytes for key, nbytes in held.items() if key != (stage, k))
        if kind is Kind.F:
            seen = [chain.forward.inner, chain.forward.outer + kept]
            for i, c in enumerate(chosen):
                seen.append(chain.forward.fixed[i] + sum(b.kept for b in chosen[:i]) + c.forward)
            held[stage, k] = chain.held + kept
        elif kind is Kind.W:
            seen = [chain.weights + deferred]
            del held[stage, k]
        else:
            way = chain.split if kind is Kind.B else chain.backward
            assert way is not None
            seen = [way.outer + kept, way.inner + (deferred if kind is Kind.B else 0)]
            for i, c in enumerate(chosen):
                before = way.fixed[i] + sum(b.kept for b in chosen[:i])
                later = sum(b.deferred for b in chosen[i + 1 :])
                seen.append(before + (c.split + later if kind is Kind.B else c.backward))
            held[stage, k] = chain.late + deferred
            if kind is Kind.FULL:
                del held[stage, k]
        peak = max(peak, others + max(seen))
    return peak


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SCHEDULES), st.integers(1, 5), st.integers(0, 1), st.data(), st.integers(0, 300))
def test_the_plan_is_the_fastest_of_all_that_fit(
    named: tuple[str, int], micro_batches: int, rank: int, data: st.DataObject, budget: int
) -> None:
    schedule = fuse(generate(named[0], 2, micro_batches))
    chains = {stage: data.draw(stages()) for stage in schedule.stages_of(rank)}
    every = [list(itertools.product(*(range(len(of)) for of in chain.choices))) for chain in chains.values()]
    peaks, seconds = [], []
    for plans in itertools.product(*every):
        chosen = dict(zip(chains, plans, strict=True))
        peaks.append(played(chains, chosen, schedule, rank))
        seconds.append(sum(load(chains[stage], plan).seconds for stage, plan in chosen.items()))
    found = combine({stage: loads(chain) for stage, chain in chains.items()}, moments(schedule, rank))
    fitting = [s for s, peak in zip(seconds, peaks, strict=True) if peak <= budget]
    if not fitting:
        with pytest.raises(ValueError, match=f"smallest possible peak is {min(peaks)} bytes"):
            solve(found, budget)
        return
    best = solve(found, budget)
    own = {stage: one.plan for stage, one in best.loads.items()}
    assert played(chains, own, schedule, rank) == best.peak <= budget
    assert best.seconds == min(fitting)


@settings(max_examples=100, deadline=None)
@given(stages(), st.integers(0, 80))
def test_one_micro_batch_alone_has_the_plan_of_a_model_without_a_pipeline(chain: StageChain, budget: int) -> None:
    fixed = chain.forward.fixed
    alone = Chain(chain.choices, fixed, chain.forward.outer, chain.forward.inner)
    same = StageChain(chain.choices, chain.forward, chain.forward, None, 0)
    found = combine({0: loads(same)}, [Moment("F", 0, {}, {}), Moment("BW", 0, {}, {})])
    try:
        plan = solve_one(alone, budget)
    except ValueError:
        with pytest.raises(ValueError, match="smallest possible peak"):
            solve(found, budget)
    else:
        assert solve(found, budget).seconds == alone.seconds(plan)


def _block(scale: int) -> list[Choice]:
    return [
        Choice("keep", 40 * scale, 45 * scale, 60 * scale, 1.0, 60 * scale, 12 * scale),
        Choice("selective", 15 * scale, 45 * scale, 61 * scale, 1.2, 61 * scale, 12 * scale),
        Choice("full", 2 * scale, 40 * scale, 60 * scale, 1.4, 60 * scale, 12 * scale),
    ]


def _stage(blocks: int, scale: int = 1 << 20) -> StageChain:
    way = Pass([scale] * blocks, 3 * scale, scale)
    return StageChain([_block(scale)] * blocks, way, way, way, scale, scale // 2, scale)


@pytest.mark.parametrize(("name", "blocks"), [("1f1b", 24), ("zb-h2", 16), ("zb-v", 12), ("interleaved", 8)])
def test_many_blocks_and_stages_are_planned_in_seconds(name: str, blocks: int) -> None:
    schedule = fuse(generate(name, 8, 32))
    begun = time.perf_counter()
    chains = {stage: _stage(blocks) for stage in schedule.stages_of(0)}
    found = combine({stage: loads(chain) for stage, chain in chains.items()}, moments(schedule, 0))
    least = min(one.peak for one in found)
    most = combine({s: [load(c, [0] * blocks)] for s, c in chains.items()}, moments(schedule, 0))[0].peak
    before = float("inf")
    for part in range(11):
        limit = least + (most - least) * part // 10
        best = solve(found, limit)
        plans = {stage: one.plan for stage, one in best.loads.items()}
        assert played(chains, plans, schedule, 0) == best.peak <= limit
        assert best.seconds <= before, "a larger budget is never slower"
        before = best.seconds
    assert best.seconds == pytest.approx(blocks * len(chains)), "everything is kept where there is room"
    assert time.perf_counter() - begun < 60


def test_what_is_left_out_of_too_many_still_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = fuse(generate("zb-v", 2, 4))
    scales = {stage: (1 << 20) + 7919 * i for i, stage in enumerate(schedule.stages_of(0))}
    chains = {stage: _stage(6, scale) for stage, scale in scales.items()}
    exact = combine({s: loads(c) for s, c in chains.items()}, moments(schedule, 0))
    monkeypatch.setattr(shares, "MOST", 12)
    few = combine({s: loads(c) for s, c in chains.items()}, moments(schedule, 0))
    assert len(few) < len(exact)
    least = min(one.peak for one in exact)
    assert min(one.peak for one in few) == least
    for limit in (least, least * 3 // 2, least * 2):
        best = solve(few, limit)
        plans = {stage: one.plan for stage, one in best.loads.items()}
        assert played(chains, plans, schedule, 0) == best.peak <= limit
        assert best.seconds <= solve(exact, limit).seconds * 1.15


def test_equal_numbers_of_fixed_bytes_and_choices_are_needed() -> None:
    with pytest.raises(ValueError, match="1 blocks have 2 fixed bytes"):
        StageChain([_block(1)], Pass([0, 0], 0, 0), None, None, 0)
    with pytest.raises(KeyError):
        Load((), 0, 0, 0, 0, 0, 0, 0.0).peak("SEND")
