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
        with pytest.raises(ValueError, match="init left positions of the model"):
            distlib.parallelize(
                on_meta(), left, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), initialize=lambda module: None
            )
    return found


def test_every_plan_initialises_what_belongs_to_the_whole_model() -> None:
    for found in run_ranks(2, _trained):
        assert found == [[3.0] * WIDTH + [2.0]] * (2 * len(PLANS))
