"""State that optimizers keep in odd places: refused by name when it is saved, or it comes back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distlib


class Descent(torch.optim.Optimizer):
    """Plain steps; `keep` puts something into the state or elsewhere."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.keep(p)
                p.sub_(group["lr"] * p.grad)

    def keep(self, p: nn.Parameter) -> None:
        raise NotImplementedError


class Numbered(Descent):
    def keep(self, p: nn.Parameter) -> None:
        self.state[p][0] = torch.zeros_like(p)


class Dotted(Descent):
    def keep(self, p: nn.Parameter) -> None:
        self.state[p]["moment.1"] = torch.zeros_like(p)


class Common(Descent):
    def keep(self, p: nn.Parameter) -> None:
        self.state["calls"] = self.state.get("calls", 0) + 1  # type: ignore[index, call-overload]


class More(Descent):
    def keep(self, p: nn.Parameter) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "calls": 3}


class Grouped(Descent):
    def keep(self, p: nn.Parameter) -> None:
        self.param_groups[0]["calls"] = self.param_groups[0].get("calls", 0) + 1


def trained(kind: type[Descent]) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    optimizer = kind(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Numbered, "optimizer state 0 of 'weight': only state under a name without a dot can be saved"),
        (Dotted, "optimizer state 'moment.1' of 'weight': only state under a name without a dot can be saved"),
        (
            Common,
            "optimizer state 'calls' of Common belongs to no parameter: keep it in the groups, or save it in extra=",
        ),
        (More, "More.state_dict() has 'calls' beside 'state' and 'param_groups': keep it in the groups"),
    ],
)
def test_state_that_would_not_come_back_is_refused_by_name(kind: type[Descent], says: str, tmp_path: Path) -> None:
    model, optimizer = trained(kind)
    with pytest.raises(ValueError, match=re.escape(says)):
        distlib.save(tmp_path / "c", model=model, optimizer=optimizer)
    assert not (tmp_path / "c").exists()
    distlib.save(tmp_path / "c", model=model)  # without it


def test_what_is_kept_in_the_groups_comes_back(tmp_path: Path) -> None:
    model, optimizer = trained(Grouped)
    distlib.save(tmp_path / "c", model=model, optimizer=optimizer)
    other = Grouped(model.parameters())
    distlib.load(tmp_path / "c", model=model, optimizer=other)
    assert other.param_groups[0]["calls"] == 2
