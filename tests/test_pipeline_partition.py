"""The split of layers into stages is the exact optimum, the most balanced one, within memory, and fast."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from distlib.pipeline import split_layers


def every_split(layers: int, stages: int):
    for cuts in itertools.combinations(range(1, layers), stages - 1):
        yield (0, *cuts, layers)


def stage_costs(bounds, costs, communication):
    found = []
    for a, b in itertools.pairwise(bounds):
        cost = sum(costs[a:b])
        cost += communication[a - 1] if communication and a else 0
        cost += communication[b - 1] if communication and b < len(costs) else 0
        found.append(cost)
    return found


def brute_force(costs, stages, communication, memory, limits):
    """(slowest, squares, cuts from the last one on) of the best split that fits, or None."""
    best = None
    for bounds in every_split(len(costs), stages):
        if memory and any(sum(memory[j][a:b]) > limits[j] for j, (a, b) in enumerate(itertools.pairwise(bounds))):
            continue
        found = stage_costs(bounds, costs, communication)
        key = (max(found), sum(c * c for c in found), bounds[::-1])
        best = key if best is None else min(best, key)
    return best


def test_equals_brute_force_on_200_profiles():
    infeasible = communicating = limited = 0
    for seed in range(200):
        draw = random.Random(seed)
        layers = draw.randint(1, 11)
        stages = draw.randint(1, layers)
        # Small whole numbers: sums are exact and ties are common.
        costs = [draw.randint(0, 9) for _ in range(layers)]
        communication = [draw.randint(0, 4) for _ in range(layers - 1)] if draw.random() < 0.5 else None
        memory = limits = None
        if draw.random() < 0.5:
            memory = [[draw.randint(0, 9) for _ in range(layers)] for _ in range(stages)]
            limits = [draw.randint(5, 40) for _ in range(stages)]
        expected = brute_force(costs, stages, communication, memory, limits)
        communicating += communication is not None
        if expected is None:
            infeasible += 1
            least = min(
                max(sum(memory[j][a:b]) - limits[j] for j, (a, b) in enumerate(itertools.pairwise(bounds)))
                for bounds in every_split(layers, stages)
            )
            with pytest.raises(ValueError, match=f"is {least} over it"):
                split_layers(costs, stages, communication=communication, memory=memory, limit=limits)
            continue
        found = split_layers(costs, stages, communication=communication, memory=memory, limit=limits)
        slowest, squares, cuts = expected
        assert found.slowest == slowest
        assert sum(cost**2 for cost in found.costs) == squares
        assert found.bounds[::-1] == cuts
        assert [layer for stage in found.stages for layer in stage] == list(range(layers))
        assert list(found.costs) == stage_costs(found.bounds, costs, communication)
        limited += memory is not None
        if memory:
            assert list(found.memory) == [sum(memory[j][s.start : s.stop]) for j, s in enumerate(found.stages)]
    assert infeasible > 10 and limited > 10 and communicating > 50  # every kind was seen


def test_equals_brute_force_on_fractions():
    for seed in range(100):
        draw = random.Random(seed)
        layers = draw.randint(2, 12)
        stages = draw.randint(1, layers)
        costs = [draw.lognormvariate(0, 1) for _ in range(layers)]
        communication = [draw.random() for _ in range(layers - 1)]
        expected = brute_force(costs, stages, communication, None, None)
        found = split_layers(costs, stages, communication=communication)
        assert found.slowest == pytest.approx(expected[0], rel=1e-12)
        assert sum(cost**2 for cost in found.costs) == pytest.approx(expected[1], rel=1e-9)


def test_ties_go_to_the_most_balanced():
    assert split_layers([10, 1, 1, 1, 1], 3).bounds == (0, 1, 3, 5)  # not (0, 1, 2, 5) nor (0, 1, 4, 5)
    assert split_layers([1] * 8, 4).bounds == (0, 2, 4, 6, 8)
    assert split_layers([0, 0, 0, 0], 2).bounds == (0, 1, 4)


def test_what_memory_forbids():
    costs, memory = [1, 1, 1, 9], [6, 6, 6, 1]
    assert split_layers(costs, 2).bounds == (0, 3, 4)
    assert split_layers(costs, 2, memory=memory, limit=13).bounds == (0, 2, 4)
    # 1F1B: stage 0 holds two micro-batches' activations, stage 1 one.
    weights, activations = [4] * 4, [3] * 4
    per_stage = [[w + held * a for w, a in zip(weights, activations, strict=True)] for held in (2, 1)]
    assert split_layers([1] * 4, 2, memory=per_stage, limit=21).bounds == (0, 2, 4)
    assert split_layers([1] * 4, 2, memory=per_stage, limit=[19, 21]).bounds == (0, 1, 4)
    with pytest.raises(ValueError, match="keeps the memory limit; the best one is 4 over it in some stage"):
        split_layers([1] * 4, 2, memory=per_stage, limit=16)


def test_arguments_are_checked():
    for arguments, more, message in (
        (([1, 2], 3), {}, "2 layers do not make 3 stages"),
        (([1, 2], 0), {}, "2 layers do not make 0 stages"),
        (([1, -2, 3], 2), {}, r"costs\[1\] is -2"),
        (([1, float("nan")], 2), {}, r"costs\[1\] is nan"),
        (([1, 2, 3], 2), {"communication": [1]}, "communication has 1 values; 2 are needed"),
        (([1, 2, 3], 2), {"memory": [1, 2, 3]}, "memory and limit belong together"),
        (([1, 2, 3], 2), {"limit": 3}, "memory and limit belong together"),
        (([1, 2, 3], 2), {"memory": [1, 2, 3], "limit": [1, 2, 3]}, "limit has 3 values"),
        (([1, 2, 3], 2), {"memory": [[1, 2, 3]], "limit": 9}, "memory has 1 lists; 2 are needed"),
        (([1, 2, 3], 2), {"memory": [[1, 2, 3], [1, 2]], "limit": 9}, "memory of stage 1 has 2 values"),
    ):
        with pytest.raises(ValueError, match=message):
            split_layers(*arguments, **more)


def test_a_thousand_layers_in_64_stages_take_less_than_a_second():
    draw = random.Random(0)
    costs = [draw.uniform(1, 2) for _ in range(1000)]
    times = []
    for _ in range(3):
        begun = time.process_time()  # other work on the machine is not ours
        found = split_layers(costs, 64, communication=[0.1] * 999, memory=costs, limit=[30.0 + j for j in range(64)])
        times.append(time.process_time() - begun)
    assert min(times) < 1.0
    assert len(found.stages) == 64 and found.slowest < 1.15 * (sum(costs) / 64 + 0.2)
