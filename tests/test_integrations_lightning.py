"""Lightning's Trainer under DistlibStrategy trains as a plain loop over all ranks' data."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import distlib

if importlib.util.find_spec("lightning") is None:
    pytest.skip("lightning is not installed: make test installs it", allow_module_level=True)

ROWS, STEPS, CLIP = 4, 3, 0.3


def data() -> TensorDataset:
    """Rows of both ranks for all micro-batches."""
    torch.manual_seed(1)
    return TensorDataset(torch.randn(2 * ROWS * 2 * STEPS, 6), torch.randint(5, (2 * ROWS * 2 * STEPS,)))


def network() -> nn.Module:
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)) for _ in range(3))
    return nn.Sequential(*blocks, nn.Linear(6, 5))


def plain() -> tuple[list[float], dict[str, Tensor]]:
    """Losses by step, and the weights in the end, of one process that sees every rank's rows."""
    model, x, y = network(), *data().tensors
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    for step in range(STEPS):
        rows = slice(step * 4 * ROWS, (step + 1) * 4 * ROWS)
        loss = functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def lightning_module() -> Any:
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()
            self.scale = nn.Parameter(torch.ones(1), requires_grad=False)
            self.losses: list[float] = []

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x) * self.scale

        def training_step(self, batch: list[Tensor]) -> Tensor:
            loss = functional.cross_entropy(self(batch[0]), batch[1])
            self.losses.append(float(loss.detach()))
            self.log("loss", loss, sync_dist=True)
            return loss

        def validation_step(self, batch: list[Tensor]) -> None:
            self.log("validation", functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)

    return Module()


def trainer(plan: distlib.Plan, folder: str, steps: int) -> Any:
    from lightning.pytorch import Trainer

    from distlib.integrations.lightning_strategy import DistlibStrategy

    return Trainer(
        strategy=DistlibStrategy(plan=plan),
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=2,
        gradient_clip_val=CLIP,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def train(rank: int, n: int, folder: str, settings: list[dict[str, Any]]) -> list[Any]:
    found = []
    for k, setting in enumerate(settings):
        plan = distlib.Plan(**setting)
        loader = lambda: DataLoader(data(), batch_size=ROWS)  # noqa: E731
        whole = lightning_module()
        run = trainer(plan, folder, STEPS)
        run.fit(whole, loader())
        state = getattr(run.model, "full_state_dict", run.model.state_dict)()
        logged = float(run.callback_metrics["loss"])
        validated = run.validate(whole, loader(), verbose=False)[0]["validation"]

        first = lightning_module()
        run = trainer(plan, folder, 2)
        run.fit(first, loader())
        path = f"{folder}/{k}"
        run.save_checkpoint(path)
        rest = lightning_module()
        run = trainer(plan, folder, STEPS)
        run.fit(rest, loader(), ckpt_path=path)
        again = getattr(run.model, "full_state_dict", run.model.state_dict)()
        found.append((whole.losses, state, logged, validated, rest.losses, again))
    return found


SETTINGS = [{"stage": 0}, {"stage": 3, "activations": "full"}]


def test_x(tmp_path):
    losses, weights = plain()
    for f in zip(*run_ranks(2, train, str(tmp_path), SETTINGS, timeout=110)):
        print(losses)
        for r in f: print(r[0], r[2:5], max(float((r[1]["network."+k]-v).abs().max()) for k,v in weights.items()), max(float((r[5]["network."+k]-v).abs().max()) for k,v in weights.items()))
