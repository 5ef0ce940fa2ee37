"""Memory of blocks that stay, lent to copies: more may be on its way, and never more memory is taken than without."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from activation_models import same, step
from test_activations_offload import X, model_of, offload

import distlib
from distlib.activations.lending import Lending
from distlib.activations.live import LiveBytes

BLOCKS = 8


def test_room_is_what_stayed_at_the_peak_of_the_last_step_and_is_not_there_now() -> None:
    lending = Lending()
    lending.begin_step()
    assert lending.room == 0
    stays = [lending.stay(10) for _ in range(3)]
    assert lending.room == 0  # nothing is known yet
    assert [stay.end() for stay in stays] == [True] * 3
    lending.begin_step()
    assert lending.room == 30
    first = lending.stay(20)
    assert lending.room == 10
    assert first.end()
    assert not first.end()  # a graph that was retained
    assert lending.room == 30


def test_bytes_of_a_forward_whose_graph_is_dropped_do_not_stay() -> None:
    lending = Lending()
    stay = lending.stay(10)
    assert lending._now == 10
    del stay
    gc.collect()
    assert lending._now == 0


def test_more_waits_to_be_written_while_blocks_that_stay_have_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written before somebody waits for it: then the bytes that wait are those that may."""
    from distlib.activations import stores

    class Lazy(stores._Job):
        def __init__(self, call: Any) -> None:
            self._call, self.done = call, False

        def wait(self) -> None:
            if not self.done:
                self.done = True
                self._call()

        def cancel(self) -> bool:
            return False

    def write(self: Any, source: torch.Tensor, offset: int, done: Any) -> Lazy:
        return Lazy(lambda: self._write(source, offset, done))

    monkeypatch.setattr(stores.FileStore, "write", write)
    plain, model = model_of(BLOCKS), model_of(BLOCKS)
    report, offloader = offload(model, tmp_path, resident=4, window=2 * X.nbytes)
    block = next(iter(report._wrapped)).record
    waiting: list[list[int]] = []
    for layer in model:
        layer.register_forward_hook(lambda *_: waiting[-1].append(offloader._waiting))
    for seed in range(3):
        waiting.append([])
        expected = step(plain, X, seed)
        assert same(expected, step(model, X, seed))
    kept = [one.record.kept for one in report._wrapped if one.kind == "keep"]
    assert sum(kept) > 4 * X.nbytes and block.moved > 0
    first, second, third = (counts[-BLOCKS:] for counts in waiting)  # bytes are counted by forwards, too
    assert max(first) <= 2 * X.nbytes
    assert second == third
    assert max(second) > 2 * X.nbytes + 2 * kept[0]  # lent
    for ran, count in enumerate(second[3:]):  # after the last that moves, and after each that stays
        assert count <= 2 * X.nbytes + sum(kept[ran:])


def test_lent_memory_does_not_raise_the_peak(tmp_path: Path) -> None:
    peaks = []
    for resident in (4, 0):
        model = model_of(BLOCKS)
        offload(model, tmp_path, resident=resident, window=X.nbytes)
        for _ in range(2):
            model(X).square().sum().backward()
            model.zero_grad(set_to_none=False)
        with LiveBytes() as live:
            for _ in range(3):
                model(X).square().sum().backward()
        peaks.append(live.peak)
    plain = model_of(BLOCKS)
    with LiveBytes() as live:
        plain(X).square().sum().backward()
    half, none = peaks
    # Half of the blocks stay: a half of what they would all keep, and what none of them needs.
    assert half <= none + 0.55 * (live.peak - none), (half, none, live.peak)


def test_what_moved_comes_back_while_blocks_that_stayed_run_backward(tmp_path: Path) -> None:
    model = model_of(BLOCKS)
    _, offloader = offload(model, tmp_path, resident=4, window=X.nbytes)
    for _ in range(2):
        model(X).sum().backward()
    loss = model(X).sum()
    offloader.settle()
    offloader.prefetched = offloader.waited = 0
    loss.backward()
    assert offloader.prefetched > 4
    assert offloader.waited == 0  # without, the first of all had to be waited for


def test_a_budget_lends_nothing(tmp_path: Path) -> None:
    model = model_of(4)
    distlib.checkpoint_activations(model, budget=0.5, example_inputs=X, folder=tmp_path)
    assert not next(iter(model)).forward.setting.offloader.lends
