"""`checkpoint_activations`: wraps the repeated blocks of a module, by one policy or by a plan within a budget."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distlib.activations.blocks import find_blocks
from distlib.activations.budget import Chain, smallest, solve
from distlib.activations.measure import Loss, Measurement, no_trace
from distlib.activations.offload import Offloader
from distlib.activations.report import ActivationReport, Prediction, Whole
from distlib.activations.selective import make_policy
from distlib.activations.size import parse_size, show_size
from distlib.activations.wrapped import Setting, Wrapped
from distlib.calls import as_call

POLICIES = ("full", "selective", "offload")
ROUNDS = 5  # timed runs of each block and kind; the median counts


def checkpoint_activations(
    module: nn.Module,
    policy: str | Collection[Any] | Callable[..., Any] = "full",
    *,
    budget: str | int | float | None = None,
    blocks: str | Sequence[type[nn.Module]] = "auto",
    example_inputs: Any = None,
    loss: Loss | None = None,
    folder: str | Path | None = None,
    resident: int | None = None,
    window: str | int | None = None,
) -> ActivationReport:
    """Makes the repeated blocks of `module` keep less for backward. Losses and gradients stay the same, bit for bit.

    Blocks are changed in place: their `forward` is wrapped, and nothing else; names, state dict and classes stay. Call
    it before the module is wrapped for data parallelism; on several ranks, alike on each. No rank waits for another.

    Args:
        policy: "full": blocks keep their inputs, and backward runs their forward again. "selective": they also keep the
            results of matrix products, attention and convolutions, and recompute the rest. "offload": saved tensors
            move out of memory in forward and come back in backward. A collection of operations
            (torch.ops.aten.mm.default, ...) or a callable (operation, *args, **kwargs) -> bool: selective, keeping
            the results of those.
        budget: instead of a policy: bytes ("2GiB", int) that the peak of a step may take beside parameters, gradients
            and optimizer state; or a part (float, 0 to 1) of the way from the smallest possible peak to that of keeping
            everything. Each block is measured on `example_inputs`, and the fastest of all plans that fit is applied.
        blocks: "auto": the children of each repeated list; or classes of modules. The outermost count.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments of `module`. Needed
            for a budget; else bytes are counted on them at once, and not in the first step.
        loss: for a budget: scalar of the module's output, as in training; default: the mean of the output.
        folder: "offload" on the CPU: a folder on a disk. With a budget: allows blocks to offload. The file has no name
            and is gone with the process. CUDA tensors go to pinned host memory instead.
        resident: "offload": so many last blocks keep their tensors, which are needed first (default 1).
        window: "offload": bytes that may wait to be written, and that may come back ahead of need; default: those of
            the largest block. While resident blocks do not need their memory, it may be more by as much.

    Returns:
        The report: print it. `saved_bytes` is there after the first forward, or at once with example inputs.

    Raises:
        ValueError: no repeated blocks; options that contradict each other or cannot take effect; with example inputs, a
            setting that saves nothing; a budget that cannot be met, with the smallest that can.
    """
    if isinstance(budget, Real) and not isinstance(budget, Integral):
        budget = float(budget)  # numpy's, too
    _require_consistent(policy, budget, example_inputs, loss, folder, resident, window)
    found = find_blocks(module, blocks)
    require_plain(found)
    custom = None if isinstance(policy, str) else policy
    name = "budget" if budget is not None else policy if isinstance(policy, str) else "selective"
    offloader = None
    devices = {p.device for block in found.values() for p in block.parameters()}
    if name == "offload" or folder is not None:
        offloader = Offloader(
            Path(folder).absolute() if folder is not None else None,
            parse_size("window", window) if window is not None else None,
            lends=budget is None,  # a budget counts with each block's own memory
        )
        for device in devices - {torch.device("meta")}:
            offloader.prepare(device)
    report = ActivationReport(name)
    setting = Setting(report, make_policy(custom), offloader)
    kept = (1 if resident is None else resident) if name == "offload" else 0
    if kept >= len(found):
        raise ValueError(
            f"resident={kept} of {len(found)} blocks: all of them keep their tensors, so 0 bytes would be saved"
        )
    wrapped = []
    for i, (its_name, block) in enumerate(found.items()):
        wrapped.append(Wrapped(block, its_name, "keep" if i >= len(found) - kept else name, setting))
    report.attach(wrapped, module)
    try:
        if budget is not None:
            if torch.device("meta") in devices:
                raise ValueError("a budget is measured: the module must not be on the meta device")
            _plan(module, wrapped, report, budget, as_call(example_inputs), loss, offloader)
        elif example_inputs is not None:
            _count(module, report, as_call(example_inputs))
    except BaseException:
        report.remove()
        raise
    return report


def _require_consistent(
    policy: Any, budget: Any, example_inputs: Any, loss: Any, folder: Any, resident: Any, window: Any
) -> None:
    if isinstance(policy, str) and policy not in POLICIES:
        raise ValueError(
            f"policy={policy!r}: must be one of {', '.join(map(repr, POLICIES))}, or a collection of operations, or a "
            "callable"
        )
    if budget is not None:
        if policy != "full":
            raise ValueError(f"policy={policy!r} and budget={budget!r}: a budget chooses for each block; give only one")
        if example_inputs is None:
            raise ValueError(f"budget={budget!r} needs example_inputs= to measure the blocks on")
        if isinstance(budget, bool) or (isinstance(budget, float) and not 0 <= budget <= 1):
            raise ValueError(
                f"budget={budget!r}: must be bytes (an int or a text such as '2GiB') or a part from 0.0 to 1.0"
            )
    elif loss is not None:
        raise ValueError("loss= is for measuring a budget: without budget= it has no effect")
    offloads = policy == "offload"
    if folder == "":
        raise ValueError("folder='' names no folder: pass one on a disk")
    if folder is not None and not offloads and budget is None:
        raise ValueError(f'folder={str(folder)!r} has no effect without policy="offload" or budget=')
    number = isinstance(resident, Integral) and not isinstance(resident, bool)
    if resident is not None and (not offloads or not number or resident < 0):
        raise ValueError(f'resident={resident!r}: a number of blocks from 0, for policy="offload"')
    if window is not None and not offloads and folder is None:
        raise ValueError(f'window={window!r} has no effect without policy="offload", or budget= with folder=')


def require_plain(found: Mapping[str, nn.Module]) -> None:
    """Blocks that can be wrapped: ValueError by name else."""
    for name, block in found.items():
        if isinstance(block.__dict__.get("forward"), Wrapped):
            raise ValueError(
                f"block {name!r} has an activation setting already: call .remove() of its report before another"
            )
        if block._compiled_call_impl is not None:
            raise ValueError(
                f"block {name!r} was compiled in place, block.compile(), and would run uncompiled inside of its "
                "wrapped forward: put torch.compile(block) into the list instead, before this call"
            )
        if any(nn.parameter.is_lazy(p) for p in (*block.parameters(), *block.buffers())):
            raise ValueError(
                f"block {name!r} has lazy parameters without shapes: run a forward of the module before this call"
            )
        if isinstance(block, torch.jit.ScriptModule):
            raise ValueError(
                f"block {name!r} is a ScriptModule, whose forward cannot be wrapped: leave it out (blocks=)"
            )


def _count(module: nn.Module, report: ActivationReport, inputs: tuple[tuple, dict[str, Any]]) -> None:
    """Counts bytes in a forward without a backward. Raises ValueError where nothing is saved."""
    args, kwargs = inputs
    with no_trace(module, inputs), torch.enable_grad():
        module(*args, **kwargs)
    if not report.has_counted:
        raise ValueError(
            "example_inputs: no block has a parameter or an input with a gradient there, so there is nothing to save: "
            "train some parameter, or leave the setting out"
        )
    message = report.saves_nothing()
    if message:
        raise ValueError(message)
    report.counted()


def _plan(
    module: nn.Module,
    wrapped: Sequence[Wrapped],
    report: ActivationReport,
    budget: str | int | float,
    inputs: tuple[tuple, dict[str, Any]],
    loss: Loss | None,
    offloader: Offloader | None,
) -> None:
    """Measures, solves, applies, and tells the report what is predicted."""
    kinds = ("keep", "selective", "full") + (("offload",) if offloader is not None else ())
    report.paused = True
    try:
        measurement = Measurement(module, wrapped, inputs, loss, ROUNDS)
        chain, order, outside = measurement.chain(kinds, offloader)
    finally:
        report.paused = False
        report.forget()
    limit = _bytes_of(budget, chain)
    plan = solve(chain, limit)
    report.budget = limit
    for one, of_block, taken in zip(order, chain.choices, plan, strict=True):
        choice = of_block[taken]
        one.kind = choice.name
        report.predicted[one.name] = Prediction(choice.kept, choice.seconds)
    report.predicted_step = Whole(chain.peak(plan), outside + chain.seconds(plan))
    if all(one.kind == "keep" for one in order):
        warnings.warn(
            f"budget={budget!r}: keeping everything takes {show_size(report.predicted_step.peak)} at the peak, "
            f"which is within {show_size(limit)}: 0 bytes are saved",
            stacklevel=3,
        )


def _bytes_of(budget: str | int | float, chain: Chain) -> int:
    if not isinstance(budget, float):
        return parse_size("budget", budget)
    least, most = smallest(chain), chain.peak([0] * len(chain.choices))  # the first choice is to keep everything
    return least + round(budget * (most - least))
