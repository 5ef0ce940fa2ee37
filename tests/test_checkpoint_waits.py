"""Ranks that do not come to a save or load, that are slow, or that are interrupted in it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import Layout, build
from ranks import process_group, run_ranks, run_ranks_raw
from test_checkpoint_faults import check, save

import distlib
from distlib.checkpoint import folder, writer


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


def _loaded_at_once(rank: int, n: int, path: Path, exchanges: bool) -> list[int | None]:
    """The steps that are loaded right after a save into the background, whose disk is slow."""
    if not exchanges:
        folder.exchange = lambda a, b: False
    with process_group(rank, n):
        write, seconds = writer.write_rank_file, iter([0.0, 0.3, 0.3, 0.0, 0.3])

        def slow(*args: Any) -> Any:
            time.sleep(next(seconds))
            return write(*args)

        writer.write_rank_file = slow
        found = []
        for step in range(5):
            model = build(Layout(n), rank, seed=step)
            distlib.save(path, model=model, step=step, asynchronous=True)
            found.append(distlib.load(path, model=build(Layout(n), rank, seed=None)).step)
        return found


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_load_waits_for_the_save_in_the_background(exchanges: bool, tmp_path: Path) -> None:
    assert run_ranks(2, _loaded_at_once, tmp_path / "c", exchanges) == [list(range(5))] * 2


def _tells_of_a_failure(rank: int, n: int, path: Path) -> str:
    with process_group(rank, n):
        save(rank, n, path, 1)
        model = build(Layout(n), rank, seed=1)
        distlib.save(path, model=model, extra={"made": {}}, asynchronous=True).wait()  # type: ignore[union-attr]
        write = writer.write_rank_file

        def full(*args: Any) -> Any:
            raise OSError(28, "no space left")

        writer.write_rank_file = full
        distlib.save(path, model=model, step=2, asynchronous=True)
        with pytest.raises(RuntimeError) as caught:
            distlib.load(path, model=model)
        writer.write_rank_file = write
        assert distlib.load(path, model=model).extra == {"made": {}}  # told once; what was there still is
        return str(caught.value)


def test_a_load_tells_of_a_save_that_failed_in_the_background(tmp_path: Path) -> None:
    for text in run_ranks(2, _tells_of_a_failure, tmp_path / "c"):
        assert "in the background had failed" in text and "no space left" in text


def test_an_export_waits_for_the_save_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, write = torch.nn.Linear(2, 2), writer.write_rank_file
    distlib.save(tmp_path / "c", model=model)
    monkeypatch.setattr(writer, "write_rank_file", lambda *args: (time.sleep(0.5), write(*args))[1])
    torch.nn.init.constant_(model.weight, 3.0)
    distlib.save(tmp_path / "c", model=model, asynchronous=True)
    distlib.export(tmp_path / "c", tmp_path / "m.safetensors")
    assert torch.equal(safetensors.load_file(tmp_path / "m.safetensors")["weight"], torch.full((2, 2), 3.0))
