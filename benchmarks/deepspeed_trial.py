"""How far DeepSpeed can go on this machine: tried out before it is measured, which also compiles its parts."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from typing import Any

import peers
import torch
import torch.distributed as dist
from torch import nn

LIMIT = 900  # seconds: DeepSpeed compiles its parts when they are first used


class DeepSpeedTrial:
    """What came of trials in processes of their own.

    runs: whether it trains at all. cpu_adam: whether with its own optimizer. notes: what is to be printed.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.cpu_adam = self.runs = False
        if importlib.util.find_spec("deepspeed") is None:
            self.notes.append("DeepSpeed is NOT measured: it is not installed (pip install deepspeed).")
            return
        reason = self._try("cpu-adam")
        self.cpu_adam = self.runs = not reason
        if reason:
            self.notes.append(f"DeepSpeed's CPU Adam does not work here, so DeepSpeed has torch's AdamW: {reason}")
            reason = self._try("torch-adamw")
            self.runs = not reason
        if reason:
            self.notes.append(f"DeepSpeed is NOT measured: it does not run on this CPU: {reason}")
            return
        adam = "its CPU Adam" if self.cpu_adam else "torch's AdamW"
        self.notes.append(
            f"DeepSpeed {metadata.version('deepspeed')} with {adam}, and without the clipping that it ships with, for "
            "none of the others clips."
        )

    @property
    def argument(self) -> str:
        """For the ranks' command line; `peers.deepspeed_peer` reads it."""
        return "cpu-adam" if self.cpu_adam else "torch-adamw" if self.runs else "none"

    @staticmethod
    def _try(optimizer: str) -> str:
        """What went wrong in a trial: the last line that it wrote. Empty where it went well."""
        command = [sys.executable, __file__, optimizer]
        try:
            trial = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return f"it did not end in {LIMIT} s (does an interrupted build hold a lock in torch's extensions folder?)"
        lines = trial.stderr.strip().splitlines() or [f"exit code {trial.returncode}"]
        return lines[-1] if trial.returncode else ""


def _trial(optimizer: str) -> None:
    """Two steps of a tiny model on one rank."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    store: Any = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    peer = peers.DeepSpeed(nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16)), cpu_adam=optimizer == "cpu-adam")
    tokens = torch.arange(8)[None]
    for _ in range(2):
        peer.step([(tokens, tokens)])
    dist.destroy_process_group()


if __name__ == "__main__":
    _trial(sys.argv[1])
