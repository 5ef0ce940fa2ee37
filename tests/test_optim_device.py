"""Optimizers, norms and the loss scaler on a device: the CPU core's bits, and a host that never waits.

The device is tests/fake_device, the kernels are csrc/cuda, compiled for the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import fake_device
import pytest
import torch
from devices import device_here, needs_fake_device
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import distlib
from distlib import native
from distlib.cuda import library
from distlib.cuda.step import join_master
from distlib.optim import SGD, AdamW, GradScaler, Lion, clip_grad_norm_, global_norm
from distlib.optim.device import runs

pytestmark = [needs_fake_device, pytest.mark.skipif(native.core() is None, reason=native.why_not())]

SIZES = [(3, 5), (70,), (1,), (0,), (33, 65), (20_000,)]
STEPS = 6
CASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: AdamW(p, lr=0.02, betas=(0.8, 0.95), weight_decay=0.1),
    "adamw, clipped": lambda p: AdamW(p, lr=0.02, max_norm=0.5),
    "sgd": lambda p: SGD(p, lr=0.02, weight_decay=0.1),
    "sgd, momentum": lambda p: SGD(p, lr=0.02, momentum=0.9, dampening=0.2, max_norm=0.7),
    "sgd, nesterov": lambda p: SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "lion": lambda p: Lion(p, lr=0.002, weight_decay=0.1),
}


def parameters(device: torch.device, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    made = [nn.Parameter(torch.randn(size, generator=generator).to(dtype).to(device)) for size in SIZES]
    for p in made:
        p.grad_dtype = None  # gradients of any dtype
    return made


def gradients(step: int, device: torch.device, dtype: torch.dtype = torch.float32) -> list[torch.Tensor | None]:
    """Those of a step; some parameters have none in some steps."""
    generator = torch.Generator().manual_seed(100 + step)
    made = [torch.randn(size, generator=generator).to(dtype).to(device) for size in SIZES]
    return [None if (i + step) % 4 == 0 and step > 1 else g for i, g in enumerate(made)]


def stepped(make: Callable[[Any], Any], device: torch.device, dtype: torch.dtype) -> Any:
    """Parameters, state and norms after some steps, and where the host waited in the last ones."""
    params = parameters(device)
    optimizer = make(params)
    norms, waits = [], []
    for step in range(STEPS):
        for p, g in zip(params, gradients(step, device, dtype), strict=True):
            p.grad = g
        if device.type == "fake":
            fake_device.reset()
        optimizer.step()
        if device.type == "fake":
            waits += map(str, fake_device.host_syncs())
        norms.append(optimizer.grad_norm)
    state = optimizer.state_dict()["state"]
    taken = [{k: v.cpu() for k, v in state.get(i, {}).items()} for i in range(len(params))]
    return [p.detach().cpu() for p in params], taken, [n if n is None else n.item() for n in norms], waits


def _stepped(rank: int, n: int, place: str) -> Any:
    device = device_here(place)
    return {
        (name, dtype): stepped(make, device, dtype)
        for name, make in CASES.items()
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }


def test_steps_have_the_cpus_bits_and_the_host_never_waits() -> None:
    on_cpu, on_device = run_ranks(1, _stepped, "cpu")[0], run_ranks(1, _stepped, "fake")[0]
    for case, (params, states, norms, _) in on_cpu.items():
        other, other_states, other_norms, waits = on_device[case]
        for i, (p, q) in enumerate(zip(params, other, strict=True)):
            assert torch.equal(p, q), (case, i)
        for i, (s, t) in enumerate(zip(states, other_states, strict=True)):
            assert s.keys() == t.keys() and all(torch.equal(v, t[k]) for k, v in s.items()), (case, i)
        assert norms == pytest.approx(other_norms, rel=1e-12) if norms[0] is not None else not any(other_norms)
        assert not waits, (case, waits)


class Counted(TorchDispatchMode):
    """How many operators were called."""

    calls = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += op is not torch.ops.aten.detach.default
        return op(*args, **(kwargs or {}))


def _launches(rank: int, n: int) -> list[int]:
    device = device_here("fake")
    params = [nn.Parameter(torch.ones(5, device=device)) for _ in range(100)]
    optimizer, found = SGD(params, lr=0.1), []
    for absent in ((), (), (40,), (40,)):
        for i, p in enumerate(params):
            p.grad = None if i in absent else torch.ones(5, device=device)
        with Counted() as counted:
            optimizer.step()
        found.append(counted.calls)
    return found


def test_a_parameter_without_gradient_does_not_make_a_launch_of_each_other() -> None:
    first, *counts = run_ranks(1, _launches)[0]
    assert max(counts) < 50, (first, counts)  # of 100 parameters


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), unique=True).map(sorted))
def test_runs_are_the_indices_in_as_few_ranges_as_there_can_be(chosen: list[int]) -> None:
    found = runs(chosen)
    assert [i for begin, end in found for i in range(begin, end)] == chosen
    assert all(a[1] < b[0] for a, b in zip(found, found[1:], strict=False))


def _norms(rank: int, n: int) -> None:
    device = device_here("fake")
    for order in (2.0, 1.0, 3.0, float("inf")):
        found = []
        for where in (torch.device("cpu"), device):
            params = parameters(where)
            for p, g in zip(params, gradients(2, where), strict=True):
                p.grad = g
            fake_device.reset()
            norms = [global_norm(params, order), clip_grad_norm_(params, 0.5, order), global_norm(params, order)]
            assert where.type == "cpu" or not fake_device.host_syncs()
            assert all(v.device == where and v.dtype is torch.float64 for v in norms)
            found.append([v.item() for v in norms])
        assert found[0] == pytest.approx(found[1], rel=1e-6)
        assert found[0][2] == pytest.approx(0.5, rel=1e-5)
    mixed = [parameters(torch.device("cpu"))[0], parameters(device)[0]]
    with pytest.raises(ValueError, match=r"parameters are on cpu and on fake:0"):
        global_norm(mixed)


def test_norms_on_the_device() -> None:
    run_ranks(1, _norms)


def _scaled(rank: int, n: int, place: str, name: str) -> Any:
    """A loss scale with overflows in the first step and in a later one."""
    device = device_here(place)
    params = parameters(device)
    optimizer, scaler = CASES[name](params), GradScaler(init_scale=256.0, growth_interval=2)
    waits, scales = [], []
    for step in range(STEPS):
        loss = scaler.scale(torch.ones((), device=device))
        for p, g in zip(params, gradients(step, device, torch.float16), strict=True):
            p.grad = None if g is None else g * loss.to(g.dtype)
        if step in (0, 3):
            params[4].grad[2, 7] = float("inf" if step else "nan")
        if device.type == "fake":
            fake_device.reset()
        scaler.step(optimizer)
        scaler.update()
        if device.type == "fake":
            waits += map(str, fake_device.host_syncs())
        scales.append(scaler.get_scale())
    state = optimizer.state_dict()["state"]
    taken = [{k: v.cpu() for k, v in state.get(i, {}).items()} for i in range(len(params))]
    return [p.detach().cpu() for p in params], taken, scales, waits


@pytest.mark.parametrize("name", ["adamw", "adamw, clipped", "sgd, momentum"])
def test_a_step_with_infinities_is_skipped_by_the_device_itself(name: str) -> None:
    (params, states, scales, _), (other, other_states, other_scales, waits) = (
        run_ranks(1, _scaled, place, name)[0] for place in ("cpu", "fake")
    )
    assert all(torch.equal(p, q) for p, q in zip(params, other, strict=True))
    assert scales == other_scales and len(set(scales)) == 2
    assert not waits
    for state, other_state in zip(states, other_states, strict=True):
        assert all(torch.equal(value, other_state[key]) for key, value in state.items())


def _remainders(rank: int, n: int, place: str) -> Any:
    device = device_here(place)
    halves = parameters(device, torch.bfloat16)
    optimizer = AdamW(halves, lr=1e-4, remainders=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(STEPS):
            for p, g in zip(halves, gradients(step, device, torch.bfloat16), strict=True):
                p.grad = g
            optimizer.step()
    # State moves: what was saved goes on in another optimizer as if nothing had happened.
    other_halves = [nn.Parameter(p.detach().clone()) for p in halves]
    other = AdamW(other_halves, lr=1e-4, remainders=True)
    other.load_state_dict(optimizer.state_dict())
    for params, chosen in ((halves, optimizer), (other_halves, other)):
        for p, g in zip(params, gradients(1, device, torch.bfloat16), strict=True):
            p.grad = g
        chosen.step()
    masters = [join_master(p.detach().cpu(), optimizer.state[p]["remainder"].cpu()) for p in halves]
    for p, q in zip(halves, other_halves, strict=True):
        assert torch.equal(p, q) and torch.equal(optimizer.state[p]["remainder"], other.state[q]["remainder"])
        assert optimizer.state[p]["exp_avg"].dtype is torch.float32
    return masters


def test_remainders_are_masters_of_32_bits() -> None:
    """bf16 parameters and remainders are what fp32 masters would be, to the bit, on both devices."""
    masters = [p.detach().bfloat16().float() for p in parameters(torch.device("cpu"))]
    plain = [nn.Parameter(m) for m in masters]
    optimizer = AdamW(plain, lr=1e-4)
    for step in [*range(STEPS), 1]:
        for p, g in zip(plain, gradients(step, torch.device("cpu"), torch.bfloat16), strict=True):
            p.grad = None if g is None else g.float()
        optimizer.step()
    for place in ("cpu", "fake"):
        for master, p in zip(run_ranks(1, _remainders, place)[0], plain, strict=True):
            assert torch.equal(master, p.detach()), place


def test_remainders_are_refused_by_name_where_they_make_no_sense() -> None:
    halves, whole = nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"remainders=True: parameter 1 of the group is torch.float32"):
        AdamW([halves, whole], remainders=True)
    with pytest.raises(ValueError, match=r"AdamW\(remainders=True\)"):
        AdamW([halves])
    with pytest.raises(ValueError, match="leave one of them out"):
        AdamW([halves], remainders=True, offload="/nowhere")


def _learning_rates(rank: int, n: int) -> None:
    """A tensor on the device is the learning rate, and is read when the stream gets there."""
    device = device_here("fake")
    params, plain = parameters(device), parameters(torch.device("cpu"))
    rate = torch.tensor(0.5, device=device)
    optimizer, other = AdamW(params, lr=rate), AdamW(plain)
    for step, lr in enumerate((0.5, 0.125, 0.25)):
        for chosen in (params, plain):
            for p, g in zip(chosen, gradients(step, chosen[0].device), strict=True):
                p.grad = g
        rate.fill_(lr)
        other.param_groups[0]["lr"] = lr
        fake_device.reset()
        optimizer.step()
        assert not fake_device.host_syncs()
        other.step()
    assert all(torch.equal(p.cpu(), q) for p, q in zip(params, plain, strict=True))


def test_the_learning_rate_may_be_on_the_device() -> None:
    run_ranks(1, _learning_rates)


def _without_kernels(rank: int, n: int) -> None:
    device = device_here("fake", kernels=False)
    assert not library.present() or device.type != "cuda"
    expected = stepped(CASES["adamw, clipped"], torch.device("cpu"), torch.float32)
    with pytest.warns(UserWarning, match="CUDA kernels are not in use"):
        params, _, norms, _ = stepped(CASES["adamw, clipped"], device, torch.float32)
    for p, q in zip(params, expected[0], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert norms == pytest.approx(expected[2], rel=1e-6)


def test_without_kernels_torch_steps_and_says_so() -> None:
    run_ranks(1, _without_kernels)


def _moved(rank: int, n: int) -> None:
    """State of a CPU's optimizer goes on on the device, and back."""
    device = device_here("fake")
    cpu = torch.device("cpu")
    plain, params = parameters(cpu), parameters(device)
    first, second = CASES["adamw"](plain), CASES["adamw"](params)
    for step in range(STEPS):
        for chosen in (plain, params):
            for p, g in zip(chosen, gradients(step, chosen[0].device), strict=True):
                p.grad = g
        first.step()
        second.step()
        saved, other = first.state_dict(), second.state_dict()
        second.load_state_dict(saved)
        first.load_state_dict(other)
    assert all(torch.equal(p.cpu(), q) for p, q in zip(params, plain, strict=True))
    with pytest.raises(ValueError, match="wrap the model in ShardedDataParallel with that offload="):
        optimizer = distlib.optim.AdamW(params, offload="/tmp")
        optimizer.step()


def test_state_moves_between_devices() -> None:
    run_ranks(1, _moved)


def _odd(rank: int, n: int, place: str) -> Any:
    """Gradients of other strides or dtypes than their parameters; a scaler whose loss is on the CPU."""
    device = device_here(place)
    generator = torch.Generator().manual_seed(1)
    made = [
        torch.randn(4, 6, generator=generator).to(device).t(),
        torch.randn(2, 3, 4, 5, generator=generator).to(device).to(memory_format=torch.channels_last),
        torch.randn(7, dtype=torch.float64, generator=generator).to(device),
    ]
    params = [nn.Parameter(tensor) for tensor in made]
    params[2].grad_dtype = None
    optimizer, waits = Lion(params, lr=0.1), []
    for _ in range(STEPS):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(device)
        if device.type == "fake":
            fake_device.reset()
        optimizer.step()
        waits += map(str, fake_device.host_syncs()) if device.type == "fake" else []
    scaled, scaler = parameters(device), GradScaler(init_scale=8.0)
    optimizer = AdamW(scaled, lr=0.1, max_norm=0.5)
    for step in range(STEPS):
        scaler.scale(torch.ones(()))
        for p, g in zip(scaled, gradients(step, device), strict=True):
            p.grad = g
        scaler.step(optimizer)
        scaler.update()
    return [p.detach().cpu() for p in params + scaled], waits


def test_gradients_of_another_layout_and_scales_on_the_cpu() -> None:
    (expected, _), (found, waits) = (run_ranks(1, _odd, place)[0] for place in ("cpu", "fake"))
    assert all(torch.equal(p, q) for p, q in zip(expected, found, strict=True))
    assert not waits
