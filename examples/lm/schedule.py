"""The learning rate of each step: linear warm-up, then half a cosine down to a tenth."""

from __future__ import annotations

import math

FLOOR = 0.1  # of the peak


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Learning rate of `step` (from 0) of `steps`: up to `peak` in `warmup` steps, then down to a tenth."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2)
