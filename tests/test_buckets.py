"""Bucket layouts: every element is covered once, in order, within the cap, the same on every call."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distlib.buckets import MIB, Layout, Parameter, plan

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    sizes = draw(st.lists(st.integers(0, 5000), max_size=40))
    parameters = [Parameter(f"p{i}", n, draw(st.sampled_from(DTYPES))) for i, n in enumerate(sizes)]
    order = draw(st.permutations(range(len(sizes))))
    order = order[: draw(st.integers(0, len(order)))] if draw(st.booleans()) else order
    return plan(
        parameters,
        order,
        cap_bytes=draw(st.integers(1, 40_000)),
        first_cap_bytes=draw(st.integers(1, 10_000)),
        align_bytes=draw(st.sampled_from([1, 8, 64, 4096])),
        tail=draw(st.integers(0, 50)),
    )


@given(layouts())
@settings(max_examples=300, deadline=None)
def test_every_element_is_covered_once_and_no_slices_overlap(layout: Layout) -> None:
    seen = [m.parameter for b in layout.buckets for m in b.members]
    assert sorted(seen) == sorted(layout.order)
    for bucket in layout.buckets:
        end = 0
        for member in bucket.members:
            assert member.numel == layout.parameters[member.parameter].numel
            assert member.offset >= end
            end = member.offset + member.numel
        tail = layout.tail if bucket is layout.buckets[-1] else 0
        assert end + tail <= bucket.numel


@given(layouts())
@settings(max_examples=300, deadline=None)
def test_slices_are_aligned_grouped_by_dtype_and_keep_the_order(layout: Layout) -> None:
    for bucket in layout.buckets:
        assert bucket.members
        for member in bucket.members:
            assert layout.parameters[member.parameter].dtype == bucket.dtype
            if layout.align_bytes >= bucket.dtype.itemsize:
                assert member.offset * bucket.dtype.itemsize % layout.align_bytes == 0
    for dtype in DTYPES:
        laid = [m.parameter for b in layout.buckets if b.dtype == dtype for m in b.members]
        assert laid == [i for i in layout.order if layout.parameters[i].dtype == dtype]


@given(layouts())
@settings(max_examples=300, deadline=None)
def test_the_cap_holds_except_for_a_parameter_alone(layout: Layout) -> None:
    for bucket in layout.buckets:
        tail = layout.tail if bucket is layout.buckets[-1] else 0
        if len(bucket.members) > 1:
            assert (bucket.numel - tail) * bucket.dtype.itemsize <= layout.cap_bytes


@given(layouts())
@settings(max_examples=100, deadline=None)
def test_buckets_are_numbered_by_when_they_are_complete(layout: Layout) -> None:
    place = {parameter: position for position, parameter in enumerate(layout.order)}
    complete = [max(place[m.parameter] for m in b.members) for b in layout.buckets]
    assert complete == sorted(complete)
    assert [b.index for b in layout.buckets] == list(range(len(layout.buckets)))


@given(layouts(), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_rebuilding_is_planning_anew_and_deterministic(layout: Layout, random) -> None:  # type: ignore[no-untyped-def]
    order = list(layout.order)
    random.shuffle(order)
    limits = (layout.cap_bytes, layout.first_cap_bytes, layout.align_bytes, layout.tail)
    assert layout.rebuild(order) == plan(layout.parameters, order, *limits)
    assert layout.rebuild(order).rebuild(layout.order) == layout
    if layout.align_bytes % 8 == 0:  # padding of a slice then depends on its size alone, not on its place
        assert _bytes_of_gradients(layout.rebuild(order)) == _bytes_of_gradients(layout)


def _bytes_of_gradients(layout: Layout) -> int:
    return layout.nbytes - (layout.tail * layout.buckets[-1].dtype.itemsize if layout.buckets else 0)


def test_the_first_bucket_is_small_and_the_default_order_is_reversed() -> None:
    layout = plan([Parameter(f"p{i}", 100_000, torch.float32) for i in range(100)])
    assert layout.buckets[0].nbytes <= MIB < layout.buckets[1].nbytes <= 25 * MIB
    assert [m.parameter for m in layout.buckets[0].members] == [99, 98]
    assert layout.nbytes == 100 * 100_000 * 4


def test_a_large_parameter_is_alone() -> None:
    sizes = [10, 10 * MIB, 10]
    layout = plan([Parameter(f"p{i}", n, torch.float32) for i, n in enumerate(sizes)], range(3))
    assert [[m.parameter for m in b.members] for b in layout.buckets] == [[0], [1], [2]]


def test_the_tail_is_at_the_end_of_the_last_bucket_only() -> None:
    parameters = [Parameter(f"p{i}", 16, torch.float32) for i in range(4)]
    layout = plan(parameters, cap_bytes=64, first_cap_bytes=64, tail=5)
    assert [b.numel for b in layout.buckets] == [16, 16, 16, 21]


def test_nothing_to_lay_out_gives_no_bucket() -> None:
    assert plan([]).buckets == ()


@pytest.mark.parametrize("limit", ["cap_bytes", "first_cap_bytes", "align_bytes", "tail"])
def test_limits_must_be_positive(limit: str) -> None:
    with pytest.raises(ValueError, match=limit):
        plan([Parameter("p", 1, torch.float32)], **{limit: -1})


@pytest.mark.parametrize("order", [[0, 0], [0, 2], [-1]])
def test_an_order_that_repeats_or_invents_is_refused(order: list[int]) -> None:
    with pytest.raises(ValueError, match="at most once"):
        plan([Parameter("p", 1, torch.float32), Parameter("q", 1, torch.float32)], order)
