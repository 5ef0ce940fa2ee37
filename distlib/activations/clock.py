"""Seconds between two moments on the device that computes: by the clock, or by its events, without waiting."""

from __future__ import annotations

import time
from typing import Any

import torch

from distlib import streams


class Span:
    """begin() ... end() ... seconds. Of a GPU it is the time of what was enqueued in between."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin: Any = None
        self._end: Any = None

    def begin(self) -> Span:
        self._begin = self._now()
        return self

    def end(self) -> Span:
        self._end = self._now()
        return self

    def _now(self) -> Any:
        stream = streams.current(self._device)
        if stream is None:
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record(stream)
        return event

    @property
    def begun(self) -> bool:
        return self._begin is not None

    @property
    def seconds(self) -> float | None:
        """None before its end. Waits for the device where that is still computing."""
        if self._end is None:
            return None
        if self._device.type == "cpu":
            return self._end - self._begin
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3
