"""Less common uses of sharded models on a device: each has the CPU's bits, and no access without an order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import fake_device
import pytest
import torch
from devices import device_here, needs_fake_device
from ranks import process_group, run_ranks
from sharded_models import Block, adamw, loss_of, part_of, tiny
from torch import nn
from torch.utils.checkpoint import checkpoint

import distlib
from distlib import native

pytestmark = [needs_fake_device, pytest.mark.skipif(native.core() is None, reason=native.why_not())]

STEPS = 4


class Context:
    """A rank on a device; `batch` is its part of a step's batch there."""

    def __init__(self, rank: int, n: int, device: torch.device, **options: Any) -> None:
        self.rank, self.n, self.device, self.options = rank, n, device, options

    def wrap(self, module: nn.Module, **more: Any) -> distlib.ShardedDataParallel:
        options = {"units": [Block]} | self.options | more
        if self.device.type == "cpu":
            options.pop("offload", None)
        return distlib.ShardedDataParallel(module, device=self.device, **options)

    def batch(self, step: int) -> tuple[torch.Tensor, ...]:
        return tuple(t.to(self.device, non_blocking=True) for t in part_of(step, self.rank, self.n))


def _weights(model: distlib.ShardedDataParallel) -> list[torch.Tensor]:
    return list(model.full_state_dict().values())


def _trained(here: Context, model: distlib.ShardedDataParallel, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The weights after some steps."""
    for step in range(STEPS):
        loss_of(model, *here.batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return _weights(model)


def evaluated_between(here: Context) -> list[torch.Tensor]:
    """Evaluation between micro-steps and after a step; weights that are loaded right after it."""
    model = here.wrap(tiny())
    optimizer = distlib.optim.AdamW(model.parameters(), lr=3e-3, max_norm=0.05)
    found = []
    before = model.full_state_dict()
    for step in range(STEPS):
        with model.no_sync():
            loss_of(model, *here.batch(2 * step)).backward()
        with torch.no_grad():
            found.append(loss_of(model, *here.batch(99)))
        loss_of(model, *here.batch(2 * step + 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            found.append(loss_of(model, *here.batch(99)))
            if step == 1:
                model.load_state_dict(before)
                found.append(loss_of(model, *here.batch(99)))
                with model.summon_full_params():
                    model.module.norm.weight.add_(0.25)
                found.append(loss_of(model, *here.batch(99)))
    return [*(f.cpu() for f in found), *_weights(model)]


def zeroed_in_place(here: Context) -> list[torch.Tensor]:
    """zero_grad(set_to_none=False), also between micro-steps; steps that the user skips; losses that are summed."""
    model = here.wrap(tiny())
    optimizer = adamw(model.parameters())
    for step in range(STEPS):
        with model.no_sync():
            loss_of(model, *here.batch(2 * step)).backward()
            if step == 2:
                optimizer.zero_grad(set_to_none=False)
        (loss_of(model, *here.batch(2 * step)) + loss_of(model, *here.batch(2 * step + 1))).backward()
        if step != 1:
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
    return _weights(model)


class Skips(nn.Module):
    """Blocks that only some ranks use, in some steps."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny(blocks=4)
        self.used = [0, 1, 2, 3]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.inner.embed(tokens)
        for i in self.used:
            x = self.inner.blocks[i](x)
        return self.inner.head(self.inner.norm(x + self.inner.fixed(x)))


def skipped_units(here: Context) -> list[torch.Tensor]:
    """Units unused in some steps, gathered in vain; under stages 1 and 2 on some ranks only."""
    module = Skips()
    model = here.wrap(module)
    optimizer = distlib.optim.AdamW(model.parameters(), lr=3e-3)
    anywhere = here.options["stage"] < 3
    for step in range(STEPS):
        alone = anywhere and here.rank == 0
        module.used = [0, 1, 2, 3] if step == 0 else [[0, 1], [1, 3], [3, 2, 0]][(step + alone) % 3]
        loss_of(model, *here.batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        module.used = [2]
        with torch.no_grad():
            loss_of(model, *here.batch(step))
    return _weights(model)


class Checkpointed(nn.Module):
    """A block by torch's own checkpoint."""

    def __init__(self, inner: nn.Module, reentrant: bool = False) -> None:
        super().__init__()
        self.inner = inner
        self.reentrant = reentrant

    def forward(self, *inputs: torch.Tensor) -> Any:
        return checkpoint(self.inner, *inputs, use_reentrant=self.reentrant)


def checkpointed(here: Context) -> list[torch.Tensor]:
    """Blocks inside of units are recomputed."""
    module = tiny()
    module.blocks = nn.ModuleList(Checkpointed(block) for block in module.blocks)
    model = here.wrap(module)
    optimizer = distlib.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return _trained(here, model, optimizer)


def policies(here: Context) -> list[torch.Tensor]:
    """distlib's own checkpointing around and inside of units."""
    found = []
    for policy in ("full", "selective"):
        module = tiny()
        distlib.checkpoint_activations(module, policy)
        model = here.wrap(module)
        optimizer = distlib.optim.Lion(model.parameters(), lr=1e-3)
        found += _trained(here, model, optimizer)
    return found


def adapters(here: Context) -> list[torch.Tensor]:
    """A frozen model with small trained parts."""
    module = tiny().requires_grad_(False)
    for block in module.blocks:
        block.norm.requires_grad_(True)
    model = here.wrap(module)
    optimizer = distlib.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, max_norm=0.01)
    return _trained(here, model, optimizer)


def scaled_losses(here: Context) -> list[torch.Tensor]:
    """Infinities in some steps, by distlib's and by torch's optimizers; unscaled before clipping."""
    found = []
    for make in (lambda p: distlib.optim.AdamW(p, lr=3e-3, max_norm=0.05), adamw):
        model = here.wrap(tiny())
        optimizer, scaler = make(model.parameters()), distlib.optim.GradScaler(init_scale=64.0, growth_interval=2)
        for step in range(STEPS):
            loss = loss_of(model, *here.batch(step))
            if step == 1 and here.rank == 0:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            if step == 2:
                scaler.unscale_(optimizer)
                found.append(model.clip_grad_norm_(0.5).cpu().float())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found += [torch.tensor(scaler.get_scale()), *_weights(model)]
    return found


def two_models(here: Context) -> list[torch.Tensor]:
    """Taking turns, the gradient of one flowing through the other."""
    models = [here.wrap(tiny(seed)) for seed in (0, 1)]
    optimizers = [distlib.optim.AdamW(m.parameters(), lr=3e-3) for m in models]
    for step in range(STEPS):
        inputs, targets = here.batch(step)
        first, second = (model(inputs) for model in models)
        nn.functional.cross_entropy((first + second).flatten(0, 1), targets.flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [w for m in models for w in _weights(m)]


def failing(here: Context) -> list[torch.Tensor]:
    """A forward that raises in the middle, and a forward without a backward; then training goes on."""
    module = tiny()
    model = here.wrap(module)
    optimizer = adamw(model.parameters())
    for step in range(STEPS):
        loss_of(model, *here.batch(step)).backward()
        handle = module.blocks[1].up.register_forward_pre_hook(_raise)
        with contextlib.suppress(ZeroDivisionError):
            loss_of(model, *here.batch(step))
        handle.remove()
        if step % 2:
            loss_of(model, *here.batch(step))
        optimizer.step()
        optimizer.zero_grad()
    return _weights(model)


def broken_backward(here: Context) -> list[torch.Tensor]:
    """A backward that raises before any unit was reduced, alone and as a micro-step; then training goes on."""
    model = here.wrap(tiny())
    optimizer = adamw(model.parameters())
    for step in range(STEPS):
        inputs, targets = here.batch(step)
        output = model(inputs)
        output.register_hook(_raise)
        with contextlib.suppress(ZeroDivisionError):
            nn.functional.cross_entropy(output.flatten(0, 1), targets.flatten()).backward()
        with model.no_sync():
            loss_of(model, *here.batch(step)).backward()
            output = model(inputs)
            output.register_hook(_raise)
            with contextlib.suppress(ZeroDivisionError):
                nn.functional.cross_entropy(output.flatten(0, 1), targets.flatten()).backward()
        loss_of(model, *here.batch(step + 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return _weights(model)


def reentrant(here: Context) -> list[torch.Tensor]:
    """The older kind of checkpoint runs a backward inside of the backward."""
    module = tiny(tied=False)
    module.blocks = nn.ModuleList(Checkpointed(block, True) for block in module.blocks)
    model = here.wrap(module)
    optimizer = distlib.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return _trained(here, model, optimizer)


def half(here: Context) -> list[torch.Tensor]:
    """bf16 with masters: distlib's and torch's optimizers, skipped steps, loaded weights."""
    module = tiny()
    module.scale = module.scale.bfloat16()
    model = here.wrap(module, mixed_precision=distlib.MixedPrecision(param=torch.bfloat16))
    first = distlib.optim.AdamW(model.parameters(), lr=3e-3, max_norm=0.05)
    second = adamw(model.parameters())
    before = model.full_state_dict()
    for step in range(STEPS):
        loss_of(model, *here.batch(step)).backward()
        if step != 2:
            (first if step % 2 else second).step()
            first.zero_grad()
        if step == 1:
            model.load_state_dict({k: 0.5 * (v + before[k]) for k, v in model.full_state_dict().items()})
    return _weights(model)


def _raise(*_: Any) -> None:
    raise ZeroDivisionError


def from_meta(here: Context) -> list[torch.Tensor]:
    """Built nowhere, initialised on the device, unit by unit."""

    def init(owner: nn.Module) -> None:
        with torch.no_grad():
            for i, p in enumerate(owner.parameters(recurse=False)):
                p.copy_(torch.linspace(-0.5, 0.5 + i, p.numel()).view(p.shape))
            for b in owner.buffers(recurse=False):
                b.fill_(0.5)

    with torch.device("meta"):
        module = tiny()
    model = here.wrap(module, init=init)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=True)
    weights = _trained(here, model, optimizer)
    report = str(model.memory_report(optimizer))
    assert "optimizer" in report
    return weights


USES: dict[str, Callable[[Context], list[torch.Tensor]]] = {
    f.__name__: f
    for f in (
        evaluated_between,
        zeroed_in_place,
        skipped_units,
        checkpointed,
        policies,
        adapters,
        scaled_losses,
        two_models,
        failing,
        from_meta,
        broken_backward,
        reentrant,
        half,
    )
}


def _used(rank: int, n: int, place: str, options: list[dict[str, Any]]) -> Any:
    device = device_here(place)
    found = {}
    with process_group(rank, n):
        for index, chosen in enumerate(options):
            for name, use in USES.items():
                watch = fake_device.WatchPinned() if place == "fake" and "offload" in chosen else None
                with watch or contextlib.nullcontext():
                    found[name, index] = use(Context(rank, n, device, **chosen))
    return found


ALONE: list[dict[str, Any]] = [{"stage": 2}, {"stage": 3, "offload": "cpu"}]
TOGETHER: list[dict[str, Any]] = [{"stage": 2}, {"stage": 3}, {"stage": 1, "offload": "cpu"}]


@pytest.mark.parametrize(("n", "options"), [(1, ALONE), (2, TOGETHER)])
def test_any_use_has_the_cpus_bits_on_a_device(n: int, options: list[dict[str, Any]]) -> None:
    on_cpu = run_ranks(n, _used, "cpu", options, timeout=200, env={"DISTLIB_NODES": str(n)})
    on_device = run_ranks(n, _used, "fake", options, timeout=200)
    for rank, (expected, found) in enumerate(zip(on_cpu, on_device, strict=True)):
        for (name, index), values in expected.items():
            others = found[name, index]
            assert len(values) == len(others), (name, options[index])
            for i, (value, other) in enumerate(zip(values, others, strict=True)):
                assert torch.equal(value, other), (rank, name, options[index], i)
