"""What goes wrong with checkpoints: kills at every phase, failing ranks, damaged, foreign and misfitting ones."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import Layout, adamw, build, content, differences
from ranks import process_group, run_ranks, run_ranks_raw
from torch import nn

import distlib
from distlib.checkpoint import folder
from distlib.checkpoint.writer import write_rank_file

PHASES = ["begun", "writing", "written", "indexed", "manifest", "synced", "placed", "cleaned"]


def save(rank: int, n: int, path: Path, step: int, asynchronous: bool = False) -> None:
    model = build(Layout(n), rank, seed=step)
    handle = distlib.save(path, model=model, optimizer=adamw(model, rank, step), step=step, asynchronous=asynchronous)
    if handle is not None:
        handle.wait()


def check(rank: int, n: int, path: Path, steps: tuple[int, ...]) -> int:
    """Loads, and checks that all of it is of one of these steps."""
    model = build(Layout(n), rank, seed=9)
    optimizer = adamw(model, rank, 9)
    state = distlib.load(path, model=model, optimizer=optimizer)
    assert state.step in steps and differences(model, optimizer, state.step) == []
    return state.step


# ------------------------------------------------------------ kill -9


def _killed(rank: int, n: int, path: Path, phase: str, victim: int, exchange: bool, asynchronous: bool) -> None:
    def end(reached: str) -> None:
        if reached == phase and rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    if not exchange:
        folder.exchange = lambda a, b: False  # a file system that cannot
    with process_group(rank, n):
        save(rank, n, path, 1)
        folder.on_phase = end
        save(rank, n, path, 2, asynchronous)


def _after(rank: int, n: int, path: Path, steps: tuple[int, ...]) -> int:
    with process_group(rank, n):
        step = check(rank, n, path, steps)
        save(rank, n, path, 3)
        assert check(rank, n, path, (3,)) == 3
        return step


def _kills() -> list[Any]:
    kills = [(phase, 0, True, False) for phase in PHASES]
    kills += [(phase, 0, False, False) for phase in ("synced", "renamed away", "placed", "cleaned")]
    kills += [("writing", 1, True, False), ("written", 1, True, False), ("indexed", 0, True, True)]
    ids = [f"{p}-rank{v}{'' if e else '-rename'}{'-async' if a else ''}" for p, v, e, a in kills]
    return [pytest.param(*kill, id=name) for kill, name in zip(kills, ids, strict=True)]


@pytest.mark.parametrize(("phase", "victim", "exchange", "asynchronous"), _kills())
def test_a_kill_leaves_the_old_checkpoint_or_the_new_one(
    phase: str, victim: int, exchange: bool, asynchronous: bool, tmp_path: Path
) -> None:
    path = tmp_path / "c"
    outcomes = run_ranks_raw(2, _killed, path, phase, victim, exchange, asynchronous, timeout=30, grace=8)
    assert (outcomes[victim].kind, outcomes[victim].code) == ("signal", signal.SIGKILL), outcomes[victim]
    if phase != "cleaned":  # the others may have ended well only if the save was complete
        assert outcomes[1 - victim].kind == "exception", outcomes[1 - victim]
    late = phase in ("placed", "cleaned")
    steps = run_ranks(2, _after, path, (2,) if late else (1,))
    assert len(set(steps)) == 1
    assert [other.name for other in tmp_path.iterdir()] == ["c"], "what the killed save left was not removed"


def test_a_kill_in_the_first_save_leaves_nothing_to_load(tmp_path: Path) -> None:
    for phase in ("begun", "manifest"):
        run_ranks_raw(1, _killed_first, tmp_path / "c", phase, timeout=30)
        with pytest.raises(ValueError, match="there is no checkpoint to load"):
            distlib.load(tmp_path / "c", model=build(Layout(1), 0))
        assert len(list(tmp_path.iterdir())) == 1
    save(0, 1, tmp_path / "c", 2)
    assert check(0, 1, tmp_path / "c", (2,)) == 2 and len(list(tmp_path.iterdir())) == 1


def _killed_first(rank: int, n: int, path: Path, phase: str) -> None:
    folder.on_phase = lambda reached: os.kill(os.getpid(), signal.SIGKILL) if reached == phase else None
    save(rank, n, path, 1)


# ------------------------------------------------------------ a rank that fails


class _FullDisk:
    """A file that takes nothing."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> _FullDisk:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        raise OSError(28, "No space left on device")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _full(rank: int, n: int, path: Path, victim: int, asynchronous: bool) -> None:
    with process_group(rank, n):
        save(rank, n, path, 1)
        real = Path.open
        name = f"__{victim}_0.distcp"
        Path.open = lambda self, *a, **k: _FullDisk(real(self, *a, **k)) if self.name == name else real(self, *a, **k)
        with pytest.raises(RuntimeError, match=rf"save to .*: rank {victim}: .*No space left on device"):
            save(rank, n, path, 2, asynchronous)
        if asynchronous:  # nobody waits: the next save tells
            model = build(Layout(n), rank)
            distlib.save(path, model=model, asynchronous=True)
            with pytest.raises(RuntimeError, match=rf"in the background had failed: .*rank {victim}: .*No space left"):
                distlib.save(path, model=model)
        Path.open = real
        assert check(rank, n, path, (1,)) == 1
        save(rank, n, path, 3)
        assert check(rank, n, path, (3,)) == 3


@pytest.mark.parametrize(("victim", "asynchronous"), [(1, False), (0, False), (1, True)])
def test_a_full_disk_on_one_rank_raises_on_all(victim: int, asynchronous: bool, tmp_path: Path) -> None:
    run_ranks(3, _full, tmp_path / "c", victim, asynchronous)
    assert [other.name for other in tmp_path.iterdir()] == ["c"]


def _limited(rank: int, n: int, path: Path) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(OSError) as caught:
        write_rank_file(path, [torch.ones(3), torch.ones(100_000)])
    return str(caught.value)


def test_a_file_that_takes_a_part_of_a_record_says_why(tmp_path: Path) -> None:
    """Torch's own words for it are "enforce fail at inline_container.cc"."""
    assert run_ranks(1, _limited, tmp_path / "f") == ["[Errno 27] File too large"]


def test_what_cannot_be_removed_fails_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.EBUSY, "Device or resource busy")

    path = tmp_path / "c"
    save(0, 1, path, 1)
    monkeypatch.setattr(folder.shutil, "rmtree", busy)
    for step, left in ((2, 1), (3, 2)):
        save(0, 1, path, step)
        assert check(0, 1, path, (step,)) == step and len(list(tmp_path.iterdir())) == 1 + left
        assert "cannot be removed: [Errno 16] Device or resource busy. The next save to this path" in caplog.text
    monkeypatch.undo()
    save(0, 1, path, 4)
    assert check(0, 1, path, (4,)) == 4
    assert [other.name for other in tmp_path.iterdir()] == ["c"], "the next save removes what was left"


def _differ(rank: int, n: int, path: Path) -> None:
    with process_group(rank, n):
        model = nn.Linear(3, 2 + (rank == 1))
        with pytest.raises(ValueError, match="ranks 0 and 1 save models whose names, shapes, dtypes or ties differ"):
            distlib.save(path, model=model)
        with pytest.raises(ValueError, match="ranks 0 and 1 save different steps: 0 and 1"):
            distlib.save(path, model=nn.Linear(3, 2), step=rank)
        with pytest.raises(ValueError, match="ranks 0 and 1 save different paths"):
            distlib.save(path.with_name(f"c{rank}"), model=nn.Linear(3, 2))
        with pytest.raises(ValueError, match=r"rank 1: extra\['x'\] cannot be pickled"):
            distlib.save(path, model=nn.Linear(3, 2), extra={"x": (lambda: 0) if rank == 1 else 0})
        with pytest.raises(ValueError, match=r"keys \['a0'\] on rank 0, \['a1'\] on rank 1"):
            distlib.save(path, model=nn.Linear(3, 2), extra={f"a{rank}": 0})
        model = build(Layout(n), rank)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name == "kernel" and rank == 1:
                    p._distlib_shard.offset += 1  # type: ignore[attr-defined]
                    p._distlib_shard.numel -= 1  # type: ignore[attr-defined]
                    p.data = p.data[1:]
        with pytest.raises(RuntimeError, match=r"model.kernel of shape \(3, 2, 3, 5\) has 90 elements, but .* hold 89"):
            distlib.save(path, model=model)


def test_ranks_that_do_not_save_the_same_raise_together(tmp_path: Path) -> None:
    run_ranks(2, _differ, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_saved_is_refused_by_name(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> Any:
            return 1

    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model[0].weight]["rows"] = torch.zeros(3)
    cases: list[tuple[str, dict[str, Any]]] = [
        (r"optimizer state 'rows' of '0.weight' has shape \(3,\)", {"model": model, "optimizer": optimizer}),
        ("parameter 0 of the optimizer's group 0", {"model": nn.Linear(3, 2), "optimizer": optimizer}),
        (r"module '1' \(Odd\) has extra state", {"model": nn.Sequential(nn.Linear(1, 1), Odd(1, 1))}),
        ("step=1.5 is no int", {"model": model, "step": 1.5}),
        ("extra must be a dict", {"model": model, "extra": [1]}),
    ]
    for words, arguments in cases:
        with pytest.raises(ValueError, match=words):
            distlib.save(tmp_path / "c", **arguments)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("three years")
    with pytest.raises(ValueError, match="holds files but no checkpoint of distlib: it is not replaced"):
        distlib.save(tmp_path / "data", model=model)
    with pytest.raises(ValueError, match="is a file; a checkpoint is a folder"):
        distlib.save(tmp_path / "data" / "thesis.tex", model=model)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert (tmp_path / "data" / "thesis.tex").read_text() == "three years"


# ------------------------------------------------------------ a checkpoint that is not as it should be


def _save(rank: int, n: int, path: Path) -> None:
    with process_group(rank, n):
        save(rank, n, path, 1)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "c"
    run_ranks(2, _save, path)
    return path


def _refused(rank: int, n: int, path: Path, kind: str, words: str) -> None:
    with process_group(rank, n):
        model = build(Layout(n), rank, seed=9)
        optimizer = adamw(model, rank, 9)
        before = [p._version for p in model.parameters()]
        with pytest.raises({"value": ValueError, "runtime": RuntimeError}[kind], match=words):
            distlib.load(path, model=model, optimizer=optimizer)
        assert differences(model, optimizer, 9) == [] and before == [p._version for p in model.parameters()]


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def _damages() -> list[Any]:
    def truncated(path: Path) -> None:
        file = path / "__1_0.distcp"
        os.truncate(file, file.stat().st_size - 100)

    def manifest(path: Path, change: Any) -> None:
        body = json.loads((path / "manifest.json").read_bytes())
        change(body)
        del body["crc32"]
        body["crc32"] = zlib.crc32(json.dumps(body, sort_keys=True).encode())
        (path / "manifest.json").write_text(json.dumps(body))

    def in_a_tensor(path: Path) -> None:
        file = path / "__0_0.distcp"
        wanted = content("embedding.weight", (13, 5), torch.float32, 1).reshape(-1)[:4].numpy().tobytes()
        flip(file, file.read_bytes().index(wanted))

    return [
        pytest.param(
            truncated,
            "runtime",
            "__1_0.distcp, which holds '.*', has .* bytes instead of .*: it was trunc",
            id="truncated",
        ),
        pytest.param(
            in_a_tensor, "runtime", "__0_0.distcp: bytes .* which hold 'model.embedding.weight', are damaged", id="bit"
        ),
        pytest.param(
            lambda p: (p / "__1_0.distcp").unlink(), "runtime", "__1_0.distcp, which holds .* missing", id="missing"
        ),
        pytest.param(
            lambda p: (p / ".metadata").unlink(), "runtime", ".metadata, the index .* is missing", id="no index"
        ),
        pytest.param(lambda p: flip(p / ".metadata", 200), "runtime", ".metadata, the index .* damaged", id="index"),
        pytest.param(lambda p: flip(p / "manifest.json", 90), "runtime", "manifest.json is damaged", id="manifest"),
        pytest.param(
            lambda p: os.truncate(p / "manifest.json", 90), "runtime", "manifest.json is damaged", id="cut manifest"
        ),
        pytest.param(
            lambda p: manifest(p, lambda m: m.update(version=0)),
            "value",
            "version 0; this distlib reads version 1",
            id="old",
        ),
        pytest.param(
            lambda p: (p / "manifest.json").unlink(),
            "value",
            "of torch.distributed.checkpoint, not of distlib",
            id="dcp",
        ),
        pytest.param(lambda p: shutil.rmtree(p), "value", "does not exist: there is no checkpoint", id="none"),
        pytest.param(
            lambda p: [f.unlink() for f in p.iterdir()],
            "value",
            "not a checkpoint of distlib: it has no mani",
            id="empty",
        ),
    ]


@pytest.mark.parametrize(("damage", "kind", "words"), _damages())
def test_a_damaged_or_foreign_checkpoint_changes_nothing(
    damage: Any, kind: str, words: str, good: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(good, tmp_path / "c"))
    damage(path)
    run_ranks(2, _refused, path, kind, words)


def test_a_bit_in_any_record_is_noticed(good: Path, tmp_path: Path) -> None:
    """One rank reads all that is needed: each flip must be found, but in the states of two ranks' generators and in the
    records of a parameter without elements, of which each rank wrote one, and one for each moment."""
    manifest = json.loads((good / "manifest.json").read_bytes())
    path = Path(shutil.copytree(good, tmp_path / "c"))
    unread = 0
    for name in ("__0_0.distcp", "__1_0.distcp"):
        for offset, size, _ in manifest["files"][name]["chunks"]:
            place = offset + size // 2
            flip(path / name, place)
            model = build(Layout(1), 0, seed=9)
            optimizer = adamw(model, 0, 9)
            try:
                distlib.load(path, model=model, optimizer=optimizer)
                unread += 1
            except RuntimeError as error:
                assert "damaged" in str(error) and differences(model, optimizer, 9) == []
            flip(path / name, place)
    assert unread == 2 + 2 * 3


def _misfits() -> list[Any]:
    def renamed() -> nn.Module:
        model = build(Layout(1, "plain"), 0, 9)
        model.core = model.kernel
        del model._parameters["kernel"]
        return model

    def with_kernel(tensor: torch.Tensor) -> nn.Module:
        model = build(Layout(1, "plain"), 0, 9)
        model._parameters["kernel"] = nn.Parameter(tensor)
        return model

    def untied() -> nn.Module:
        model = build(Layout(1, "plain"), 0, 9)
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        return model

    def tied() -> nn.Module:
        model = build(Layout(1, "plain"), 0, 9)
        model.copy = model.kernel
        return model

    return [
        pytest.param(renamed, r"of another model: the checkpoint lacks 'core'; the model lacks 'kernel'", id="names"),
        pytest.param(
            lambda: with_kernel(torch.zeros(3, 2, 5, 3)),
            r"'kernel' has shape \(3, 2, 3, 5\) .* \(3, 2, 5, 3\)",
            id="shape",
        ),
        pytest.param(
            lambda: with_kernel(torch.zeros(3, 2, 3, 5).half()),
            r"'kernel' .* torch.float32 .* torch.float16",
            id="dtype",
        ),
        pytest.param(
            untied, "'head.weight' and 'embedding.weight' are tied in the checkpoint, not in the model", id="untied"
        ),
        pytest.param(tied, "are tied in the model, not in the checkpoint", id="tied"),
    ]


@pytest.mark.parametrize(("make", "words"), _misfits())
def test_a_model_that_does_not_fit_is_refused_and_left_alone(make: Any, words: str, good: Path) -> None:
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=words) as caught:
        distlib.load(good, model=model)
    assert str(good) in str(caught.value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_an_index_that_would_run_code_is_not_loaded(good: Path, tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "proof"),)

    path = Path(shutil.copytree(good, tmp_path / "c"))
    data = pickle.dumps(Evil())
    (path / ".metadata").write_bytes(data)
    body = json.loads((path / "manifest.json").read_bytes())
    del body["crc32"]
    body["files"][".metadata"] = {"bytes": len(data), "chunks": [[0, len(data), zlib.crc32(data)]]}
    body["crc32"] = zlib.crc32(json.dumps(body, sort_keys=True).encode())
    (path / "manifest.json").write_text(json.dumps(body))
    with pytest.raises(RuntimeError, match="names (posix|nt).mkdir, which is no part of an index"):
        distlib.load(path, model=build(Layout(1), 0))
    assert not (tmp_path / "proof").exists()


def _reads_only_its_own(rank: int, n: int, path: Path) -> int:
    from distlib.checkpoint.reader import Checkpoint

    read: list[int] = []
    real = Checkpoint._content

    def counted(self: Any, record: Any, check: bool = True) -> bytes:
        if record.name.startswith("model.") and check:
            read.append(record.size)
        return real(self, record, check)

    Checkpoint._content = counted  # type: ignore[method-assign]
    with process_group(rank, n):
        distlib.load(path, model=_big(rank, n), rng=False)
    return sum(read)


def _big(rank: int, n: int) -> nn.Module:
    from checkpoint_models import cut

    return cut(nn.Linear(1024, 8192, bias=False), Layout(n), rank)


def _save_big(rank: int, n: int, path: Path) -> None:
    with process_group(rank, n):
        distlib.save(path, model=_big(rank, n), rng=False)


def test_a_rank_reads_no_more_than_its_pieces_and_their_chunks(tmp_path: Path) -> None:
    run_ranks(1, _save_big_cut, tmp_path / "c")
    sizes = run_ranks(3, _reads_only_its_own, tmp_path / "c")
    pieces = [4 * Layout(3).piece(0, 1024 * 8192, rank)[1] for rank in range(3)]
    for size, piece in zip(sizes, pieces, strict=True):
        assert piece <= size < piece + 3 * (1 << 20), (size, piece)


def _save_big_cut(rank: int, n: int, path: Path) -> None:
    from distlib.checkpoint import layout

    layout.chunks.__defaults__ = (1 << 20,)
    _save_big(rank, n, path)
