"""The example's data: a byte on one side of the split, a window dealt once, any world the same batches."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from lm.data import Sampler, batch_of, count_windows, load_corpus, split, standard_library
from lm.schedule import learning_rate

CPU = torch.device("cpu")
World = tuple[int, int, int, int]


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """(windows, global batch, ranks, seed) that fit."""
    size = draw(st.integers(1, 8))
    batch = size * draw(st.integers(1, 4))
    return draw(st.integers(batch, 20 * batch)), batch, size, draw(st.integers(0, 2**32))


def samplers(windows: int, batch: int, size: int, seed: int) -> list[Sampler]:
    return [Sampler(windows, batch, rank, size, seed) for rank in range(size)]


def global_batches(ranks: list[Sampler], steps: int) -> list[list[int]]:
    """What all ranks together see in each step, in rank order."""
    return [np.concatenate([next(rank) for rank in ranks]).tolist() for _ in range(steps)]


@settings(deadline=None)
@given(worlds(), st.integers(1, 50))
def test_global_batches_do_not_depend_on_the_number_of_ranks(world: World, steps: int) -> None:
    windows, batch, size, seed = world
    assert global_batches(samplers(*world), steps) == global_batches(samplers(windows, batch, 1, seed), steps)


@settings(deadline=None)
@given(worlds())
def test_an_epoch_deals_every_window_once_but_a_rest_smaller_than_a_batch(world: World) -> None:
    windows, batch, size, _ = world
    ranks = samplers(*world)
    dealt = np.concatenate(global_batches(ranks, windows // batch))
    assert len(np.unique(dealt)) == len(dealt) == windows - windows % batch
    assert dealt.min() >= 0 and dealt.max() < windows
    assert {(rank.epoch, len(next(rank))) for rank in ranks} == {(0, batch // size)}
    assert {rank.epoch for rank in ranks} == {1}


@settings(deadline=None)
@given(worlds(), st.integers(0, 60), st.integers(1, 20), st.sampled_from([1, 2, 3, 4, 8]))
def test_resumed_on_any_number_of_ranks_equals_uninterrupted(
    world: World, before: int, after: int, other_size: int
) -> None:
    windows, batch, size, seed = world
    uninterrupted = samplers(*world)
    global_batches(uninterrupted, before)
    states = [rank.state_dict() for rank in uninterrupted]
    assert all(state == states[0] for state in states)

    size = other_size if batch % other_size == 0 else 1
    resumed = samplers(windows, batch, size, seed + 1)  # the seed comes from the state, too
    for rank in resumed:
        rank.load_state_dict(states[0])
    assert global_batches(resumed, after) == global_batches(uninterrupted, after)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second = global_batches([Sampler(100, 100)], 2)
    (other_seed,) = global_batches([Sampler(100, 100, seed=1)], 1)
    assert first != second and first != other_seed
    assert sorted(first) == sorted(second) == sorted(other_seed) == list(range(100))


def test_a_sampler_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="6 windows does not divide over 4 ranks"):
        Sampler(100, 6, rank=0, size=4)
    with pytest.raises(ValueError, match="7 windows to train on and a step takes 8"):
        Sampler(7, 8)
    with pytest.raises(ValueError, match="one among 100 windows and this data has 99"):
        Sampler(99, 8).load_state_dict(Sampler(100, 8).state_dict())


@settings(deadline=None)
@given(st.integers(2, 200), st.integers(1, 40))
def test_windows_tile_the_text_and_targets_are_the_next_bytes(length: int, context: int) -> None:
    text = np.arange(length, dtype=np.uint8)
    windows = np.arange(count_windows(text, context))
    if len(windows) == 0:
        assert length < context + 1
        return
    inputs, targets = batch_of(text, windows, context, CPU)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.flatten().tolist() == list(range(len(windows) * context))
    assert targets.flatten().tolist() == list(range(1, len(windows) * context + 1))
    assert length - (len(windows) * context + 1) < context  # no further window would fit


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=60))
def test_the_split_keeps_every_byte_on_one_side_and_leaves_no_side_empty(texts: list[bytes]) -> None:
    assume(sum(map(len, texts)) >= 20)
    train, validation = split([text.replace(b"\0", b"\1") for text in texts])
    whole = sorted(b"".join(texts).replace(b"\0", b"\1"))
    assert sorted(train[train != 0].tolist() + validation[validation != 0].tolist()) == whole
    assert len(train) and len(validation)
    assert np.count_nonzero(validation) <= len(whole) / 2


def test_a_file_is_mapped_and_its_end_is_for_validation(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes(bytes(range(200)))
    train, validation = load_corpus(file, context=8)
    assert isinstance(train, np.memmap)
    assert train.tolist() == list(range(190)) and validation.tolist() == list(range(190, 200))


def test_a_folder_is_read_in_sorted_order_without_hidden_empty_and_binary_files(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a.txt", "b/10.txt", ".git/config", "b/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 10)
    (tmp_path / "image").write_bytes(b"text\0and more")
    (tmp_path / "empty").touch()
    train, validation = load_corpus(tmp_path, context=4)
    joined = bytes(train).replace(b"\0", b"") + bytes(validation)
    assert joined == b"a.txt" * 10 + b"b/10.txt" * 10 + b"b/2.txt" * 10


def test_the_standard_library_is_there_without_installed_packages() -> None:
    files = standard_library()
    assert files == sorted(files, key=lambda file: file.parts)
    assert {"argparse.py", "ast.py"} <= {file.name for file in files}
    assert not any("site-packages" in file.parts for file in files)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file or folder"),
        ({}, "no files in this folder"),
        ({"empty": b""}, r"\(0 text files\): 0 bytes to train on"),
        ({"image": b"\0\1\2" * 100}, r"\(0 text files\): 0 bytes to train on"),
        ({"short": b"abc" * 10}, "a window takes 65: give more --data or a smaller --context than 64"),
        (b"", "0 bytes to train on and 0 to validate"),
        (b"abc" * 100, "15 to validate, but a window takes 65"),
    ],
)
def test_data_without_a_window_is_refused(
    tmp_path: Path, content: dict[str, bytes] | bytes | None, message: str
) -> None:
    path = tmp_path / "data"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.mkdir()
        for name, text in content.items():
            (path / name).write_bytes(text)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        load_corpus(path, context=64)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_learning_rate_warms_up_then_falls_to_a_tenth() -> None:
    rates = [learning_rate(step, 100, peak=2.0, warmup=10) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[9] == rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.2, abs=2e-3)
    assert [learning_rate(step, 3, 1.0, warmup=0) for step in (0, 2)] == [1.0, pytest.approx(0.325)]
