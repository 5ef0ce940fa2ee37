"""Micro-batches under way at once, and backwards in two passes: gradients of the plain module, bytes and memory of the
formulas, whatever the order."""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from micro_batch_orders import (
    SPLIT,
    WHOLE,
    WIDTH,
    Driver,
    Layer,
    Outer,
    StageNet,
    Tied,
    any_order,
    assert_gradients,
    data,
    gradients,
    made,
    plain_step,
    play,
)
from ranks import process_group, run_ranks
from test_sharded_features import NO_CORE
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import distlib
from distlib.comm.work import CollectiveError
from distlib.pipeline.split_backward import prepare
from distlib.sharded import MixedPrecision

pytestmark = pytest.mark.slow  # among the first files to be tested

MAKES = {"stage": StageNet, "remade": lambda: StageNet(remade=True), "checkpointed": Outer, "tied": Tied}
HELD = f"G {SPLIT} R"
STEPS = 2
THRICE = "G F0 F1 R G F2 B0 F3 B1 W0 R G B2 B3 W1 W2 W3 R"
THROUGH = f"G {SPLIT}; {SPLIT} R"  # held over two steps


def wrapped(make: Any, options: dict[str, Any], dtype: torch.dtype = torch.float64, how: str = "auto") -> Any:
    module = made(make, dtype)
    report = prepare(module, how)
    options = dict(options)
    if options.get("stage") == 0:
        del options["stage"]
        model: Any = distlib.DataParallel(module, **options)
    else:
        model = distlib.ShardedDataParallel(module, units="auto" if make is Norms else [Layer], **options)
    model.report = report
    return model


# ------------------------------------------------------------ values


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


@functools.cache
def oracle(make: str, n: int) -> list[tuple[dict[tuple[int, int], torch.Tensor], dict[str, torch.Tensor | None]]]:
    """Per step: gradients of inputs, and of parameters, of a plain module in one process."""
    plain, found = made(MAKES[make]), []
    optimizer = sgd(plain)
    for step in range(STEPS):
        inputs = plain_step(plain, step, n)
        found.append((inputs, gradients(plain)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=step != 0)
    return found


def equal(rank: int, n: int, cases: list[tuple[str, dict[str, Any], str, str]]) -> None:
    with process_group(rank, n):
        for make, options, order, how in cases:
            what = make, options, order, how
            model = wrapped(MAKES[make], options, how=how)
            optimizer = sgd(model)
            for step, (inputs, wanted) in enumerate(oracle(make, n)):
                for k, gradient in play(model, order.split(";")[step % (order.count(";") + 1)], rank, step).items():
                    assert torch.allclose(gradient, inputs[rank, k], rtol=1e-9, atol=1e-10), (what, step, k)
                assert_gradients(wanted, model, (what, step))
                optimizer.step()
                optimizer.zero_grad(set_to_none=step != 0)
            if make in ("remade", "checkpointed"):  # once in F, once more in the backward: not in W
                assert [layer.runs for layer in model.layers] == [2 * 4 * STEPS] * 3, what


def cases(spread: bool) -> list[tuple[str, dict[str, Any], str, str]]:
    """(model, options, order, split) on one host, or on hosts of their own."""
    three = {"stage": 3, "partition_size": 2, "shard_optimizer": "world"}
    if not spread:
        found = [("stage", one, SPLIT, "auto") for one in ({"stage": 0}, {"stage": 2, "partition_size": 2}, three)]
        found += [("stage", {"stage": s}, SPLIT, "graph") for s in (0, 3)]
        return [*found, ("stage", three, WHOLE, "auto"), ("remade", {"stage": 3}, SPLIT, "auto")]
    keeps: dict[str, Any] = {"stage": 3, "prefetch": 0, "reshard_after_forward": False}
    second: dict[str, Any] = {"stage": 3, "reshard_after_forward": 2, "hierarchical": False}
    found = [("stage", one, SPLIT, "auto") for one in ({"stage": 1}, {"stage": 2}, three, keeps)]
    found += [("stage", second, order, "auto") for order in (WHOLE, SPLIT, THRICE, THROUGH)]
    found += [("stage", three, HELD, "graph")]
    return found + [(make, {"stage": 3}, SPLIT, "auto") for make in ("remade", "checkpointed", "tied")]


@pytest.mark.parametrize("nodes", [1, pytest.param(4, marks=NO_CORE)])
def test_any_wrapper_has_the_gradients_of_the_plain_module(nodes: int) -> None:
    run_ranks(4, equal, cases(nodes > 1), env={"DISTLIB_NODES": str(nodes)}, timeout=100)


def two_models(rank: int, n: int, seed: int, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Two stages of one rank, in a random order that is the same on all ranks, twice."""
    with process_group(rank, n):
        wanted = oracle("stage", n)[0][1]
        for options in pairs:
            rng = random.Random(seed)
            models = [wrapped(StageNet, one) for one in options]
            lines = [any_order(rng), any_order(rng)]
            choices = [0] * len(lines[0]) + [1] * len(lines[1])
            rng.shuffle(choices)
            before: list[torch.Tensor] = []
            for _ in range(2):
                drivers = [Driver(model, rank, 0) for model in models]
                todo = [iter(line) for line in lines]
                for i in choices:
                    drivers[i].do(next(todo[i]))
                for model in models:
                    assert_gradients(wanted, model, (seed, options, lines, choices))
                now = [p.grad.clone() for model in models for p in model.parameters() if p.grad is not None]
                assert all(torch.equal(a, b) for a, b in zip(now, before, strict=False)), (seed, options)
                before = now
                for model in models:
                    model.zero_grad()


@pytest.mark.parametrize(("n", "nodes"), [(2, 1), pytest.param(2, 2, marks=NO_CORE), pytest.param(4, 4, marks=NO_CORE)])
@pytest.mark.parametrize("seed", [1, 2])
def test_two_models_take_turns_in_any_order(n: int, nodes: int, seed: int) -> None:
    three, some = {"stage": 3}, {"stage": 3, "partition_size": n // 2}
    pairs = [(three, some), ({"stage": 2, "partition_size": n // 2}, three), ({"stage": 0}, {"stage": 1})]
    run_ranks(n, two_models, 10 * n + nodes + 100 * seed, pairs, env={"DISTLIB_NODES": str(nodes)})


def other_features(rank: int, n: int, folder: str) -> None:
    """What changes how parameters or gradients travel: split and held as whole, of the same wrapper."""
    bf16 = MixedPrecision(torch.bfloat16, reduce=torch.float32)
    cases: list[tuple[dict[str, Any], float]] = [
        ({"stage": 3, "mixed_precision": bf16, "offload": Path(folder)}, 1e-5),
        ({"stage": 1, "mixed_precision": MixedPrecision(torch.bfloat16)}, 1e-2),
        ({"stage": 3, "gather_dtype": torch.int8}, 1e-5),
        ({"stage": 0, "gradient_dtype": torch.bfloat16, "static_graph": True}, 1e-2),
    ]
    with process_group(rank, n):
        for options, rtol in cases:
            ends = []
            for order in (WHOLE, HELD):
                model = wrapped(StageNet, options, torch.float32)
                optimizer = distlib.optim.AdamW(model.parameters(), lr=1e-3)
                scaler = distlib.optim.GradScaler(init_scale=4.0)
                for step in range(2):
                    play(model, order, rank, step, scale=float(scaler.scale(torch.ones(()))))
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
                play(model, order, rank, 2)
                ends.append(gradients(model))
            for (name, want), have in zip(ends[0].items(), ends[1].values(), strict=True):
                assert (have is None) == (want is None), (options, name)
                assert want is None or torch.allclose(have, want, rtol=rtol, atol=rtol), (options, name, have, want)


@NO_CORE
def test_other_features_work_as_in_whole_backwards(tmp_path: Path) -> None:
    run_ranks(2, other_features, str(tmp_path), env={"DISTLIB_NODES": "2"})


class Norms(nn.Module):
    """All that it trains lands in the input pass. `skips`: how far `norm` is not used; `spare` never is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.spare = nn.LayerNorm(WIDTH)
        self.skips = False
        self.register_buffer("gain", torch.full((WIDTH,), 2.0))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += x.detach().mean()
        return (x * 1 if self.skips else self.norm(x)) * self.gain


def empty_weight_passes(rank: int, n: int) -> None:
    """Nothing lands in W, on one rank not even in B."""
    with process_group(rank, n):
        plain = made(Norms)
        plain_step(plain, 0, 1, micro_batches=2)  # of rank 0
        wanted = {name: None if g is None else g / n for name, g in gradients(plain).items()}
        for options in ({"stage": 0, "find_unused_parameters": True}, {"stage": 1}, {"stage": 3}):
            model = wrapped(Norms, options)
            model.module.skips = rank > 0
            for _ in range(2):
                driver = Driver(model, rank, 0, micro_batches=2)
                for action in "F0 F1 B0 B1 W0 W1".split():
                    driver.do(action)
                assert_gradients(wanted, model, options)
                model.zero_grad()


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=NO_CORE)])
def test_weight_passes_in_which_nothing_lands(nodes: int) -> None:
    run_ranks(2, empty_weight_passes, env={"DISTLIB_NODES": str(nodes)})


def buffers_in_flight(rank: int, n: int) -> tuple[float, float]:
    """DataParallel copies buffers when no graph refers to them: `gain` is saved for backwards under way."""
    with process_group(rank, n):
        model = wrapped(Norms, {"stage": 0, "find_unused_parameters": True})
        play(model, "F0 F1 F2 B0 F3 B1 W0 B2 B3 W1 W2 W3", rank, 0)
        driver = Driver(model, rank, 1)
        before = float(model.module.seen)
        driver.do("F0")
        return before, float(model.module.seen - data(1, 0, rank).detach().mean())


def test_buffers_are_copied_when_no_micro_batch_is_under_way() -> None:
    (mine, first), (other, second) = run_ranks(2, buffers_in_flight)
    assert abs(mine - other) > 1e-3 and first == pytest.approx(mine) and second == pytest.approx(mine)


# ------------------------------------------------------------ memory


def most_memory(rank: int, n: int, prefetch: int) -> dict[str, int]:
    """Most bytes: of whole parameters during and after each kind of action, of gradient buffers, of the layers."""
    with process_group(rank, n):
        model = wrapped(lambda: StageNet(layers=12), {"prefetch": prefetch})
        most: Counter[str] = Counter()
        action = ""

        def look(*_: Any) -> None:
            most[f"during {action[0]}"] = max(most[f"during {action[0]}"], model._gathered_bytes())
            most["buffers"] = max(most["buffers"], model._reduction.buffer_bytes)

        def watch(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            look()
            output.register_hook(look)

        pool, take = model._reduction._pool, model._reduction._pool.take
        pool.take = lambda *args: (take(*args), look())[0]
        for layer in model.module.layers:
            layer.down.register_forward_hook(watch)
        for step in range(2):
            driver = Driver(model, rank, step)
            for action in "F0 F1 F2 F3 B0 B1 W0 B2 B3 W1 W2 W3".split():
                driver.do(action)
                most[f"after {action[0]}"] = max(most[f"after {action[0]}"], model._gathered_bytes())
                if "W" not in action and action != "B2" and action != "B3":
                    most["aside"] = max(most["aside"], model._reduction.buffer_bytes) if step == 0 else most["aside"]
        assert model.hold()
        most["held"] = model._gathered_bytes()
        assert model.release() and not model.release()
        most["released"] = model._gathered_bytes()
        root, *units = [sum(f.layout.numel * 8 for f in unit.flats) for unit in model._units]
        return {**most, "root": root, "unit": units[0]}


@NO_CORE
@pytest.mark.parametrize("prefetch", [0, 2])
def test_only_a_few_units_are_whole_with_several_micro_batches_under_way(prefetch: int) -> None:
    for found in run_ranks(2, most_memory, prefetch, env={"DISTLIB_NODES": "2"}):
        root, unit = found["root"], found["unit"]
        for kind in "FB":
            assert root + unit <= found[f"during {kind}"] <= root + (2 + prefetch) * unit, (kind, found)
        assert found["after F"] == root and found["after B"] == found["after W"] == 0, found
        assert found["held"] == root + 12 * unit and found["released"] == 0, found
        # Between the passes: gradients of norms, and of `mix`, whose memory a weight pass would miss. Then: three
        # buffers for units, three for the root's trained part, and what hop 1 adds to the sums.
        assert found["aside"] == (13 * 2 * WIDTH + 12 * WIDTH * WIDTH) * 8, found
        assert unit <= found["buffers"] <= found["aside"] + 6 * unit, found


# ------------------------------------------------------------ bytes

WORLD, PARTITION = 1024, 8


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DISTLIB_NODES", str(WORLD // PARTITION))
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def counted(model: Any, order: str) -> dict[tuple[str, str], tuple[int, int]]:
    """(calls, bytes) of the second step, by role of the group and operation."""
    groups = getattr(model, "process_groups", {})
    roles = {g.name: role for role, g in groups.items() if g is not None}
    for step in range(2):
        distlib.ledger().reset()
        play(model, order, 0, step)
        model.zero_grad()
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for row in distlib.ledger().rows:
        key = roles.get(row.group, row.group), row.op
        calls, size = found.get(key, (0, 0))
        found[key] = max(calls, row.calls), size + row.bytes
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_passes_cost_the_bytes_of_one(world: None, stage: int) -> None:
    p, found = PARTITION, {}
    for order in (WHOLE, SPLIT, THRICE)[: 3 if stage == 3 else 2]:
        model = wrapped(StageNet, {"stage": stage, "partition_size": p}, torch.float32)
        flats = [(unit.is_root, flat) for unit in model._units for flat in unit.flats]
        found[order] = counted(model, order)
        assert model.gathers == (stage == 3)
    whole = [4 * flat.layout.numel for _, flat in flats]
    trained = [4 * flat.layout.numel for _, flat in flats if flat.trained]
    hops = 1 if stage == 1 else 4  # stage 1 keeps whole gradients, and makes hop 1 once
    for order, have in found.items():
        assert have["reduction", "reduce_scatter"] == (hops * len(trained), hops * sum(trained) * (p - 1) // p), order
        assert have["replication", "all_reduce"] == found[WHOLE]["replication", "all_reduce"], order
        assert have["replication", "all_reduce"][0] == 1, order
        if stage < 3 or "G" in order:
            times = [max(1, order.count("G"))] * len(flats)
        else:  # F and B of each micro-batch; the root stays whole from an F to the end of the next backward
            times = [4 if is_root else 8 for is_root, _ in flats]
        moved = sum(t * size for t, size in zip(times, whole, strict=True)) * (p - 1) // p
        assert have["partition", "all_gather"] == (sum(times), moved), order


def test_data_parallel_averages_once_whatever_the_passes(world: None) -> None:
    model = wrapped(StageNet, {"stage": 0, "bucket_mb": 0.001}, torch.float32, how="graph")
    whole, split = counted(model, WHOLE), counted(model, SPLIT)
    assert whole == split and model.traffic[0] > 1
    assert {op: calls for (_, op), (calls, _) in split.items()} == {"all_reduce": model.traffic[0]}


# ------------------------------------------------------------ faults


def dies(rank: int, n: int, stage: int, when: str) -> str:
    """Rank 1 raises in a pass of micro-batch 1; what each rank hears."""
    with process_group(rank, n, timeout=20):
        model = wrapped(StageNet, {"stage": stage})

        def boom(_: torch.Tensor) -> None:
            raise ValueError("boom")

        driver = Driver(model, rank, 0)
        try:
            for action in SPLIT.split():
                if rank == 1 and action == when == "B1":
                    driver.flying[1][1].register_hook(boom)
                if rank == 1 and action == when == "W1":
                    driver.queues[1].on_ready(boom)
                driver.do(action)
        except (ValueError, CollectiveError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"


@pytest.mark.parametrize("when", ["B1", "W1"])
@pytest.mark.parametrize("stage", [0, 3])
def test_an_exception_in_a_pass_ends_all_ranks_with_its_words(stage: int, when: str) -> None:
    first, second = run_ranks(2, dies, stage, when, timeout=40)
    assert second == "ValueError: boom"
    which = "input" if when == "B1" else "weight"
    assert first.startswith("CollectiveError") and f"rank 1: backward stopped with an exception in its {which}" in first
