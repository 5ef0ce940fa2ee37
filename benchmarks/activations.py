"""Activation memory of a GPT: the time and the peak memory of a step under each setting, beside what was predicted.

    python benchmarks/activations.py            # all of it, two minutes
    python benchmarks/activations.py --quick    # the same claims from few rounds

One process. Steps (forward, loss, backward) of all settings take turns. Full recomputation and the budget of its peak,
which differ in one block of six, then take turns for many rounds. For peak memory each setting has a process of
its own, in which it is the growth of resident memory during one step, by the operating system's count; large tensors
are mapped and unmapped there each for itself, so that what is freed does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

import distlib
from distlib.activations import ActivationReport

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from lm.model import GPT, next_token_loss

if TYPE_CHECKING:
    from report import Report, Row

LAYERS, WIDTH, HEADS, BATCH, LENGTH = 6, 192, 3, 4, 256
WHAT = f"GPT, {LAYERS} blocks of width {WIDTH}, {BATCH} x {LENGTH} tokens"
PARTS = {"budget 25%": 0.25, "budget 50%": 0.5, "budget 75%": 0.75}
EQUAL = "budget of full's peak"
SETTINGS = ("none", "full", "selective", "offload", *PARTS, EQUAL)


class Trained:
    """A model under one setting, and steps of it."""

    def __init__(self, setting: str, folder: str) -> None:
        torch.manual_seed(0)
        tokens = torch.randint(256, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))
        self.inputs, self.targets = tokens[:, :-1], tokens[:, 1:]
        self.model: nn.Module = GPT(LAYERS, WIDTH, HEADS)
        self.report = self._apply(setting, folder)

    def _apply(self, setting: str, folder: str) -> ActivationReport | None:
        if setting == "none":
            return None
        if setting in ("full", "selective"):
            return distlib.checkpoint_activations(self.model, setting)
        if setting == "offload":
            return distlib.checkpoint_activations(self.model, setting, folder=folder)
        budget = PARTS.get(setting) or self._peak_of_full()
        return distlib.checkpoint_activations(
            self.model, budget=budget, example_inputs=self.inputs, loss=lambda y: next_token_loss(y, self.targets)
        )

    def _peak_of_full(self) -> int:
        report = distlib.checkpoint_activations(self.model, "full")
        self.step()
        with report.measuring():
            self.step()
        report.remove()
        assert report.measured_peak is not None
        return report.measured_peak

    def step(self) -> float:
        """Forward, loss, backward; gradients stay allocated. Returns the loss."""
        self.model.zero_grad(set_to_none=False)
        loss = next_token_loss(self.model(self.inputs), self.targets)
        loss.backward()
        return loss.item()


# ---- peak memory, in a process of its own -------------------------------------------------------------------


def peak_here(setting: str, folder: str) -> dict[str, int]:
    """Bytes by which resident memory grows at the peak of a step, and what the plan predicted (0: no plan)."""
    torch.set_num_threads(1)
    trained = Trained(setting, folder)
    for _ in range(3):
        trained.step()
    growths = []
    for _ in range(3):
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        trained.step()
        growths.append(_status("VmHWM") - before)
    predicted = trained.report.predicted_step if trained.report is not None else None
    return {"peak": sorted(growths)[1], "predicted": predicted.peak if predicted is not None else 0}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peaks(folder: str) -> dict[str, dict[str, int]]:
    """Of every setting."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 << 10), "MALLOC_TRIM_THRESHOLD_": "0"}
    found = {}
    for setting in SETTINGS:
        command = [sys.executable, __file__, "--peak-of", setting, "--folder", folder]
        done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
        found[setting] = json.loads(done.stdout.splitlines()[-1])
    return found


# ---- time ---------------------------------------------------------------------------------------------------


def times(trained: dict[str, Trained], rounds: int) -> dict[str, list[float]]:
    """Seconds per round, settings in turns."""
    calls: dict[str, Callable[[], float]] = {setting: one.step for setting, one in trained.items()}
    losses = {setting: [call() for _ in range(2)][-1] for setting, call in calls.items()}
    if len(set(losses.values())) != 1:
        raise RuntimeError(f"losses differ: {losses}")
    seconds: dict[str, list[float]] = {setting: [] for setting in calls}
    for _ in range(rounds):
        for setting, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[setting].append(time.perf_counter() - start)
    return seconds


def results(quick: bool) -> Report:
    from report import Bar, Row
    from report_bytes import ByteReport, Bytes

    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:  # on a disk, as it should be
        trained = {setting: Trained(setting, folder) for setting in SETTINGS}
        seconds = times(trained, 4 if quick else 12)
        close = times({setting: trained[setting] for setting in ("full", EQUAL)}, 12 if quick else 100)
        peak = peaks(folder)
    rows: list[Row] = [
        Row(f"{WHAT}: step", 1, seconds, [Bar(setting, "none") for setting in SETTINGS[1:]]),
        Row("the same peak: step", 1, close, [Bar("full", EQUAL, at_least=1.0)]),
    ]
    samples = {setting: [float(of["peak"])] for setting, of in peak.items()}
    rows.append(Bytes("peak memory of a step", 1, samples, [Bar(setting, "none") for setting in SETTINGS[1:]]))
    notes = []
    for setting in (*PARTS, EQUAL):
        report = trained[setting].report
        assert report is not None and report.predicted_step is not None
        measured = seconds[setting]
        both = {"measured": measured, "predicted": [report.predicted_step.seconds] * len(measured)}
        around = [Bar("measured", "predicted", at_most=1.15), Bar("predicted", "measured", at_most=1.15)]
        rows.append(Row(f"{setting}: step", 1, both, around))
        of = peak[setting]
        both = {"measured": [float(of["peak"])], "predicted": [float(of["predicted"])]}
        around = [Bar("measured", "predicted", at_most=1.10), Bar("predicted", "measured", at_most=1.10)]
        rows.append(Bytes(f"{setting}: peak memory", 1, both, around))
        kinds = list(report.choices.values())
        notes.append(f"{setting}: " + ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))))
    for setting in ("full", "selective", "offload"):
        report = trained[setting].report
        assert report is not None
        notes.append(f"{setting}: saves {report.saved_bytes:,} of {report.baseline_bytes:,} bytes of the blocks")
    return ByteReport("activations", "Activation memory", rows, notes)


def main() -> None:
    if "--peak-of" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--peak-of", required=True)
        parser.add_argument("--folder", required=True)
        options = parser.parse_args()
        print(json.dumps(peak_here(options.peak_of, options.folder)))
        return
    import report

    parser = report.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: rough ratios")
    options = parser.parse_args()
    report.publish(results(options.quick), options)


if __name__ == "__main__":
    main()
