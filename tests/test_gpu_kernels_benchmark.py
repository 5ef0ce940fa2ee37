"""The benchmark of kernels: its sizes and bytes, and all of its cases in small, on the emulated card."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_kernels
import pytest
import torch
from cuda_cards import a_card
from gpu_kernels import COPY, OURS, Case, Sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from report import Row


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(0, 1 << 30))
def test_sizes_of_tensors_sum_to_the_bucket(count: int, more: int) -> None:
    sizes = gpu_kernels.tensor_sizes(count + more, count)
    assert sum(sizes) == count + more and len(sizes) == count and min(sizes) >= 1


def test_sizes_are_the_issues_and_shrink_with_memory() -> None:
    assert gpu_kernels.sizes_for(79 << 30, quick=False) == Sizes(1 << 28, 400, 1_000_000_000)
    assert sum(gpu_kernels.tensor_sizes(1 << 28, 400)) * 4 == 1 << 30
    small = gpu_kernels.sizes_for(16 << 30, quick=False)
    assert small.parameters < 300_000_000 and small.parameters * 60 <= 16 << 30
    quick = gpu_kernels.sizes_for(79 << 30, quick=True)
    assert quick.bucket < 1 << 28 and quick.parameters < 1_000_000_000


def test_bytes_of_a_step_are_those_of_its_arrays() -> None:
    assert gpu_kernels.STEP_BYTES == {
        "fp32 gradients": 28,
        "bf16 gradients in, bf16 parameters out": 28,
        "bf16 parameters and remainders": 26,
    }


def test_every_case_is_right_and_rated_on_the_emulated_card(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    copy_of = gpu_kernels.copy_of

    def watched(bytes: int, device: torch.device) -> object:
        copied.append(bytes)
        return copy_of(bytes, device)

    monkeypatch.setattr(gpu_kernels, "copy_of", watched)
    with a_card("emulated") as device:
        *_, found = gpu_kernels.results(device, Sizes(6000, 40, 5000), 4, "", "about")
    assert len(found.rows) == len(gpu_kernels.CASES) and not found.checks
    limits = {}
    for row, words, bytes in zip(found.rows, found.notes[1:], copied, strict=True):
        assert {OURS, COPY} <= set(row.samples) and all(len(taken) == 4 for taken in row.samples.values())
        assert f"{row.what}: GB/s of {bytes / 2**30:.2f} GiB" in words and bytes > 0
        assert all(math.isfinite(row.value(bar)) for bar in row.bars)
        limits[row.what.split(",")[0].split(":")[0]] = [bar.at_least for bar in row.bars]
    # The bars of the issue's table.
    assert limits["pack fp32 to bf16"] == [0.88, 2.0]
    assert limits["pack fp32"] == limits["unpack fp32"] == [0.9, 1.1]
    steps = [[bar.at_least for bar in row.bars] for row in found.rows if row.what.startswith("AdamW")]
    assert steps == [[0.9, 1.0], [0.9, 1.3], [None]]


@pytest.mark.parametrize("kind", list(gpu_kernels.STEP_BYTES))
def test_a_step_that_does_nothing_is_no_measurement(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(gpu_kernels, "CASES", [gpu_kernels.step(kind)])
    monkeypatch.setattr(gpu_kernels.DeviceTable, "step", lambda self, rule, scalars: None)
    with a_card("emulated") as device, pytest.raises(RuntimeError, match="AdamW.* differs from torch's"):
        one_of(gpu_kernels.CASES[0], device)


@pytest.mark.parametrize("name", ["pack_with_norm", "quantize", "dequantize", "reorder"])
def test_a_wrong_result_is_no_measurement(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(gpu_kernels, "CASES", [getattr(gpu_kernels, name)])
    with a_card("emulated") as device:
        monkeypatch.setattr(gpu_kernels.PackTable, "pack", lambda self, **given: None)
        monkeypatch.setattr(gpu_kernels.blocks, "dequantize", lambda packed, out: out.zero_())
        monkeypatch.setattr(gpu_kernels.blocks, "reorder", lambda out, *given: out.zero_())
        if name == "quantize":
            monkeypatch.setattr(gpu_kernels.blocks, "quantize", lambda values: torch.zeros(1, dtype=torch.uint8))
        with pytest.raises(RuntimeError, match="differs from torch's"):
            one_of(gpu_kernels.CASES[0], device)


def one_of(make: Callable[..., Any], device: torch.device) -> tuple[Row, str]:
    return gpu_kernels.measured(make, gpu_kernels.Clock(device), Sizes(600, 4, 100), 1)


def test_a_case_that_fails_is_told_about_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(device: torch.device, sizes: Sizes) -> Case:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore about it")

    monkeypatch.setattr(gpu_kernels, "CASES", [fails, gpu_kernels.reorder])
    with a_card("emulated") as device:
        first, last = gpu_kernels.results(device, Sizes(600, 4, 100), 2, "", "about")
    assert [(check.what, check.measured, check.met) for check in last.checks] == [
        ("case 1 of 2", "CUDA out of memory.", False)
    ]
    assert len(last.rows) == 1 and last.cells()[-1][-1] == "NOT met"


def test_caches_are_read_through() -> None:
    into = torch.zeros((), dtype=torch.int64)
    gpu_kernels.read_through(torch.ones(1000, dtype=torch.uint8), into)
    assert into.item() == 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so nothing is missing")
def test_without_a_gpu_it_says_what_is_missing() -> None:
    script = Path(gpu_kernels.__file__)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "gpu_kernels.py needs a GPU" in done.stderr
