"""Models on the meta device: what a class initialises is initialised wherever its tensors lie, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

import distlib
from distlib.pipeline.build import materialise
from distlib.pipeline.stages import StageModule

WIDTH = 8


class Positions(nn.Module):
    """A parameter and a buffer of its own beside blocks; its reset_parameters() reaches down to the blocks, too."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(WIDTH))
        self.register_buffer("scale", torch.empty(()))
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.positions, 3.0)
        self.scale.fill_(2.0)
        for block in self.blocks:
            block.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        x = (x + self.positions) * self.scale
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def by_class(module: nn.Module) -> None:
    if isinstance(module, Positions):
        nn.init.constant_(module.positions, 3.0)
        module.scale.fill_(2.0)
    elif isinstance(module, nn.Linear):
        module.reset_parameters()


def on_meta() -> Positions:
    with torch.device("meta"):
        return Positions()


@pytest.mark.parametrize("init", [None, by_class])
def test_a_stage_initialises_what_belongs_to_modules_that_were_divided(init: Any) -> None:
    model = on_meta()
    stage = StageModule(model, ["blocks.0", "blocks.1", "positions", "scale"])
    materialise(stage, init)
    assert torch.equal(stage.positions, torch.full((WIDTH,), 3.0)) and stage.scale == 2
    for k in range(2):
        weight = stage.get_submodule(f"blocks.{k}").weight
        assert weight.device.type == "cpu" and 0 < weight.std() < 1
    assert model.positions.device.type == "meta" and model.blocks[2].weight.device.type == "meta"


@pytest.mark.parametrize("init", [None, by_class])
def test_values_do_not_depend_on_how_a_model_is_divided(init: Any) -> None:
    torch.manual_seed(5)
    whole = materialise(on_meta(), init)
    model = on_meta()
    stage = materialise(StageModule(model, ["blocks.2", "blocks.3", "positions", "scale"]), init)
    held = dict(whole.named_parameters())
    for name, parameter in stage.named_parameters():
        assert torch.equal(parameter, held[name]), name


def test_what_nobody_initialises_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"init left positions, scale of the model \(Positions\) without values"):
        materialise(on_meta(), lambda module: None)
    model: nn.Module = on_meta()
    stage = StageModule(model, ["blocks.0", "positions", "scale"])
    with pytest.raises(ValueError, match=r"init left positions, scale of the model \(Positions\) without values"):
        materialise(stage, lambda module: module.reset_parameters() if isinstance(module, nn.Linear) else None)

    class Forgets(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.ones_(self.weight)

    with torch.device("meta"):
        model = nn.Sequential(Forgets(2, 2))
    with pytest.raises(ValueError, match=r"reset_parameters\(\) left bias of 0 \(Forgets\) without values"):
        materialise(model, None)
    with torch.device("meta"):
        bare = nn.Sequential(nn.PReLU())
    bare[0].reset_parameters = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"0 \(PReLU\) is on the meta device and has no reset_parameters\(\)"):
        materialise(bare, None)


class Assigns(nn.Module):
    """Its reset_parameters() hangs other tensors, or gives them other memory."""

    def __init__(self, by_data: bool) -> None:
        super().__init__()
        self.by_data = by_data
        self.weight = nn.Parameter(torch.empty(WIDTH))

    def reset_parameters(self) -> None:
        if self.by_data:
            self.weight.data = torch.full((WIDTH,), 2.0)
        else:
            self.weight = nn.Parameter(torch.full((WIDTH,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Counts(nn.Module):
    """Integers that only the constructor sets."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ids", torch.arange(5))

    def reset_parameters(self) -> None:
        pass


def _assigned(rank: int, n: int) -> None:
    with distlib.init():
        for stage in (1, 3):
            with torch.device("meta"):
                model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Assigns(by_data=False), Assigns(by_data=True))
            wrapped = distlib.ShardedDataParallel(model, stage=stage)
            state = wrapped.full_state_dict()
            assert all(torch.equal(state[f"{k}.weight"], torch.full((WIDTH,), 2.0)) for k in (1, 2))
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Counts())
        with pytest.raises(ValueError, match=r"left ids of 1 \(Counts\) without values"):
            distlib.ShardedDataParallel(model, stage=3)


def test_tensors_that_are_assigned_reach_the_pieces() -> None:
    run_ranks(2, _assigned)


def test_tensors_that_are_assigned_stay_tied() -> None:
    with torch.device("meta"):
        model = nn.Sequential(Assigns(by_data=False), Assigns(by_data=True), nn.Sequential(Counts()))
        model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"left ids of 2.0 \(Counts\) without values"):
        materialise(model, None)
    assert model[0].weight is model[1].weight and torch.equal(model[0].weight, torch.full((WIDTH,), 2.0))


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.empty(WIDTH)), nn.Parameter(torch.empty(WIDTH))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.first)
        nn.init.normal_(self.second)


def test_a_stage_draws_what_the_whole_module_draws() -> None:
    def made() -> Draws:
        with torch.device("meta"):
            return Draws()

    whole = materialise(made(), None)
    for name in ("first", "second"):
        model = made()
        assert torch.equal(getattr(materialise(StageModule(model, [name]), None), name), getattr(whole, name)), name


PLANS: list[dict[str, Any]] = [
    {"pipeline": 2},
    {"pipeline": 2, "stage": 1},
    {"pipeline": 2, "stage": 3},
    {"stage": 3},
]


def _trained(rank: int, n: int) -> list[list[float]]:
    found = []
    with distlib.init():
        for plan in PLANS:
            for init in (None, by_class):
                torch.manual_seed(0)
                settings = {**plan, **({"costs": "estimated"} if plan.get("pipeline") else {})}
                engine = distlib.parallelize(
                    on_meta(),
                    distlib.Plan(**settings),
                    optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
                    example_inputs=(torch.ones(2, WIDTH),),
                    initialize=init,
                )
                state = engine.model.full_state_dict()
                found.append(state["positions"].tolist() + [float(state["scale"])])
                assert float(engine.train_step((torch.ones(2, WIDTH),))) > 0
        left = distlib.Plan(stage=3)
        with pytest.raises(ValueError, match="init left positions, scale of the model"):
            distlib.parallelize(
                on_meta(), left, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), initialize=lambda module: None
            )
    return found


def test_every_plan_initialises_what_belongs_to_the_whole_model() -> None:
    for found in run_ranks(2, _trained):
        assert found == [[3.0] * WIDTH + [2.0]] * (2 * len(PLANS))
