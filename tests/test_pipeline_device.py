"""Pipelines on a device that is not the CPU: the CPU's bits, streams in order, by either way of messages.

The device is tests/fake_device: an access that no event orders raises at the line that made it.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from devices import device_here, needs_fake_device
from pipeline_models import CASES
from ranks import process_group, run_ranks

import distlib
from distlib.pipeline import reach

pytestmark = needs_fake_device

ROWS, MICRO, STEPS = 7, 3, 3
Found = dict[str, Any]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def train(device: torch.device, name: str, direct: bool = False, **options: Any) -> Found:
    """Losses, gradients and outputs of some steps. direct: whether messages must go from device to device."""
    case = CASES[name]
    model = distlib.PipelineParallel(
        case.made(),
        microbatches=MICRO,
        loss_fn=case.loss,
        example_inputs=case.batch(ROWS, 0)[0],
        costs="estimated",
        device=device,
        **options,
    )
    assert all(p.device == device for p in model.parameters())
    assert model._runtime._transport.direct == direct
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(3)
    found: Found = {"losses": []}
    for step in range(STEPS):
        loss = model.train_step(*case.batch(ROWS, step))
        assert loss.device == device
        found["losses"].append(bits(loss))
        if step == 0:
            found["gradients"] = {name: bits(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    inputs, target = case.batch(ROWS, 0)
    found["evaluation"] = bits(model.eval_step(inputs, target))
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    outputs = list(output.values()) if isinstance(output, dict) else [output]
    assert all(o.device == device for o in outputs)
    found["outputs"] = [bits(o) for o in outputs]
    found["weights"] = {name: bits(t) for name, t in model.full_state_dict().items()}
    return found


def trained(rank: int, n: int, place: str, records: list[dict[str, Any]], way: str = "") -> list[Found]:
    """way: of messages that must be taken; "staged" does not ask whether there is another."""
    device = device_here(place)
    if way == "staged":
        reach._settle = lambda group, device: "for a test"
    with process_group(rank, n), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [train(device, **record, direct=way == "direct") for record in records]
    heard = any("through host memory" in str(w.message) for w in said)
    assert heard == (way == "staged" and rank == 0), [str(w.message) for w in said]
    return found


def assert_alike(n: int, records: list[dict[str, Any]], way: str) -> None:
    on_cpu = run_ranks(n, trained, "cpu", records, timeout=100)
    on_device = run_ranks(n, trained, "fake", records, way, timeout=100)
    for here, there in zip(on_cpu, on_device, strict=True):
        for record, expected, found in zip(records, here, there, strict=True):
            for what, value in expected.items():
                assert found[what] == value, (what, record)


RECORDS: list[dict[str, Any]] = [
    {"name": "dropout", "schedule": "zb-h1"},  # states of two generators travel
    {"name": "tied", "schedule": "1f1b"},
    {"name": "skips", "schedule": "gpipe"},
    {"name": "tied", "schedule": "interleaved"},
    {"name": "lengths", "schedule": "zb-v"},
]


def test_one_rank_has_the_cpus_bits() -> None:
    assert_alike(1, [{**record, "stages": None} for record in RECORDS], "direct")


def test_messages_from_device_to_device_carry_the_same_bits() -> None:
    assert_alike(2, RECORDS, "direct")


def test_messages_through_host_memory_carry_the_same_bits() -> None:
    assert_alike(2, RECORDS, "staged")
