"""The main job under any plan: one loss curve, also across a stop and a start under another plan."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks_raw
from test_train_lm import assert_same_curve, check, interrupted_at, one_rank, parse, saved_step, text

pytestmark = pytest.mark.slow  # among the first files to be tested

__all__ = ["text"]  # a fixture

PLANS = Path(__file__).parents[1] / "examples" / "plans"
SMALL = "--steps 20 --batch 16 --context 16 --layers 2 --width 16 --heads 2 --warmup 2 --lr 5e-3".split()
SHORT = "--validate-every 10 --validation-windows 16 --report-every 5 --sample 2".split()


def train(ranks: int, text: Path, folder: Path, *more: str, plan: dict[str, Any] | Path | None = None) -> Any:
    """A small run; what it wrote to --out, and what rank 0 said."""
    out = folder / "out.json"
    arguments = ["--data", str(text), "--out", str(out), *SMALL, *SHORT, *more, *written(plan, folder)]
    outcomes = run_ranks_raw(ranks, one_rank, arguments, timeout=90, grace=10)
    assert all(outcome.ok for outcome in outcomes), "\n".join(map(str, outcomes))
    return json.loads(out.read_text()), outcomes[0].output


def written(plan: dict[str, Any] | Path | None, folder: Path) -> list[str]:
    """The option that names the plan's file."""
    if isinstance(plan, dict):
        path = folder / "plan.json"
        path.write_text(json.dumps(plan))
        plan = path
    return [] if plan is None else ["--plan", str(plan)]


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run that all others must equal."""
    run, _ = train(1, text, tmp_path_factory.mktemp("alone"))
    return run


SAME = {
    "replicated": (2, {"clip": 1.0}),
    "stage 2": (2, {"clip": 1.0, "stage": 2, "microbatches": 2}),
    "pipeline": (2, {"clip": 1.0, "pipeline": 2, "microbatches": 4}),
    "pipeline of partitions": (
        4,
        {"clip": 1.0, "pipeline": 2, "schedule": "zb-h1", "microbatches": 4, "stage": 3, "partition_size": 2},
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_the_loss_curve_does_not_depend_on_the_plan(
    name: str, text: Path, tmp_path: Path, alone: dict[str, Any]
) -> None:
    ranks, plan = SAME[name]
    run, said = train(ranks, text, tmp_path, plan=plan)
    assert_same_curve(run, alone)
    assert {key: run["plan"][key] for key in plan} == plan
    reports = run["summary"]["ranks"]
    counted, expected = (sum(report[key] for report in reports) for key in ("bytes_counted", "bytes_expected"))
    assert counted == expected > 0
    assert all(0 < report["state_bytes"] <= 1.1 * report["state_expected"] for report in reports)
    assert f"{run['summary']['parameters']:,} parameters" in said
    if "pipeline" in plan:  # which stage has what
        assert re.search(r"stage 0: .*embedding, blocks\.0", said) and re.search(r"stage 1: .*final_norm, head", said)
    assert all(len(line) <= 80 for line in said.partition("step  0/20")[2].splitlines())


def test_a_run_that_stops_goes_on_under_another_plan(text: Path, tmp_path: Path, alone: dict[str, Any]) -> None:
    saved = tmp_path / "run"
    data = ["--data", str(text), *SMALL, *SHORT, "--save", str(saved), "--save-every", "5"]
    pipeline = {"clip": 1.0, "pipeline": 2, "microbatches": 4}
    for ranks, stop, plan in [(2, 7, pipeline), (1, 12, None)]:
        go_on = ["--resume", str(saved)] if saved.exists() else []
        arguments = [*data, *go_on, *written(plan, tmp_path)]
        outcomes = run_ranks_raw(ranks, interrupted_at, stop, arguments, grace=10)
        assert all("interrupted" in outcome.text for outcome in outcomes), "\n".join(map(str, outcomes))
        assert saved_step(saved) == stop // 5 * 5
    run, _ = train(4, text, tmp_path, "--resume", str(saved), plan={**pipeline, "stage": 1})
    assert_same_curve(run, alone)


@pytest.mark.parametrize(
    ("name", "ranks", "options"),
    [("one_host", 4, ""), ("mics", 4, ""), ("pipeline", 4, ""), ("large", 8, "--layers 6")],
)
def test_the_ready_plans_train(
    name: str, ranks: int, options: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # large.yaml names a folder
    run, said = train(ranks, text, tmp_path, *options.split(), plan=PLANS / f"{name}.yaml")
    assert run["train_loss"][-1] < run["train_loss"][0] - 0.5, said
    assert run["validation_loss"][-1][1] < run["validation_loss"][0][1] - 0.5


@pytest.mark.parametrize(
    ("plan", "arguments", "message"),
    [
        ({"pipeline": 2}, "--clip 0.5", "--clip 0.5 has no effect with --plan: say it in"),
        ({"pipeline": 2}, "--clip 1", "--clip 1.0 has no effect with --plan: say it in"),  # the default, but given
        ({"pipeline": 2}, "--accumulate 1", "--accumulate 1 has no effect with --plan"),
        ({"pipeline": 2}, "--stage 3", "--stage 3 has no effect with --plan"),
        ({"pipeline": 2}, "--partition-size 0", "--partition-size 0 has no effect with --plan"),
        ({"pipeline": 2}, "--strategy replicated", "--strategy replicated has no effect with --plan"),
        ({"pipeline": 2}, "--accumulate 2", "--accumulate 2 has no effect with --plan"),
        ({"pipeline": 2}, "--strategy mics", "--strategy mics has no effect with --plan"),
        ({"pipeline": 4}, "", "pipeline=4 does not divide 6 ranks"),
        (
            {"pipeline": 2, "microbatches": 4},
            "--batch 8",
            "--batch 8 does not divide over 3 x 2 ranks x 4 micro-batches: try --batch 12",
        ),
        ({"pipelines": 2}, "", "unknown key; did you mean 'pipeline'?"),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan: dict[str, Any], arguments: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        check(parse([*arguments.split(), *written(plan, tmp_path)]), ranks=6)
    assert message in str(caught.value)


def test_a_plan_that_is_missing_ends_every_rank_with_a_line(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    for rank, outcome in enumerate(run_ranks_raw(2, one_rank, ["--plan", str(missing)])):
        line = f"SystemExit: train_lm: rank {rank}: --plan {missing}: no such file; examples/plans/ has some"
        assert outcome.text.strip().endswith(line)


def without_yaml(rank: int, size: int, arguments: list[str]) -> None:
    sys.modules["yaml"] = None  # type: ignore[assignment]  # as if it were not installed
    one_rank(rank, size, arguments)


def test_a_plan_in_yaml_without_its_library_ends_every_rank_with_a_line() -> None:
    for rank, outcome in enumerate(run_ranks_raw(2, without_yaml, ["--plan", str(PLANS / "pipeline.yaml")])):
        assert f"SystemExit: train_lm: rank {rank}: a plan in YAML needs PyYAML" in outcome.text
        assert outcome.text.strip().splitlines()[-1].endswith("or write the plan as .json")
