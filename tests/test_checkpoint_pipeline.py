"""Checkpoints move between pipeline layouts: what one plan saved, any other continues, tied weights and all."""

from __future__ import annotations

import json
import logging
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_models import CASES, Case, Language
from ranks import run_ranks
from torch import nn

import distlib
from distlib.checkpoint import optimizer_state
from distlib.checkpoint.reader import Checkpoint

ROWS, SAVED, STEPS = 24, 3, 6

PLANS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "pipeline 4": (4, {"pipeline": 4, "schedule": "1f1b", "microbatches": 4}),
    "pipeline 2 x sharded 2": (
        4,
        {"pipeline": 2, "schedule": "zb-h1", "microbatches": 2, "stage": 3, "partition_size": 2},
    ),
    "pipeline 2 x replicas 2": (4, {"pipeline": 2, "schedule": "interleaved", "microbatches": 4}),
    "V of 2": (2, {"pipeline": 2, "schedule": "zb-v", "microbatches": 4}),
    "sharded 3": (3, {"stage": 2}),
}


class Counting(Language):
    """With a buffer that counts its batches, which no gradient tells of."""

    def __init__(self) -> None:
        super().__init__(8, tied=True)
        self.register_buffer("seen", torch.full((3,), 7.0))


def case() -> Case:
    return Case(Counting, CASES["tied"].batch, CASES["tied"].loss)


def _train(rank: int, n: int, plan: dict[str, Any], folder: str, begin: int, fused: bool) -> tuple[list[float], Any]:
    torch.set_num_threads(1)
    make = distlib.optim.AdamW if fused else torch.optim.AdamW
    with distlib.init():
        mine = case()
        module = mine.made()
        if begin:
            for p in module.parameters():
                p.data.zero_()
            module.seen.zero_()

        def optimizer(parameters: Any) -> torch.optim.Optimizer:
            matrices = list(parameters)
            return make([{"params": matrices, "weight_decay": 0.1}], lr=1e-2)

        settings = {**plan, "clip": 1.0}
        if plan.get("pipeline"):
            settings["costs"] = "estimated"
        engine = distlib.parallelize(
            module, distlib.Plan(**settings), optimizer=optimizer, loss_fn=mine.loss, example_inputs=mine.batch(4, 0)[0]
        )
        if begin:
            state = engine.load(folder)
            assert (engine.steps, state.step) == (SAVED, SAVED)
        losses = []
        for step in range(begin, STEPS):
            rows = torch.arange(ROWS).tensor_split(engine.data_size)[engine.data_rank]
            inputs, target = (t[rows] for t in mine.batch(ROWS, step))
            losses.append(float(engine.train_step(inputs, target)))
            if step == SAVED - 1 and not begin:
                engine.save(folder)
        state = (
            engine.model.full_state_dict() if hasattr(engine.model, "full_state_dict") else engine.model.state_dict()
        )
        return losses, {name: value.clone() for name, value in state.items()} if rank == 0 else None


@pytest.mark.parametrize(
    ("saved", "loaded", "fused"),
    [
        ("pipeline 4", ["1 rank", "pipeline 2 x sharded 2", "V of 2"], False),
        ("1 rank", ["pipeline 4", "pipeline 2 x replicas 2"], True),
        ("pipeline 2 x sharded 2", ["pipeline 4", "sharded 3", "V of 2"], True),
        ("V of 2", ["pipeline 2 x sharded 2", "1 rank"], False),
        ("sharded 3", ["pipeline 2 x replicas 2"], False),
    ],
)
def test_training_goes_on_in_any_other_layout(saved: str, loaded: list[str], fused: bool, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    n, plan = PLANS[saved]
    straight = run_ranks(n, _train, plan, str(folder), 0, fused)
    names = {name for name, _ in case().made().named_parameters()} | {"seen"}
    held = {name.removeprefix("model.") for name in Checkpoint(folder).tensors if name.startswith("model.")}
    assert held - {"head.weight"} == names  # each once, and the tied weight under its other name too
    for other in loaded:
        n, plan = PLANS[other]
        resumed = run_ranks(n, _train, plan, str(folder), SAVED, fused)
        for losses, _ in resumed:
            assert losses == pytest.approx(straight[0][0][SAVED:], rel=1e-5), other
        expected, got = straight[0][1], resumed[0][1]
        assert expected.keys() == got.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)


def _another(rank: int, n: int, folder: str) -> None:
    with distlib.init():
        mine = CASES["language"]
        model = distlib.PipelineParallel(
            mine.made(), microbatches=2, loss_fn=mine.loss, example_inputs=mine.batch(4, 0)[0], costs="estimated"
        )
        with pytest.raises(ValueError, match="tied in the checkpoint|another model"):
            distlib.load(folder, model=model)


def test_another_model_is_refused_on_all_ranks(tmp_path: Path) -> None:
    n, plan = PLANS["pipeline 4"]
    run_ranks(n, _train, plan, str(tmp_path / "saved"), 0, False)
    run_ranks(2, _another, str(tmp_path / "saved"))


class _Empty(nn.Linear):
    """With a parameter of no elements."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.none = nn.Parameter(torch.zeros(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.none.sum()


def _empty(rank: int, n: int, plan: dict[str, Any], path: str, begin: bool, old: bool) -> list[float]:
    torch.manual_seed(0)
    if old:  # as files were that lack the scalars of such a parameter
        optimizer_state._is_first = lambda parameter, piece: False
    with distlib.init():
        engine = distlib.parallelize(
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), _Empty()),
            distlib.Plan(**plan),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
            loss_fn=nn.functional.mse_loss,
            example_inputs=torch.zeros(4, 4),
        )
        if begin:
            engine.load(path)
        x = torch.arange(16.0).view(4, 4)[engine.data_rank :: engine.data_size]
        losses = [float(engine.train_step(x, x + 1)) for _ in range(2)]
        if not begin:
            engine.save(path)
        return losses


@pytest.mark.parametrize("old", [False, True])
def test_parameters_without_elements_are_saved_with_their_scalars(old: bool, tmp_path: Path) -> None:
    plans = [
        (2, {"pipeline": 2, "microbatches": 2, "costs": "estimated"}),
        (4, {"pipeline": 2, "microbatches": 2, "costs": "estimated", "stage": 3}),
        (1, {}),
    ]
    for k, (n, plan) in enumerate(plans):
        run_ranks(n, _empty, plan, str(tmp_path / str(k)), False, old)
        continued = [run_ranks(m, _empty, other, str(tmp_path / str(k)), True, False)[0] for m, other in plans]
        assert all(losses == pytest.approx(continued[0], rel=1e-5) for losses in continued)


# ------------------------------------------------------------ buffers of several stages


class _Scaled(nn.Module):
    """A layer with a buffer that other layers have, too."""

    def __init__(self, scale: torch.Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x)) * self.scale


class _Buffered(nn.Module):
    """Buffers that every stage reads: two of the root, one without elements, and one that all layers share."""

    def __init__(self) -> None:
        super().__init__()
        scale = torch.rand(4)
        self.blocks = nn.ModuleList(_Scaled(scale) for _ in range(8))
        self.register_buffer("bias", torch.rand(4))
        self.register_buffer("empty", torch.zeros(0, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) + self.bias + self.empty.sum()
        return x


def _held(model: nn.Module, key: str) -> list[torch.Tensor]:
    """All buffers of this name on this rank."""
    return [m._buffers[key] for m in model.modules() if key in m._buffers]


def _buffered(rank: int, n: int, plan: dict[str, Any], path: str, begin: bool) -> tuple[list[float], list[Any], int]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = _Buffered()
    if begin:
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.zero_()
    settings = {"microbatches": 2, **plan} | ({"costs": "estimated"} if "pipeline" in plan else {})
    with distlib.init():
        engine = distlib.parallelize(
            module,
            distlib.Plan(**settings),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
            loss_fn=nn.functional.mse_loss,
            example_inputs=torch.zeros(8, 4),
        )
        x = torch.arange(32.0).view(8, 4).tensor_split(engine.data_size)[engine.data_rank] / 32
        if begin:
            engine.load(path)
        else:
            engine.train_step(x, x)
            engine.save(path)
        values = [[b.tolist() for b in _held(engine.model, key)] for key in ("bias", "scale")]
        return [float(engine.train_step(x, x)) for _ in range(2)], values, len(_held(engine.model, "bias"))


BUFFERED: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "pipeline 2": (2, {"pipeline": 2}),
    "pipeline 3": (3, {"pipeline": 3}),
    "V of 2": (2, {"pipeline": 2, "schedule": "zb-v"}),
    "pipeline 2 x replicas 2": (4, {"pipeline": 2, "schedule": "interleaved"}),
    "pipeline 2 x sharded 2": (4, {"pipeline": 2, "stage": 3}),
}


@pytest.mark.parametrize("saved", BUFFERED)
def test_buffers_of_several_stages_are_saved_once_and_loaded_into_all(saved: str, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    n, plan = BUFFERED[saved]
    straight = run_ranks(n, _buffered, plan, str(path), False)
    torch.manual_seed(0)
    whole = _Buffered()
    found = Checkpoint(path)
    assert torch.equal(found.tensor("model.bias"), whole.bias)
    assert torch.equal(found.tensor("model.blocks.0.scale"), whole.blocks[0].scale)
    for other, (m, their_plan) in BUFFERED.items():
        for losses, values, copies in run_ranks(m, _buffered, their_plan, str(path), True):
            assert losses == pytest.approx(straight[0][0], rel=1e-5), other
            assert copies == (2 if other in ("V of 2", "pipeline 2 x replicas 2") else 1)
            for held, expected in zip(values, (whole.bias, whole.blocks[0].scale), strict=True):
                assert held and all(value == expected.tolist() for value in held), other


# ------------------------------------------------------------ generators, loss scales


class _Logged(logging.Handler):
    """What distlib.checkpoint logs, as text."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logger = logging.getLogger("distlib.checkpoint")
        logger.addHandler(self)
        logger.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _engine(plan: dict[str, Any]) -> distlib.Engine:
    settings = {"microbatches": 2, "seed": 1, **plan} | ({"costs": "estimated"} if "pipeline" in plan else {})
    torch.manual_seed(0)
    return distlib.parallelize(
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4), nn.Linear(4, 4)),
        distlib.Plan(**settings),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        loss_fn=nn.functional.mse_loss,
        example_inputs=torch.zeros(8, 4),
    )


class Position:
    """Where a rank's data loader is."""

    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def _numbers_saved(rank: int, n: int, plan: dict[str, Any], path: str) -> tuple[int, list[float], float]:
    with distlib.init():
        engine = _engine(plan)
        x = torch.ones(8, 4)
        engine.train_step(x, x)
        engine.save(path, extra={"position": Position(engine.data_rank), "all": 1})
        return engine.data_rank, torch.rand(2).tolist(), float(engine.train_step(x, x))


def _numbers_loaded(rank: int, n: int, plan: dict[str, Any], path: str) -> tuple[Any, ...]:
    with distlib.init():
        engine, logged, x, position = _engine(plan), _Logged(), torch.ones(8, 4), Position(-1)
        torch.manual_seed(100 + engine.data_rank)
        before = torch.get_rng_state()
        state = engine.load(path)
        kept = torch.equal(before, torch.get_rng_state())
        assert state.extra["all"] == 1
        if "position" in state.extra:
            engine.load(path, extra={"position": position}, rng=False)
        else:
            with pytest.raises(ValueError, match=r"extra\['position'\] was not the same on all"):
                engine.load(path, extra={"position": position}, rng=False)
        told = sum("random number generators stay as they are" in line for line in logged.lines)
        numbers = torch.rand(2).tolist(), float(engine.train_step(x, x))
        return state.rng, kept, told, position.value, engine.data_rank, *numbers


RANKS: dict[str, tuple[int, dict[str, Any]]] = {
    "2 replicas": (2, {}),
    "sharded 2": (2, {"stage": 3}),
    "pipeline 2": (2, {"pipeline": 2}),
    "V of 2": (2, {"pipeline": 2, "schedule": "zb-v"}),
    "4 replicas": (4, {}),
    "pipeline 2 x replicas 2": (4, {"pipeline": 2}),
    "pipeline 4": (4, {"pipeline": 4}),
}


def _as_before(path: Path) -> None:
    """The manifest as it was when it did not tell of replicas."""
    body = json.loads((path / "manifest.json").read_bytes())
    del body["crc32"], body["replicas"]
    body["crc32"] = zlib.crc32(json.dumps(body, sort_keys=True).encode())
    (path / "manifest.json").write_text(json.dumps(body))


@pytest.mark.parametrize(
    ("saved", "same", "others"),
    [
        ("2 replicas", ["2 replicas", "sharded 2"], ["pipeline 2", "4 replicas"]),
        ("pipeline 2", ["pipeline 2", "V of 2"], ["2 replicas"]),
        ("pipeline 2 x replicas 2", ["pipeline 2 x replicas 2"], ["4 replicas", "pipeline 4"]),
    ],
)
def test_generators_come_back_where_ranks_are_the_same_replicas(
    saved: str, same: list[str], others: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "saved"
    n, plan = RANKS[saved]
    straight = run_ranks(n, _numbers_saved, plan, str(path))
    for other in same:
        found = run_ranks(n, _numbers_loaded, RANKS[other][1], str(path))
        for (data_rank, numbers, loss), (rng, _, told, _, now, drawn, again) in zip(straight, found, strict=True):
            assert (rng, told, now, drawn) == (True, 0, data_rank, numbers), other
            if other == saved:
                assert again == loss  # to the bit: the masks are the same
    for other in others:
        m, their_plan = RANKS[other]
        found = run_ranks(m, _numbers_loaded, their_plan, str(path))
        assert [(rng, kept) for rng, kept, *_ in found] == [(False, True)] * m, other
        assert [told > 0 for _, _, told, *_ in found] == [True] + [False] * (m - 1)  # rank 0 says it
    _as_before(path)
    for other in (*same, *others):
        m, their_plan = RANKS[other]
        found = run_ranks(m, _numbers_loaded, their_plan, str(path))
        assert {rng for rng, *_ in found} == {"pipeline" not in their_plan and m == n}, other


def test_what_differs_between_ranks_is_given_back_to_the_same_replicas_only(tmp_path: Path) -> None:
    for saved, other in (("2 replicas", "pipeline 2"), ("pipeline 2 x replicas 2", "4 replicas")):
        path = tmp_path / saved
        (n, plan), (_, their_plan) = RANKS[saved], RANKS[other]
        run_ranks(n, _numbers_saved, plan, str(path))
        found = run_ranks(n, _numbers_loaded, plan, str(path))
        assert all(position == data_rank for _, _, _, position, data_rank, *_ in found)
        assert {position for _, _, _, position, *_ in run_ranks(n, _numbers_loaded, their_plan, str(path))} == {-1}
        _as_before(path)  # which of them they are is not known: as it was
        found = run_ranks(n, _numbers_loaded, plan, str(path))
        assert all(position == data_rank for _, _, _, position, data_rank, *_ in found)


def _scaled(rank: int, n: int, plan: dict[str, Any], path: str, begin: bool) -> tuple[float | None, int, int]:
    x = torch.ones(8, 4)
    with distlib.init():
        engine, logged = _engine(plan), _Logged()
        if begin:
            engine.load(path)
        own = None if engine.scaler is None else float(engine.scaler.get_scale())
        engine.train_step(x, x)
        if not begin:
            engine.save(path)
        return own, engine.steps, sum("the loss scale stays as it is" in line for line in logged.lines)


@pytest.mark.parametrize("plan", [{"pipeline": 2}, {"stage": 3}], ids=["pipeline", "sharded"])
def test_a_plan_that_scales_losses_loads_what_was_saved_without(plan: dict[str, Any], tmp_path: Path) -> None:
    half = {**plan, "precision": {"dtype": "fp16", "init_scale": 512.0}}
    path = str(tmp_path / "saved")
    run_ranks(2, _scaled, plan, path, False)
    assert run_ranks(2, _scaled, half, path, True) == [(512.0, 2, 1), (512.0, 2, 0)]
    run_ranks(2, _scaled, {**half, "precision": {"dtype": "fp16", "init_scale": 64.0}}, path, False)
    assert run_ranks(2, _scaled, half, path, True) == [(64.0, 2, 0)] * 2
    assert run_ranks(2, _scaled, plan, path, True) == [(None, 2, 0)] * 2


def test_a_scaler_of_the_callers_own_must_have_been_saved(tmp_path: Path) -> None:
    model, scaler = nn.Linear(2, 2), Position(3)
    distlib.save(tmp_path / "c", model=model)
    with pytest.raises(ValueError, match="saved without a scaler"):
        distlib.load(tmp_path / "c", model=model, scaler=scaler)
    distlib.load(tmp_path / "c", model=model, scaler=scaler, scaler_required=False)
    assert scaler.value == 3
