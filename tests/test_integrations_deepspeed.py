"""A plan with engine="deepspeed" trains as the same plan without: losses, norms, checkpoints."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional

import distlib

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed: make test installs it", allow_module_level=True)


class Model(nn.Module):
    """Blocks of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)) for _ in range(2))
        self.head = nn.Linear(6, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (rows, length) int64 -> (rows, length, 11)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def loss_fn(logits: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1).float(), target.flatten())


def batch(step: int, rank: int) -> Tensor:
    return torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(10 * step + rank))


def engine_of(plan: distlib.Plan, **changes: Any) -> Any:
    torch.manual_seed(0)
    arguments = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9), "loss_fn": loss_fn, "weigh": weigh}
    return distlib.parallelize(Model(), plan, **{**arguments, **changes})


def weigh(target: Tensor) -> float:
    """Of micro-batches that have as many rows, so that a mistake in weighing shows."""
    return 1.0 + float(target[0, 0])


def trained(engine: Any, steps: range) -> list[tuple[float, float]]:
    """(loss, norm of the gradients) of each step."""
    found = []
    for step in steps:
        tokens = batch(step, engine.data_rank)
        loss = engine.train_step(tokens, tokens.roll(-1, 1))
        found.append((float(loss), float(engine.grad_norm)))
    return found


SETTINGS: list[dict[str, Any]] = [
    {"stage": 0, "microbatches": 2},
    {"stage": 1, "microbatches": 2},
    {"stage": 2, "microbatches": 2},
    {"stage": 3, "microbatches": 2, "activations": "full"},
    {"stage": 0, "precision": "bf16"},
    {"stage": 3, "precision": "bf16"},
]
CHECKPOINTS = (0, 3)


def compare(rank: int, n: int, folder: str) -> list[dict[str, Any]]:
    """By settings, what both engines made of them; then what is refused, as text."""
    distlib.init()
    found = []
    for k, settings in enumerate(SETTINGS):
        plan = distlib.Plan(clip=0.3, seed=3, **settings)
        ours = engine_of(plan)
        engine = engine_of(plan.replace(engine="deepspeed"))
        one: dict[str, Any] = {"ours": trained(ours, range(3)), "theirs": trained(engine, range(3))}
        tokens = batch(7, rank)
        one["evaluated"] = [float(e.eval().eval_step(tokens, tokens)) for e in (ours, engine)]
        one["output"] = [e(tokens) for e in (ours, engine)]
        one["described"] = engine.describe()
        one["sizes"] = (engine.data_rank, engine.data_size, engine.steps)
        if k in CHECKPOINTS:
            engine.save(f"{folder}/{k}", extra={"rank": rank})
            number = torch.rand(())
            after = trained(engine.train(), range(3, 5))
            again = engine_of(plan.replace(engine="deepspeed"))
            state = again.load(f"{folder}/{k}")
            one["state"] = (state.step, state.extra, state.rng, again.steps)
            one["resumed"] = (torch.equal(torch.rand(()), number), trained(again, range(3, 5)), after)
        found.append(one)
    return [*found, {"refused": refused(folder)}]


def refused(folder: str) -> dict[str, str]:
    """By a word, what is said."""
    plan = distlib.Plan(stage=2, engine="deepspeed")
    adamw = {"optimizer": lambda p: distlib.optim.AdamW(p, lr=0.1)}
    engine = engine_of(plan)
    divided = engine_of(plan.replace(stage=3))
    cases = {
        "adagrad": lambda: engine_of(plan, optimizer=lambda p: torch.optim.Adagrad(p, lr=0.1)),
        "pieces": lambda: distlib.save(f"{folder}/pieces", model=divided.model),
        "fp16": lambda: engine_of(plan.replace(precision="fp16")),
        "files": lambda: engine_of(plan.replace(offload=folder)),
        "cpu": lambda: engine_of(plan.replace(offload="cpu")),
        "flat": lambda: engine_of(plan, **adamw),
        "background": lambda: engine.save(folder, asynchronous=True),
        "nothing": lambda: engine.load(f"{folder}/nothing"),
    }
    said = {}
    for word, case in cases.items():
        with pytest.raises(ValueError) as error:
            case()
        said[word] = str(error.value)
    return said


def without_a_launcher(rank: int, n: int) -> list[list[tuple[float, float]]]:
    for name in list(os.environ):
        if name.startswith(("TORCHELASTIC_", "MASTER_", "GROUP_")) or name.endswith(("RANK", "WORLD_SIZE")):
            del os.environ[name]
    with distlib.init():
        plan = distlib.Plan(stage=2, clip=0.3)
        return [trained(engine_of(plan.replace(engine=name)), range(2)) for name in ("distlib", "deepspeed")]


def test_a_plain_process_needs_no_launchers_variables() -> None:
    ((ours, theirs),) = run_ranks(1, without_a_launcher, timeout=110)
    assert torch.allclose(torch.tensor(theirs), torch.tensor(ours), rtol=1e-5)


class Interrupted(Exception):
    """An error of the script."""


CUT = [
    {"stage": 0},
    {"stage": 1},
    {"stage": 2},
    {"stage": 3},
    {"stage": 0, "precision": "bf16"},
    {"stage": 1, "precision": "bf16"},
    {"stage": 3, "precision": "bf16"},
]


def losses(settings: dict[str, Any], where: str | None, number: int) -> list[float]:
    """Of four steps; before the third, another batch is cut off by an error in its micro-batch of that number."""
    engine = engine_of(distlib.Plan(microbatches=4, seed=3, engine="deepspeed", **settings))
    calls: list[int] = []
    block = engine.zero.module.blocks[1]

    def interrupt(module: nn.Module, inputs: Any, output: Tensor) -> None:
        def cut(*_: Any) -> None:
            raise Interrupted

        calls.append(1)
        if len(calls) == number:
            output.register_hook(cut) if where == "backward" else cut()

    found = []
    for step in range(4):
        if step == 2 and where is not None:
            handle = (block if where != "last" else engine.zero.module).register_forward_hook(interrupt)
            with pytest.raises(Interrupted):
                engine.train_step(batch(9, engine.data_rank), batch(8, engine.data_rank))
            handle.remove()
        tokens = batch(step, engine.data_rank)
        found.append(float(engine.train_step(tokens, tokens.roll(-1, 1))))
    return found


def interrupted(rank: int, n: int) -> tuple[list[list[list[float]]], list[str]]:
    """By settings: losses without and with errors; then what is said after an error inside of ZeRO's backward."""
    distlib.init()
    ways = [(None, 0), ("block", 1), ("block", 3), ("last", 2), ("last", 4)]
    curves = [[losses(settings, *way) for way in ways] for settings in CUT]
    curves[0].append(losses(CUT[0], "backward", 3))
    said = []
    for settings in CUT[1:4]:
        with pytest.raises(RuntimeError) as error:
            losses(settings, "backward", 2)
        said.append(str(error.value))
    return curves, said


def test_gradients_of_a_batch_that_was_cut_off_are_of_no_step() -> None:
    for curves, said in run_ranks(2, interrupted, timeout=150):
        for settings, (unbroken, *broken) in zip(CUT, curves, strict=True):
            assert all(curve == unbroken for curve in broken), settings
        for text in said:
            assert "an error ended ZeRO's backward" in text and "load a checkpoint" in text


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    return run_ranks(2, compare, str(tmp_path_factory.mktemp("deepspeed")), timeout=110)


@pytest.mark.parametrize("case", range(len(SETTINGS)), ids=lambda k: "-".join(map(str, SETTINGS[k].values())))
def test_losses_norms_and_outputs_are_those_of_our_own_engine(case: int, found: list[list[dict[str, Any]]]) -> None:
    # bf16: stage 0 is the same autocast; in stage 3 weights are rounded at other moments
    is_rounded = SETTINGS[case] == {"stage": 3, "precision": "bf16"}
    tolerance = {"rtol": 5e-3 if is_rounded else 1e-5, "atol": 1e-2 if is_rounded else 1e-5}
    for rank, one in enumerate(of_rank[case] for of_rank in found):
        assert all(norm > 0.3 for _, norm in one["ours"])  # so that clipping matters
        torch.testing.assert_close(torch.tensor(one["theirs"]), torch.tensor(one["ours"]), **tolerance)
        torch.testing.assert_close(*map(torch.tensor, one["evaluated"]), **tolerance)
        torch.testing.assert_close(*one["output"], **tolerance)
        assert one["sizes"] == (rank, 2, 3)
        assert f"DeepSpeed, ZeRO stage {SETTINGS[case]['stage']}" in one["described"]


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_goes_on_to_the_bit(case: int, found: list[list[dict[str, Any]]]) -> None:
    for rank, one in enumerate(of_rank[case] for of_rank in found):
        assert one["state"] == (3, {"rank": rank}, True, 3)
        same_numbers, resumed, unbroken = one["resumed"]
        assert same_numbers
        assert resumed == unbroken


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("fp16", 'has none on the CPU. Take "bf16"'),
        ("files", 'Take "cpu", or engine="distlib"'),
        ("cpu", "the ranks are on the CPU"),
        ("flat", "torch.optim.AdamW"),
        ("adagrad", "stage=2 cannot use Adagrad: ZeRO makes another one in its place, which learning-rate schedules"),
        ("pieces", "is divided over ranks by DeepSpeed's stage 3: save with Engine.save"),
        ("background", "leave asynchronous out"),
        ("nothing", "no checkpoint of DeepSpeed"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_with_the_way_out(
    word: str, says: str, found: list[list[dict[str, Any]]]
) -> None:
    for of_rank in found:
        assert says in of_rank[-1]["refused"][word]


def exported(rank: int, n: int, folder: str) -> list[dict[str, Tensor]]:
    """The whole weights after two steps: of our engine, of DeepSpeed's by stage; then what from_pretrained reads."""
    from distlib.integrations import huggingface as hf

    distlib.init()
    found = []
    for plan in (distlib.Plan(), *(distlib.Plan(stage=stage, engine="deepspeed") for stage in (0, 2, 3))):
        engine = engine_of(plan, weigh=None)
        for step in range(2):
            tokens = batch(step, engine.data_rank)
            engine.train_step(tokens, tokens.roll(-1, 1))
        gather = getattr(engine.model, "full_state_dict", None)
        found.append(gather() if gather is not None else engine.model.module.state_dict())
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = hf.causal_lm({"model_type": "llama", "vocab_size": 11, **sizes})
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    engine = distlib.parallelize(
        model,
        distlib.Plan(stage=3, engine="deepspeed"),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        loss_fn=hf.causal_loss,
    )
    with pytest.raises(ValueError, match="DeepSpeed has divided the model over ranks: give the Engine"):
        hf.export_pretrained(model, folder)
    hf.export_pretrained(engine, folder)
    read = type(model).from_pretrained(folder).state_dict()
    assert read.keys() == whole.keys() and all(torch.equal(read[name], whole[name]) for name in whole)
    return found


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_whole_weights_are_gathered_from_every_stage(tmp_path: Path) -> None:
    for ours, *theirs in run_ranks(2, exported, str(tmp_path), timeout=110):
        for state in theirs:
            assert state.keys() == ours.keys()
            for name, weight in ours.items():
                torch.testing.assert_close(state[name], weight, rtol=1e-5, atol=1e-6)
