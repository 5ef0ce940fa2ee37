"""Checkpoints fit any world: saved by n ranks and loaded by m, in every layout, with everything beside the weights."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from checkpoint_models import Layout, Toy, adamw, build, content, differences
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import process_group, run_ranks
from torch import nn

import distlib
from distlib.checkpoint import layout as chunking
from distlib.checkpoint.layout import Piece

WORLDS = (1, 2, 3, 4, 6)
LAYOUTS = [Layout(n) for n in WORLDS] + [
    Layout(4, p=2),
    Layout(6, p=3),
    Layout(4, "owner"),
    Layout(2, "plain"),
    Layout(1, "plain"),
]


def said(layout: Layout) -> str:
    return f"{layout.kind}-{layout.n}-{layout.p}"


@contextlib.contextmanager
def ranks_of(rank: int, n: int) -> Iterator[None]:
    """A process group; none for a single rank, as in a plain script."""
    if n == 1:
        yield
        return
    with process_group(rank, n):
        yield


# ------------------------------------------------------------ n to m


def _save(rank: int, n: int, folder: Path, layout: Layout, asynchronous: bool = False) -> None:
    with ranks_of(rank, n):
        model = build(layout, rank)
        handle = distlib.save(
            folder / said(layout), model=model, optimizer=adamw(model, rank), step=7, asynchronous=asynchronous
        )
        if handle is not None:
            handle.wait()
        assert differences(model, None) == [], "saving changed the model"


def _load_all(rank: int, n: int, folder: Path, layout: Layout, saved: list[Layout]) -> None:
    with ranks_of(rank, n):
        for other in saved:
            for kept in (None, 1):  # an optimizer that has not stepped, and one that has
                model = build(layout, rank, kept)
                optimizer = adamw(model, rank, kept, lr=9.0)
                versions = {name: p._version for name, p in model.named_parameters()}
                state = distlib.load(folder / said(other), model=model, optimizer=optimizer)
                assert differences(model, optimizer) == [], f"{said(other)} loaded by {said(layout)}"
                assert (state.step, state.world_size, state.rng) == (7, other.n, other.n == n)
                assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.25]
                assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.0]
                stale = [k for k, p in model.named_parameters() if p.numel() and p._version == versions[k]]
                assert not stale, "written, but the version does not tell"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of every layout."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for layout in LAYOUTS:
        run_ranks(layout.n, _save, folder, layout)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS, ids=said)
def test_every_layout_loads_every_other(layout: Layout, saved: Path) -> None:
    run_ranks(layout.n, _load_all, saved, layout, LAYOUTS)


def test_a_checkpoint_knows_nothing_of_the_ranks_but_their_files(saved: Path) -> None:
    for layout in LAYOUTS:
        names = sorted(path.name for path in (saved / said(layout)).iterdir())
        assert names == sorted([".metadata", "manifest.json", *(f"__{r}_0.distcp" for r in range(layout.n))])


def test_asynchronous_saves_the_same(saved: Path, tmp_path: Path) -> None:
    for layout in (Layout(2), Layout(2, "plain")):
        run_ranks(layout.n, _save, tmp_path, layout, True)
        now, before = (
            json.loads((f / said(layout) / "manifest.json").read_bytes())["files"] for f in (tmp_path, saved)
        )
        for name in ("__0_0.distcp", "__1_0.distcp"):  # the last record is the random number generators'
            assert len(now[name]["chunks"]) > 10 and now[name]["chunks"][:-1] == before[name]["chunks"][:-1]
        run_ranks(2, _load_all, tmp_path, Layout(2), [layout])


# ------------------------------------------------------------ torch's tools read it


@pytest.mark.parametrize("layout", [Layout(3), Layout(4, p=2), Layout(2, "plain")], ids=said)
def test_dcp_reads_it(layout: Layout, saved: Path, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    whole = {"model": build(Layout(1, "plain"), 0, None).state_dict()}
    assert "head.weight" in whole["model"], "the tied name is asked for, too"
    dcp.load(whole, checkpoint_id=saved / said(layout), no_dist=True)
    for name, tensor in whole["model"].items():
        expected = content(name.replace("head.weight", "embedding.weight"), tensor.shape, tensor.dtype)
        assert torch.equal(tensor, expected), name
    dcp_to_torch_save(saved / said(layout), tmp_path / "all.pt")
    nested = torch.load(tmp_path / "all.pt", weights_only=False)
    moment = nested["optimizer"]["state"]["kernel"]["exp_avg"]
    assert torch.equal(moment, content("kernel.exp_avg", (3, 2, 3, 5), torch.float32))
    assert [group["weight_decay"] for group in nested["optimizer"]["param_groups"]] == [0.5, 0.0]
    assert nested["optimizer"]["state"]["kernel"]["step"] == len("kernel")


# ------------------------------------------------------------ chunks, by arithmetic


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 6), max_size=4),
    st.integers(0, 10_000),
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.integers(4, 200),
    st.booleans(),
)
def test_chunks_cover_every_element_once(
    shape: list[int], a: int, b: int, replicas: int, limit: int, large: bool
) -> None:
    numel = math.prod(shape)
    first, last = sorted((a % (numel + 1), b % (numel + 1)))
    marks = torch.zeros(numel, dtype=torch.int64)
    places = torch.arange(numel).view(shape)
    before = chunking.WHOLE
    chunking.WHOLE = 1 if large else before
    try:
        for replica in range(replicas):
            tensor = torch.empty(last - first)
            piece = Piece("x", torch.Size(shape), first, tensor, replica, replicas)
            for chunk in chunking.chunks([piece], limit):
                assert chunk.numel * 4 <= max(limit * 2, 4)
                box = places
                for dim, (at, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                    box = box.narrow(dim, at, size)
                begin = first + chunk.start
                assert box.reshape(-1).tolist() == list(range(begin, begin + chunk.numel))
                marks[begin : begin + chunk.numel] += 1
    finally:
        chunking.WHOLE = before
    assert marks.tolist() == [int(first <= i < last) for i in range(numel)]


def _shares(rank: int, n: int, folder: Path) -> None:
    with process_group(rank, n):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(700, 700) for _ in range(3)), *(nn.Linear(60, 50) for _ in range(40)))
        distlib.save(folder, model=model, rng=False)


def test_what_all_ranks_hold_is_divided_among_them(tmp_path: Path) -> None:
    run_ranks(3, _shares, tmp_path / "c")
    sizes = [path.stat().st_size for path in (tmp_path / "c").glob("*.distcp")]
    assert len(sizes) == 3 and max(sizes) < 1.1 * min(sizes), sizes


def _other_order(rank: int, n: int, path: Path) -> None:
    with process_group(rank, n):
        layout = Layout(n, "plain")
        model = build(layout, rank)
        optimizer = adamw(model, rank)
        if rank == 0:
            for p, state in list(optimizer.state.items()):
                optimizer.state[p] = dict(reversed(state.items()))
        distlib.save(path, model=model, optimizer=optimizer)
        fresh = build(layout, rank, None)
        other = adamw(fresh, rank, None)
        distlib.load(path, model=fresh, optimizer=other)
        assert differences(fresh, other) == []


def test_ranks_may_have_come_by_their_state_in_different_orders(tmp_path: Path) -> None:
    run_ranks(2, _other_order, tmp_path / "c")


# ------------------------------------------------------------ beside the weights


class Counter:
    """An object with state, as a data loader's position."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def _save_beside(rank: int, n: int, path: Path) -> list[Any]:
    with ranks_of(rank, n):
        for generator in (random.seed, np.random.seed, torch.manual_seed):
            generator(100 + rank)
        extra = {"position": Counter(5), "own": Counter(rank), "curve": [1.0, {"a": np.arange(3)}]}
        distlib.save(path, model=build(Layout(n), rank), step=3, extra=extra, scaler=Counter(65536.0))
        return [random.random(), np.random.rand(), torch.rand(1).item()]


def _load_beside(rank: int, n: int, path: Path, saved_by: int, draws: list[list[Any]]) -> None:
    with ranks_of(rank, n):
        position, own, scaler = Counter(0), Counter("old"), Counter(0)
        model = build(Layout(n), rank, None)
        if saved_by == n:
            extra = {"position": position, "own": own}
            state = distlib.load(path, model=model, extra=extra, scaler=scaler)
            assert own.value == rank and state.extra["own"] == {"value": rank}
            assert [random.random(), np.random.rand(), torch.rand(1).item()] == draws[rank]
        else:
            before = torch.get_rng_state()
            with pytest.raises(ValueError, match=rf"extra\['own'\] was not the same on all {saved_by} ranks"):
                distlib.load(path, model=model, extra={"own": own})
            state = distlib.load(path, model=model, extra={"position": position}, scaler=scaler)
            assert "own" not in state.extra and torch.equal(torch.get_rng_state(), before) and not state.rng
        assert state.extra_by_rank == {"own": [{"value": r} for r in range(saved_by)]}
        assert (position.value, scaler.value, state.step) == (5, 65536.0, 3)
        assert state.extra["curve"][1]["a"].tolist() == [0, 1, 2]
        with pytest.raises(ValueError, match=r"without extra\['missing'\]; it has"):
            distlib.load(path, model=model, extra={"missing": Counter(0)})
        with pytest.raises(ValueError, match="without an optimizer"):
            distlib.load(path, model=model, optimizer=torch.optim.SGD(model.parameters()))


def test_step_scaler_extra_and_generators_come_back(tmp_path: Path) -> None:
    draws = run_ranks(2, _save_beside, tmp_path / "c")
    run_ranks(2, _load_beside, tmp_path / "c", 2, draws)
    run_ranks(3, _load_beside, tmp_path / "c", 2, draws)
    run_ranks(1, _load_beside, tmp_path / "c", 2, draws)


def _resumed(rank: int, n: int, path: Path) -> None:
    with process_group(rank, n):

        def training(seed: int) -> tuple[Any, Any]:
            torch.manual_seed(seed)
            layers = [nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.3), nn.Linear(9, 3)]
            model = distlib.DataParallel(nn.Sequential(*layers))
            return model, torch.optim.AdamW(model.parameters(), lr=0.1)

        def train(model: Any, optimizer: Any, steps: int) -> None:
            for _ in range(steps):
                optimizer.zero_grad()
                model(torch.randn(4, 6)).square().mean().backward()
                optimizer.step()

        straight, one = training(0)
        torch.manual_seed(rank)
        train(straight, one, 6)
        first, two = training(0)
        torch.manual_seed(rank)
        train(first, two, 3)
        distlib.save(path, model=first, optimizer=two, step=3)
        second, three = training(1)
        distlib.load(path, model=second, optimizer=three)
        train(second, three, 3)
        for name, wanted in straight.state_dict().items():
            same = torch.equal(second.state_dict()[name], wanted)
            assert same or (rank != 0 and "running" in name), name  # statistics are rank 0's


def test_resumed_is_uninterrupted_to_the_bit(tmp_path: Path) -> None:
    run_ranks(2, _resumed, tmp_path / "c")


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.1),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, fused=True),
    lambda p: torch.optim.NAdam(p, lr=0.1),
    lambda p: torch.optim.Adagrad(p, lr=0.1),
    lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True, momentum=0.5),
    lambda p: torch.optim.Rprop(p, lr=0.1),
    lambda p: torch.optim.ASGD(p, lr=0.1),
], ids=["SGD", "momentum", "Adam", "NAdam", "Adagrad", "RMSprop", "Rprop", "ASGD"])  # fmt: skip
def test_torch_optimizers_go_on_as_if_nothing_had_been(make: Any, tmp_path: Path) -> None:
    def step(model: nn.Module, optimizer: Any, seed: int) -> None:
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i))
        optimizer.step()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    optimizer = make(model.parameters())
    step(model, optimizer, 0)
    distlib.save(tmp_path / "c", model=model, optimizer=optimizer)
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data.zero_()
    resumed = make(other.parameters())
    distlib.load(tmp_path / "c", model=other, optimizer=resumed)
    step(model, optimizer, 10)
    step(other, resumed, 10)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_moments_keep_their_dtype_beside_half_parameters(tmp_path: Path) -> None:
    model = nn.Linear(3, 2).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        optimizer.state[p] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.rand(p.shape),
            "exp_avg_sq": torch.rand(p.shape),
        }
    distlib.save(tmp_path / "c", model=model, optimizer=optimizer)
    other = torch.optim.AdamW(model.parameters())
    distlib.load(tmp_path / "c", model=model, optimizer=other)
    for p in model.parameters():
        assert torch.equal(other.state[p]["exp_avg"], optimizer.state[p]["exp_avg"])


def test_groups_may_be_others_but_not_mixed(tmp_path: Path) -> None:
    model = build(Layout(1, "plain"), 0)
    distlib.save(tmp_path / "c", model=model, optimizer=adamw(model, 0))
    split = torch.optim.AdamW([{"params": [p]} for p in model.parameters() if p.requires_grad])
    distlib.load(tmp_path / "c", model=model, optimizer=split)
    assert sorted({g["weight_decay"] for g in split.param_groups}) == [0.0, 0.5]
    with pytest.raises(ValueError, match="group 0 of the optimizer holds 'kernel', saved with weight_decay=0"):
        mixed = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        distlib.load(tmp_path / "c", model=model, optimizer=mixed)
    with pytest.raises(ValueError, match="optimizer did not have 'frozen'"):
        distlib.load(tmp_path / "c", model=model, optimizer=torch.optim.AdamW([model.frozen]))
    with pytest.raises(ValueError, match="state of AdamW; the optimizer is SGD"):
        distlib.load(tmp_path / "c", model=model, optimizer=torch.optim.SGD(model.parameters()))
    part = torch.optim.AdamW(model.stack.parameters())
    distlib.load(tmp_path / "c", model=model, optimizer=part)
    assert len(part.state) == 5


def test_memory_formats_and_strides_do_not_matter(tmp_path: Path) -> None:
    model = nn.Conv2d(3, 4, 5).to(memory_format=torch.channels_last)
    distlib.save(tmp_path / "c", model=model)
    plain = nn.Conv2d(3, 4, 5)
    distlib.load(tmp_path / "c", model=plain)
    assert torch.equal(plain.weight, model.weight)
    again = nn.Conv2d(3, 4, 5).to(memory_format=torch.channels_last)
    distlib.load(tmp_path / "c", model=again)
    assert torch.equal(again.weight, model.weight) and again.weight.is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------ export


@pytest.mark.parametrize("layout", [Layout(3), Layout(2, "plain")], ids=said)
def test_export_writes_the_modules_names_and_tells_ties(layout: Layout, saved: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    distlib.export(saved / said(layout), tmp_path / "m.safetensors")
    with safetensors.safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        aliases = json.loads(file.metadata()["distlib.aliases"])
        found = {name: file.get_tensor(name) for name in file.keys()}
    assert aliases == {"head.weight": "embedding.weight"}
    wanted = Toy().state_dict()
    assert found.keys() | aliases.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor, content(name, wanted[name].shape, wanted[name].dtype)), name
    distlib.export(saved / said(layout), tmp_path / "m.safetensors", dtype=torch.float16)
    with safetensors.safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("kernel"), found["kernel"].half())
        assert file.get_tensor("seen").dtype == torch.int64
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_export_says_what_it_needs(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'distlib-train\[checkpoint\]'"):
        distlib.export(saved / said(Layout(2)), tmp_path / "m.safetensors")


# ------------------------------------------------------------ in the background


def _background(rank: int, n: int, path: Path) -> None:
    with process_group(rank, n):
        model = build(Layout(n), rank)
        optimizer = adamw(model, rank)
        handle = distlib.save(path, model=model, optimizer=optimizer, step=1, asynchronous=True)
        with torch.no_grad():  # training goes on, with collectives of its own, while the thread writes
            for p in model.parameters():
                p.zero_()
        for _ in range(50):
            total = torch.ones(1000)
            dist.all_reduce(total)
            assert total[0] == n
        assert handle is not None and handle.stall > 0
        handle.wait()
        assert handle.done()
        fresh = build(Layout(n), rank, None)
        other = adamw(fresh, rank, None)
        assert distlib.load(path, model=fresh, optimizer=other).step == 1
        assert differences(fresh, other) == [], "the copy was not made before save returned"
        for step in (2, 3, 4):  # each waits for the one before; the plan is sent but once
            distlib.save(path, model=fresh, optimizer=other, step=step, asynchronous=True)
        assert distlib.save(path, model=fresh, optimizer=other, step=5) is None
        again = build(Layout(n), rank, None)
        assert distlib.load(path, model=again).step == 5 and differences(again, None) == []


def test_training_goes_on_while_a_thread_writes(tmp_path: Path) -> None:
    run_ranks(2, _background, tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def _saves_and_leaves(rank: int, n: int, folder: Path, bad: Path) -> str:
    distlib.init()
    model = torch.nn.Linear(64, 64)
    distlib.save(folder, model=model, step=3, asynchronous=True)
    distlib.shutdown()
    distlib.init()
    distlib.save(bad, model=model, step=3, asynchronous=True)
    try:
        distlib.shutdown()
    except (OSError, RuntimeError, ValueError) as error:
        return str(error)
    return "no error"


def test_shutdown_waits_for_a_save_in_the_background_and_tells_its_error(tmp_path: Path) -> None:
    bad = tmp_path / "none" / "below"  # no such folder to save in
    (tmp_path / "none").write_text("a file")
    errors = run_ranks(2, _saves_and_leaves, tmp_path / "saved", bad)
    assert all(str(bad) in error for error in errors)
    assert distlib.load(tmp_path / "saved", model=torch.nn.Linear(64, 64)).step == 3
