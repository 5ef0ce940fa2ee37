"""The GPU benchmarks without a GPU: what a trace tells, what is kept where ranks fail, their logic in small."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_cards
import gpu_collectives
import gpu_model
import gpu_ranks
import gpu_step
import gpu_trace
import pytest
import report
import torch
from gpu_parts import Done
from gpu_report import GpuReport
from gpu_summary import collected
from hypothesis import given, settings
from hypothesis import strategies as st

import distlib

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


# ---- traces -----------------------------------------------------------------------------------------------------


def event(name: str, cat: str, ts: float, dur: float) -> dict[str, Any]:
    return {"name": name, "cat": cat, "ts": ts, "dur": dur, "ph": "X"}


def test_a_trace_tells_waits_and_the_share_of_copies_behind_kernels() -> None:
    events = [
        event(gpu_trace.WITHIN, "user_annotation", 100, 100),
        event("cudaStreamSynchronize", "cuda_runtime", 50, 5),  # before: the profiler's own
        event("cudaEventSynchronize", "cuda_runtime", 150, 5),
        event("cudaLaunchKernel", "cuda_runtime", 160, 5),
        event("cudaDeviceSynchronize", "cuda_runtime", 250, 5),
        event("gemm", "kernel", 100, 50),
        event("gemm", "kernel", 140, 20),
        event("Memcpy DtoH (Device -> Pinned)", "gpu_memcpy", 150, 20),
        event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 160, 20),
        event("Memcpy DtoD (Device -> Device)", "gpu_memcpy", 200, 99),
    ]
    assert gpu_trace.waits(events) == ["cudaEventSynchronize"]
    share, copying, computing = gpu_trace.hidden_share(events)
    assert share == pytest.approx(10 / 30) and copying == pytest.approx(30e-6) and computing == pytest.approx(60e-6)
    with pytest.raises(ValueError, match="no copies between host and GPU"):
        gpu_trace.hidden_share(events[:7])
    with pytest.raises(ValueError, match="is no result of trace"):
        gpu_trace.waits(events[1:])


some_intervals = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)).map(lambda i: (float(i[0]), float(sum(i)))))


@settings(deadline=None)
@given(some_intervals, some_intervals)
def test_common_time_is_counted_as_point_by_point(first: list[Any], second: list[Any]) -> None:
    def points(intervals: list[Any]) -> set[int]:
        return {point for begin, end in intervals for point in range(int(begin), int(end))}

    assert gpu_trace.length(gpu_trace.united(first)) == len(points(first))
    assert gpu_trace.common(gpu_trace.united(first), gpu_trace.united(second)) == len(points(first) & points(second))


# ---- the benchmarks -----------------------------------------------------------------------------------


def test_what_was_measured_before_ranks_failed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curve = [(5.0).hex(), (4.0).hex()]
    kinds = ("fp32", "bf16")
    curves = {f"{kind}, {setting}": curve for kind in kinds for setting in ("prefetch=0", "prefetch=2", "torch")}
    waits = {"distlib": ["a.py:1: waits"], "torch": []}

    def alone(arguments: list[str], **environ: str) -> Any:
        if "--part=curves" in arguments:
            return curves if not environ.get("CUDA_LAUNCH_BLOCKING") else {**curves, "bf16, torch": curve[::-1]}
        if "--part=offload" in arguments:
            raise subprocess.CalledProcessError(1, "python")
        return {"size": "a GPT", "waits": waits, "control": ["waits"] * 5}

    def ranks(script: str, n: int, arguments: list[str], **environ: str) -> Any:
        end = 1 if environ.get("CUDA_LAUNCH_BLOCKING") else 2
        other = {**curves, "fp32, prefetch=2": [(5.001).hex(), *curve[1:]]}
        return {name: its[:end] for name, its in other.items()}

    monkeypatch.setattr(gpu_step, "run_alone", alone)
    monkeypatch.setattr(gpu_step, "run_ranks", ranks)
    monkeypatch.setattr(gpu_cards, "cards", lambda: 1)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "argv", ["gpu_step.py", f"--out={tmp_path}"])
    saved: list[int] = []
    save = report.save
    monkeypatch.setattr(report, "save", lambda found, *more: (saved.append(len(found.cells())), save(found, *more)))
    assert gpu_step.main() == 1
    assert saved[0] > 0 and saved == sorted(saved) and len(set(saved)) >= 4, "each time that something is known"
    checks = json.loads((tmp_path / "gpu_step.json").read_text())["checks"]
    found = {(check["what"], check["ranks"]): (check["measured"], check["met"]) for check in checks}
    assert found["host synchronisations in 5 steady steps, distlib", 1] == ("1, the first: a.py:1: waits", False)
    assert found["offload: runs to its end", 1] == ("exit code 1, see the log", False)
    assert found["1 process: prefetch on and off, the same bits", 1] == ("2 of 2 curves", True)
    assert found["2 processes on one device: prefetch on and off, the same bits", 2] == ("1 of 2 curves", False)
    assert found["2 processes on one device: fp32 losses beside one process", 2] == ("2.0e-04", False)
    assert found["CUDA_LAUNCH_BLOCKING=1: the same bits", 1] == ("5 of 6 curves", False)
    assert found["CUDA_LAUNCH_BLOCKING=1: the same bits", 2] == ("6 of 6 curves", True)


def test_ranks_that_fail_leave_the_collectives_of_others_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ranks(script: str, n: int, arguments: list[str], **environ: str) -> Any:
        if n == 4:
            raise subprocess.CalledProcessError(1, "python")
        spread = "--nccl" in arguments
        assert ("--repeat=10" in arguments, "--rounds=10" in arguments) == (spread, spread), arguments
        seconds = {"mapped memory": [1e-3, 2e-3]} | ({"NCCL": [1e-3, 2e-3]} if spread else {})
        return {"all_reduce 65536": {"right": dict.fromkeys(seconds, True), "seconds": seconds}}

    monkeypatch.setattr(gpu_collectives, "run_ranks", ranks)
    monkeypatch.setattr(gpu_cards, "cards", lambda: 4)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "argv", ["gpu_collectives.py", f"--out={tmp_path}"])
    assert gpu_collectives.main() == 1
    document = json.loads((tmp_path / "gpu_collectives.json").read_text())
    assert [row["ranks"] for row in document["rows"]] == [2, 2]
    assert [(check["ranks"], check["met"]) for check in document["checks"]] == [(2, True), (2, True), (4, False)]


def test_ranks_whose_launches_block_play_the_beginning_of_a_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(type="cuda")
    assert gpu_ranks.length(card, 2) == 20
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    assert (gpu_ranks.length(card, 1), gpu_ranks.length(card, 2)) == (20, 8)


class Event:
    """torch.cuda.Event's clock: it advances by a millisecond with each record."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        Event.now += 1.0
        self.at = Event.now

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A device that is called cuda, whose tensors are the CPU's: what surrounds steps is run, nothing is measured."""
    cpu = torch.device("cpu")
    for name in ("synchronize", "reset_peak_memory_stats", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 << 30, 80 << 30))
    allocated = itertools.count(0, 1000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5000)
    monkeypatch.setattr(gpu_ranks, "size_for", lambda free: gpu_model.TINY)
    monkeypatch.setattr(gpu_ranks, "module_of", lambda size, device: gpu_model.module_of(size, cpu))
    monkeypatch.setattr(gpu_ranks, "batch_of", lambda size, device: gpu_model.batch_of(size, cpu))
    monkeypatch.setattr(gpu_ranks, "Sharded", gpu_model.Plain)
    offloaded = SimpleNamespace(remove=lambda: None, moved_bytes=10_000)
    monkeypatch.setattr(distlib, "checkpoint_activations", lambda module, policy, resident: offloaded)
    return SimpleNamespace(type="cuda")


def test_what_surrounds_timed_steps_runs_and_is_told_in_rows(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = [event("Memcpy DtoH (Device -> Pinned)", "gpu_memcpy", 0, 20), event("gemm", "kernel", 0, 10)]

    def trace(call: Callable[[], object]) -> list[dict[str, Any]]:
        call()
        return [event(gpu_trace.WITHIN, "user_annotation", 0, 100), *copies]

    monkeypatch.setattr(gpu_trace, "trace", trace)

    steps = gpu_ranks.steps(card, 3)
    rows = gpu_step.step_rows(steps)
    assert [row.bars[0].limit for row in rows] == [1.03, None, None, None, None, None]
    assert all(len(taken) == 3 for row in rows[:4] for taken in row.samples.values())
    halves = [steps["seconds"][kind]["torch"] for kind in ("forward and backward", "optimizer")]
    assert halves == [[pytest.approx(1e-3)] * 3] * 2, "a record in the middle of each step"
    assert steps["peak"] == {"distlib": 4000, "torch": 4000}, "what the other holds does not count"

    offload = gpu_ranks.offload(card, 3)
    checks = [*gpu_step.step_checks(steps), *gpu_step.offload_checks(offload)]
    assert ("50% of 0 ms of copies, 1 GB/s", None) in [(check.measured, check.met) for check in checks]
    assert (steps["traced control"], checks[3].met) == ([], False), "a profile that sees no waits proves nothing"
    monkeypatch.setattr(gpu_trace, "trace", lambda call: call())
    monkeypatch.setattr(gpu_trace, "hidden_share", lambda events: gpu_trace.waits([]))
    (unseen,) = [c for c in gpu_step.offload_checks(gpu_ranks.offload(card, 1)) if "hidden" in c.what]
    assert "no result of trace()" in unseen.measured and unseen.met is None
    text = GpuReport("x", "x", [*rows, *gpu_step.offload_rows(offload)], [], checks).cells()
    told = [cells[0].split(": ")[-1] for cells in text[:4]]
    assert told == ["step", "step by events", "forward and backward", "optimizer"]
    assert text[0][-2] == "<= 1.030x" and "MiB" in text[4][3]


@pytest.mark.parametrize(("gib", "billions"), [(79, 1.0), (139, 1.0), (47, 0.7), (23, 0.39), (15, 0.15), (7, 0.05)])
def test_the_model_is_the_largest_that_the_card_holds(gib: int, billions: float) -> None:
    size = gpu_model.size_for(gib << 30)
    assert size.parameters >= billions * 1e9 and size.memory < gib << 30
    module = gpu_model.module_of(size, torch.device("meta"))
    assert sum(p.numel() for p in module.parameters()) == size.parameters
    with pytest.raises(RuntimeError, match="bytes are free on the card"):
        gpu_model.size_for(1 << 20)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("script", ["gpu_step", "gpu_collectives"])
def test_a_benchmark_runs_on_the_fake_device_and_tells_no_times(script: str, tmp_path: Path) -> None:
    fake_device = pytest.importorskip("fake_device")
    if reason := fake_device.why_not():
        pytest.skip(reason)
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), "--device=fake", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    dones, documents = collected([Done(script, "passed", 1.0, 2.0, 0)], {script: tmp_path})
    assert dones[0].outcome == "passed", dones[0].why
    document = documents[script][0]
    assert document["rows"] == [] and document["checks"], "checks, and nothing that was timed"
    assert [check["what"] for check in document["checks"] if check["met"] is False] == []
    assert len(document["lines"]) == len(document["checks"])
