"""Bugs of the communication that were found by reading: one test per property that they broke."""

from __future__ import annotations

import gc
import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import process_group, run_ranks, store

from distlib import native
from distlib.comm.group import Group
from distlib.comm.meeting import Host

pytestmark = pytest.mark.skipif(native.core() is None, reason=native.why_not())


# ---------------------------------------------------------------- memory


def child_drops_a_tensor(rank: int, n: int) -> float:
    with process_group(rank, n):
        x = Group.of().registered_empty(1 << 16).fill_(7)
        child = os.fork()
        if not child:
            del x
            gc.collect()
            os._exit(0)
        os.waitpid(child, 0)
        return float(x.mean())


def test_a_forked_child_that_drops_registered_memory_leaves_its_parents_alone() -> None:
    assert run_ranks(2, child_drops_a_tensor) == [7.0, 7.0]
