"""What models do: frozen and tied parameters, checkpoints, changing control flow, several models. In fp64, so that any
difference from the plain module on one process is a mistake, not rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import process_group, run_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

import distlib
from distlib import native

NO_CORE = pytest.mark.skipif(native.core() is None, reason=native.why_not())
WIDTH = 7


def data(step: int, rank: int, salt: int = 0) -> torch.Tensor:
    """The inputs of one rank in one step."""
    generator = torch.Generator().manual_seed(10_000 * salt + 100 * step + rank)
    return torch.randn(3, WIDTH, generator=generator, dtype=torch.float64)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 11)
        self.down = nn.Linear(11, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Blocks that are units, and a root. `way` says how a forward goes through them."""

    def __init__(self, blocks: list[nn.Module] | None = None, way: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(3)] if blocks is None else blocks)
        self.extra = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.way = way or straight

    def forward(self, x: torch.Tensor, step: int, rank: int) -> Any:
        return self.way(self, x, step, rank)


def straight(net: Net, x: torch.Tensor, step: int, rank: int) -> torch.Tensor:
    x = net.first(x)
    for block in net.blocks:
        x = block(x)
    return net.last(x)


Make = Callable[[], nn.Module]
LossOf = Callable[[nn.Module, int, int], torch.Tensor]


def square(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    return model(data(step, rank), step, rank).square().mean()


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


@dataclass
class Case:
    """A model and its loss on one rank's data; `options` go to the wrapper."""

    make: Make
    loss: LossOf = square
    optimizer: Callable[[Any], torch.optim.Optimizer] = adamw
    steps: int = 4
    hosts: bool = True  # in stage 3 over hosts, too
    units: Any = (Block,)


def assert_equal(model: Any, plain: nn.Module, what: str, rtol: float = 1e-9) -> None:
    """The sharded model's weights are the plain module's."""
    full = model.full_state_dict()
    want = plain.state_dict()
    assert list(full) == list(want), what
    for name, _ in plain.named_parameters(remove_duplicate=False):
        torch.testing.assert_close(
            full[name], want[name], rtol=rtol, atol=1e-10, msg=lambda m, n=name: f"{what}, {n}: {m}"
        )


def run_case(case: Case, name: str, rank: int, n: int, **options: Any) -> None:
    torch.manual_seed(0)
    plain = case.make().double()
    torch.manual_seed(0)
    model = distlib.ShardedDataParallel(case.make().double(), units=list(case.units), **options)
    theirs, ours = case.optimizer(plain.parameters()), case.optimizer(model.parameters())
    for step in range(case.steps):
        for r in range(n):
            (case.loss(plain, step, r) / n).backward()
        case.loss(model, step, rank).backward()
        for (key, want), (_, piece) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
            assert (want.grad is None) == (piece.grad is None), f"{name}: {key} in step {step}"
        for optimizer in (theirs, ours):
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(model, plain, f"{name} {options}")


# ------------------------------------------------------------ frozen, tied, odd


class Lora(nn.Module):
    """A frozen weight plus a small trained product: the product is computed from parameters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, WIDTH) * 0.1)
        self.b = nn.Parameter(torch.randn(WIDTH, 2) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.linear(x, self.base.weight + self.b @ self.a, self.base.bias)


def frozen_unit() -> nn.Module:
    net = Net()
    net.blocks[1].requires_grad_(False)
    net.first.requires_grad_(False)
    return net


def tied() -> nn.Module:
    """Within a unit, across units, and between a unit and the root."""
    net = Net()
    net.blocks[0].down.weight = nn.Parameter(net.blocks[0].up.weight.detach().t().contiguous())
    inner = nn.Linear(WIDTH, WIDTH)
    net.blocks[1].up, net.blocks[1].down = inner, inner
    net.blocks[2].up.bias = net.blocks[0].up.bias
    net.blocks[2].down.bias = net.last.bias
    return net


class Odd(nn.Module):
    """Scalars, parameters of no elements, parameters smaller than the group."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.none = nn.Parameter(torch.zeros(0, 3))
        self.one = nn.Parameter(torch.ones(1))
        self.three = nn.Parameter(torch.ones(3))
        self.matrix = nn.Parameter(torch.randn(WIDTH, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = x @ self.matrix
        return x * self.scalar * self.one + self.none.sum() + mixed.sum() * self.three.prod() * 0.01


class Empty(nn.Module):
    """A unit whose only parameter has no elements."""

    def __init__(self) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.zeros(4, 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.none.sum()


class TwoTypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDTH, WIDTH)
        self.narrow = nn.Linear(WIDTH, WIDTH)

    def _apply(self, fn: Any, recurse: bool = True) -> TwoTypes:
        super()._apply(fn, recurse)
        self.narrow.float()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.wide(x) + self.narrow(x.float()).double()


# ------------------------------------------------------------ control flow


def skipping(net: Net, x: torch.Tensor, step: int, rank: int) -> torch.Tensor:
    """A unit, and a part of the root, that some steps leave out: no gradient, so no decay either."""
    x = net.first(x)
    for i, block in enumerate(net.blocks):
        if step % 2 == 0 or i != 1:
            x = block(x)
    return net.last(net.extra(x) if step == 2 else x)


def by_rank(net: Net, x: torch.Tensor, step: int, rank: int) -> torch.Tensor:
    """Ranks use different parts of the root."""
    return straight(net, net.extra(x) if (rank + step) % 2 else x, step, rank)


def by_rank_units(net: Net, x: torch.Tensor, step: int, rank: int) -> torch.Tensor:
    """Ranks use different units."""
    x = net.first(x)
    for i, block in enumerate(net.blocks):
        if i != (rank + step) % 4:
            x = block(x)
    return net.last(x)


def turning(net: Net, x: torch.Tensor, step: int, rank: int) -> torch.Tensor:
    """Another order of units in every step."""
    x = net.first(x)
    for i in range(3):
        x = net.blocks[(i * (1 + step % 2) + step) % 3](x)
    return net.last(x)


def twice(net: Net, x: torch.Tensor, step: int, rank: int) -> torch.Tensor:
    x = net.first(x)
    for i in (0, 1, 0, 2, 1):
        x = net.blocks[i](x)
    return net.last(x)


def straight_ahead(net: Net, x: torch.Tensor, step: int, rank: int) -> dict[str, Any]:
    return {"out": (straight(net, x, step, rank),), "note": "text"}


# ------------------------------------------------------------ checkpoints


def checkpointed(reentrant: bool) -> Callable[..., torch.Tensor]:
    def way(net: Net, x: torch.Tensor, step: int, rank: int) -> torch.Tensor:
        x = net.first(x)
        for block in net.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return checkpoint(net.last, x, use_reentrant=reentrant)  # a part of the root

    return way


class Inside(Block):
    """A block that checkpoints a part of itself."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = checkpoint(lambda v: torch.tanh(self.up(v)), x, use_reentrant=self.reentrant)
        return x + self.down(hidden)


def several(net: Net, x: torch.Tensor, step: int, rank: int) -> torch.Tensor:
    """One checkpoint around two units."""
    return net.last(checkpoint(lambda v: net.blocks[1](net.blocks[0](v)), net.first(x), use_reentrant=False))


def only_reentrant_blocks(net: Net, x: torch.Tensor, step: int, rank: int) -> torch.Tensor:
    """Blocks whose inputs become leaves when they are recomputed, before parameters' own graphs are visited."""
    x = net.first(x)
    for block in net.blocks:
        x = checkpoint(block, x, use_reentrant=True)
    return net.last(x)


# ------------------------------------------------------------ losses


def two_forwards(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    first = model(data(step, rank), step, rank)
    second = model(data(step, rank, 1), step, rank)
    return first.square().mean() + (first * second).mean()


def with_leaf(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    """Inputs that want gradients themselves."""
    return model(data(step, rank).requires_grad_(), step, rank).square().mean()


def leaf_alone(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    return model(data(step, rank).requires_grad_()).square().mean()


def of_dict(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    return model(x=data(step, rank), step=step, rank=rank)["out"][0].square().mean()


def evaluating(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    """Forwards without gradients before, and between forward and backward."""
    with torch.no_grad():
        before = model(data(step, rank), step, rank)
    loss = square(model, step, rank)
    with torch.inference_mode():
        model.eval()
        model(data(step, rank, 2), step, rank)
        model.train()
    assert torch.allclose(before.square().mean(), loss)
    return loss


def forgotten(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    """A forward that no backward follows."""
    square(model, step + 100, rank)
    return square(model, step, rank)


def raising(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    """A forward that raises in its middle, then a good one."""
    handle = model.blocks[1].up.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(data(step, rank), step, rank)
    handle.remove()
    return square(model, step, rank)


def kept_graph(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    """Two backwards through one graph."""
    loss = square(model, step, rank)
    share = 1 if isinstance(model, distlib.ShardedDataParallel) else 2  # the oracle sees two ranks' data
    (loss * 0.3 / share).backward(retain_graph=True)
    return loss


def input_gradient(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    """torch.autograd.grad for inputs only, then the training backward."""
    x = data(step, rank).requires_grad_()
    (slope,) = torch.autograd.grad(model(x, step, rank).sum(), x)
    return model(data(step, rank) + slope.detach(), step, rank).square().mean()


def penalty(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    """A gradient penalty: a second backward through the first."""
    x = data(step, rank).requires_grad_()
    out = model(x, step, rank)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return out.square().mean() + slope.square().mean()


# ------------------------------------------------------------ modules of torch


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(10, 6, batch_first=True)
        self.out = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor, step: int, rank: int) -> torch.Tensor:
        hidden, _ = self.lstm(x[None])
        return self.out(self.gru(hidden)[0])


def sequential_loss(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    return model(data(step, rank)).square().mean()


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, WIDTH)),
        nn.Conv1d(1, 4, 3),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Sequential(nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), nn.Flatten()),
        nn.Linear(12, 3),
    )


def normed() -> nn.Module:
    net = Net()
    for block in net.blocks:
        nn.utils.parametrizations.weight_norm(block.up)
    return net


def attention() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH + 1, 2, 9, dropout=0.0, batch_first=True), 2)


def attention_loss(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    return model(F.pad(data(step, rank), (0, 1))[None]).square().mean()


# ------------------------------------------------------------ optimizers


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=False)


def adagrad(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(parameters, lr=0.05, foreach=True)


def adam_plain(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01, foreach=False, amsgrad=True)


CASES = {
    "lora": Case(lambda: Net([Lora() for _ in range(3)]), units=(Lora,)),
    "lora with leaf inputs": Case(lambda: nn.Sequential(Lora(), Lora()), leaf_alone, units=(Lora,)),
    "lora in re-entrant checkpoints": Case(lambda: Net([Lora(), Lora()], only_reentrant_blocks), units=(Lora,)),
    "a frozen unit": Case(frozen_unit),
    "tied": Case(tied),
    "odd sizes": Case(lambda: Net([Odd(), Odd()]), units=(Odd,)),
    "an empty unit": Case(lambda: Net([Block(), Empty()]), units=(Block, Empty)),
    "only scalars": Case(lambda: Net([Odd()]), units=(Odd,)),
    "two dtypes": Case(lambda: Net([TwoTypes(), Block()]), units=(TwoTypes, Block), steps=2),
    "skipped in some steps": Case(lambda: Net(way=skipping), steps=5),
    "used on some ranks": Case(lambda: Net(way=by_rank)),
    "units used on some ranks": Case(lambda: Net(way=by_rank_units), hosts=False),
    "another order": Case(lambda: Net(way=turning), steps=5),
    "called twice": Case(lambda: Net(way=twice)),
    "a dict": Case(lambda: Net(way=straight_ahead), of_dict),
    "checkpoints": Case(lambda: Net(way=checkpointed(False))),
    "re-entrant checkpoints": Case(lambda: Net(way=checkpointed(True))),
    "checkpoints inside": Case(lambda: Net([Inside(False), Inside(False)]), units=(Inside,)),
    "re-entrant checkpoints inside": Case(lambda: Net([Inside(True), Inside(True)]), units=(Inside,)),
    "one checkpoint around units": Case(lambda: Net(way=several)),
    "leaf inputs": Case(Net, with_leaf),
    "two forwards": Case(Net, two_forwards),
    "evaluation in between": Case(Net, evaluating),
    "a forward without backward": Case(Net, forgotten),
    "a forward that raises": Case(Net, raising),
    "two backwards through one graph": Case(Net, kept_graph),
    "gradients of inputs": Case(Net, input_gradient),
    "gradient penalty": Case(Net, penalty, hosts=False),
    "lstm": Case(Recurrent, units=(nn.LSTM, nn.GRU)),
    "convolutions": Case(convolutions, sequential_loss, units=(nn.Sequential,)),
    "weight norm": Case(normed),
    "attention": Case(attention, attention_loss, units=(nn.TransformerEncoderLayer,)),
    "sgd": Case(Net, optimizer=sgd),
    "adagrad": Case(Net, optimizer=adagrad),
    "amsgrad": Case(Net, optimizer=adam_plain),
}  # fmt: skip


def every_case(rank: int, n: int, names: list[str], settings: list[dict[str, Any]]) -> None:
    with process_group(rank, n):
        for options in settings:
            for name in names:
                run_case(CASES[name], name, rank, n, **options)


def test_as_the_plain_module_in_shared_memory() -> None:
    run_ranks(2, every_case, list(CASES), [{"stage": 3}], timeout=120)
    run_ranks(3, every_case, ["odd sizes", "tied", "skipped in some steps"], [{"stage": 2}, {"stage": 1}], timeout=120)


@NO_CORE
def test_as_the_plain_module_over_hosts() -> None:
    names = [name for name, case in CASES.items() if case.hosts]
    env = {"DISTLIB_NODES": "2"}
    run_ranks(2, every_case, names, [{"stage": 3}], timeout=120, env=env)


@NO_CORE
def test_as_the_plain_module_kept_whole_over_hosts() -> None:
    names = ["odd sizes", "tied", "units used on some ranks", "gradient penalty", "checkpoints inside", "lstm"]
    settings = [{"stage": 2}, {"stage": 1}]
    run_ranks(2, every_case, names, settings, timeout=120, env={"DISTLIB_NODES": "2"})
    some = ["two forwards", "called twice", "re-entrant checkpoints", "evaluation in between", "another order"]
    settings = [{"stage": 3, "reshard_after_forward": False, "prefetch": 0}]
    run_ranks(2, every_case, some, settings, timeout=120, env={"DISTLIB_NODES": "2"})
