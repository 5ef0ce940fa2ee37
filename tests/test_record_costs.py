"""Costs of leaves: estimates are the operators' own numbers, measurements leave no trace, splits follow from both."""

from __future__ import annotations

import pytest
import torch
from lm.model import GPT
from record_models import CASES, tokens, values
from torch import nn

from distlib.pipeline.costs import BANDWIDTH, FLOPS, LeafCost, estimate, measure, split_auto
from distlib.pipeline.cut import crossing_bytes
from distlib.pipeline.record import record
from distlib.pipeline.stages import assign, cut, ghost, leaves_of


def test_an_estimate_is_operations_and_bytes() -> None:
    n, k, m = 4096, 512, 256
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(k, k), nn.Linear(k, m, bias=False), nn.ReLU(), nn.Linear(m, m))
        x = torch.empty(n, k)
    model[3].weight.requires_grad_(False)
    program = record(model, (x,), {}, leaves_of(model))
    first, second, relu, last = found = estimate(program, model)
    assert found == estimate(program, ghost(model))
    product = 2 * n * k * m / FLOPS + 4 * (n * k + k * m + n * m) / BANDWIDTH
    assert second.forward == pytest.approx(product, rel=1e-6)
    assert second.backward == pytest.approx(product, rel=1e-6) and second.weight == pytest.approx(product, rel=1e-6)
    assert first.backward == 0 < first.weight  # the inputs need no gradient
    assert relu.forward == pytest.approx(4 * 2 * n * m / BANDWIDTH) and relu.weight == 0
    assert last.weight < 0.1 * last.backward  # its bias only
    assert [c.parameter_bytes for c in found] == [4 * (k * k + k), 4 * k * m, 0, 4 * (m * m + m)]
    # Saved: inputs of the first two; the relu's result; of the last one nothing, its weight needs no gradient.
    assert [c.activation_bytes for c in found] == [4 * n * k, 4 * n * k, 4 * n * m, 0]
    assert [c.output_bytes for c in found] == [4 * n * k, 4 * n * m, 4 * n * m, 0]


@pytest.mark.parametrize("case", CASES)
def test_crossing_bytes_are_those_of_a_cut(case: str) -> None:
    torch.manual_seed(0)
    make, inputs = CASES[case]
    module = make()
    program = record(module, *inputs(), leaves_of(module))
    count = len(program.leaf_calls)
    for k, expected in enumerate(crossing_bytes(program)):
        parts = cut(program, [0] * (k + 1) + [1] * (count - k - 1), 2)
        assert sum(port.nbytes for part in parts for port in part.sends) == expected, k
    costs = estimate(program, module)
    assert [cost.name for cost in costs] == [call.name for call in program.leaf_calls]
    assert all(cost.forward > 0 for cost in costs[:1]) and all(cost.total >= 0 for cost in costs)


def test_measured_on_random_numbers_without_a_trace() -> None:
    model = ghost(GPT(3, 16, 2, tied=True))
    program = record(model, (tokens(),), {}, leaves_of(model))
    before = torch.get_rng_state()
    costs = measure(program, model, repeat=2)
    assert torch.equal(torch.get_rng_state(), before) and all(p.is_meta for p in model.parameters())
    blocks = [(c.forward, c.backward, c.weight) for c in costs if c.name.startswith("blocks")]
    assert len(set(blocks)) == 1 and min(blocks[0][:2]) > 0  # measured once, for all three
    assert [c.activation_bytes for c in costs] == [c.activation_bytes for c in estimate(program, model)]
    for case in ("modes", "in place", "many, dict", "custom functions", "u-net", "another module's weight"):
        make, inputs = CASES[case]
        module = make()
        weights = {name: t.clone() for name, t in module.state_dict().items()}
        program = record(module, *inputs(), leaves_of(module), torch.bfloat16 if case == "u-net" else None)
        assert all(cost.forward > 0 for cost in measure(program, module, repeat=1))
        assert all(torch.equal(t, weights[name]) for name, t in module.state_dict().items())
        assert all(p.grad is None for p in module.parameters())


def test_glue_counts_with_what_it_works_on() -> None:
    make, inputs = CASES["another module's weight"]
    module = make()
    program = record(module, *inputs(), leaves_of(module))
    *_, before, last = estimate(program, module)
    assert before.name == "blocks.2" and last.name == "shared"
    assert last.parameter_bytes == 4 * (8 * 8 + 8 + 32 * 8)  # the product with the embedding's weight behind it


def test_bounds_follow_from_costs_and_memory() -> None:
    module = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
    program = record(module, (values(2, 6),), {}, leaves_of(module))

    def costs(*seconds: float) -> list[LeafCost]:
        return [LeafCost(str(k), s / 3, s / 3, s / 3, 100, 10, 8) for k, s in enumerate(seconds)]

    bounds = split_auto(program, costs(3, 1, 1, 1, 3), 3)
    assert bounds == (0, 1, 4, 5) and assign(program, bounds) == (0, 1, 1, 1, 2)
    assert split_auto(program, costs(9, 1, 1, 1, 1), 2) == (0, 1, 5)
    # 400 bytes of state per leaf, and the activations of 2 micro-batches on stage 0, of 1 on stage 1.
    assert split_auto(program, costs(9, 1, 1, 1, 1), 2, memory_limit=1260) == (0, 2, 5)
    assert split_auto(program, costs(9, 1, 1, 1, 1), 2, memory_limit=1250, in_flight=[1, 3], state=3.9) == (0, 3, 5)
    dear = costs(1, 1, 1, 1, 1)
    dear[1] = LeafCost("1", 1 / 3, 1 / 3, 1 / 3, 100, 10, 8000)
    assert split_auto(program, dear, 2) == (0, 2, 5)
    assert split_auto(program, dear, 2, seconds_per_byte=1e-3) == (0, 3, 5)
    for more, message in (
        ({"stages": 6}, r"5 leaf calls \(0, 1, 2, 3, 4\) do not make 6 stages. Use fewer"),
        ({"stages": 2, "memory_limit": 900}, "no split of 5 layers into 2 stages keeps the memory limit"),
        ({"stages": 2, "in_flight": [1]}, "in_flight has 1 values for 2 stages"),
        ({"stages": 2, "costs": dear[:3]}, "3 costs are given for 5 leaf calls"),
    ):
        with pytest.raises(ValueError, match=message):
            split_auto(program, **{"costs": dear, **more})
