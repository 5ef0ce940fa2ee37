"""What a stage sent is not kept by it: its memory is free once it is away."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

import distlib
from distlib.activations.live import LiveBytes

MICRO, ROWS, WIDTH, WIDE = 4, 64, 4, 1024
SENT = ROWS * WIDE * 4  # bytes of what stage 0 sends for a micro-batch


def mean_square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def peak_of_a_step(rank: int, n: int, schedule: str) -> int:
    distlib.init()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDE, bias=False), nn.Linear(WIDE, WIDTH, bias=False))
    batch = torch.randn(MICRO * ROWS, WIDTH), torch.randn(MICRO * ROWS, WIDTH)
    pipeline = distlib.PipelineParallel(
        model, None, schedule, MICRO, mean_square, ["1"], torch.randn(ROWS, WIDTH), costs="estimated"
    )
    pipeline.train_step(*batch)
    with LiveBytes() as live:
        pipeline.train_step(*batch)
        return live.peak


@pytest.mark.parametrize("schedule", ["gpipe", "zb-h2"])
def test_the_output_of_a_stage_does_not_live_until_its_backward(schedule: str) -> None:
    """A product needs its inputs only; gradients of the weight (small) and of what was sent come one by one."""
    peak = run_ranks(2, peak_of_a_step, schedule)[0]
    assert peak < 2.5 * SENT, peak / SENT
