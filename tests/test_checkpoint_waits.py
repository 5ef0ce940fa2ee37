"""Ranks that do not come to a save or load, that are slow, or that are interrupted in it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoint_models import Layout, build
from ranks import process_group, run_ranks, run_ranks_raw
from test_checkpoint_faults import check, save

import distlib
from distlib.checkpoint import writer


def _absent(rank: int, n: int, path: Path, how: str) -> str:
    with process_group(rank, n, timeout=5):
        save(rank, n, path, 1)
        if rank == 1 and how == "is elsewhere":
            time.sleep(12)
            return ""
        if rank == 1:  # its disk is slow, or it hangs there
            write = writer.write_rank_file

            def slow(*args: Any) -> Any:
                if how == "stops":
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(9)
                return write(*args)

            writer.write_rank_file = slow
        begin = time.monotonic()
        if how == "has a slow disk":
            save(rank, n, path, 2)
            return "saved"
        with pytest.raises(RuntimeError) as caught:
            save(rank, n, path, 2)
        assert time.monotonic() - begin < 30
        return str(caught.value)


@pytest.mark.parametrize("how", ["is elsewhere", "stops"])
@pytest.mark.parametrize("hosts", ["1", "2"])
def test_a_rank_that_does_not_come_is_not_waited_for_like_a_disk(how: str, hosts: str, tmp_path: Path) -> None:
    outcomes = run_ranks_raw(2, _absent, tmp_path / "c", how, timeout=50, env={"DISTLIB_NODES": hosts})
    assert outcomes[0].ok, str(outcomes[0])
    assert "rank 1 did not come, and has shown no sign of life for 5 s" in outcomes[0].value, outcomes[0]


def test_a_slow_disk_is_waited_for_beyond_the_timeout(tmp_path: Path) -> None:
    assert run_ranks(2, _absent, tmp_path / "c", "has a slow disk") == ["saved", "saved"]


def _interrupted(rank: int, n: int, path: Path, call: str) -> str:
    with process_group(rank, n):
        save(rank, n, path, 1)
        model = build(Layout(n), rank, seed=1)

        class Interrupted:
            def state_dict(self) -> dict[str, Any]:
                if rank == 1 and call == "save":
                    raise KeyboardInterrupt
                return {}

            def load_state_dict(self, state: dict[str, Any]) -> None:
                if rank == 1 and call == "load":
                    raise KeyboardInterrupt

        distlib.save(path.parent / "other", model=model, extra={"own": {}})
        with pytest.raises(KeyboardInterrupt if rank == 1 else RuntimeError) as caught:
            if call == "save":
                distlib.save(path, model=model, extra={"own": Interrupted()})
            else:
                distlib.load(path.parent / "other", model=model, extra={"own": Interrupted()})
        assert check(rank, n, path, (1,)) == 1
        return str(caught.value)


@pytest.mark.parametrize("call", ["save", "load"])
def test_an_interrupt_on_one_rank_is_told_to_the_others(call: str, tmp_path: Path) -> None:
    found = run_ranks(2, _interrupted, tmp_path / "c", call)
    assert "rank 1: KeyboardInterrupt" in found[0]
