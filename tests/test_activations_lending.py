"""Memory of blocks that stay, lent to copies: more may be on its way, and never more memory is taken than without."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from activation_models import WIDTH, same, step
from test_activations_offload import X, model_of, offload
from torch import Tensor, nn

import distlib
from distlib.activations.lending import Lending
from distlib.activations.live import LiveBytes

BLOCKS = 8
SMALL = X[:, :16].contiguous()  # 128 KiB


def test_room_is_what_stayed_at_the_peak_of_the_last_step_and_is_not_there_now() -> None:
    lending = Lending()
    lending.begin_step()
    assert lending.room == 0
    stays = [lending.stay(10) for _ in range(5)]
    assert lending.room == 0  # nothing is known yet
    assert [stay.end() for stay in stays] == [True] * 5
    lending.begin_step()
    assert lending.room == 30  # but for a block that is at work
    first = lending.stay(10)
    assert lending.room == 20
    assert first.end()
    assert not first.end()  # a second backward
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
    report, offloader = offload(model, tmp_path, resident=5, window=2 * X.nbytes)
    block = next(iter(report._wrapped)).record
    waiting: list[list[int]] = []
    for layer in model:
        layer.register_forward_hook(lambda *_: waiting[-1].append(offloader._waiting.nbytes))
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
    for ran, count in enumerate(second[2:]):  # after the last that moves, and after each that stays
        assert count <= 2 * X.nbytes + sum(kept[ran:])


def in_order(model: nn.Module, order: str, **options: Any) -> None:
    """Forwards (F) and backwards (B) of micro-batches, the oldest first; l: of the newest first."""
    losses: list[Tensor] = []
    for what in order:
        if what == "F":
            losses.append(model(SMALL).square().sum())
        else:
            losses.pop(0 if what == "B" else -1).backward(**options)


class Thrice(nn.Module):
    """A block whose layer is called again and again."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.layers(self.layers(x)))


STEPS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    # what is called, orders of each step (the last is measured), options of backward
    "plain": ("model", ["FB"] * 3, {}),
    "retained graphs": ("model", ["FB"] * 3, {"retain_graph": True}),
    "one after the other, then 1F1B": ("model", ["FB", "FFBFBB", "FFBFBFBB"], {}),
    "1F1B from the first step on": ("model", ["FFBFBB"] * 3, {}),
    "the newest first": ("model", ["FFFlll"] * 3, {}),
    "orders that change": ("model", ["FFFBBB", "FFFlll", "FFFBlB"], {}),
    "three forwards, then one": ("model", ["FFFBBB", "FB", "FB", "FB"], {}),
    "blocks that are called three times": ("thrice", ["FB"] * 3, {}),
}


@pytest.mark.parametrize(
    ("resident", "window", "name"),
    [
        *((4, 4, name) for name in STEPS),
        *((resident, window, "plain") for resident, window in ((4, 1), (1, 2), (7, 1))),
        (6, 1, "the newest first"),
    ],
)
def test_lent_memory_does_not_raise_the_peak(name: str, resident: int, window: int, tmp_path: Path) -> None:
    called, steps, options = STEPS[name]
    peaks = []
    for lends in (True, False):
        layers = model_of(BLOCKS)
        model = Thrice(layers) if called == "thrice" else layers
        report = distlib.checkpoint_activations(
            model, "offload", folder=tmp_path, resident=resident, window=window * SMALL.nbytes
        )
        offloader = layers[0].forward.setting.offloader
        offloader.lends = lends
        for order in steps[:-1]:
            in_order(model, order, **options)
        gc.collect()
        with LiveBytes() as live:
            in_order(model, steps[-1], **options)
            peaks.append(live.peak)
        assert offloader._lending._now == offloader._alive == 0
        assert offloader._waiting.nbytes == offloader._ahead.nbytes == 0
        report.remove()
    assert peaks[0] <= peaks[1] + SMALL.nbytes, [peak / SMALL.nbytes for peak in peaks]


def test_a_graph_that_is_dropped_leaves_nothing_though_a_small_result_stays(tmp_path: Path) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layer(x) * torch.sigmoid(self.gate(x))  # saves its result, which is small

    model = nn.Sequential(*[Gated() for _ in range(4)])
    _, offloader = offload(model, tmp_path, resident=1)
    for _ in range(3):
        model(X)
        gc.collect()
        assert offloader._alive == 0 and offloader._lending._now == 0
        assert all(store.slab.used == 0 for store in offloader._stores.values())


def test_a_small_result_that_stays_is_still_guarded_against_changes_in_place(tmp_path: Path) -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

        def forward(self, x: Tensor) -> Tensor:
            gate = torch.sigmoid(self.gate(x))
            result = x + self.layer(x) * gate
            gate.mul_(2)
            return result

    model = nn.Sequential(Changed(), Changed())
    offload(model, tmp_path, resident=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(X).sum().backward()


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
