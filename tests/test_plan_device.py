"""`parallelize` under plans on a device that is not the CPU: the CPU's losses, whatever the layout; and the main job.

The device is tests/fake_device, with the kernels of csrc/cuda: an access that no event orders raises.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import fake_device
import pytest
import torch
from devices import device_here, needs_fake_device
from pipeline_models import CASES
from ranks import run_ranks
from test_engine_parts import CLIP, RULES, bare_end, batch, mse, plainly, steps_of
from test_train_lm import SHORT, SMALL, assert_same_curve, text

import distlib
from distlib import world
from distlib.engine.as_in_training import where_it_computes

pytestmark = needs_fake_device

__all__ = ["text"]  # a fixture

ROWS, STEPS = 8, 4
ALONE = {"OMP_NUM_THREADS": "1"}  # threads that spin would take the cores from the other ranks


def init_on(place: str) -> distlib.World:
    """distlib.init(), by which this rank is given the fake device, as it would be a GPU."""
    device = device_here(place)
    world._pick_device = lambda backend, launch: device
    return distlib.init()


def train(plan: dict[str, Any], case_name: str = "tied") -> tuple[list[float], list[float], str]:
    """Losses, an evaluation after them, and what the engine says of itself. Weights and batches come from the CPU."""
    case = CASES[case_name]
    engine = distlib.parallelize(
        case.made(),
        distlib.Plan(**plan, **({"costs": "estimated"} if plan.get("pipeline") else {})),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        loss_fn=case.loss,
        example_inputs=case.batch(ROWS, 0)[0],
    )
    losses, norms = [], []
    for step in range(STEPS):
        inputs, target = (t.chunk(engine.data_size)[engine.data_rank] for t in case.batch(ROWS, step))
        losses.append(engine.train_step(inputs, target))
        if engine.grad_norm is not None:
            norms.append(float(engine.grad_norm))
    losses.append(engine.eval().eval_step(inputs, target))
    assert all(loss.device == engine.device for loss in losses)
    assert engine(inputs).device == engine.device
    return [loss.item() for loss in losses], norms, engine.describe()


def trained(rank: int, n: int, place: str, plans: list[dict[str, Any]]) -> list[Any]:
    with init_on(place):
        return [train(plan) for plan in plans]


PLANS: list[dict[str, Any]] = [
    {"clip": 0.3, "microbatches": 2},
    {"activations": {"budget": 0.5}, "microbatches": 2},
    {"stage": 3, "microbatches": 2, "precision": "bf16"},
    {"pipeline": 2, "microbatches": 4, "schedule": "zb-h1", "clip": 0.3},
    {
        "pipeline": 2,
        "microbatches": 4,
        "stage": 3,
        "partition_size": 1,
        "precision": "bf16",
        "activations": "full",
    },
    {"pipeline": 2, "microbatches": 4, "schedule": "zb-h1", "activations": {"budget": 0.5}},
    {"stage": 2, "activations": {"budget": 0.5}},
    {"pipeline": 2, "microbatches": 2, "stage": 1, "partition_size": 1, "activations": {"budget": 0.5}},
]
SCALED = {"dtype": "fp16", "init_scale": 1024.0}
ONLY_THERE: list[dict[str, Any]] = [
    {"stage": 1, "offload": "cpu"},
    {"pipeline": 2, "microbatches": 2, "stage": 1, "partition_size": 1, "offload": "cpu"},
    {"activations": "offload"},
    {"pipeline": 2, "microbatches": 4, "stage": 1, "partition_size": 1, "precision": SCALED},
]


def test_plans_train_as_on_the_cpu() -> None:
    on_cpu = run_ranks(2, trained, "cpu", PLANS, timeout=100, env=ALONE)[0]
    on_device = run_ranks(2, trained, "fake", PLANS, timeout=100, env=ALONE)
    for found in on_device:
        for plan, (losses, norms, words), (expected, expected_norms, _) in zip(PLANS, found, on_cpu, strict=True):
            assert losses == pytest.approx(expected, rel=1e-6), plan
            assert norms == pytest.approx(expected_norms, rel=1e-5), plan
            assert "Each rank computes on fake." in words
    assert on_device[0] == on_device[1]


BARE: list[dict[str, Any]] = [
    {"clip": CLIP},
    {"clip": CLIP, "stage": 1},
    {"clip": CLIP, "stage": 1, "offload": "cpu"},  # the pieces are on the CPU, the stage without any computes elsewhere
    {"clip": CLIP, "stage": 1, "precision": SCALED},
    {"clip": CLIP, "stage": 1, "precision": SCALED, "offload": "cpu"},
]


def trained_bare(rank: int, n: int) -> list[list[float]]:
    found = []
    with init_on("fake"):
        for plan in BARE:
            for name in ("torch's", "ours"):
                engine = distlib.parallelize(
                    bare_end(),
                    distlib.Plan(pipeline=2, microbatches=2, split=["1"], **plan),
                    optimizer=RULES[name],
                    loss_fn=mse,
                    example_inputs=batch(0)[0],
                )
                found.append(steps_of(engine))
    return found


def test_a_stage_without_parameters_meets_the_others_on_their_device() -> None:
    model = bare_end()
    expected = plainly(model, torch.optim.SGD(model.parameters(), lr=5.0))
    everyone = run_ranks(2, trained_bare, timeout=100, env=ALONE)
    assert everyone[0] == everyone[1]
    for k, values in enumerate(everyone[0]):
        plan = BARE[k // 2]
        assert values == pytest.approx(expected, rel=2e-2 if "precision" in plan else 1e-4), plan


def measured(rank: int, n: int) -> None:
    """Sharding takes modules from the CPU: for measuring they are where they will compute, if they fit."""
    device = device_here("fake")
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    parameters, values = list(module.parameters()), [p.clone() for p in module.parameters()]
    with where_it_computes([module], device):
        assert {t.device for t in (*module.parameters(), *module.buffers())} == {device}
    assert all(a is b and a.device.type == "cpu" for a, b in zip(module.parameters(), parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(parameters, values, strict=True))

    class TooLarge(torch.nn.Linear):
        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            if fn(torch.empty(0)).device == device:
                raise torch.OutOfMemoryError("out of memory")
            return super()._apply(fn, recurse)

    large = torch.nn.Sequential(torch.nn.Linear(4, 4), TooLarge(4, 4))
    with pytest.warns(UserWarning, match="does not fit whole on fake"), where_it_computes([module, large], device):
        assert {p.device.type for part in (module, large) for p in part.parameters()} == {"cpu"}


def test_blocks_are_measured_where_they_will_compute() -> None:
    run_ranks(1, measured)


def test_what_only_devices_can_do() -> None:
    expected = run_ranks(2, trained, "cpu", [{}], timeout=100, env=ALONE)[0][0][0]
    for found in run_ranks(2, trained, "fake", ONLY_THERE, timeout=100, env=ALONE):
        for plan, (losses, _, _) in zip(ONLY_THERE, found, strict=True):
            assert losses == pytest.approx(expected, rel=0.03 if "precision" in plan else 1e-5), plan


def steady(rank: int, n: int, plans: list[dict[str, Any]]) -> list[list[str]]:
    """By plan, where the host waited for the device in steps in which nothing is new."""
    case, found = CASES["tied"], []
    with init_on("fake"):
        for plan in plans:
            engine = distlib.parallelize(
                case.made(),
                distlib.Plan(**plan),
                optimizer=lambda parameters: distlib.optim.AdamW(parameters, lr=1e-2),
                loss_fn=case.loss,
                example_inputs=case.batch(ROWS, 0)[0],
            )
            kept, waits = [], []
            for step in range(STEPS + 1):
                inputs, target = (t.chunk(engine.data_size)[engine.data_rank] for t in case.batch(ROWS, step))
                fake_device.reset()
                kept.append(engine.train_step(inputs.pin_memory(), target.pin_memory()))
                kept.append(engine.grad_norm)
                waits += [str(wait) for wait in fake_device.host_syncs() if step >= STEPS - 1]
            found.append(waits)
            assert all(torch.isfinite(value) for value in kept)
    return found


STEADY: list[dict[str, Any]] = [
    {"clip": 0.3, "microbatches": 2},
    {"stage": 3, "clip": 0.3},
    {"pipeline": 2, "microbatches": 4, "schedule": "zb-h1", "clip": 0.3, "costs": "measured"},
    {"pipeline": 2, "microbatches": 2, "stage": 2, "partition_size": 1, "clip": 0.3, "costs": "estimated"},
]


def test_a_steady_step_makes_no_host_wait_for_its_device() -> None:
    for found in run_ranks(2, steady, STEADY, timeout=100, env=ALONE):
        for plan, waits in zip(STEADY, found, strict=True):
            assert not waits, (plan, waits)


def pipelines_of_replicas(rank: int, n: int, place: str) -> Any:
    with init_on(place):
        return [
            train({"pipeline": 2, "microbatches": 2, "schedule": schedule, "stage": stage})
            for schedule, stage in [("1f1b", 0), ("zb-v", 2)]
        ]


def test_replicas_of_pipelines() -> None:
    on_cpu, on_device = (
        run_ranks(4, pipelines_of_replicas, place, timeout=100, env=ALONE) for place in ("cpu", "fake")
    )
    for here, there in zip(on_cpu, on_device, strict=True):
        for expected, found in zip(here, there, strict=True):
            assert found[0] == pytest.approx(expected[0], rel=1e-6)


def resumed(rank: int, n: int, place: str, folder: str) -> tuple[float, list[float]]:
    """The loss of a second step, and the same after loading what was saved before it under other plans."""
    case = CASES["tied"]
    plans: list[dict[str, Any]] = [{"pipeline": 2, "microbatches": 2, "costs": "estimated"}, {}, {"stage": 3}]

    def engine_of(plan: dict[str, Any]) -> distlib.Engine:
        return distlib.parallelize(
            case.made(),
            distlib.Plan(**plan),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
            loss_fn=case.loss,
            example_inputs=case.batch(ROWS, 0)[0],
        )

    def step(engine: distlib.Engine, number: int) -> float:
        inputs, target = (t.chunk(engine.data_size)[engine.data_rank] for t in case.batch(ROWS, number))
        return float(engine.train_step(inputs, target))

    with init_on(place):
        engine = engine_of(plans[0])
        step(engine, 0)
        engine.save(folder)
        expected, found = step(engine, 1), []
        for plan in plans:
            engine = engine_of(plan)
            engine.load(folder)
            found.append(step(engine, 1))
    return expected, found


def test_a_checkpoint_continues_under_other_plans(tmp_path: Path) -> None:
    everything = [
        run_ranks(2, resumed, place, str(tmp_path / place), timeout=100, env=ALONE)[0] for place in ("cpu", "fake")
    ]
    for expected, found in everything:
        assert found == pytest.approx([everything[0][0]] * 3, rel=1e-6)
        assert expected == pytest.approx(everything[0][0], rel=1e-6)


def language_model(rank: int, n: int, place: str) -> list[float]:
    """A model of Transformers in two stages, its loss weighed by tokens."""
    from distlib.integrations import huggingface as hf

    sizes = {"vocab_size": 53, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    with init_on(place):
        torch.manual_seed(0)
        model = hf.causal_lm({"model_type": "llama", **sizes, "num_key_value_heads": 1, "num_hidden_layers": 2})
        ids = torch.randint(53, (4, 10), generator=torch.Generator().manual_seed(1))
        batch = {"input_ids": ids, "labels": ids.clone()}
        engine = distlib.parallelize(
            model,
            distlib.Plan(pipeline=2, microbatches=2, costs="estimated"),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
            example_inputs=batch,
            weigh=hf.causal_tokens,
        )
        return [float(engine.train_step(batch, batch["labels"])) for _ in range(3)]


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_a_model_of_transformers_in_stages() -> None:
    on_cpu, on_device = (run_ranks(2, language_model, place, timeout=100, env=ALONE) for place in ("cpu", "fake"))
    assert on_device == [pytest.approx(losses, rel=1e-5) for losses in on_cpu]
    assert on_cpu[0][-1] < on_cpu[0][0]


# ------------------------------------------------------------ the main job


def job(rank: int, n: int, place: str, arguments: list[str]) -> list[str]:
    """examples/train_lm.py on one rank. Returns where the host waited for the device in the training loop's file."""
    device = device_here(place)
    world._pick_device = lambda backend, launch: device
    import train_lm

    train_lm.main(arguments)
    return [str(s) for s in fake_device.host_syncs() if "batch_of" in str(s)] if place == "fake" else []


@pytest.mark.parametrize("plan", [None, {"pipeline": 2, "microbatches": 3, "stage": 1, "clip": 1.0}])
def test_the_main_job_trains_the_same_curve(plan: dict[str, Any] | None, text: Path, tmp_path: Path) -> None:
    runs = {}
    for place in ("cpu", "fake"):
        out = tmp_path / f"{place}.json"
        arguments = ["--data", str(text), "--out", str(out), *SMALL, *SHORT]
        if plan is not None:
            path = tmp_path / "plan.json"
            path.write_text(json.dumps(plan))
            arguments += ["--plan", str(path)]
        assert run_ranks(2, job, place, arguments, timeout=100, env=ALONE) == [[], []]
        runs[place] = json.loads(out.read_text())
    assert_same_curve(runs["fake"], runs["cpu"])
    assert runs["fake"]["world"]["device"] == "fake"
    reports = runs["fake"]["summary"]["ranks"]
    assert sum(r["bytes_counted"] for r in reports) == sum(r["bytes_expected"] for r in reports) > 0
