"""What travels between stages, who holds what, how stages are named, and what is refused."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lm.model import GPT
from played import Played, compare, recorded
from record_models import CASES, Many, Residual, UNet, tokens, values
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distlib.pipeline.record import record
from distlib.pipeline.stages import (
    StageModule,
    assign,
    chain,
    cut,
    edges,
    ghost,
    holdings,
    leaves_of,
    tied,
)

# ---------------------------------------------------------------- what travels


def test_only_what_is_needed_travels_and_straight_to_where_it_is() -> None:
    parts = cut(recorded(UNet(), (values(2, 2, 9),), {}), range(7), 7)
    assert edges(parts) == ((0, 1), (0, 6), (1, 2), (1, 5), (2, 3), (3, 4), (4, 5), (5, 6))  # the input: everywhere
    assert [len(port.specs) for part in parts for port in part.sends] == [1] * 8  # tensors meet where they are used
    parts = cut(recorded(GPT(3, 16, 2), (tokens(),), {}), range(6), 6)
    assert edges(parts) == ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5))  # rotary tables are made on each stage
    assert {port.nbytes for part in parts for port in part.sends} == {2 * 6 * 16 * 4}
    make, inputs = CASES["many, dict"]
    program = recorded(make(), *inputs())
    assert [call.name for call in program.leaf_calls] == [
        "embed", "blocks.0", "blocks.1", "blocks.2", "split", "blocks.0", "split", "head"
    ]  # fmt: skip
    parts = cut(program, range(8), 8)
    assert [part.state for part in parts[1:4]] == [("causal",)] * 3  # masks are not sent
    crossing = [(port.source, port.target, spec.dtype) for part in parts for port in part.sends for spec in port.specs]
    assert {dtype for _, _, dtype in crossing} == {torch.float32}
    assert (0, 6, torch.float32) in crossing  # first, to the glue behind the last split


def test_no_gradient_is_sent_where_there_is_none() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    module[0].requires_grad_(False)
    module[1].requires_grad_(False)
    parts = compare(module, lambda: ((values(2, 6),), {}))[-1]
    assert [port.specs[0].requires_grad for part in parts for port in part.sends] == [False, False, True]

    class Ignores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            a = self.layers[0](x)
            b = self.layers[1](a)
            return self.layers[2](b) + a.argmax(-1, keepdim=True) + a.detach()

    parts = compare(Ignores(), lambda: ((values(2, 6),), {}))[-1]
    grads = {(p.source, p.target): [s.requires_grad for s in p.specs] for part in parts for p in part.sends}
    assert grads == {(0, 1): [True], (0, 2): [False, False], (1, 2): [True]}


def test_values_are_dropped_after_their_last_use() -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = []

    def before(module: nn.Module, args: Any) -> None:
        most.append(sum(ref() is not None for ref in alive))

    def after(module: nn.Module, args: Any, output: Tensor) -> None:
        alive.append(weakref.ref(output))

    module = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
    with torch.no_grad():
        played = Played(module, cut(recorded(module, (values(2, 6),), {}), [0] * 5, 1))
        for layer in module:
            layer.register_forward_pre_hook(before)
            layer.register_forward_hook(after)
        played.forward((values(2, 6),), {})
    assert most == [0, 1, 1, 1, 1]


def test_a_stage_forgets_a_part_that_nobody_keeps_and_its_copy_is_its_own() -> None:
    module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    played = Played(module, cut(recorded(module, (values(2, 6),), {}), [0, 1], 2))
    played.forward((values(2, 6),), {})
    stage = copy.deepcopy(played.stages[0])
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.zero_()
    assert not stage(played.parts[0], (), (values(2, 6),), {})[0][0][0].any()
    assert played.stages[0](played.parts[0], (), (values(2, 6),), {})[0][0][0].any()
    kept = weakref.ref(played.parts[0])
    played.parts = ()
    gc.collect()
    assert kept() is None


# ---------------------------------------------------------------- who holds what


def test_names_and_objects_stay_those_of_the_model() -> None:
    torch.manual_seed(0)
    for case, shared in (
        ("gpt, tied", {"embedding.weight": (0, 2)}),
        ("another module's weight", {"embed.weight": (0, 2), "shared.weight": (0, 2), "shared.bias": (0, 2)}),
    ):
        make, inputs = CASES[case]
        module = make()
        program = recorded(module, *inputs())
        calls = len(program.leaf_calls)
        parts = cut(program, [0] * 2 + [1] * (calls - 3) + [2], 3)
        held = holdings(parts, module)
        assert tied(module, held) == shared
        stages = [StageModule(module, one.names) for one in held]
        whole = module.state_dict(keep_vars=True)
        found = {}
        for stage in stages:
            mine = stage.state_dict(keep_vars=True)
            assert all(whole[name] is tensor for name, tensor in mine.items())
            found.update(mine)
        assert found.keys() == whole.keys()
    module = Many()
    module.unused, module.blocks[1].training = nn.Linear(2, 2), False
    module.register_parameter("spare", nn.Parameter(torch.ones(3)))
    program = recorded(module, *CASES["many, dict"][1]())
    held = holdings(cut(program, [0] * 4 + [1] * 4, 2), module)
    assert [one.idle for one in held] == [("spare",), ("unused",)]
    stages = [StageModule(module, one.names) for one in held]
    assert {n for s in stages for n, _ in s.named_parameters()} == {n for n, _ in module.named_parameters()}
    assert "offset" not in stages[1].state_dict() and dict(stages[1].named_buffers())["offset"] is module.offset
    assert not stages[0].get_submodule("blocks.1").training and stages[0].get_submodule("blocks.0").training
    assert not any(part.training for stage in stages for part in stage.eval().modules())
    with pytest.raises(RuntimeError, match="a container of a pipeline stage cannot be called"):
        stages[0].get_submodule("blocks")(values(1))


def test_recording_leaves_the_model_as_it_was() -> None:
    class Keeps(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            self.cache = super().forward(x)
            if x.shape[0] == 3:
                raise ArithmeticError("three")
            return self.cache

    torch.manual_seed(0)
    module = Keeps(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LSTM(4, 4))
    module[0].weight.grad = torch.ones(4, 4)

    def look() -> Any:
        attributes = [(type(part), sorted(vars(part)), part.training) for part in module.modules()]
        return attributes, [
            (n, id(t), t._version, t.requires_grad) for n, t in module.state_dict(keep_vars=True).items()
        ]

    before, generator = look(), torch.get_rng_state()
    module[2]._forward_hooks.clear()
    with pytest.raises(ArithmeticError, match="three"):
        record(module, (values(3, 4),), {}, ["0", "1", "2"])
    with pytest.raises(ValueError, match="never"):
        assign(record(nn.Sequential(module[0], module[1]), (values(2, 4),), {}, ["0", "1"]), ["2"])
    assert look() == before and torch.equal(torch.get_rng_state(), generator)
    assert all(a is b for a, b in zip(module[2]._flat_weights, module[2].parameters(), strict=True))
    assert not torch.overrides._get_current_function_mode_stack() and "apply" in vars(torch.autograd.Function)
    other = ghost(module)
    assert all(t.is_meta for t in other.state_dict().values()) and other[0].weight.requires_grad


# ---------------------------------------------------------------- finding and naming stages


def test_leaves_are_found_in_the_longest_list_and_in_others_beside_it() -> None:
    assert leaves_of(GPT(2, 16, 2)) == ["embedding", "blocks.0", "blocks.1", "final_norm", "head"]
    assert leaves_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == ["0", "1", "2"]
    nested = nn.Sequential(
        nn.Linear(2, 2), nn.Linear(2, 2), nn.Sequential(*(nn.Sequential(nn.Linear(2, 2)) for _ in "abc"))
    )
    assert leaves_of(nested) == ["0", "1", "2.0", "2.1", "2.2"]
    assert leaves_of(nn.ModuleDict({"a": Residual(), "b": nn.ModuleList([UNet()])})) == [
        "a", "b.0.down.0", "b.0.down.1", "b.0.down.2", "b.0.middle", "b.0.up.0", "b.0.up.1", "b.0.up.2"
    ]  # fmt: skip
    assert leaves_of(Residual()) == ["norm", "inner", "drop"]
    assert leaves_of(nn.Transformer(8, 2, 2, 2, 16, batch_first=True)) == [
        "encoder.layers.0", "encoder.layers.1", "encoder.norm", "decoder.layers.0", "decoder.layers.1", "decoder.norm"
    ]  # fmt: skip
    model = GPT(3, 16, 2)
    assert leaves_of(model, ["blocks.1.mlp_norm"])[1:6] == [
        "blocks.0", "blocks.1.attention_norm", "blocks.1.attention", "blocks.1.mlp_norm", "blocks.1.up"
    ]  # fmt: skip
    program = recorded(model, (tokens(),), {}, ["blocks.1.mlp_norm", "final_norm"])
    assert assign(program, ["blocks.1.mlp_norm", "final_norm"]) == (0, 0, 0, 0, 1, 1, 1, 1, 2, 2)
    compare(model, lambda: ((tokens(),), {}), split=["blocks.1.mlp_norm"])


def test_stages_given_as_modules() -> None:
    torch.manual_seed(0)
    module, split = chain([nn.LSTM(4, 4), Pairs(), Residual(4)])
    assert [name.split(".")[0] for name in module.state_dict()] == ["0"] * 4 + ["2"] * 4
    program = recorded(module, (values(3, 2, 4),), {}, split)
    assert assign(program, split) == (0, 1, 2)
    compare(module, lambda: ((values(3, 2, 4),), {}), split=split)
    with pytest.raises(ValueError, match="the same module is given as two stages"):
        chain([module, module])


class Pairs(nn.Module):
    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor]:
        return (x + state[0],)


# ---------------------------------------------------------------- refusals


class Says(nn.Module):
    """A model of three leaves whose glue is `what(self, x, leaves)`."""

    def __init__(self, what: Callable[..., Any], *leaves: nn.Module) -> None:
        super().__init__()
        self.what = what
        self.layers = nn.ModuleList(leaves or [nn.Linear(6, 6) for _ in range(3)])
        self.register_buffer("steps", torch.zeros(6))

    def forward(self, x: Tensor) -> Any:
        return self.what(self, x, *self.layers)


class Item(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.max().item()


class Aside(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.loss = super().forward(x)
        return self.loss + 1


class Appends(nn.Module):
    def forward(self, x: Tensor, to: list[Tensor]) -> Tensor:
        to.append(x)
        return x


class Unknown:
    def __init__(self, x: Tensor) -> None:
        self.x = x


def replaces(self: Any, x: Tensor, a: Any, b: Any, c: Any) -> Tensor:
    self.steps = self.steps + 1
    return c(b(a(x)))


def counts_late(self: Any, x: Tensor, a: Any, b: Any, c: Any) -> Tensor:
    y = b(a(x) + self.steps)
    self.steps.add_(y.detach().sum(0))
    return c(y)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "if": (
        lambda: Says(lambda self, x, a, b, c: c(b(x)) if a(x).sum() > 0 else x),
        r"the model \(Says\) at .*test_record_stages.py:\d+ asks for the value of a tensor .*torch.where",
    ),
    "item in a leaf": (
        lambda: Says(lambda self, x, a, b, c: b(a(x)), nn.Linear(6, 6), Item(), nn.Linear(6, 6)),
        r"module 'layers.1' \(Item\) at .*test_record_stages.py:\d+ asks for the value",
    ),
    "numpy": (lambda: Says(lambda self, x, a, b, c: a(x).detach().numpy()), r"asks for the value of a tensor \(.numpy"),
    "boolean index": (lambda: Says(lambda self, x, a, b, c: c(a(x)[x > 0])), "makes a shape of values"),
    "attribute": (
        lambda: Says(lambda self, x, a, b, c: c(a(x)) + a.loss, Aside(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)),
        r"uses a tensor, float32 \[2, 6\], that no call returned \(attribute layers.0.loss\).*return it",
    ),
    "list": (
        lambda: Says(lambda self, x, a, b, c: b(a(x, [])), Appends(), nn.Linear(6, 6), nn.Linear(6, 6)),
        "the call of layers.0 changes a list or dict that it is given",
    ),
    "argument": (
        lambda: Says(lambda self, x, a, b, c: b(Unknown(a(x)))),
        "the call of layers.1 has a Unknown with tensors",
    ),
    "output": (
        lambda: Says(lambda self, x, a, b, c: Unknown(a(x))),
        "the model's output has a Unknown .* Register the class",
    ),
    "checkpoint": (
        lambda: Says(lambda self, x, a, b, c: c(checkpoint(b, a(x), use_reentrant=False))),
        "layers.1 runs inside of activation checkpointing .* distlib.checkpoint_activations",
    ),
    "old checkpoint": (
        lambda: Says(lambda self, x, a, b, c: c(checkpoint(b, a(x), use_reentrant=True))),
        "layers.1 is called inside of an autograd.Function",
    ),
    "buffer": (
        lambda: Says(replaces),
        "forward replaces steps of a module that is divided among stages. Write into it",
    ),
    "two stages": (lambda: Says(counts_late), "steps is read on stage 0 and written on stage 1"),
    "two names": (
        lambda: Says(lambda self, x, a, b, c: twice_named(a(x), b, c)),
        "writes in place, on stage 1, into memory of which 2 tensors come from an earlier stage",
    ),
    "leaf's state": (
        lambda: Says(lambda self, x, a, b, c: c(a(x)) + a.running_mean, nn.BatchNorm1d(6), *(nn.Linear(6, 6),) * 2),
        "layers.0.running_mean is used outside of the module that writes it",
    ),
    "hook": (
        lambda: hooked(Says(lambda self, x, a, b, c: a(x))),
        "Says is divided .* its backward hooks would never fire",
    ),
    "lazy": (lambda: Says(lambda self, x, a, b, c: a(x), nn.LazyLinear(3)), "layers.0.weight has no shape yet"),
}


def twice_named(h: Tensor, b: nn.Module, c: nn.Module) -> Tensor:
    h = h + 0
    view = h[:, 0]
    h.mul_(2)
    view.add_(b(h * 1).sum(1))
    return c(h)


def hooked(module: nn.Module) -> nn.Module:
    module.register_full_backward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize("case", REFUSED)
def test_what_stages_cannot_do_is_refused_by_name(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        module = make()
        program = record(module, (values(2, 6),), {}, leaves_of(module))
        cut(program, range(len(program.leaf_calls)), len(program.leaf_calls))


def test_wrong_names_and_bounds_are_refused() -> None:
    model = GPT(3, 16, 2)
    model.spare = nn.Linear(2, 2)
    program = recorded(model, (tokens(),), {})
    for run, message in (
        (lambda: leaves_of(model, ["block.1"]), "GPT has no module 'block.1'; did you mean blocks.1"),
        (lambda: leaves_of(model, ["blocks.1", "blocks.1.up"]), "'blocks.1.up', which is inside of blocks.1"),
        (lambda: leaves_of(model, [""]), "which is the whole model"),
        (lambda: leaves_of(model, "half"), "split='half' must be"),
        (lambda: record(model, (tokens(),), {}, ["blocks.1", "blocks.1.up"]), "blocks.1.up lies inside of blocks.1"),
        (lambda: record(model, (tokens(),), {}, [""]), "the whole model is no leaf"),
        (lambda: assign(program, ["spare"]), "'spare', which the recorded run never calls"),
        (lambda: assign(program, ["blocks.2", "blocks.1"]), r"stage 1 would hold no leaf \(before blocks.1\)"),
        (lambda: assign(program, ["embedding"]), r"stage 0 would hold no leaf \(before embedding\). 6 leaf calls"),
        (lambda: assign(program, [0, 3, 3, 6]), r"stage 1 would hold no leaf \(before blocks.2\)"),
        (lambda: assign(program, [0, 3, 5]), "must go from 0 to 6"),
        (lambda: cut(program, [0, 1, 0, 1, 1, 1], 2), "blocks.1 is on stage 0, but is called after leaves of stage 1"),
        (lambda: cut(program, [0] * 6, 2), r"of 2 stages, \[1\] would hold no leaf"),
        (lambda: cut(program, [0] * 5, 1), "5 stages are given for 6 leaf calls"),
        (lambda: StageModule(model, ["blocks.7"]), "no module 'blocks.7'"),
    ):
        with pytest.raises(ValueError, match=message):
            run()
