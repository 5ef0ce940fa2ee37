"""The interpreter's end: scripts that forget to leave their groups end cleanly all the same."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

STOCK_DDP = """
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("distlib", store=dist.HashStore(), rank=0, world_size=1)
model = DistributedDataParallel(torch.nn.Linear(8, 8))
model(torch.ones(2, 8)).sum().backward()
"""
FUTURE = """
import torch, torch.distributed as dist
dist.init_process_group("distlib", store=dist.HashStore(), rank=0, world_size=1)
future = dist.all_reduce(torch.ones(8), async_op=True).get_future()
future.wait()
"""
UNWAITED = """
import torch, torch.distributed as dist
dist.init_process_group("distlib", store=dist.HashStore(), rank=0, world_size=1)
for _ in range(10):
    dist.all_reduce(torch.ones(100_000), async_op=True)
"""


@pytest.mark.parametrize("core", ["1", "0"])
@pytest.mark.parametrize("script", [STOCK_DDP, FUTURE, UNWAITED], ids=["stock DDP", "a future", "unwaited works"])
def test_a_script_that_does_not_destroy_its_group_ends_with_code_0(script: str, core: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, "DISTLIB_CORE": core, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
