"""Lightning's Trainer under DistlibStrategy trains as a plain loop over all ranks' data."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import distlib

pytestmark = pytest.mark.slow  # among the first files to be tested

if importlib.util.find_spec("lightning") is None:
    pytest.skip("lightning is not installed: make test installs it", allow_module_level=True)

ROWS, STEPS, CLIP = 4, 3, 0.1


def data() -> TensorDataset:
    """An epoch is a step: the Trainer's sampler deals these rows to 2 ranks, two batches each."""
    torch.manual_seed(1)
    return TensorDataset(torch.randn(4 * ROWS, 6), torch.randint(5, (4 * ROWS,)))


def network() -> nn.Module:
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)) for _ in range(3))
    return nn.Sequential(*blocks, nn.Linear(6, 5))


def plain() -> tuple[list[float], dict[str, Tensor]]:
    """Losses before each step and after the last, and the weights in the end, of one process that sees all rows."""
    model, x, y = network(), *data().tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)  # unlike Adam, it feels the gradients' scale
    losses = []
    for _ in range(STEPS):
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), CLIP) > CLIP
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(functional.cross_entropy(model(x), y).item())
    return losses, {f"network.{name}": p for name, p in model.state_dict().items()}


def lightning_module() -> Any:
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()
            self.scale = nn.Parameter(torch.ones(1), requires_grad=False)  # outside of all blocks
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
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.3, momentum=0.9)

    return Module()


def trainer(plan: distlib.Plan, folder: str, epochs: int, **settings: Any) -> Any:
    from lightning.pytorch import Trainer

    from distlib.integrations.lightning_strategy import DistlibStrategy

    return Trainer(
        strategy=DistlibStrategy(plan=plan) if plan.stage else "distlib",
        accelerator="cpu",
        max_epochs=epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=CLIP,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def whole_state(run: Any) -> dict[str, Tensor]:
    return getattr(run.model, "full_state_dict", run.model.state_dict)()


def train(rank: int, n: int, folder: str, settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each plan: a run without a break, and one that goes on from another's checkpoint."""

    def loader() -> DataLoader[Any]:
        return DataLoader(data(), batch_size=ROWS, shuffle=True)

    for wrong, words in (({"precision": "bf16-mixed"}, "the plan decides"), ({"sync_batchnorm": True}, "batch norm")):
        with pytest.raises(ValueError, match=words):
            trainer(distlib.Plan(stage=1), folder, 1, **wrong).fit(lightning_module(), loader())

    found = []
    for k, setting in enumerate(settings):
        plan = distlib.Plan(**setting)
        module, run = lightning_module(), trainer(plan, folder, STEPS)
        kind = distlib.ShardedDataParallel if plan.stage else distlib.DataParallel
        with mock.patch.object(kind, "no_sync", autospec=True, side_effect=kind.no_sync) as paused:
            run.fit(module, loader())
        assert paused.call_count == STEPS  # around one of two micro-batches
        validated = run.validate(module, loader(), verbose=False)[0]["validation"]
        unbroken = {"losses": module.losses, "state": whole_state(run), "validated": validated}

        module, run = lightning_module(), trainer(plan, folder, STEPS - 1)
        run.fit(module, loader())
        path = f"{folder}/{k}"
        run.save_checkpoint(path)
        module, run = lightning_module(), trainer(plan, folder, STEPS)
        run.fit(module, loader(), ckpt_path=path)
        resumed = {"losses": module.losses, "state": whole_state(run), "step": run.global_step}
        found.append({"unbroken": unbroken, "resumed": resumed})
    return found


SETTINGS = [{"stage": 0}, {"stage": 3, "activations": "full"}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[dict[str, Any]]]]:
    """(folder with the checkpoints "0", "1", ...; per rank and plan, what `train` found)."""
    folder = tmp_path_factory.mktemp("lightning")
    return folder, run_ranks(2, train, str(folder), SETTINGS, timeout=110)


def step_losses(by_rank: list[list[float]]) -> list[float]:
    """The mean over ranks and micro-batches, by step."""
    return torch.tensor(by_rank, dtype=torch.float64).view(len(by_rank), -1, 2).mean((0, 2)).tolist()


@pytest.mark.parametrize("case", range(len(SETTINGS)), ids=str)
def test_the_trainer_trains_as_a_plain_loop(case: int, runs: tuple[Path, Any]) -> None:
    losses, weights = plain()
    of_ranks = [found[case]["unbroken"] for found in runs[1]]
    assert step_losses([found["losses"] for found in of_ranks]) == pytest.approx(losses[:-1], rel=1e-5)
    for found in of_ranks:
        assert found["validated"] == pytest.approx(losses[-1], rel=1e-5)
        assert found["state"].keys() == weights.keys() | {"scale"}
        for name, weight in weights.items():
            torch.testing.assert_close(found["state"][name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", range(len(SETTINGS)), ids=str)
def test_a_checkpoint_goes_on_and_is_read_without_ranks(case: int, runs: tuple[Path, Any]) -> None:
    losses, weights = plain()
    folder, found = runs
    of_ranks = [one[case]["resumed"] for one in found]
    assert step_losses([one["losses"] for one in of_ranks]) == pytest.approx(losses[-2:-1], rel=1e-5)
    for one in of_ranks:
        assert one["step"] == STEPS
        for name, weight in weights.items():
            torch.testing.assert_close(one["state"][name], weight, rtol=1e-4, atol=1e-5)
    module = lightning_module()
    assert distlib.load(folder / str(case), model=module).step == STEPS - 1
    x, y = data().tensors
    with torch.no_grad():
        assert functional.cross_entropy(module(x), y).item() == pytest.approx(losses[-2], rel=1e-5)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (distlib.Plan(pipeline=2), "pipeline=2: training_step computes the loss .* distlib.parallelize"),
        (distlib.Plan(engine="deepspeed"), 'strategy="deepspeed"'),
        (distlib.Plan(microbatches=4), r"accumulate_grad_batches=4"),
        (distlib.Plan(clip=0.5), r"gradient_clip_val=0.5"),
        (distlib.Plan(precision="fp16"), "no loss scale"),
        (distlib.Plan(activations={"budget": "1GiB"}), "no example inputs"),
    ],
)
def test_what_the_trainer_decides_is_refused_in_a_plan(plan: distlib.Plan, words: str) -> None:
    from distlib.integrations.lightning_strategy import DistlibStrategy

    with pytest.raises(ValueError, match=words):
        DistlibStrategy(plan)


def pieces(rank: int, n: int, folder: str) -> dict[str, Any]:
    """What is said of a module in pieces, by a word; and numbers that scripts ask it for."""
    from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging

    def loader() -> DataLoader[Any]:
        return DataLoader(data(), batch_size=ROWS)

    plan, said = distlib.Plan(stage=3), {}
    for callback in (StochasticWeightAveraging(1e-3), EMAWeightAveraging()):
        with pytest.raises(ValueError) as error:
            trainer(plan, folder, 1, callbacks=[callback]).fit(lightning_module(), loader())
        said[type(callback).__name__] = str(error.value)
        trainer(distlib.Plan(), folder, 1, callbacks=[callback])  # replicated: whole weights

    class Asks(type(lightning_module())):  # type: ignore[misc]
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            said["norm"] = float(distlib.optim.global_norm(self.parameters()))

        def on_validation_epoch_end(self) -> None:
            x = data().tensors[0][:2]
            with pytest.raises(RuntimeError, match="summon_full_params"):
                self(x)
            with self.trainer.model.summon_full_params(), torch.no_grad():
                said["whole"] = self(x)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            trained = [p for p in self.parameters() if p.requires_grad]
            groups = [[p for p in trained if p.ndim > 1], [p for p in trained if p.ndim < 2]]
            return torch.optim.SGD(
                [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], lr=0.0
            )

    module, run = Asks(), trainer(plan, folder, 1)
    with pytest.warns(UserWarning, match="the optimizer decays nothing"):
        run.fit(module, loader(), loader())
    with pytest.raises(ValueError) as error:
        trainer(plan, folder, 1).fit(module, loader())
    said["second"] = str(error.value)
    return said


def test_what_needs_whole_parameters_is_refused_or_summoned(tmp_path: Path) -> None:
    model, (x, y) = network(), data().tensors
    functional.cross_entropy(model(x), y).backward()
    norm = float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    for said in run_ranks(2, pieces, str(tmp_path), timeout=110):
        for name in ("StochasticWeightAveraging", "EMAWeightAveraging"):
            assert f"callbacks=[{name}(...)]): it averages whole weights" in said[name]
        assert "scale is a piece" in said["second"] and "Go on with that Trainer" in said["second"]
        assert said["norm"] == pytest.approx(norm, rel=1e-5)
        torch.testing.assert_close(said["whole"], model(x[:2]).detach())


def loading(rank: int, n: int, folder: str) -> dict[str, Any]:
    """What checkpoints do, and what is said of what they cannot."""
    from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
    from lightning.pytorch.trainer.states import TrainerFn

    def loader() -> DataLoader[Any]:
        return DataLoader(data(), batch_size=ROWS)

    class Tested(type(lightning_module())):  # type: ignore[misc]
        def test_step(self, batch: list[Tensor]) -> None:
            self.log("tested", functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    found: dict[str, Any] = {"averages": [], "tested": [], "drawn": []}
    for callback in (WeightAveraging(), EMAWeightAveraging()):
        with pytest.raises(ValueError) as error:
            trainer(distlib.Plan(), folder, 1, callbacks=[callback]).fit(lightning_module(), loader())
        found["averages"].append(str(error.value))
    for stage in (0, 3):
        module, run = Tested(), trainer(distlib.Plan(stage=stage), folder, STEPS)
        run.fit(module, loader())
        for weights_only in (True, False):
            run.save_checkpoint(f"{folder}/{stage} {weights_only}", weights_only=weights_only)
        for path in (None, f"{folder}/{stage} True", f"{folder}/{stage} False"):
            torch.manual_seed(5)
            said = run.test(module, loader(), ckpt_path=path, verbose=False)
            found["tested"].append(said[0]["tested"])
            found["drawn"].append(float(torch.rand(())))
        state = run.optimizers[0].state_dict()["state"]
        assert all(one["momentum_buffer"].abs().sum() > 0 for one in state.values() if one["momentum_buffer"].numel())
    strategy = run.strategy
    assert run.state.fn == TrainerFn.TESTING
    with pytest.raises(ValueError) as error:
        strategy.load_checkpoint(f"{folder}/3 False", weights_only=True)
    found["weights only"] = str(error.value)

    class Loose(Tested):  # type: ignore[misc, valid-type]
        strict_loading = False

    with pytest.raises(ValueError) as error:
        trainer(distlib.Plan(), folder, 1).test(Loose(), loader(), ckpt_path=f"{folder}/0 False", verbose=False)
    found["loose"] = str(error.value)
    return found


def test_tests_load_weights_alone_and_what_cannot_be_loaded_so_is_refused(tmp_path: Path) -> None:
    losses, _ = plain()
    for found in run_ranks(2, loading, str(tmp_path), timeout=110):
        for text in found["averages"]:
            assert "WeightAveraging(...)]): it averages whole weights, and puts them into the Trainer's dict" in text
        assert found["tested"] == pytest.approx([losses[-1]] * 6, rel=1e-5)
        assert found["drawn"] == [found["drawn"][0]] * 6
        assert "weights_only=True" in found["weights only"] and "distlib.export" in found["weights only"]
        assert "strict_loading=False: a checkpoint and the module must have the same weights" in found["loose"]
