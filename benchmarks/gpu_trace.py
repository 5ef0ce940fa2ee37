"""What a profile of a GPU tells: where the host waited for it, and which share of copies ran while kernels did.

Read from the profiler's trace file, whose form is that of Chrome's traces and the same in all versions of torch.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

WITHIN = "what is traced"
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cuStreamSynchronize", "cudaMemcpy")

Interval = tuple[float, float]


def trace(call: Callable[[], object]) -> list[dict[str, Any]]:
    """The events of `call` on the host and the GPU; times are in microseconds. Waits for the GPU before and after."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function(WITHIN):
            call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        return json.loads(file.read_text())["traceEvents"]


def waits(events: Iterable[dict[str, Any]]) -> list[str]:
    """Names of the calls within what was traced that block the host until the GPU is done."""
    events = list(events)
    whole = [span(e) for e in events if e.get("name") == WITHIN and e.get("cat") == "user_annotation"]
    if not whole:
        raise ValueError(f"the trace has no {WITHIN!r}: it is no result of trace()")
    begin, end = whole[0]
    return [e["name"] for e in events if e.get("name") in WAITS and "dur" in e and begin <= e["ts"] <= end]


def hidden_share(events: Iterable[dict[str, Any]]) -> tuple[float, float, float]:
    """Copies between host and GPU: (share of their time in which a kernel ran, their seconds, kernels' seconds)."""
    events = list(events)
    copies = [span(e) for e in events if e.get("cat") == "gpu_memcpy" and ("DtoH" in e["name"] or "HtoD" in e["name"])]
    kernels = [span(e) for e in events if e.get("cat") == "kernel"]
    if not copies:
        raise ValueError("the trace has no copies between host and GPU: nothing was offloaded")
    hidden, total = common(united(copies), united(kernels)), length(united(copies))
    return hidden / total, total * 1e-6, length(united(kernels)) * 1e-6


def span(event: dict[str, Any]) -> Interval:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def united(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points as intervals that do not touch, in order."""
    result: list[Interval] = []
    for begin, end in sorted(intervals):
        if result and begin <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        else:
            result.append((begin, end))
    return result


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)


def common(first: Sequence[Interval], second: Sequence[Interval]) -> float:
    """The length of what two united lists share."""
    total, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        total += max(0.0, min(first[i][1], second[j][1]) - max(first[i][0], second[j][0]))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return total
