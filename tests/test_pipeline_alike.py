"""What ranks of a pipeline must have alike, and what may change after it was made: told on all ranks, or right."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
from pipeline_models import CASES, WIDTH, Language, Residual, reference_step
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional

import distlib
from distlib.pipeline.runtime import StageError

ROWS, MICRO_BATCHES = 6, 3
LANGUAGE, TIED = CASES["language"], CASES["tied"]


def pipeline(model: nn.Module, **options: Any) -> Any:
    given: dict[str, Any] = {
        "microbatches": MICRO_BATCHES,
        "loss_fn": LANGUAGE.loss,
        "example_inputs": LANGUAGE.batch(ROWS, 0)[0],
        "costs": "estimated",
        **options,
    }
    return distlib.PipelineParallel(model, **given)


def said_by(call: Any) -> str:
    """What a call raises, in words; "" if nothing."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - its words are what is asked for
        return f"{type(error).__name__}: {error}"
    return ""


def same_gradients(model: nn.Module, plain: nn.Module) -> bool:
    own = dict(plain.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, own[name].grad, rtol=1e-5, atol=1e-7)
    return True


# ---------------------------------------------------------------- options

DIFFERENT: dict[str, tuple[Any, Any]] = {
    "microbatches": (3, 2),
    "schedule": ("1f1b", "gpipe"),
    "split": (["blocks.2"], ["blocks.3"]),
    "shape_header": (True, False),
    "example_inputs": (LANGUAGE.batch(ROWS, 0)[0], None),
    "limit": (None, 3),
}


def _differ(rank: int, n: int) -> dict[str, str]:
    with distlib.init(timeout=timedelta(seconds=20)):
        return {k: said_by(lambda k=k, v=v: pipeline(LANGUAGE.made(), **{k: v[rank]})) for k, v in DIFFERENT.items()}


def test_options_that_differ_between_ranks_are_named_on_all() -> None:
    for said in run_ranks(2, _differ):
        for name, words in said.items():
            assert words.startswith("RuntimeError: PipelineParallel: its options must be the same"), (name, words)
            assert f"\n  {name}: " in words, words


class Choosy(Language):
    """Its glue depends on a number that each rank has for itself."""

    def __init__(self, power: float) -> None:
        super().__init__(4)
        self.power = power

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.power


def _programs(rank: int, n: int) -> str:
    with distlib.init(timeout=timedelta(seconds=20)):
        torch.manual_seed(0)
        return said_by(lambda: pipeline(Choosy(1.0 + rank), split=["blocks.2"]))


def test_models_that_compute_otherwise_on_another_rank_are_refused() -> None:
    for words in run_ranks(2, _programs):
        assert "what the model does, and its stages, must be the same on all 2 ranks" in words
        assert "mul(" in words and "1.0" in words and "2.0" in words


# ---------------------------------------------------------------- steps that only some ranks take


def _left_out(rank: int, n: int) -> tuple[str, str]:
    with distlib.init(timeout=timedelta(seconds=20)):
        model = pipeline(LANGUAGE.made())
        refused = said_by(lambda: model.train_step(*LANGUAGE.batch(2, 1))) if rank == 0 else ""
        return refused, said_by(lambda: model.train_step(*LANGUAGE.batch(ROWS, 2)))


def test_a_step_that_one_rank_left_out_is_noticed() -> None:
    (refused, first), (_, second) = run_ranks(2, _left_out)
    assert "2 rows cannot be divided into 3" in refused
    assert "at its step 2, rank 1 at its step 1" in first or "at its step 1, rank 0 at its step 2" in first
    assert "took a step that the other did not, or was refused its batch" in first
    assert "at its step" in second


# ---------------------------------------------------------------- what is changed afterwards


def _unfrozen(rank: int, n: int) -> str:
    with distlib.init(timeout=timedelta(seconds=20)):
        made = LANGUAGE.made()
        for name, parameter in made.named_parameters():
            parameter.requires_grad_(name.startswith(("blocks.5", "norm", "head")))
        model = pipeline(made, split=["blocks.3"])

        def steps() -> None:
            model.train_step(*LANGUAGE.batch(ROWS, 0))
            for parameter in model.parameters():
                parameter.requires_grad_(True)
            model.train_step(*LANGUAGE.batch(ROWS, 1))

        return said_by(steps)


def test_what_was_frozen_when_it_was_recorded_cannot_be_trained_later() -> None:
    for words in run_ranks(2, _unfrozen):
        assert "was frozen when the pipeline was made" in words and "freeze it afterwards" in words, words


def _frozen(rank: int, n: int) -> bool:
    with distlib.init(timeout=timedelta(seconds=20)):
        model, plain = pipeline(TIED.made()), TIED.made()
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, plain)]
        for step in range(6):
            for one in (model, plain):  # by the names that one process has
                for name, parameter in one.named_parameters():
                    if name.startswith(("embedding.", "blocks.0")):
                        parameter.requires_grad_(not 2 <= step < 4)
            torch.manual_seed(step)
            loss = model.train_step(*TIED.batch(ROWS, step))
            torch.manual_seed(step)
            torch.testing.assert_close(loss, reference_step(plain, TIED, ROWS, step, MICRO_BATCHES), rtol=1e-5, atol=0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return True


def test_layers_may_be_frozen_and_trained_again_by_the_names_of_one_process() -> None:
    assert run_ranks(2, _frozen) == [True, True]


class Scaled(nn.Module):
    """A part that is divided among stages, and computes otherwise in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) * (3.0 if self.training else 1.0)
        return x


class Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Scaled()
        self.last = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x))


def _modes(rank: int, n: int, part: str, mode: bool) -> str:
    """A rank may hear of it while it is still in the step before."""
    with distlib.init(timeout=timedelta(seconds=20)):
        model, x = Holds(), torch.zeros(ROWS, WIDTH)
        model.last.eval()
        parallel = pipeline(model, loss_fn=functional.mse_loss, example_inputs=x)

        def steps() -> None:
            parallel.train_step(x, x)
            if (changed := dict(parallel.named_modules()).get(part)) is not None:
                changed.train(mode)
            parallel.train_step(x, x)

        return said_by(steps)


@pytest.mark.parametrize(
    ("part", "mode", "words"),
    [
        ("inner", False, "inner is in evaluation mode, and is divided among stages"),
        ("last.1", True, "last.1 is in training mode, and the pipeline took it to be in evaluation mode"),
    ],
)
def test_modes_that_other_ranks_do_not_see_are_refused(part: str, mode: bool, words: str) -> None:
    for said in run_ranks(2, _modes, part, mode):
        assert words in said


# ---------------------------------------------------------------- random numbers of the loss


def noisy(output: Tensor, target: Tensor) -> Tensor:
    keep = torch.rand(output.shape[:2]) > 0.3
    return (functional.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none") * keep.flatten()).mean()


def _loss_draws(rank: int, n: int, case: str) -> tuple[list[float], list[float], Tensor]:
    kind = replace(CASES[case], loss=noisy)
    with distlib.init(timeout=timedelta(seconds=20)):
        model, plain = pipeline(kind.made(), loss_fn=noisy), kind.made()
        found, expected = [], []
        for step in range(3):
            torch.manual_seed(step)
            found.append(float(model.train_step(*kind.batch(ROWS, step))))
            after = torch.rand(4)
            torch.manual_seed(step)
            expected.append(float(reference_step(plain, kind, ROWS, step, MICRO_BATCHES)))
        return found, expected, after


@pytest.mark.parametrize("case", ["language", "dropout"])
def test_a_loss_that_draws_is_that_of_one_process_and_leaves_generators_alike(case: str) -> None:
    results = run_ranks(2, _loss_draws, case)
    for found, expected, after in results:
        assert found == pytest.approx(expected, rel=1e-5)
        assert torch.equal(after, results[0][2])


# ---------------------------------------------------------------- micro-batches that count nothing


def ignoring(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=-1)


def counting(target: Tensor) -> float:
    return float((target >= 0).sum())


def _nothing_counts(rank: int, n: int, schedule: str) -> bool:
    with distlib.init(timeout=timedelta(seconds=20)):
        model, plain = pipeline(LANGUAGE.made(), schedule=schedule, loss_fn=ignoring, weigh=counting), LANGUAGE.made()
        tokens, target = LANGUAGE.batch(ROWS, 0)
        target = target.clone()
        target[2:4] = -1  # the second micro-batch
        expected = ignoring(plain(tokens), target)
        expected.backward()
        torch.testing.assert_close(model.train_step(tokens, target), expected.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(model.eval_step(tokens, target), expected.detach(), rtol=1e-5, atol=0)
        with pytest.raises(ValueError, match="nothing in this batch counts"):
            model.train_step(tokens, torch.full_like(target, -1))
        return same_gradients(model, plain)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_a_micro_batch_of_weight_0_adds_nothing(schedule: str) -> None:
    assert run_ranks(2, _nothing_counts, schedule) == [True, True]


def _nothing_counts_sharded(rank: int, n: int, pipelined: bool) -> bool:
    """On one rank a micro-batch counts nothing, on the other all do."""
    tokens, target = LANGUAGE.batch(2 * ROWS, 0)
    target = target.clone()
    target[2:4] = -1
    with distlib.init(timeout=timedelta(seconds=20)):
        plan = {"pipeline": 2, "stage": 3} if pipelined else {"stage": 3}
        engine = distlib.parallelize(
            LANGUAGE.made(),
            distlib.Plan(**plan, microbatches=MICRO_BATCHES),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            loss_fn=ignoring,
            weigh=counting,
            example_inputs=tokens[:ROWS],
        )
        plain = LANGUAGE.made()
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        for _ in range(2):
            expected = ignoring(plain(tokens), target)
            expected.backward()
            optimizer.step()
            optimizer.zero_grad()
            part = slice(engine.data_rank * ROWS, (engine.data_rank + 1) * ROWS)
            loss = engine.train_step(tokens[part], target[part])
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
        return True


@pytest.mark.parametrize("pipelined", [False, True])
def test_a_micro_batch_of_weight_0_lets_sharded_ranks_meet(pipelined: bool) -> None:
    ranks = 4 if pipelined else 2
    assert run_ranks(ranks, _nothing_counts_sharded, pipelined) == [True] * ranks


# ---------------------------------------------------------------- a model like any other


class Talks(nn.Linear):
    """Has a state beside its tensors."""

    def get_extra_state(self) -> Any:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"version": 3}


def _states(rank: int, n: int) -> dict[str, Any]:
    with distlib.init(timeout=timedelta(seconds=20)):
        torch.manual_seed(0)
        made = Language(4, tied=True)
        made.blocks[3].up = Talks(2 * WIDTH, WIDTH)
        model = pipeline(made, split=["blocks.2"])
        names = [name for name, _ in model.named_parameters()]
        if rank == 1:
            model.get_submodule("stage_1.blocks.2").extra = nn.Parameter(torch.ones(2))
        full = model.full_state_dict()
        found = model.load_state_dict(
            {"embedding.weight": full["embedding.weight"], "more": torch.ones(1)}, strict=False
        )
        return {
            "tied": [name for name in names if name in ("embedding.weight", "head.weight")],
            "extra": full.get("blocks.2.extra"),
            "state": full.get("blocks.3.up._extra_state"),
            "unexpected": found.unexpected_keys,
            "missing": "norm.weight" in found.missing_keys or "blocks.0.norm.weight" in found.missing_keys,
            "again": said_by(lambda: model.load_state_dict(model.state_dict())),
        }


def test_names_and_states_are_those_of_the_whole_model() -> None:
    for found in run_ranks(2, _states):
        assert found["tied"] == ["embedding.weight"]
        assert found["extra"] is not None and found["extra"].tolist() == [1.0, 1.0]
        assert found["state"] == {"version": 3}
        assert found["unexpected"] == ["more"] and found["missing"]
        assert found["again"] == ""


class Locked(nn.Module):
    """Returns what no other process can be told."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return x, threading.Lock()


def _cannot_be_sent(rank: int, n: int) -> str:
    with distlib.init(timeout=timedelta(seconds=20)):
        x = torch.zeros(ROWS, WIDTH)
        model = pipeline(Locked(), loss_fn=lambda made, target: (made[0] - target).square().mean(), example_inputs=x)
        return said_by(lambda: model(x))


def test_an_output_that_cannot_be_sent_is_told_on_all_ranks() -> None:
    for words in run_ranks(2, _cannot_be_sent):
        assert "cannot pickle '_thread.lock' object" in words


def test_a_pipeline_that_is_let_go_of_leaves_nothing() -> None:
    def made() -> weakref.ref[nn.Module]:
        model = pipeline(LANGUAGE.made())
        model.train_step(*LANGUAGE.batch(ROWS, 0))
        return weakref.ref(model.division.ghost.blocks[0])

    with distlib.init():
        ghosts = [made() for _ in range(2)]
        gc.collect()
        assert [ghost() for ghost in ghosts] == [None, None]


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"microbatches": 0}, "microbatches=0: must be a whole number, 1 or more"),
        ({"microbatches": "4"}, "microbatches='4': must be a whole number"),
        ({"schedule": 1}, "schedule=1: give one of gpipe, 1f1b"),
        ({"loss_fn": "mse"}, "loss_fn='mse': must be a function"),
        ({"timeout": -5}, "timeout=-5: must be seconds above 0"),
        ({"timeout": "5"}, "timeout='5': must be seconds above 0"),
    ],
)
def test_arguments_of_other_kinds_are_named(options: dict[str, Any], words: str) -> None:
    with distlib.init(), pytest.raises(ValueError, match=words):
        pipeline(LANGUAGE.made(), **options)


def test_what_is_no_model_or_has_no_modules_or_no_loss_is_said() -> None:
    x = torch.zeros(ROWS, WIDTH)
    with distlib.init():
        with pytest.raises(
            ValueError, match=r"module is list: give the model, or module=None and the stages as split="
        ):
            pipeline([Residual()])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="Linear calls no modules of its own, between which it could be divided"):
            pipeline(nn.Linear(WIDTH, WIDTH), example_inputs=x)
        model = pipeline(Scaled(), loss_fn=None, example_inputs=x)
        with pytest.raises(StageError, match=r"no loss_fn= was given, and the model returned a tensor"):
            model.train_step(x)
        with pytest.raises(RuntimeError, match=r"recording the model failed in module 'blocks.0' .*example_inputs"):
            pipeline(Scaled(), example_inputs=torch.zeros(ROWS, WIDTH + 1))
        with pytest.warns(UserWarning, match="loss_fn has parameters of its own"):
            pipeline(Scaled(), loss_fn=nn.Bilinear(WIDTH, WIDTH, 1), example_inputs=x)
