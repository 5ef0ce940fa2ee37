"""`DataParallel` and pipelines on a real GPU, whoever shares a card: the losses and weights of one process on the CPU.

On the fake device the same tests run anywhere; test_data_parallel_device.py and test_pipeline_device.py look closer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_places import PLACES, device_of, ready
from pipeline_models import CASES, reference_step
from ranks import process_group, run_ranks

import distlib
from distlib import native

ROWS, MICRO, STEPS = 6, 3, 4
PIPELINES: list[dict[str, Any]] = [
    {"name": "language", "schedule": "1f1b"},
    {"name": "tied", "schedule": "zb-h1"},
    {"name": "skips", "schedule": "zb-v", "shape_header": True},
    {"name": "lengths", "schedule": "gpipe"},
]

pytestmark = pytest.mark.skipif(native.core() is None, reason=native.why_not())


def optimizer_of(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def piped(rank: int, n: int, place: str) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    device = device_of(place, rank)
    found = []
    with process_group(rank, n):
        for options in PIPELINES:
            case = CASES[options["name"]]
            model = distlib.PipelineParallel(
                case.made(),
                microbatches=MICRO,
                loss_fn=case.loss,
                example_inputs=case.batch(ROWS, 0)[0],
                costs="estimated",
                device=device,
                **{key: value for key, value in options.items() if key != "name"},
            )
            optimizer, losses = optimizer_of(model.parameters()), []
            for step in range(STEPS):
                losses.append(float(model.train_step(*(case.batch(ROWS, step) if model.needs_batch else ()))))
                optimizer.step()
                optimizer.zero_grad()
            found.append((losses, model.full_state_dict()))
    return found


def replicated(rank: int, n: int, place: str) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    device, case = device_of(place, rank), CASES["language"]
    with process_group(rank, n) as group:
        model = distlib.DataParallel(case.made().to(device), bucket_mb=0.01)
        optimizer, losses = optimizer_of(model.parameters()), []
        for step in range(STEPS):
            inputs, target = (t.chunk(n)[rank].to(device) for t in case.batch(ROWS, step))
            loss = case.loss(model(inputs), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mean = loss.detach().cpu() / n
            torch.distributed.all_reduce(mean, group=group)
            losses.append(float(mean))
        return [(losses, {name: t.cpu() for name, t in model.module.state_dict().items()})]


def one_process(name: str, micro: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    case = CASES[name]
    model = case.made()
    optimizer, losses = optimizer_of(model.parameters()), []
    for step in range(STEPS):
        losses.append(float(reference_step(model, case, ROWS, step, micro)))
        optimizer.step()
        optimizer.zero_grad()
    return losses, model.state_dict()


def assert_alike(place: str, found: Any, expected: Any) -> None:
    tolerance = 1e-5 if place == "fake" else 1e-4  # a GPU's matrix products round otherwise than the CPU's
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    for name, weight in expected[1].items():
        torch.testing.assert_close(found[1][name], weight, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize(("place", "n"), PLACES)
def test_a_pipeline_trains_as_one_process(place: str, n: int, request: pytest.FixtureRequest) -> None:
    ready(place, request)
    for options, found in zip(PIPELINES, run_ranks(n, piped, place, timeout=100)[0], strict=True):
        assert_alike(place, found, one_process(options["name"], MICRO))


@pytest.mark.parametrize(("place", "n"), PLACES)
def test_replicas_train_as_one_process(place: str, n: int, request: pytest.FixtureRequest) -> None:
    ready(place, request)
    (found,) = run_ranks(n, replicated, place, timeout=100)[0]
    assert_alike(place, found, one_process("language", 1))
