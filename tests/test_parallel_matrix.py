"""Every way to divide 1, 2, 4, 6 and 8 ranks gives the loss curve of one process, over 50 steps, to 1e-5.

A record is one training. All ways to write the ranks as pipeline x partition x replicas go with schedules, policies
for activations, tied embeddings, ZeRO stages and two numbers of micro-batches in turn, so that each value of each meets
every factoring size. DISTLIB_MATRIX=all runs every schedule with every factoring (some minutes).
"""

from __future__ import annotations

import functools
import itertools
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pipeline_models import CASES, Case, Language
from ranks import run_ranks

import distlib
from distlib.activations import offload

pytestmark = pytest.mark.slow  # among the first files to be tested

STEPS, ROWS = 50, 48
SCHEDULES = ("1f1b", "zb-h1", "interleaved", "gpipe", "zb-v", "zb-h2")
ACTIVATIONS = (None, "full", "selective", "offload")
EVERYTHING = os.environ.get("DISTLIB_MATRIX") == "all"
LIMIT = 600 if EVERYTHING else 110  # seconds for four records: the full matrix may run beside other work


@dataclass(frozen=True)
class Record:
    """One training. partition: ranks of a partition group; replicas of these; stage: of ZeRO, 0 replicated."""

    pipeline: int
    partition: int
    replicas: int
    stage: int
    schedule: str
    activations: str | None
    tied: bool
    microbatches: int

    @property
    def ranks(self) -> int:
        return self.pipeline * self.partition * self.replicas

    @property
    def layers(self) -> int:
        return max(2, 2 * self.pipeline - 2)  # with embedding, norm and head: a module for each of two stages per rank

    def plan(self, folder: str) -> distlib.Plan:
        settings: dict[str, Any] = {
            "stage": self.stage,
            "microbatches": self.microbatches,
            "costs": "estimated",
            "clip": 1.0,
        }
        if self.stage:
            settings["partition_size"] = self.partition
        if self.pipeline > 1:
            settings.update(pipeline=self.pipeline, schedule=self.schedule)
        else:
            del settings["costs"]
        if self.activations == "offload":
            settings["activations"] = {"policy": "offload", "folder": folder}
        elif self.activations:
            settings["activations"] = self.activations
        return distlib.Plan(**settings)


def records() -> list[Record]:
    found = []
    turn, others = itertools.count(), itertools.count()
    for ranks in (1, 2, 4, 6, 8):
        for pipeline, partition in itertools.product(range(1, ranks + 1), repeat=2):
            if ranks % (pipeline * partition):
                continue
            replicas = ranks // pipeline // partition
            schedules = SCHEDULES
            if pipeline == 1:
                schedules = ("1f1b",)
            elif not EVERYTHING:
                schedules = (SCHEDULES[next(turn) % 6],)
            for schedule in schedules:
                k = next(others)
                stage = (1, 2, 3)[k % 3] if partition > 1 else (3 * (k % 2) if replicas > 1 else 0)
                found.append(
                    Record(
                        pipeline,
                        partition,
                        replicas,
                        stage,
                        schedule,
                        ACTIVATIONS[(k + (k // 6 if EVERYTHING else 0)) % 4],  # each with each of six schedules
                        bool((k + k // 4) % 2),
                        2 + 2 * (k // 3 % 2),
                    )
                )
    return found


def case_of(tied: bool, layers: int) -> Case:
    tokens = CASES["language"]
    return Case(lambda: Language(layers, tied=tied), tokens.batch, tokens.loss)


@functools.cache
def reference(tied: bool, layers: int) -> list[float]:
    """The curve of one process that knows of nothing: whole batches, torch's own AdamW and clipping."""
    torch.set_num_threads(1)
    case = case_of(tied, layers)
    model = case.made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(STEPS):
        inputs, target = case.batch(ROWS, step)
        loss = case.loss(model(inputs), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _curves(rank: int, n: int, todo: list[Record], folder: str) -> list[list[float]]:
    torch.set_num_threads(1)
    offload.SMALLEST = 64  # bytes: these models are small
    curves = []
    with distlib.init():
        for record in todo:
            case = case_of(record.tied, record.layers)
            engine = distlib.parallelize(
                case.made(),
                record.plan(folder),
                optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3),
                loss_fn=case.loss,
                example_inputs=case.batch(ROWS // (record.partition * record.replicas), 0)[0],
            )
            losses = []
            for step in range(STEPS):
                inputs, target = (t.chunk(engine.data_size)[engine.data_rank] for t in case.batch(ROWS, step))
                losses.append(float(engine.train_step(inputs, target)))
            curves.append(losses)
    return curves


def _batches() -> list[tuple[int, list[Record]]]:
    """Records of equal numbers of ranks, some at a time: they share processes."""
    found = []
    for ranks, group in itertools.groupby(records(), key=lambda r: r.ranks):
        mine = list(group)
        found += [(ranks, mine[i : i + 4]) for i in range(0, len(mine), 4)]
    return found


@pytest.mark.parametrize(
    ("n", "todo"), [pytest.param(n, todo, id=f"{n}-{i}") for i, (n, todo) in enumerate(_batches())]
)
def test_the_loss_curve_is_that_of_one_process(n: int, todo: list[Record], tmp_path: Any) -> None:
    everyone = run_ranks(n, _curves, todo, str(tmp_path), timeout=LIMIT)
    wrong = {}
    for i, record in enumerate(todo):
        expected = reference(record.tied, record.layers)
        assert expected[-1] < 0.95 * expected[0]  # it learns, so that errors would show
        for curves in everyone:
            error = max(abs(a / b - 1) for a, b in zip(curves[i], expected, strict=True))
            if not error <= 1e-5:
                wrong[str(record)] = error
    assert not wrong


def test_the_matrix_has_every_value_at_every_number_of_ranks() -> None:
    found = records()
    factorings = {(r.pipeline, r.partition, r.replicas) for r in found}
    expected = {
        (p, q, n // p // q)
        for n in (1, 2, 4, 6, 8)
        for p in range(1, n + 1)
        for q in range(1, n + 1)
        if n % (p * q) == 0
    }
    assert factorings == expected
    divided = [r for r in found if r.pipeline > 1]
    for values in (
        itertools.product(SCHEDULES, ACTIVATIONS) if EVERYTHING else [],
        [(s,) for s in SCHEDULES],
        [(a,) for a in ACTIVATIONS],
        [(True,), (False,)],
    ):
        for value in values:
            assert any(set(value) <= {r.schedule, r.activations, r.tied} for r in divided), value
    assert {r.stage for r in divided} == {0, 1, 2, 3} and {r.microbatches for r in divided} == {2, 4}
