"""Offloading: what moves, when it comes back, what happens when the disk fails; the slab of offsets."""

from __future__ import annotations

import copy
import errno
import gc
import os
import resource
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from activation_models import WIDTH, Residual, same, step
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import distlib
from distlib.activations.offload import Offloader
from distlib.activations.report import ActivationReport
from distlib.activations.slab import ALIGNMENT, Slab
from distlib.activations.stores import FileStore, file_system


def model_of(blocks: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[Residual() for _ in range(blocks)])


X = torch.randn(32, 64, WIDTH, generator=torch.Generator().manual_seed(1))  # 512 KiB


def offload(model: nn.Module, folder: Path, **options: Any) -> tuple[ActivationReport, Offloader]:
    report = distlib.checkpoint_activations(model, "offload", folder=folder, **options)
    return report, next(iter(model)).forward.setting.offloader


@pytest.mark.parametrize("window", [None, 1, "1GiB"])
@pytest.mark.parametrize("resident", [0, 1, 3])
def test_any_window_and_residence_give_the_same_bits(window: Any, resident: int, tmp_path: Path) -> None:
    plain, model = model_of(), model_of()
    report, offloader = offload(model, tmp_path, window=window, resident=resident)
    for seed in range(3):
        assert same(step(plain, X, seed), step(model, X, seed))
    kinds = list(report.choices.values())
    assert kinds == ["offload"] * (4 - resident) + ["keep"] * resident
    assert report.moved_bytes > 0.9 * report.baseline_bytes * (4 - resident) / 4
    assert offloader._alive == 0
    assert all(store.slab.used == 0 for store in offloader._stores.values())


def test_the_second_step_prefetches_in_the_order_of_the_first(tmp_path: Path) -> None:
    model = model_of()
    _, offloader = offload(model, tmp_path, resident=0, window="1GiB")
    counts = []
    for _ in range(3):
        loss = model(X).square().mean()
        offloader.settle()
        offloader.prefetched = offloader.waited = 0
        loss.backward()
        counts.append((offloader.prefetched, offloader.waited))
    assert counts[0][1] > 4  # in the first step each is waited for, at its first use
    assert counts[1][1] == counts[2][1] == 1  # then only what is needed first of all
    assert counts[1][0] > counts[0][0]


def test_another_order_than_the_last_works(tmp_path: Path) -> None:
    plain, model = model_of(), model_of()
    offload(model, tmp_path, resident=0)
    for forwards in (1, 3, 2, 1):
        assert same(step(plain, X, 3, forwards), step(model, X, 3, forwards))
    for each in (plain, model):
        each.zero_grad()
        torch.manual_seed(0)
        first, second = each(X).sum(), each(2 * X).sum()
        first.backward()  # not the last forward first
        second.backward()
    assert same([p.grad for p in plain.parameters()], [p.grad for p in model.parameters()])


def test_memory_that_two_tensors_look_at_moves_once_and_parameters_never(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(256, 256))

        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.weight.t()
            first, second = y.chunk(2, dim=-1)
            return torch.cat((first.sin() * second, second.cos() * first), dim=-1) + y.exp()

    model = nn.Sequential(Twice(), Twice())
    x = torch.randn(512, 256)
    report, _ = offload(model, tmp_path, resident=0)
    model(x).sum().backward()
    half, whole = x.nbytes // 2, x.nbytes
    # Input, y (four times), the result of exp, sine and cosine: each once; nothing of the weight.
    assert report.moved_bytes == 2 * (whole + whole + whole + 2 * half)


def test_the_tensors_memory_is_released_and_the_window_bounds_what_waits(tmp_path: Path) -> None:
    from distlib.activations.live import LiveBytes

    model = model_of(6)
    _, offloader = offload(model, tmp_path, resident=0, window=X.nbytes)
    model(X).sum().backward()
    live = LiveBytes()
    with live:
        loss = model(X).sum()
        offloader.settle()
        until = time.monotonic() + 20
        while live.live >= 2 * X.nbytes and time.monotonic() < until:
            time.sleep(0.01)  # the worker drops what it has written a moment after it says so
        assert live.live < 2 * X.nbytes  # of more than 60 X.nbytes
        peak = live.peak
        loss.backward()
    assert peak < 16 * X.nbytes  # one block's work and the window


def test_forwards_without_backward_give_their_space_back(tmp_path: Path) -> None:
    model = model_of()
    _, offloader = offload(model, tmp_path)
    for _ in range(3):
        loss = model(X).sum()
        del loss
    offloader.settle()
    gc.collect()
    (store,) = offloader._stores.values()
    assert store.slab.used == 0 and offloader._alive == 0
    assert not list(tmp_path.iterdir())  # the file has no name


@pytest.mark.parametrize("call", ["pwrite", "preadv"])
def test_errors_of_the_worker_surface_in_the_step(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    offload(model, tmp_path)

    def fails(*_: Any) -> int:
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(RuntimeError, match=rf"{tmp_path}: cannot .* bytes.*the disk is gone"):
        model(X).sum().backward()
    monkeypatch.undo()
    model.zero_grad()
    assert step(model, X)[0].isfinite()  # the next step is whole again


def _in_a_process_with_small_files(folder: str, queue: Any) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    model = model_of()
    offload(model, Path(folder))
    try:
        model(X).sum().backward()
    except RuntimeError as error:
        queue.put(str(error))
    else:
        queue.put("no error")


def test_a_full_disk_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    model = model_of()
    offload(model, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(RuntimeError, match=r"cannot grow by \d+ bytes.*No space left.*it is full: free some space"):
            model(X).sum().backward()
    context = get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_in_a_process_with_small_files, args=(str(tmp_path), queue), daemon=True)
    process.start()
    message = queue.get(timeout=100)
    process.join()
    assert "File too large" in message and "give another folder" in message


def test_a_folder_in_memory_is_warned_of() -> None:
    folder = Path("/dev/shm")
    if not folder.is_dir() or file_system(folder) != "tmpfs":
        pytest.skip("no tmpfs here")
    with pytest.warns(UserWarning, match="tmpfs.*saves 0 bytes"):
        FileStore(folder)


def _steps_of_a_fork(model: nn.Module, plain: nn.Module, queue: Any) -> None:
    torch.set_num_threads(1)  # those of OpenMP are not there after a fork, and it would wait for them
    try:
        queue.put([same(step(plain, X, seed), step(model, X, seed)) for seed in range(4)])
    except RuntimeError as error:
        queue.put(str(error))


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_that_are_forked_have_files_and_threads_of_their_own(warm: bool, tmp_path: Path) -> None:
    """warm: the model has made a step before. Both processes move at once what they saved, into files of one folder."""
    plain, model = model_of(), model_of()
    offload(model, tmp_path, resident=0, window=1)
    if warm:
        step(model, X)
    context = get_context("fork")
    queues = [context.Queue() for _ in range(2)]
    processes = [context.Process(target=_steps_of_a_fork, args=(model, plain, queue), daemon=True) for queue in queues]
    for process in processes:
        process.start()
    try:
        for queue in queues:
            assert queue.get(timeout=100) == [True] * 4
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert same(step(plain, X), step(model, X))  # the parent is what it was


def _backward_of_a_fork(loss: Tensor, queue: Any) -> None:
    try:
        loss.backward()
    except RuntimeError as error:
        queue.put(str(error))
    else:
        queue.put("no error")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_backward_in_a_fork_of_a_forward_before_it_is_refused(tmp_path: Path) -> None:
    model = model_of()
    _, offloader = offload(model, tmp_path, resident=0)
    loss = model(X).sum()
    offloader.settle()
    context = get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_backward_of_a_fork, args=(loss, queue), daemon=True)
    process.start()
    try:
        assert f"moved by process {os.getpid()}, which has forked since" in queue.get(timeout=100)
    finally:
        process.kill()
        process.join()
    loss.backward()


def test_a_graph_that_somebody_keeps_does_not_end_prefetching(tmp_path: Path) -> None:
    """As a loss of validation that nobody runs backward: steps begin and end as without."""
    model = model_of()
    _, offloader = offload(model, tmp_path, resident=0, window="1GiB")
    kept = model(X).square().mean()
    for _ in range(6):
        model(X).square().mean().backward()
    moved = len(offloader._order)
    offloader.prefetched = offloader.waited = 0
    for _ in range(5):
        loss = model(X).square().mean()
        offloader.settle()
        loss.backward()
        del loss
        assert len(offloader._tape) == len(offloader._needed) == moved
    assert offloader.waited == 5 and offloader.prefetched > 5 * 4  # once a step, what is needed first of all
    plain = model_of()
    plain(X).square().mean().backward()
    model.zero_grad()
    torch.manual_seed(5)
    kept.backward()  # and it is still whole
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_memory_whose_tensors_count_changes_apart_moves_as_often_as_it_changes(tmp_path: Path) -> None:
    """Chunks that are no views, as in a GRU: each is written, saved, and written beside the other."""

    class Gates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.other = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.linear(x).unsafe_chunk(2, -1)
            y = second.sigmoid_() * self.other(x)
            return x + y + first.tanh_() * y

    torch.manual_seed(0)
    plain = nn.Sequential(*[Gates() for _ in range(3)])
    model = copy.deepcopy(plain)
    _, offloader = offload(model, tmp_path, resident=0, window=1)
    for seed in range(3):
        assert same(step(plain, X, seed), step(model, X, seed))


def test_small_tensors_stay_and_are_reported(tmp_path: Path) -> None:
    model = model_of()
    report, _ = offload(model, tmp_path, resident=0)
    with pytest.warns(UserWarning, match="'offload' saves 0 bytes"):
        model(torch.randn(2, WIDTH)).sum().backward()
    assert report.moved_bytes == 0 and report.saved_bytes == 0


def test_a_budget_may_offload(tmp_path: Path) -> None:
    plain, model = model_of(), model_of()
    report = distlib.checkpoint_activations(model, budget=0.0, example_inputs=X, folder=tmp_path)
    assert "offload" in report.choices.values()  # the smallest peak of all keeps not even the inputs
    assert same(step(plain, X), step(model, X))


Operations = st.lists(st.tuples(st.booleans(), st.integers(1, 5 * ALIGNMENT)), max_size=60)


@settings(deadline=None)
@given(Operations)
def test_pieces_of_a_slab_never_overlap_and_all_come_back(operations: list[tuple[bool, int]]) -> None:
    slab, taken = Slab(), {}
    for takes, nbytes in operations:
        if takes or not taken:
            offset = slab.take(nbytes)
            if offset is None:
                slab.grow(Slab.rounded(nbytes) + ALIGNMENT)
                offset = slab.take(nbytes)
            assert offset is not None and offset % ALIGNMENT == 0 and offset + nbytes <= slab.size
            for other, its in taken.items():
                assert offset + nbytes <= other or other + its <= offset
            taken[offset] = nbytes
        else:
            offset = sorted(taken)[nbytes % len(taken)]
            slab.give(offset, taken.pop(offset))
    assert slab.used == sum(map(Slab.rounded, taken.values()))
    for offset, nbytes in taken.items():
        slab.give(offset, nbytes)
    assert slab._free == ([(0, slab.size)] if slab.size else [])


def test_pinned_memory_needs_cuda() -> None:
    from distlib.activations.stores import PinnedStore

    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    with pytest.raises(ValueError, match="cuda: this torch finds no such device"):
        PinnedStore(torch.device("cuda"))
