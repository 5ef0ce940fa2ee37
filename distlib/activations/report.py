"""What a setting does: bytes saved, and per block what was predicted beside what was measured in the last step."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from distlib.activations.clock import Span
from distlib.activations.counting import Account
from distlib.activations.live import LiveBytes
from distlib.activations.size import show_size
from distlib.activations.wrapped import Record, Wrapped, on_first_gradient
from distlib.shown import Shown


@dataclass(frozen=True)
class Prediction:
    """Of one block: bytes from its forward to its backward; seconds of its forward and backward together."""

    kept: int
    seconds: float


@dataclass(frozen=True)
class Whole:
    """Of a step (forward, loss, backward): bytes at its peak beside parameters, gradients and optimizer; seconds."""

    peak: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a budget came to: attributes as of ActivationReport."""

    choices: dict[str, str]
    budget: int | None
    predicted: dict[str, Prediction]
    predicted_step: Whole | None


class ActivationReport(Shown):
    """Returned by `checkpoint_activations`; print it. It is up to date after every step.

    Attributes:
        policy: "full", "selective", "offload", or "budget".
        choices: block name -> "keep", "selective", "full" or "offload".
        budget: bytes, or None.
        predicted: block name -> Prediction; empty unless there is a budget.
        predicted_step: the Whole that the plan was chosen for, or None.
        measured_peak: bytes of the last step inside `measuring()`, or None.
        in_flight: in a pipeline, stage -> the most micro-batches of it that this rank holds at once. Bytes and seconds
            of blocks, and seconds of a step, are then of one micro-batch; the peak is the rank's.
    """

    def __init__(self, policy: str, in_flight: Mapping[int, int] | None = None) -> None:
        self.policy = policy
        self.in_flight = None if in_flight is None else dict(in_flight)
        self.budget: int | None = None
        self.predicted: dict[str, Prediction] = {}
        self.predicted_step: Whole | None = None
        self.measured_peak: int | None = None
        self.paused = False  # while blocks are measured
        self._wrapped: list[Wrapped] = []
        self._counting = True
        self._counted = False
        self._backward_ran = False
        self._checked = False
        self._accounts = (Account(), Account())
        self._step: Span | None = None
        self._hooks: list[Any] = []
        self._live: LiveBytes | None = None  # while a step is measured

    # ------------------------------------------------------------ what it says

    @property
    def choices(self) -> dict[str, str]:
        return {one.name: one.kind for one in self._wrapped}

    @property
    def baseline_bytes(self) -> int:
        """Bytes that the blocks would keep for backward if they kept everything. Unique memory, without parameters."""
        self._require_counted()
        return sum(one.record.baseline for one in self._wrapped)

    @property
    def kept_bytes(self) -> int:
        """Bytes that the blocks keep in memory for backward."""
        self._require_counted()
        return sum(one.record.kept for one in self._wrapped)

    @property
    def saved_bytes(self) -> int:
        """The difference. Raises RuntimeError before there was a forward with gradients to count it in."""
        return self.baseline_bytes - self.kept_bytes

    @property
    def moved_bytes(self) -> int:
        """Bytes that were moved to the store in the last step."""
        return sum(one.record.moved for one in self._wrapped)

    @property
    def step_seconds(self) -> float | None:
        """From the module's first forward to the end of backward in the last step; None before there was one, and in a
        pipeline, where ranks wait for each other in between."""
        return self._step.seconds if self._step is not None and self.in_flight is None else None

    def refresh(self) -> None:
        """Counts bytes again in the next step, as for another batch size."""
        self._counting = True
        self._backward_ran = True
        self._checked = False

    @contextlib.contextmanager
    def measuring(self) -> Iterator[LiveBytes]:
        """Around one step: counts every tensor that is made in it, to fill `measured_peak` (bytes). Such a step is
        slow: do not time it. Gradients must be there before (one step earlier; `zero_grad(set_to_none=False)`), as they
        would count."""
        live = self._live = LiveBytes()
        try:
            with live:
                yield live
        finally:
            self._live = None
        self.measured_peak = live.peak

    def remove(self) -> None:
        """Gives all blocks their forwards back. RuntimeError where one was wrapped again; nothing is changed then."""
        for one in self._wrapped:
            one.require_outermost()
        for one in self._wrapped:
            one.remove()
        for hook in self._hooks:
            hook.remove()
        self._wrapped, self._hooks = [], []

    def __rich__(self) -> Any:
        from rich.table import Table

        plan = bool(self.predicted)
        table = Table(title=self._title(), caption=self._summary(), caption_justify="left")
        columns = ["block", "does", "keeps all", "keeps"] + (["predicted"] if plan else [])
        columns += ["moves", "forward ms", "again ms", "backward ms"] + (["both ms", "predicted ms"] if plan else [])
        for column in columns:
            table.add_column(column, justify="left" if column in ("block", "does") else "right")
        for one in self._wrapped:
            record, counted = one.record, self._counted
            forward, again, backward = (
                self._seconds(spans) for spans in (record.forwards, record.recomputations, record.backwards)
            )
            cells = [one.name or "(module)", record.kind]
            cells += [show_size(record.baseline), show_size(record.kept)] if counted else ["", ""]
            if plan:
                cells.append(show_size(self.predicted[one.name].kept))
            cells += [show_size(record.moved) if record.moved else "", _ms(forward), _ms(again), _ms(backward)]
            if plan:
                both = forward + backward if forward is not None and backward is not None else None
                cells += [_ms(both), _ms(self.predicted[one.name].seconds)]
            table.add_row(*cells)
        return table

    def _seconds(self, spans: Sequence[Span]) -> float | None:
        """Of a step; of a micro-batch, on average, in a pipeline."""
        found = [s for s in (span.seconds for span in spans) if s is not None]
        return sum(found) / (1 if self.in_flight is None else len(found)) if found else None

    def _title(self) -> str:
        within = f" within {show_size(self.budget)}" if self.budget is not None else ""
        return f"Activations: {self.policy}{within}"

    def _summary(self) -> str:
        lines = []
        for stage, count in (self.in_flight or {}).items():
            lines.append(f"stage {stage}: at most {count} micro-batches are held at once")
        if self._counted:
            saved, baseline = self.saved_bytes, self.baseline_bytes
            part = f" ({saved / baseline:.0%})" if baseline else ""
            lines.append(f"saved {show_size(saved)} of {show_size(baseline)}{part}: {show_size(self.kept_bytes)} stay")
        else:
            lines.append("bytes are counted in the first step")
        if self.predicted_step is not None:
            peak = "" if self.measured_peak is None else f", measured {show_size(self.measured_peak)}"
            seconds = "" if self.step_seconds is None else f", measured {self.step_seconds * 1e3:.1f} ms"
            of = "" if self.in_flight is None else " of a micro-batch"
            lines.append(f"peak of a step: predicted {show_size(self.predicted_step.peak)}{peak}")
            lines.append(f"forward and backward{of}: predicted {self.predicted_step.seconds * 1e3:.1f} ms{seconds}")
        elif self.step_seconds is not None:
            lines.append(f"forward and backward: {self.step_seconds * 1e3:.1f} ms")
        return "\n".join(lines)

    # ------------------------------------------------------------ what it is told

    def attach(self, wrapped: Sequence[Wrapped], *modules: nn.Module) -> None:
        """These blocks of these modules are reported on."""
        self._wrapped = list(wrapped)
        for module in modules:
            self._hooks.append(module.register_forward_pre_hook(_Begins(self), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(_Ends(self), with_kwargs=True))

    def attach_arrivals(self, module: nn.Module, place: int) -> None:
        """The argument of `module` at this place came from other ranks, as do gradients of its outputs: they count as
        activations while they live, though no operation of this rank made them."""
        self._hooks.append(module.register_forward_pre_hook(_Arrives(self, place)))
        self._hooks.append(module.register_forward_hook(_Returns(self)))

    def arrived(self, *trees: Any) -> None:
        """These came from another rank."""
        if self._live is not None:
            self._live.adopt(tree_leaves(trees))

    def joins(self, block: Wrapped) -> None:
        """A copy of a block belongs to this copy of its report."""
        self._wrapped.append(block)

    def entered(self, record: Record) -> bool:
        if self.paused:
            return False
        if self._backward_ran:
            self._begin_step()
        if record.counted and self.in_flight is not None:
            return False
        if self._counting and all(one.record.went for one in self._wrapped):
            self._clear_bytes()  # a forward to look at its output is no part of the step
        record.counted = self._counting
        self._counted = self._counted or self._counting
        return self._counting

    def backward_runs(self) -> None:
        self._backward_ran = True
        if self._counting and not self.paused and not self._checked:
            self._checked = True
            self._warn_if_nothing_saved()

    def accounts(self) -> tuple[Account, Account]:
        return self._accounts

    @property
    def has_counted(self) -> bool:
        """Whether there was a forward with gradients to count bytes in."""
        return self._counted

    def saves_nothing(self) -> str:
        """The message that says so, with numbers; empty where something is saved."""
        if self.saved_bytes > 0 or set(self.choices.values()) <= {"keep"}:
            return ""
        return (
            f"the activation setting {self.policy!r} saves {self.saved_bytes} bytes: {len(self._wrapped)} blocks "
            f"would keep {self.baseline_bytes} bytes and keep {self.kept_bytes}. Their saved tensors are inputs, "
            "parameters or small; name larger blocks (blocks=), or leave the setting out"
        )

    def counted(self) -> None:
        """Bytes were counted in a forward on example inputs, which is no step."""
        for one in self._wrapped:
            one.record.clear()
        self._counting, self._checked, self._step = False, True, None

    def follow(self, first: Plan) -> None:
        """Another rank's plan takes the place of its own."""
        for one in self._wrapped:
            one.kind = first.choices[one.name]
        self.budget, self.predicted, self.predicted_step = first.budget, dict(first.predicted), first.predicted_step

    @property
    def plan(self) -> Plan:
        """What was planned, to be followed by another rank."""
        return Plan(self.choices, self.budget, self.predicted, self.predicted_step)

    def forget(self) -> None:
        """What was measured on the way to a setting is no step."""
        for one in self._wrapped:
            one.record.clear()
        self._clear_bytes()
        self._counting, self._counted, self._step = True, False, None
        self._backward_ran = self._checked = False

    def _require_counted(self) -> None:
        if not self._counted:
            raise RuntimeError(
                "bytes are counted in the first forward with gradients: run a step, or pass example_inputs= to "
                "checkpoint_activations"
            )

    def _warn_if_nothing_saved(self) -> None:
        message = self.saves_nothing() if self._counted else ""
        if message:
            warnings.warn(message, stacklevel=2)

    def _begin_step(self) -> None:
        self._backward_ran = False
        again = self._counting and not self._checked  # refresh() was called: else all blocks are counted by now
        self._counting = again
        for one in self._wrapped:
            one.record.clear()
        if again:
            self._clear_bytes()

    def _clear_bytes(self) -> None:
        for one in self._wrapped:
            one.record.clear_bytes()
        self._accounts = (Account(), Account())

    def step_begins(self, device: torch.device) -> None:
        """The module's forward begins."""
        if self.paused or not torch.is_grad_enabled():
            return
        if self._step is None or self._backward_ran or self._step.seconds is not None:
            self._step = Span(device).begin()

    def step_ends(self) -> None:
        """A backward through the module's output is over."""
        if self._step is not None and not self.paused:
            self._step.end()

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_wrapped": [],  # blocks that are copied too join: one of them does not take all others along
            "_accounts": (Account(), Account()),
            "_step": None,
            "_live": None,
            "_hooks": [],
            "_counting": True,
            "_counted": False,
        }


class _Begins:
    """Hook: the module's forward begins."""

    def __init__(self, report: ActivationReport) -> None:
        self._report = report

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self._report.step_begins(tensors[0].device if tensors else torch.device("cpu"))


class _Arrives:
    """Hook: an argument of a forward came from other ranks."""

    def __init__(self, report: ActivationReport, place: int) -> None:
        self._report, self._place = report, place

    def __call__(self, module: nn.Module, args: Any) -> None:
        self._report.arrived(args[self._place])


class _Returns:
    """Hook: gradients of a forward's outputs will come from other ranks."""

    def __init__(self, report: ActivationReport) -> None:
        self._report = report

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None:
                leaf.register_hook(self._report.arrived)


class _Ends:
    """Hook: the module's forward ended; when backward comes back to its output, its end is waited for."""

    def __init__(self, report: ActivationReport) -> None:
        self._report = report

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._report.paused:
            on_first_gradient(output, self._backward_begins)

    def _backward_begins(self, _: Any) -> None:
        self._report.backward_runs()
        torch.autograd.Variable._execution_engine.queue_callback(self._report.step_ends)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f}"
