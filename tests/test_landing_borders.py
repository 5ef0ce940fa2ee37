"""Where later runs of a step begin to look at operators: hooks of one run, modes that end in order, compiled parts."""

from __future__ import annotations

import contextlib
import copy
import io
import threading
from typing import Any

import pytest
import torch
from test_landing import Adds, in_rooms
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from distlib import native
from distlib.comm.slots import SlotPool
from distlib.pipeline.landing import Landing, _Redirect
from distlib.pipeline.program import Spec

pytestmark = pytest.mark.skipif(native.core() is None, reason=native.why_not())


class Many(nn.Module):
    """Twelve operators or more, and after the last module that ends two."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = x + 1  # an addition of the same kind as the maker, before the border
        for part in self.parts:
            y = part(y.tanh()).cos()
        return x + y * 1


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The operators that later runs look at."""
    found: list[Any] = []
    plain = _Redirect.__torch_dispatch__

    def dispatch(self: _Redirect, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found.append(func)
        return plain(self, func, types, args, kwargs)

    monkeypatch.setattr(_Redirect, "__torch_dispatch__", dispatch)
    return found


def test_later_runs_see_operators_from_the_last_border_on_only(seen: list[Any]) -> None:
    module = Many()
    assert in_rooms(lambda x, _: module(x), [False] * 4, module) == [False, False, True, True]
    assert [func.overloadpacket.__name__ for func in seen] == ["cos", "mul", "add"] * 2
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_without_a_module_they_see_all(seen: list[Any]) -> None:
    module = Many()
    assert in_rooms(lambda x, _: module(x), [False] * 2) == [False, True]
    assert len(seen) > 12


@pytest.mark.parametrize("look, made", [(4 * 8 * 4 // 3, True), (4 * 8 * 4 // 3 + 1, False)])
def test_a_result_of_fewer_bytes_than_its_looks_are_worth_is_copied(look: int, made: bool, seen: list[Any]) -> None:
    module = Many()
    assert in_rooms(lambda x, _: module(x), [False] * 4, module, 8 * look) == [False, False, made, made]
    assert len(seen) == 6 * made


def test_a_module_that_runs_often_is_counted(seen: list[Any]) -> None:
    module = Many()
    module.parts = nn.ModuleList([module.parts[0]] * 4)
    assert in_rooms(lambda x, _: module(x), [False] * 4, module) == [False, False, True, True]
    assert len(seen) == 6


def test_two_results_are_seen_from_the_first_ones_border_on(seen: list[Any]) -> None:
    module, pool = Many(), SlotPool()
    landing = Landing(lambda: module, 0)
    for run in range(4):
        x, values = torch.randn(4, 8), [None, None]
        slot = pool.reserve([Spec.of(x), Spec.of(x)])

        def step(x: Tensor = x, values: list[Any] = values) -> None:
            early: list[Tensor] = []
            handle = module.parts[1].register_forward_hook(lambda part, args, result: early.append(result * 3))
            values[1] = module(x)
            values[0] = early.pop()
            handle.remove()

        landing.run(step, values, dict(enumerate(slot.rooms)))
        assert [room.holds(v) for room, v in zip(slot.rooms, values, strict=True)] == [run > 1] * 2
    assert len(seen) == 2 * 14, "of 20"
    pool.close()


class Counts(TorchDispatchMode):
    """A mode of the user's own, as selective checkpointing has one."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


class Within(nn.Module):
    """The part runs under a mode, which ends before the last operator, or after it."""

    def __init__(self, to_the_end: bool) -> None:
        super().__init__()
        self.part, self.mode, self.to_the_end = Many(), Counts(), to_the_end

    def forward(self, x: Tensor) -> Tensor:
        x = x.exp()
        with self.mode:
            x = self.part(x)
            if self.to_the_end:
                return x.sin()
        return x.sin()


@pytest.mark.parametrize("to_the_end", [False, True])
def test_modes_that_begin_before_a_border_end_in_order(to_the_end: bool) -> None:
    module = Within(to_the_end)
    module(torch.ones(4, 8))
    calls, module.mode.calls = module.mode.calls, 0
    assert in_rooms(lambda x, _: module(x), [False] * 5, module) == [False, False, False, True, True]
    assert module.mode.calls == 10 * calls and not _get_current_dispatch_mode_stack()


def test_a_mode_that_begins_before_the_border_in_some_runs_only_is_let_be() -> None:
    module = Many()

    def run(x: Tensor, more: bool) -> Tensor:
        with Counts() if more else contextlib.nullcontext():
            return module(x)

    in_rooms(run, [False, False, False, True, True, False], module)
    assert not _get_current_dispatch_mode_stack()


def test_an_error_after_the_border_leaves_no_mode_and_no_hook() -> None:
    module, fails = Many(), []

    def run(x: Tensor, more: bool) -> Tensor:
        result = module(x)
        if fails:
            raise ArithmeticError
        return result

    pool, landing, spec = SlotPool(), Landing(lambda: module, 0), [Spec.of(torch.empty(4, 8))]
    for k in range(4):
        fails += [k] if k == 3 else []
        values: list[Any] = [None]

        def step(values: list[Any] = values) -> None:
            values[0] = run(torch.ones(4, 8), False)

        slot = pool.reserve(spec)
        with pytest.raises(ArithmeticError) if fails else contextlib.nullcontext():
            landing.run(step, values, {0: slot.rooms[0]})
    assert not _get_current_dispatch_mode_stack()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


class Doubles(Counts):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.ops.aten.add.Tensor else result


def test_a_mode_around_the_stage_sees_what_it_always_sees() -> None:
    module = Many()
    with Doubles():
        assert in_rooms(lambda x, _: module(x), [False] * 4, module) == [False] * 4
    assert in_rooms(lambda x, _: module(x), [False] * 3, module) == [False, False, True]


@torch.library.custom_op("distlib_tests::through_a_module", mutates_args=())
def through_a_module(x: Tensor) -> Tensor:
    return INSIDE(x).detach().clone()


INSIDE = nn.Linear(8, 8)


def test_a_module_called_inside_of_an_operator_is_no_border(seen: list[Any]) -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inside = nn.Linear(8, 8), INSIDE

        def forward(self, x: Tensor) -> Tensor:
            return through_a_module(self.first(x)) + 1

    module = Calls()
    assert in_rooms(lambda x, _: module(x), [False] * 4, module) == [False, False, True, True]
    assert seen


class KeepsACopy(nn.Module):
    """Of its part, in run number `at`, from 1, in which the part does not run."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.part, self.at, self.runs = Many(), at, 0
        self.copies: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        if self.runs == self.at:
            buffer = io.BytesIO()
            torch.save(self.part, buffer)
            buffer.seek(0)
            self.copies += [copy.deepcopy(self.part), torch.load(buffer, weights_only=False)]
            return x + 1
        return self.part(x) + 1


@pytest.mark.parametrize("at", [1, 2, 3])  # the first run, the watched one, and the next
def test_copies_of_modules_made_inside_of_a_run_have_hooks_that_do_nothing(at: int) -> None:
    module, x = KeepsACopy(at), torch.randn(4, 8)
    landing, pool, values = Landing(lambda: module, 0), SlotPool(), [None]

    def step() -> None:
        values[0] = module(x)

    for _ in range(4):
        slot = pool.reserve([Spec.of(x)])
        landing.run(step, values, {0: slot.rooms[0]})
    assert len(module.copies) == 2
    for part in module.copies:
        assert torch.equal(part(x), module.part(x)) and not _get_current_dispatch_mode_stack()
    pool.close()


class OnThreads(nn.Module):
    """Its parts run on other threads first, as replicas do."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Many()

    def forward(self, x: Tensor) -> Tensor:
        made: list[Tensor] = []
        thread = threading.Thread(target=lambda: made.append(self.part(x)))
        thread.start()
        thread.join()
        return self.part(x) + made[0]


def test_what_runs_on_other_threads_is_no_border() -> None:
    module = OnThreads()
    assert in_rooms(lambda x, _: module(x), [False] * 4, module) == [False, False, True, True]


class Compiled(nn.Module):
    """Somewhere inside modules run that are compiled: as a module, by its forward, or in a function."""

    def __init__(self, how: str, backend: Any) -> None:
        super().__init__()
        part = Many()
        if how == "module":
            self.part: Any = torch.compile(part, backend=backend)
        else:
            self.part = part
        if how == "in place":
            part.compile(backend=backend)
        if how == "forward":
            part.forward = torch.compile(part.forward, backend=backend)  # type: ignore[method-assign]
        self.run = torch.compile(lambda x: part(x), backend=backend) if how == "function" else self.part

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x) + 1


@pytest.mark.parametrize("how", ["module", "in place", "forward", "function"])
def test_what_is_compiled_while_watched_keeps_nothing_of_it(how: str) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    module = Compiled(how, backend)
    landing, pool, values = Landing(lambda: module, 0), SlotPool(), [None]
    for run in range(4):
        x = torch.randn(4, 8)
        slot = pool.reserve([Spec.of(x)])

        def step(x: Tensor = x) -> None:
            values[0] = module(x)

        landing.run(step, values, {0: slot.rooms[0]})
        assert (slot.rooms[0].holds(values[0])) == (run > 1)
    assert len(graphs) == (2 if how == "function" else 1), "a function once with hooks on its modules"
    pool.close()


def test_a_layer_that_runs_otherwise_with_hooks_has_none(seen: list[Any]) -> None:
    """In evaluation nn.TransformerEncoderLayer is one operator, if nothing of it has a hook."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    module = nn.Sequential(nn.TransformerEncoder(layer, 2), Adds()).eval()
    with torch.no_grad():
        made = in_rooms(lambda x, _: module(x.unsqueeze(0)), [False] * 4, module)
    assert made == [False, False, True, True] and len(seen) < 6
