"""What a recording says no to, and where in the model that is."""

from __future__ import annotations

import contextlib
import logging
import random
import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.utils import _pytree as pytree

from distlib.words import words_of

_PRIMITIVE = (int, float, complex, str, bytes, bool, type(None), type(...), slice, torch.dtype, torch.device)


ASKS_FOR_VALUES = (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException)


class DrawnByPython:
    """Whether code of modules that are divided draws from Python's or numpy's generator: its branches are taken while
    recording, once for all steps, and on each rank otherwise."""

    def __init__(self) -> None:
        self.note()

    def note(self) -> None:
        """What is drawn from now on counts."""
        self._state = self._now()

    def require_none(self, before: str) -> None:
        """Raises ValueError if anything was."""
        for name, state in self._now().items():
            if name in self._state and state != self._state[name]:
                raise ValueError(
                    f"pipeline: before {before}, the model draws from {name}{line()}: what follows from that would be "
                    "the same in each step, and other on each rank. Draw with torch, and use torch.where; or pass the "
                    "number as an input; or draw inside of a module that lies in one stage"
                )

    @contextlib.contextmanager
    def as_before(self) -> Iterator[None]:
        """What is drawn inside, is drawn again outside."""
        numpy = sys.modules.get("numpy")
        before = random.getstate(), None if numpy is None else numpy.random.get_state()
        try:
            yield
        finally:
            random.setstate(before[0])
            if numpy is not None and before[1] is not None:
                numpy.random.set_state(before[1])

    @staticmethod
    def _now() -> dict[str, Any]:
        found: dict[str, Any] = {"Python's random": random.getstate()}
        if (numpy := sys.modules.get("numpy")) is not None:
            kind, keys, *rest = numpy.random.get_state()
            found["numpy.random"] = (kind, keys.tobytes(), *rest)
        return found


def check_opaque(leaf: Any, where: str) -> None:
    """Refuses objects with tensors inside that pytree does not look into."""
    if isinstance(leaf, _PRIMITIVE) or isinstance(leaf, (nn.Module, type)) or callable(leaf):
        return
    inside: list[Any] = []
    if isinstance(leaf, Mapping):
        inside += leaf.values()
    elif isinstance(leaf, (list, tuple, set)):
        inside += leaf
    inside += getattr(leaf, "__dict__", {}).values()
    if any(isinstance(item, Tensor) for item in pytree.tree_leaves(inside)):
        raise ValueError(
            f"pipeline: {where} has a {type(leaf).__name__} with tensors in it, which pytree does not know. Register "
            "the class (torch.utils._pytree.register_dataclass or register_pytree_node), or use a tuple or dict"
        )


def line() -> str:
    """Where the model's code is, of the running stack."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and not _is_foreign(frame.f_code.co_filename):
        frame = frame.f_back
    return "" if frame is None else f" ({frame.f_code.co_filename}:{frame.f_lineno})"


_OURS = (torch.__path__[0], __file__.rpartition("pipeline")[0])


def _is_foreign(filename: str) -> bool:
    return not filename.startswith(_OURS) and not filename.startswith("<")


def refusal(error: Exception, module: nn.Module) -> Exception | None:
    """What to say about an error that only fake tensors raise; None for the model's own."""
    values = ASKS_FOR_VALUES
    is_numpy = isinstance(error, RuntimeError) and ".numpy() is not supported" in str(error)
    if isinstance(error, values) or is_numpy:
        what = "asks for the value of a tensor" if not isinstance(error, values[1]) else "makes a shape of values"
        detail = ".numpy()" if is_numpy else str(getattr(error, "func", error))
        return ValueError(
            f"pipeline: {_where(error, module)} {what} ({detail}). Stages are cut before any value is there, and a "
            "rank has only its own: use torch.where or masks instead of `if`, .item(), .tolist() and boolean "
            "indexing; or pass the number as an input that is no tensor; or wrap the code as a "
            "torch.library.custom_op with register_fake"
        )
    unknown = (fake_tensor.UnsupportedOperatorException, fake_tensor.UnsupportedFakeTensorException)
    if isinstance(error, unknown):
        return ValueError(
            f"pipeline: {_where(error, module)} calls an operator that says nothing of its result's shape: {error}. "
            "Register it with torch.library.register_fake"
        )
    if type(error) in (RuntimeError, IndexError):  # torch's, as for shapes that do not go together
        return RuntimeError(
            f"pipeline: recording the model failed in {_where(error, module)}: {words_of(error)}. Have the inputs (or "
            "example_inputs) the shapes and dtypes that it takes?"
        )
    return None


@contextlib.contextmanager
def no_log_of_fake_tensors() -> Iterator[None]:
    """What they fail at is raised here, with its place; torch would print a traceback besides, on every rank."""
    log = logging.getLogger(fake_tensor.__name__)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _where(error: Exception, module: nn.Module) -> str:
    """Module and line in which an error arose."""
    names = {id(part): name for name, part in module.named_modules()}
    inner, line = None, ""
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        held = frame.f_locals.get("self")
        if isinstance(held, nn.Module) and id(held) in names:
            inner = held
        if _is_foreign(frame.f_code.co_filename):
            line = f" at {frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    if inner is None:
        return f"the model{line}"
    kind = next(base.__name__ for base in type(inner).__mro__ if base.__module__ == type(inner).__module__)
    return f"module {names[id(inner)]!r} ({kind}){line}" if names[id(inner)] else f"the model ({kind}){line}"
