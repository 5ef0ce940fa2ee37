"""What ranks hold at each moment: against the peaks of the simulation, and by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distlib.pipeline import Costs, Kind, generate, simulate
from distlib.pipeline.flight import Moment, moments, most_in_flight
from distlib.pipeline.passes import fuse, unfuse

NAMES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.integers(2, 5),
    st.integers(1, 8),
    st.booleans(),
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=10, max_size=10),
)
def test_the_fullest_moment_is_the_simulations_peak(
    name: str, ranks: int, micro_batches: int, fused: bool, sizes: list[tuple[int, int]]
) -> None:
    schedule = generate(name, ranks, micro_batches)
    schedule = fuse(schedule) if fused else unfuse(schedule)
    whole = [kept + more for kept, more in sizes[: schedule.stages]]
    late = [kept for kept, _ in sizes[: schedule.stages]]
    expected = simulate(schedule, Costs(activations=whole, kept=late)).peak_bytes
    for rank in range(ranks):
        found = []
        for m in moments(schedule, rank):
            held = sum(n * whole[s] for s, n in m.whole) + sum(n * late[s] for s, n in m.late)
            found.append(held + (late if m.kind is Kind.W else whole)[m.stage])
        assert max(found) == expected[rank]


def test_1f1b_by_hand() -> None:
    schedule = generate("1f1b", 3, 4)
    assert moments(schedule, 0) == [Moment(Kind.F, 0, ((0, 2),)), Moment(Kind.FULL, 0, ((0, 2),))]
    assert moments(schedule, 2) == [Moment(Kind.F, 2), Moment(Kind.FULL, 2)]
    assert [most_in_flight(schedule, rank) for rank in range(3)] == [{0: 3}, {1: 2}, {2: 1}]


def test_divided_backwards_hold_what_waits_for_w() -> None:
    schedule = fuse(generate("zb-h1", 3, 4))  # rank 2: F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3
    found = moments(schedule, 2)
    assert Moment(Kind.B, 2, (), ((2, 2),)) in found and Moment(Kind.W, 2, (), ((2, 2),)) in found
    assert not any(m.whole for m in found)


def test_between_stages_of_a_rank_outputs_and_gradients_wait() -> None:
    # rank 1: ... 2B0 2W0 1F2 1B0 1W0 2F2 ...: the gradient of 2B0 waits for 1B0, the output of 1F2 for 2F2
    found = moments(fuse(generate("zb-v", 2, 4)), 1)
    of_kind = {(m.kind, m.stage): dict(m.waiting) for m in found if m.kind in (Kind.F, Kind.B, Kind.FULL)}
    assert {edge for m in found for edge, _ in m.waiting} == {(1, 2), (2, 1)}
    assert of_kind[Kind.F, 1] == {(2, 1): 1} and (1, 2) not in of_kind[Kind.F, 2], "what it takes is its own"
    assert not any(m.waiting for m in moments(generate("interleaved", 2, 4), 0)), "its stages are no neighbours"


@pytest.mark.parametrize("name", NAMES)
def test_a_moment_that_holds_less_than_another_is_left_out(name: str) -> None:
    for rank in range(4):
        found = moments(fuse(generate(name, 4, 9)), rank)
        assert not any(a.within(b) for a in found for b in found if a is not b)
