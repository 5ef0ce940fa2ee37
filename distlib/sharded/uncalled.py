"""Which unit ran although its own forward, during which its parameters are whole, was not called; and the fix.

    blocks.0   Sequential     a unit: its forward makes parameters whole
      0        Linear         called by the model itself: computes with this rank's pieces

Looked up when a forward raises, or when a piece receives a gradient: runs in which neither happens cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import CodeType

from torch import nn

from distlib.sharded.gather import UnitState

_CALL = nn.Module._wrapped_call_impl.__code__


def explain(
    error: BaseException, root: nn.Module, units: Sequence[tuple[UnitState, Sequence[nn.Module]]]
) -> str | None:
    """Why a forward of `root` raised, if a part of a unit ran while none of the unit's own modules was called.

    units: with their own modules, without the root. Returns None where that is not so.
    """
    frames = list(_modules_in(error))
    called = {module for module, code in frames if code is _CALL}
    names = {module: name for name, module in root.named_modules()}
    for unit, own in units:
        if called.intersection(own):
            continue
        inside = {part for module in own for part in module.modules()}
        holders = {place.owner for flat in unit.flats for places in flat.places for place in places}
        ran = [(module, code) for module, code in frames if module in inside and holders.intersection(module.modules())]
        if ran:
            first = ran[0][0]
            outer = next(module for module in own if first in set(module.modules()))
            kinds = [type(module).__name__ for module, code in ran if code is _CALL]
            return _say(names, first, outer, kinds[0] if kinds else None)
    return None


def _modules_in(error: BaseException) -> Iterator[tuple[nn.Module, CodeType]]:
    """Modules whose methods the exception came through, outermost first, and the methods' code."""
    trace = error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            yield module, trace.tb_frame.f_code
        trace = trace.tb_next


def _say(names: dict[nn.Module, str], ran: nn.Module, unit: nn.Module, called: str | None) -> str:
    kind = type(unit).__name__
    inner = f"its part {names[ran]!r} ({type(ran).__name__})" if ran is not unit else "another of its methods"
    return f"{inner} ran, but the forward of {names[unit]!r} ({kind}) was not called. {advice(kind, called)}"


def advice(kind: str, called: str | None = None) -> str:
    """What to do where a module of class `kind` is a unit that is not called; called: a class inside of it that is."""
    such = f", such as {called}" if called is not None else ""
    return (
        f"A unit's parameters are whole during its own forward only. Call the {kind} itself, or wrap with units=[...]: "
        f"classes of modules that are called{such}, without {kind}"
    )


def explain_gradient(name: str, kinds: Sequence[str]) -> str:
    """What it means that this rank's piece of a parameter received a gradient in a backward of the model.

    kinds: class names of the modules of its unit; none for the root.
    """
    fix = advice(" or ".join(dict.fromkeys(kinds))) if kinds else "Use it inside of the model's forward only"
    return (
        f"this rank's piece of {name!r} received a gradient, which would not be averaged: the parameter was used while "
        f"it was not whole. {fix}. A penalty on parameters() goes into a backward of its own"
    )
