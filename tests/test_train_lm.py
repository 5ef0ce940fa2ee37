"""The main job in miniature: one loss curve, whatever launcher, ranks, micro-batches, resume."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks, run_ranks_raw

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from lm.model import GPT, generate, next_token_loss, rotary_table, rotate
from lm.settings import Settings, check, parse

SCRIPT = Path(__file__).parents[1] / "examples" / "train_lm.py"
SMALL = "--steps 12 --batch 12 --context 16 --layers 1 --width 16 --heads 2 --warmup 2 --lr 1e-2".split()
SHORT = "--validate-every 6 --validation-windows 12 --report-every 5 --sample 8".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some files of learnable nonsense."""
    folder = tmp_path_factory.mktemp("text")
    words = ["return", "yield", "lambda", "(x, y)", "[0]", "\n    ", "def f", ":", "import", "None"]
    dice = random.Random(0)
    for name in range(25):
        (folder / f"{name}.txt").write_text(" ".join(dice.choices(words, k=60)))
    return folder


def one_rank(rank: int, size: int, arguments: list[str]) -> None:
    import train_lm

    train_lm.main(arguments)


def train(ranks: int, text: Path, out: Path, *more: str) -> dict[str, Any]:
    """A small run on forked ranks; what it wrote to --out."""
    run_ranks(ranks, one_rank, ["--data", str(text), "--out", str(out), *SMALL, *SHORT, *more])
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run that all others must equal."""
    return train(1, text, tmp_path_factory.mktemp("alone") / "out.json")


def assert_same_curve(run: dict[str, Any], reference: dict[str, Any]) -> None:
    assert run["train_loss"] == pytest.approx(reference["train_loss"], rel=1e-5)
    assert [step for step, _ in run["validation_loss"]] == [step for step, _ in reference["validation_loss"]]
    losses, expected = ([loss for _, loss in r["validation_loss"]] for r in (run, reference))
    assert losses == pytest.approx(expected, rel=1e-5)


def test_one_rank_learns(alone: dict[str, Any]) -> None:
    assert alone["world"]["size"] == 1 and len(alone["train_loss"]) == 12
    assert alone["train_loss"][0] == pytest.approx(math.log(256), abs=0.1)
    assert alone["train_loss"][-1] < alone["train_loss"][0] - 0.5
    assert [step for step, _ in alone["validation_loss"]] == [0, 6, 12]
    assert alone["summary"]["validation_loss"] == alone["validation_loss"][-1][1]
    assert alone["summary"]["tokens_per_second"] > 0
    assert [rank["bytes_counted"] for rank in alone["summary"]["ranks"]] == [0]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_loss_curve_does_not_depend_on_the_number_of_ranks(
    ranks: int, text: Path, tmp_path: Path, alone: dict[str, Any]
) -> None:
    run = train(ranks, text, tmp_path / "out.json")
    assert_same_curve(run, alone)
    reports = run["summary"]["ranks"]
    assert [report["rank"] for report in reports] == list(range(ranks))
    assert all(report["peak_bytes"] > 2**20 and report["communication_seconds"] > 0 for report in reports)
    counted, expected = (sum(r[key] for r in reports) for key in ("bytes_counted", "bytes_expected"))
    assert counted == expected > run["summary"]["parameters"] * 4 * 12 * (ranks - 1)


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 4), (2, 3)])
def test_the_loss_curve_does_not_depend_on_accumulation(
    ranks: int, micro_batches: int, text: Path, tmp_path: Path, alone: dict[str, Any]
) -> None:
    run = train(ranks, text, tmp_path / "out.json", "--accumulate", str(micro_batches))
    assert_same_curve(run, alone)


def test_resumed_on_another_number_of_ranks_equals_uninterrupted(
    text: Path, tmp_path: Path, alone: dict[str, Any]
) -> None:
    saved = tmp_path / "run"
    train(2, text, tmp_path / "whole.json", "--save", str(saved), "--save-every", "5", "--steps", "12")
    assert saved_step(saved) == 12

    outcomes = run_ranks_raw(
        2, interrupted_at, 7, ["--data", str(text), *SMALL, *SHORT, "--save", str(saved), "--save-every", "5"]
    )
    assert all("interrupted" in outcome.text for outcome in outcomes)
    assert saved_step(saved) == 5
    for ranks, strategy in [(1, "replicated"), (3, "replicated"), (2, "sharded")]:
        more = ["--resume", str(saved), "--strategy", strategy]
        resumed = train(ranks, text, tmp_path / f"resumed-{ranks}.json", *more)
        assert_same_curve(resumed, alone)


def saved_step(folder: Path) -> int:
    return json.loads((folder / "manifest.json").read_text())["step"]


STRATEGIES = [
    ("sharded", 2, ()),
    ("sharded", 3, ("--stage", "1", "--accumulate", "2")),
    ("mics", 4, ("--partition-size", "2")),
    ("mics", 2, ()),
]


@pytest.mark.parametrize(("strategy", "ranks", "more"), STRATEGIES)
def test_the_loss_curve_does_not_depend_on_the_strategy(
    strategy: str, ranks: int, more: tuple[str, ...], text: Path, tmp_path: Path, alone: dict[str, Any]
) -> None:
    run = train(ranks, text, tmp_path / "out.json", "--strategy", strategy, *more)
    assert_same_curve(run, alone)
    for report in run["summary"]["ranks"]:
        assert 0 < report["state_bytes"] <= 1.1 * report["state_expected"]


def interrupted_at(rank: int, size: int, step: int, arguments: list[str]) -> None:
    """A run in which every rank raises before the given step."""
    import train_lm

    def rate(step_now: int, *others: Any) -> float:
        if step_now == step:
            raise RuntimeError("interrupted")
        return unharmed(step_now, *others)

    unharmed, train_lm.learning_rate = train_lm.learning_rate, rate
    train_lm.main(arguments)


# ---- what can go wrong


def ended_with(ranks: int, *arguments: str) -> list[str]:
    """The message with which each rank of a run ended: a line, nothing else."""
    outcomes = run_ranks_raw(ranks, one_rank, [*SMALL, *SHORT, *arguments])
    assert all(not outcome.ok and "SystemExit: train_lm: rank" in outcome.text for outcome in outcomes), outcomes
    return [outcome.text.partition("SystemExit: ")[2].strip() for outcome in outcomes]


def test_bad_data_ends_every_rank_with_a_line(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert ended_with(2, "--data", str(missing)) == [
        f"train_lm: rank {rank}: --data {missing}: no such file or folder" for rank in range(2)
    ]


def only_rank_one(rank: int, size: int, arguments: list[str], its_arguments: list[str]) -> None:
    one_rank(rank, size, arguments + its_arguments * (rank == 1))


def test_data_that_is_bad_on_one_rank_ends_all(text: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(text), *SMALL]
    outcomes = run_ranks_raw(3, only_rank_one, arguments, ["--data", str(tmp_path)])
    assert "train_lm: rank 1: --data" in outcomes[1].text
    for rank in (0, 2):
        assert f"train_lm: rank {rank} stops because of rank 1: --data {tmp_path}: no files" in outcomes[rank].text


def test_a_batch_that_does_not_divide_ends_every_rank(text: Path) -> None:
    for message in ended_with(2, "--data", str(text), "--batch", "7"):
        assert message.endswith("--batch 7 does not divide over 2 ranks: try --batch 8")


def test_a_loss_that_is_no_number_ends_every_rank(text: Path) -> None:
    for message in ended_with(2, "--data", str(text), "--lr", "1e30"):
        assert "is not a number: try a smaller --lr" in message


def test_a_checkpoint_that_does_not_fit_is_refused(text: Path, tmp_path: Path) -> None:
    saved, damaged, foreign = (tmp_path / name for name in ("run", "damaged", "foreign.pt"))
    train(1, text, tmp_path / "out.json", "--save", str(saved))
    shutil.copytree(saved, damaged)
    largest = max(damaged.glob("*.distcp"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    torch.save({"weights": 1}, foreign)
    data = ["--data", str(text)]
    for arguments, message in [
        (["--resume", str(saved)], "has 12 steps behind it: ask for more than --steps 12"),
        (["--resume", str(saved), "--context", "15"], "trained with --context 16, and this run has 15"),
        (["--resume", str(saved), "--width", "32"], "shape"),
        (["--resume", str(damaged)], largest.name),
        (["--resume", str(foreign)], "foreign.pt"),
        (["--resume", str(tmp_path / "none")], "does not exist"),
    ]:
        (line,) = ended_with(1, *data, *arguments)
        assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 0", "--steps 0 must be at least 1"),
        ("--lr -1", "--lr -1.0 and --clip 1.0 must be more than 0"),
        ("--seed -1", "must not be negative"),
        ("--strategy zero", "--strategy 'zero' must be one of replicated, sharded, mics"),
        ("--strategy sharded --partition-size 2", "--partition-size 2 has no effect without --strategy mics"),
        ("--stage 2", "--stage 2 has no effect without --strategy"),
        ("--stage 3", "--stage 3 has no effect without --strategy"),
        ("--partition-size 0", "--partition-size 0 has no effect without --strategy mics"),
        ("--save-every 5", "--save-every 5 has no effect without --save FOLDER"),
        (
            "--batch 8 --accumulate 3",
            "--batch 8 does not divide over 2 ranks x 3 micro-batches: try --batch 12",
        ),
        ("--out nowhere/at/all.json", "--out nowhere/at/all.json: there is no folder"),
        ("--save /proc/run", "--save /proc/run: nothing can be written in /proc: "),
        ("--out /proc/run.json", "--out /proc/run.json: nothing can be written in /proc: "),
        (f"--save {__file__}", f"--save {__file__} is a file; a checkpoint is a folder"),
    ],
)
def test_numbers_that_cannot_be_are_refused(arguments: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(parse(arguments.split()), ranks=2)
    assert message in str(caught.value)


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--step", "3"])
    assert "unrecognized arguments: --step 3" in capsys.readouterr().err
    assert parse([]) == Settings() and parse(["--global-batch", "4"]).batch == 4


# ---- what is said


def test_only_rank_0_speaks_in_plain_lines_or_draws_a_bar(text: Path) -> None:
    arguments = ["--data", str(text), *SMALL, *SHORT]
    plain, silent = run_ranks_raw(2, one_rank, arguments, env={"FORCE_COLOR": None})
    assert "step 10/12  loss " in plain.output and "\x1b" not in plain.output
    assert "validation loss" in plain.output and "rank" in plain.output
    assert "step" not in silent.output
    bar, silent = run_ranks_raw(2, one_rank, arguments, env={"FORCE_COLOR": "1", "TERM": "xterm"})
    assert "step 12/12" in bar.output and "\x1b[2K" in bar.output and "  lr " not in bar.output
    assert "step" not in silent.output


# ---- the model


def test_the_model_sees_no_later_byte_and_starts_undecided() -> None:
    torch.manual_seed(0)
    model = GPT(layers=2, width=32, heads=4)
    tokens = torch.randint(256, (3, 20))
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 256
    logits, other = model(tokens), model(changed)
    assert logits.shape == (3, 20, 256)
    torch.testing.assert_close(logits[:, :12], other[:, :12])
    assert not torch.allclose(logits[:, 12:], other[:, 12:])
    assert next_token_loss(logits, tokens).item() == pytest.approx(math.log(256), abs=0.15)


def test_positions_matter_only_relative_to_each_other() -> None:
    torch.manual_seed(0)
    model = GPT(layers=1, width=32, heads=4)
    tokens = torch.randint(256, (1, 8))
    assert not torch.allclose(model(tokens)[0, -1], model(tokens.flip(1).roll(-1, 1))[0, -1])
    cos, sin = rotary_table(50, 8, torch.device("cpu"))
    q, k = torch.randn(2, 1, 8).expand(2, 50, 8)
    scores = rotate(q, cos, sin) @ rotate(k, cos, sin).T
    torch.testing.assert_close(scores[10:40, 10:40], scores[:30, :30], atol=1e-4, rtol=1e-4)


def test_a_tied_head_is_the_embedding() -> None:
    tied, untied = (GPT(layers=1, width=32, heads=4, tied=tied) for tied in (True, False))
    assert tied.head.weight is tied.embedding.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 256 * 32


def test_heads_must_divide_the_width_into_even_parts() -> None:
    with pytest.raises(ValueError, match="multiple of 10"):
        GPT(layers=1, width=32, heads=5)
    with pytest.raises(ValueError, match="multiple of 8"):
        GPT(layers=1, width=12, heads=4)


def test_samples_repeat_with_the_seed() -> None:
    torch.manual_seed(0)
    model = GPT(layers=1, width=32, heads=4)
    samples = [generate(model, b"def ", 30, 16, seed, torch.device("cpu")) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
    assert len(samples[0]) == 34 and samples[0].startswith(b"def ")


# ---- the launchers


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["python", "torchrun", pytest.param("mpirun", marks=pytest.mark.mpi)])
def test_every_launcher_gives_the_same_curve(
    launcher: str, text: Path, tmp_path: Path, alone: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "out.json"
    script = [str(SCRIPT), "--data", str(text), "--out", str(out), *SMALL, *SHORT]
    command = [sys.executable, *script]
    if launcher == "torchrun":
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--log-dir={tmp_path}",
            "--nproc-per-node",
            "2",
            *script,
        ]
    if launcher == "mpirun":
        command = [*request.getfixturevalue("mpirun"), "-np", "2", *command]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "step 12/12  validation loss" in ended.stdout and "\x1b" not in ended.stdout
    run = json.loads(out.read_text())
    assert run["world"]["launcher"] == {"python": "single", "mpirun": "openmpi"}.get(launcher, launcher)
    assert run["world"]["size"] == (1 if launcher == "python" else 2)
    assert_same_curve(run, alone)
