"""Random numbers and buffers that change as a model runs: stages see what one process sees, or the cut is refused."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pipeline_models import Case, reference_step
from ranks import run_ranks
from record_models import CallsForward
from torch import Tensor, nn
from torch.nn import functional

import distlib
from distlib.pipeline.record import record
from distlib.pipeline.stages import StageModule, cut, holdings, leaves_of

WIDTH, ROWS, STEPS = 6, 8, 2


class Chain(nn.Module):
    """Four layers; subclasses say what happens around them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.4)) for _ in range(4))
        self.register_buffer("count", torch.zeros(()))


class DropsASkip(Chain):
    """Glue draws after layers of later stages than that of what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.layers[0](x)
        y = first
        for layer in list(self.layers)[1:]:
            y = layer(y)
        return y + functional.dropout(first, 0.5, self.training)


class AddsNoise(Chain):
    """Likewise, shaped like something of the first stage."""

    def forward(self, x: Tensor) -> Tensor:
        mean = y = self.layers[0](x)
        for layer in list(self.layers)[1:]:
            y = layer(y)
        return y + mean * torch.randn_like(mean)


class SendsACounter(Chain):
    """The last stage reads a buffer that the first one writes."""

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        for layer in self.layers:
            x = layer(x)
        return x * self.count


class Tracks(nn.Module):
    """Returns its own buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), 0.5)
        return self.linear(x), self.mean


class SendsABufferOfALeaf(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.layers[0] = Tracks()

    def forward(self, x: Tensor) -> Tensor:
        x, mean = self.layers[0](x)
        for layer in list(self.layers)[1:]:
            x = layer(x)
        return x - mean


MODELS: list[type[Chain]] = [DropsASkip, AddsNoise, SendsACounter, SendsABufferOfALeaf]


def case_of(kind: type[nn.Module]) -> Case:
    def made() -> nn.Module:
        torch.manual_seed(3)
        return kind()

    def batch(rows: int, step: int) -> tuple[Tensor, Tensor]:
        numbers = torch.Generator().manual_seed(step)
        return torch.randn(rows, WIDTH, generator=numbers), torch.randn(rows, WIDTH, generator=numbers)

    return Case(made, batch, functional.mse_loss)


def _losses(rank: int, n: int, backend: str | None) -> list[tuple[str, str, list[float], list[float]]]:
    """(model, schedule, losses of steps, those of one process)."""
    found = []
    with distlib.init(**({} if backend is None else {"backend": backend})):
        for kind in MODELS:
            for schedule, cuts in (("1f1b", [2]), ("zb-v", [1, 2, 3])):
                case = case_of(kind)
                model, plain = case.made(), case.made()
                pipeline = distlib.PipelineParallel(
                    copy.deepcopy(model),
                    schedule=schedule,
                    microbatches=4,
                    loss_fn=case.loss,
                    example_inputs=case.batch(ROWS, 0)[0],
                    split=[f"layers.{k}" for k in cuts],
                )
                losses, wanted = [], []
                for step in range(STEPS):
                    torch.manual_seed(step)
                    losses.append(float(pipeline.train_step(*case.batch(ROWS, step))))
                    torch.manual_seed(step)
                    wanted.append(float(reference_step(plain, case, ROWS, step, 4)))
                found.append((kind.__name__, schedule, losses, wanted))
    return found


@pytest.mark.parametrize("backend", [None, "gloo"])
def test_stages_draw_and_count_as_one_process_does(backend: str | None) -> None:
    for rank in run_ranks(2, _losses, backend, timeout=90):
        for name, schedule, losses, wanted in rank:
            assert losses == pytest.approx(wanted, rel=1e-5), (name, schedule)


# ------------------------------------------------------------ refused


class SharesANorm(Chain):
    """One batch norm on two stages: each would have averages of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.norm(layer(x))
        return x


class SharesABuffer(Chain):
    """Two modules with one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0], self.layers[3] = Tracks(), Tracks()
        self.layers[3].mean = self.layers[0].mean

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.layers[0](x)
        return self.layers[3](self.layers[2](self.layers[1](x)))[0]


class Replaces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return x - self.mean


class SharesWhatIsReplaced(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.centre = Replaces()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.centre(layer(x))
        return x


class TeachesALeaf(Chain):
    """Glue writes weights of a module that lies elsewhere, as a momentum encoder's are."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.layers[3][0].weight.lerp_(self.layers[0][0].weight, 0.5)
        for layer in self.layers:
            x = layer(x)
        return x


class NormsInGlue(Chain):
    """Running averages that torch writes without saying so."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("variance", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = functional.batch_norm(layer(x), self.mean, self.variance, training=self.training)
        return x


class SharedInsideOfLeaves(Chain):
    """Each block has the module that replaces its buffer."""

    def __init__(self) -> None:
        super().__init__()
        centre = Replaces()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), centre) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


REFUSED: list[tuple[type[Chain], str]] = [
    (SharesANorm, r"norm.running_mean is changed in forward by norm, and stages 0, 1 would each have a copy"),
    (SharesABuffer, r"layers.0.mean is changed in forward by layers.3, and stages 0, 1"),
    (SharesWhatIsReplaced, r"centre.mean is changed in forward by centre, and stages 0, 1"),
    (SharedInsideOfLeaves, r"layers.0.1.mean is changed in forward by layers.3, and stages 0, 1"),
    (NormsInGlue, r"pipeline: variance is read on stage 0 and written on stage 1"),
    (TeachesALeaf, r"layers.3.0.weight is changed in forward by torch function .*lerp_.*, and stages 0, 1"),
]


def _cut(kind: type[nn.Module], stages: Callable[[int], int], train: bool = True) -> Any:
    model = case_of(kind).made().train(train)
    program = record(model, (torch.empty(ROWS, WIDTH),), {}, leaves_of(model))
    return cut(program, [stages(k) for k in range(len(program.leaf_calls))], 2)


@pytest.mark.parametrize(("kind", "said"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_state_that_changes_on_one_of_two_stages_is_refused(kind: type[nn.Module], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _cut(kind, lambda k: int(k >= 3))


@pytest.mark.parametrize("kind", [SharesANorm, NormsInGlue])
def test_state_that_does_not_change_may_be_on_two_stages(kind: type[nn.Module]) -> None:
    assert len(_cut(kind, lambda k: int(k >= 3), train=False)) == 2


class DrawsFromItsOwn(Chain):
    """A generator of the model's: each rank would have one, each in another state."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x + torch.rand(x.shape, generator=self.generator)


def test_a_generator_in_glue_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rand .*draws from a torch.Generator, of which each rank would have its own"):
        _cut(DrawsFromItsOwn, lambda k: int(k >= 2))


def test_forwards_that_are_called_themselves_are_leaves() -> None:
    model = CallsForward()
    program = record(model, (torch.empty(2, 8),), {}, leaves_of(model))
    assert [call.name for call in program.leaf_calls] == [f"blocks.{k}" for k in range(4)]


class ReadsInEvaluation(Chain):
    """Evaluation reads on the last stage what training has on the first."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * (1 + self.count)
        for layer in self.layers:
            x = layer(x)
        return x if self.training else x * (1 + self.count)


def test_a_buffer_that_only_another_mode_reads_there_is_named() -> None:
    model = case_of(ReadsInEvaluation).made()
    ways = []
    for train in (True, False):
        program = record(model.train(train), (torch.empty(ROWS, WIDTH),), {}, leaves_of(model))
        ways.append(cut(program, [0, 0, 0, 1], 2))
    held = holdings(ways[0], model)
    stage = StageModule(model, held[1].names)
    with pytest.raises(ValueError, match="stage 1 does not hold count, which this run uses there"):
        stage(ways[1][1], [[torch.ones(ROWS, WIDTH)]], (torch.ones(ROWS, WIDTH),), {})


class Static(nn.Module):
    """A forward that is no method."""

    forward = staticmethod(torch.tanh)


class Partial(nn.Module):
    forward = functools.partialmethod(lambda self, by, x: x * by, 2.0)


def test_forwards_of_any_kind_are_recorded() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Static(), Partial(), nn.Linear(WIDTH, WIDTH))
    program = record(model, (torch.empty(2, WIDTH),), {}, ["0", "1", "2", "3"])
    assert [call.name for call in program.leaf_calls] == ["0", "1", "2", "3"]


def test_a_forward_that_is_called_past_hooks_is_refused() -> None:
    model = CallsForward()
    model.blocks[1].register_forward_hook(lambda module, given, made: 3 * made)
    with pytest.raises(ValueError, match=r"blocks.1.forward is called itself, past the hooks"):
        record(model, (torch.empty(2, 8),), {}, leaves_of(model))


class SendsSparse(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.eye(WIDTH).to_sparse()


class TakesSparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, matrix: Tensor) -> Tensor:
        return self.linear(x) + torch.sparse.mm(matrix, x.t()).t()


def test_stages_of_one_rank_may_hand_on_sparse_tensors() -> None:
    with distlib.init():
        parts = [nn.Sequential(nn.Linear(WIDTH, WIDTH), SendsSparse()), TakesSparse()]
        pipeline = distlib.PipelineParallel(
            None,
            schedule="zb-v",
            microbatches=2,
            split=parts,
            loss_fn=lambda output, _: output.square().mean(),
            example_inputs=torch.ones(4, WIDTH),
        )
        assert float(pipeline.train_step(torch.ones(4, WIDTH))) > 0
