"""Schedules as data: every generated one is sound after every pass, broken ones are refused by name, text is kept."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distlib.pipeline import (
    NAMES,
    Action,
    Costs,
    Kind,
    Schedule,
    ScheduleError,
    forward_only,
    fuse,
    gather,
    generate,
    load_csv,
    lower,
    parse,
    peak_activations,
    prepare,
    reduce,
    save_csv,
    simulate,
    unfuse,
    verify,
)
from distlib.pipeline.actions import from_csv, to_csv

sizes = st.tuples(st.sampled_from(NAMES), st.integers(1, 7), st.integers(1, 20), st.integers(1, 4))


def made(name: str, ranks: int, micro_batches: int, virtual: int) -> Schedule:
    return generate(name, ranks, micro_batches, virtual=virtual if name == "interleaved" else None)


@settings(max_examples=150, deadline=None)
@given(sizes, st.integers(1, 3), st.sampled_from([None, "step", "micro_batch"]))
def test_every_schedule_is_sound_after_every_pass(size, whole, reduced):
    schedule = made(*size)
    verify(schedule)
    full = prepare(schedule, sharded=range(0, schedule.stages, 2), whole=whole, reduced=reduced)
    for channels in ("blocking", "posted", "buffered"):
        verify(full, channels=channels)
    assert from_csv(to_csv(full)) == full


@settings(max_examples=150, deadline=None)
@given(sizes)
def test_peak_keeps_its_formula(size):
    name, ranks, micro_batches, virtual = size
    if name == "auto":
        return
    peak = max(simulate(made(*size)).peak)
    formula = peak_activations(name, ranks, micro_batches, virtual)
    if name == "zb-v" and micro_batches < 2 * ranks:
        assert peak <= formula
    else:
        assert peak == pytest.approx(formula)


def test_peak_of_interleaved_is_the_published_formula_where_p_divides_m():
    for p, v in ((2, 2), (4, 2), (4, 3), (8, 4)):
        assert peak_activations("interleaved", p, 4 * p, v) == pytest.approx(p * (1 + (p - 1) / (p * v)))


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 2**32))
def test_any_order_of_messages_by_any_costs_is_free_of_deadlock(size, seed):
    schedule, draw = made(*size), random.Random(seed)
    per_stage = [[draw.uniform(0.1, 3) for _ in range(schedule.stages)] for _ in range(3)]
    costs = Costs(*per_stage, comm=draw.choice([0, 0.3, 5]), gather=draw.choice([0, 2]), reduce=draw.choice([0, 2]))
    verify(prepare(schedule, sharded=range(schedule.stages), whole=1, reduced="micro_batch", costs=costs))


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_messages_change_no_time(size):
    """The lowered table, played with messages as the runtime does, takes as long as the data flow itself."""
    schedule = made(*size)
    costs = Costs(2.0, 2.5, 1.5, comm=0.25)
    plain, full = simulate(schedule, costs), simulate(lower(schedule, costs), costs)
    assert full.step_time == pytest.approx(plain.step_time)
    assert full.spans == pytest.approx(plain.spans)
    assert full.peak == plain.peak


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_forwards_alone_are_an_evaluation(size):
    schedule = lower(forward_only(made(*size)))
    verify(schedule, training=False, limit=1)
    with pytest.raises(ScheduleError, match="0 B, 0 W and 0 BW"):
        verify(schedule)


def test_skip_connections_get_messages_of_their_own():
    schedule = lower(generate("zb-v", 3, 6).with_edges([(0, 2), (0, 5), (1, 3)]))
    verify(schedule)
    first = [str(action) for action in schedule.actions[0]]
    assert "0SEND3>2" in first and "0RECV3<2" in first
    assert not any(action.peer == 5 for action in schedule.actions[0] if action.stage == 0)  # stages 0 and 5: rank 0
    assert "3RECV0<1" in [str(action) for action in schedule.actions[2]]
    assert from_csv(to_csv(schedule)) == schedule
    with pytest.raises(ScheduleError, match="2>1 must go from an earlier"):
        generate("gpipe", 3, 2).with_edges([(2, 1)])


def test_sends_come_at_once_and_receives_before_their_use():
    schedule = lower(generate("1f1b", 4, 8))
    for line in schedule.actions:
        for before, action in zip(line, line[1:], strict=False):
            if action.kind is Kind.SEND:
                computed = Kind.FULL if action.carries_gradients else Kind.F
                if before.kind is not Kind.RECV:
                    assert before == Action(action.stage, computed, action.micro_batch)
    # The message is expected before other work that still runs when it comes.
    third = [str(action) for action in schedule.actions[2]]
    assert third.index("2RECV2<1") < third.index("2BW0") < third.index("2F2")


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 3))
def test_gathers_hold_no_more_stages_than_asked_and_prefetch(size, whole):
    plain = made(*size)
    schedule = gather(plain, range(plain.stages), whole)
    for rank, line in enumerate(schedule.actions):
        held, most = set(), 0
        for action in line:
            if action.kind is Kind.GATHER:
                held.add(action.stage)
            elif action.kind is Kind.FREE:
                held.remove(action.stage)
            most = max(most, len(held))
        assert not held
        assert most == min(whole, len(schedule.stages_of(rank)))


def test_gather_is_hidden_behind_the_stage_before():
    costs = Costs(gather=0.9)
    plain = generate("interleaved", 2, 8, virtual=4)
    stages = range(plain.stages)
    without = simulate(plain, costs).step_time
    assert simulate(gather(plain, stages, 2), costs).step_time < simulate(gather(plain, stages, 1), costs).step_time
    assert simulate(gather(plain, stages, 4), costs).step_time == pytest.approx(without + 0.9)  # the first one


def test_fuse_and_unfuse():
    schedule = generate("zb-h1", 3, 4)
    fused = fuse(schedule)
    assert [a.kind for a in fused.actions[0]].count(Kind.FULL) == 4  # rank 0 sends no gradient, all its Ws come at once
    assert all(a.kind is not Kind.FULL for line in fused.actions[1:] for a in line)
    assert simulate(fused).step_time == simulate(schedule).step_time
    everywhere = fuse(generate("zb-v", 3, 6), sent=True)
    assert unfuse(everywhere) == generate("zb-v", 3, 6)
    with pytest.raises(ScheduleError, match="already has messages"):
        fuse(lower(schedule))


def test_reduce_follows_weight_gradients():
    schedule = generate("zb-h1", 3, 4)
    assert [str(a) for a in reduce(schedule).actions[2] if a.kind is Kind.REDUCE] == ["2REDUCE"]
    assert str(reduce(schedule).actions[2][-1]) == "2REDUCE"
    each = reduce(schedule, "micro_batch").actions[1]
    for k in range(4):
        assert each[each.index(Action(1, Kind.W, k)) + 1] == Action(1, Kind.REDUCE, k)
    with pytest.raises(ValueError, match="'epoch'"):
        reduce(schedule, "epoch")


# Each breaks one line of one table; the message must name what is wrong.
BROKEN = {
    "dropped forward": (lambda a: a != "1F2", "rank 1: stage 1 has micro-batch 2 forward .F. 0 times"),
    "dropped weight gradient": (lambda a: a != "2W3", "rank 2: stage 2 has micro-batch 3 backward as 1 B, 0 W"),
    "dropped send": (lambda a: a != "0SEND1>1", "rank 0: 0SEND1>1 is there 0 times; .* 1RECV1<0 of rank 1"),
    "dropped receive": (lambda a: a != "1RECV1<2", "rank 1: 1RECV1<2 is there 0 times; .* 2SEND1>1 of rank 2"),
    "dropped gather": (lambda a: a != "1GATHER", "rank 1: action .*, 1FREE: stage 1 is not whole|1GATHER before"),
    "dropped free": (lambda a: a != "2FREE", "rank 2: stage 2 is never freed"),
    "dropped reduce": (lambda a: a != "0REDUCE2", "rank 0: stage 0 lacks 0REDUCE2"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_missing_is_named(what):
    keep, message = BROKEN[what]
    schedule = prepare(generate("zb-h1", 3, 5), sharded=range(3), reduced="micro_batch")
    broken = schedule.with_actions([a for a in line if keep(str(a))] for line in schedule.actions)
    assert broken != schedule
    with pytest.raises(ScheduleError, match=message):
        verify(broken)


def swapped(schedule: Schedule, first: str, second: str) -> Schedule:
    a, b = parse(first), parse(second)
    turn = {a: b, b: a}
    return schedule.with_actions([turn.get(action, action) for action in line] for line in schedule.actions)


SWAPPED = [
    ("1F0", "1B0", "rank 1: action .*, 1B0, comes before 1F0"),
    ("2B1", "2W1", "rank 2: action .*, 2W1, comes before 2B1"),
    ("1RECV0<0", "1F0", "rank 1: 1F0 comes before 1RECV0<0"),
    ("2SEND0>1", "2B0", "rank 2: 2SEND0>1 comes before 2B0"),
    ("1RECV0<0", "1RECV1<0", "comes before 1RECV0<0|message 0 from rank 0 is 0SEND0>1"),
    ("2W3", "2REDUCE3", "rank 2: action .*, 2REDUCE3 comes before 2W3"),
    ("1GATHER", "1F0", "rank 1: action .*, 1F0: stage 1 is not whole|comes before"),
]


@pytest.mark.parametrize("case", SWAPPED, ids=lambda case: f"{case[0]} {case[1]}")
def test_what_is_out_of_order_is_named(case):
    schedule = prepare(generate("zb-h1", 3, 5), sharded=range(3), reduced="micro_batch")
    with pytest.raises(ScheduleError, match=case[2]):
        verify(swapped(schedule, *case[:2]))


def test_receives_in_another_order_than_sends_are_refused():
    schedule = lower(generate("gpipe", 2, 3))
    lines = [list(line) for line in schedule.actions]
    receives = [i for i, a in enumerate(lines[1]) if a.kind is Kind.RECV]
    head = [lines[1][i] for i in receives][::-1]
    lines[1] = head + [a for a in lines[1] if a.kind is not Kind.RECV]
    with pytest.raises(ScheduleError, match="message 0 from rank 0 is 0SEND0>1, but rank 1 expects 1RECV2<0 then"):
        verify(schedule.with_actions(lines), channels="buffered")


def test_a_deadlock_names_the_actions_that_wait_for_each_other():
    text = "rank 0,0F0,0F1,0SEND0>1,0SEND1>1,0RECV0<1,0BW0,0RECV1<1,0BW1\n"
    text += "rank 1,1RECV0<0,1F0,1BW0,1SEND0>0,1RECV1<0,1F1,1BW1,1SEND1>0\n"
    schedule = from_csv(text)
    verify(schedule, channels="buffered")
    with pytest.raises(ScheduleError, match="rank 0 at action 3, 0SEND1>1, waits for 1RECV1<0 of rank 1; rank 1 at"):
        verify(schedule)
    crossed = from_csv("rank 0,0F1,0F0,0BW0,0BW1\nrank 1,1F0,1BW0,1F1,1BW1\n")
    verify(crossed)  # another order is fine where data arrives
    late = from_csv("rank 0,0F0,0BW0,0F1,0BW1\nrank 1,1F1,1BW1,1F0,1BW0\n")
    with pytest.raises(ScheduleError, match="rank 0 at action 1, 0BW0, waits for 1B0 of rank 1; rank 1 at action 0"):
        verify(late)


def test_actions_of_others_are_refused():
    schedule = generate("1f1b", 2, 2)
    for token, message in (("1F0", "that rank 1 holds"), ("7F0", "of stage 7; there are 2"), ("0F9", "micro-batch 9")):
        lines = [[*schedule.actions[0], parse(token)], schedule.actions[1]]
        with pytest.raises(ScheduleError, match=f"rank 0: action 4, {token}, .*{message}"):
            verify(schedule.with_actions(lines))
    full = lower(generate("1f1b", 3, 2))
    lines = [[*full.actions[0], parse("0SEND0>2")], *full.actions[1:]]
    with pytest.raises(
        ScheduleError, match="nothing goes from stage 0 to stage 2; the edges between ranks are 0>1, 1>2"
    ):
        verify(full.with_actions(lines))


def test_a_limit_on_activations():
    schedule = generate("gpipe", 4, 8)
    verify(schedule, limit=8)
    with pytest.raises(ScheduleError, match="rank 0: holds activations of 8 micro-batches at once; the limit is 7"):
        verify(schedule, limit=7)
    costs = Costs(activations=[10, 20, 30, 40])
    verify(schedule, limit_bytes=[80, 160, 240, 320], costs=costs)
    with pytest.raises(ScheduleError, match="rank 3: holds activations of 320 bytes at once; the limit is 319"):
        verify(schedule, limit_bytes=[80, 160, 240, 319], costs=costs)
    with pytest.raises(ValueError, match="needs costs"):
        verify(schedule, limit_bytes=1)
    with pytest.raises(ValueError, match="2 limits"):
        verify(schedule, limit=[1, 2])


def test_names_and_arguments():
    with pytest.raises(ValueError, match="'zbh1' is unknown; did you mean 'zb-h1'"):
        generate("zbh1", 2, 2)
    with pytest.raises(ValueError, match="'1F1B' is unknown; did you mean '1f1b'"):
        generate("1F1B", 2, 2)
    for arguments in ((0, 2), (2, 0), (2, 1.5)):
        with pytest.raises(ValueError, match="at least 1"):
            generate("gpipe", *arguments)
    with pytest.raises(ValueError, match="has 1 stage per rank, not virtual=2"):
        generate("zb-h1", 2, 2, virtual=2)
    with pytest.raises(ValueError, match="has 2 stages per rank, not virtual=1"):
        generate("zb-v", 2, 2, virtual=1)
    with pytest.raises(ValueError, match="only 'auto' does"):
        generate("zb-h1", 2, 2, limit=3)
    assert generate("interleaved", 3, 6).stages == 6


@pytest.mark.parametrize(
    "token", ["0F3", "12B0", "0W1", "0BW7", "0SEND3>1", "1RECV3<0", "0GATHER", "0FREE", "0REDUCE", "0REDUCE3"]
)
def test_tokens_come_back(token):
    assert str(parse(token)) == token


@pytest.mark.parametrize("token", ["F3", "0X3", "0F", "0F3>1", "0SEND3", "0SEND3<1", "0GATHER3", "1SEND0>1", "0FREE>1"])
def test_tokens_that_mean_nothing_are_refused(token):
    with pytest.raises(ScheduleError, match=token):
        parse(token)


def test_csv_files(tmp_path):
    schedule = prepare(generate("zb-v", 3, 7).with_edges([(0, 2)]), sharded=[0], reduced="step")
    save_csv(schedule, tmp_path / "table.csv")
    assert load_csv(tmp_path / "table.csv") == schedule
    (tmp_path / "hand.csv").write_text("rank 0, 0F0,,0F1, ,0BW0,0BW1\n\nrank 1,,1F0,1BW0,1F1,1BW1\n")
    by_hand = load_csv(tmp_path / "hand.csv")
    assert by_hand == Schedule("hand", generate("gpipe", 2, 2).actions[:1] + by_hand.actions[1:], (0, 1), 2)
    verify(by_hand)
    for text, message in (
        ("rank 1,0F0\n", "row 1: 'rank 1' begins no row"),
        ("rank 0,0F0\nrank 1,0F1\n", "stage 0 belongs to rank 0"),
        ("rank 0,1F0\n", "no rank has an action of stage 0"),
        ("rank 0,0F0,oops\n", "row 1: 'oops' is not an action"),
        ("micro_batches,x\nrank 0,0F0\n", "header row"),
        ("", "no ranks"),
    ):
        with pytest.raises(ScheduleError, match=message):
            from_csv(text)


def test_importing_distlib_does_not_import_pipeline():
    code = "import sys, distlib; sys.exit(any(name.startswith('distlib.pipeline') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0
