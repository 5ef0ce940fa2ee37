"""`save()`: plan and copy here, write in the background or at once, put in place together."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import time
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distlib.checkpoint import folder, layout, random_state, writer
from distlib.checkpoint.layout import Chunk, Piece
from distlib.checkpoint.manifest import Manifest
from distlib.checkpoint.model_state import MODEL, ModelState, model_state, replica_of
from distlib.checkpoint.optimizer_state import STATE, OptimizerState, optimizer_state
from distlib.checkpoint.ranks import Ranks, attempt
from distlib.checkpoint.writer import Planned
from distlib.checkpoint.writing import Job, planned, write
from distlib.shards import PartOfModel, part_of
from distlib.world import before_shutdown

log = logging.getLogger("distlib.checkpoint")
_LATEST, _STAGE = "latest save", "staging"


class SaveHandle:
    """A save that goes on in the background.

    stall: the seconds for which `save` kept the training waiting on this rank.
    """

    def __init__(self, path: Path, stall: float, future: Future[None]) -> None:
        self.path, self.stall, self._future = path, stall, future
        self._told = False

    def done(self) -> bool:
        """Whether the save has ended on this rank, well or not."""
        return self._future.done()

    def wait(self, timeout: float | None = None) -> None:
        """Until the checkpoint is in place. Raises what went wrong, on all ranks alike.

        timeout: seconds; then TimeoutError, and the save goes on.
        """
        error = self._future.exception(timeout)
        self._told = True
        if error is not None:
            raise error

    def _settle(self) -> None:
        """The same before the next save or load, for an error that nobody was told of."""
        error = self._future.exception()
        if error is not None and not self._told:
            self._told = True
            raise RuntimeError(f"the save of {self.path} in the background had failed: {error}") from error


def save(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: Any = None,
    step: int | None = None,
    extra: dict[str, Any] | None = None,
    rng: bool = True,
    asynchronous: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> SaveHandle | None:
    """Save the training into the folder `path`, which is replaced at the end and in one move. Every rank must call it.

    Each rank writes the pieces that it holds, and what several hold is divided among them. The checkpoint knows whole
    parameters and no ranks: `load` brings it into any other world size or partition. Until the new checkpoint is
    complete and on disk, `path` stays as it was, also when processes are killed. `path` must be on a file system that
    all ranks share. Two jobs must not save under one name at a time.

    Args:
        model: a plain module, `distlib.DataParallel` or a sharded module: parameters and persistent buffers.
        optimizer: any `torch.optim.Optimizer` over the model's parameters, whose state are tensors of the parameters'
            own geometry and scalars. It is saved by parameters' names.
        scaler: anything with state_dict() and load_state_dict(); equal on all ranks.
        step: the number of steps done; `load` gives it back.
        extra: by name, values or objects with state_dict(), such as a data loader's position or a loss curve. Anything
            that pickle can write. Where ranks differ, each one's is kept.
        rng: also the states of Python's, numpy's and torch's random number generators, of every rank.
        asynchronous: copy to host memory and return; a thread writes. A later save or load waits for it. The memory
            is kept for the next save. `distlib.shutdown()` waits for the last one, too.
        process_group: the ranks that hold the model; default: all.

    Returns:
        A `SaveHandle` if asynchronous, else None.

    Raises:
        ValueError, RuntimeError: on all ranks, naming the rank, file or parameter; what was at `path` is untouched. If
            asynchronous, `SaveHandle.wait`, or the next save or load, raises it.
    """
    begun = time.perf_counter()
    target = folder.real(path)
    ranks = Ranks.of(process_group)
    settle(ranks)

    def prepare() -> Job:
        _check(step, extra)
        state = model_state(model, ranks.rank, ranks.size)
        state_of = optimizer_state(optimizer, state) if optimizer is not None else None
        objects = _objects(ranks, part_of(model), state_of, scaler, rng)
        own_extra = {key: _pickled(key, state_of_object(value)) for key, value in (extra or {}).items()}
        manifest = Manifest(
            save_id="",
            world_size=ranks.size,
            step=step,
            aliases={a.removeprefix(MODEL): n.removeprefix(MODEL) for a, n in state.aliases.items()},
            optimizer={"class": type(optimizer).__name__, "kinds": state_of.kinds} if state_of is not None else None,
            scaler=scaler is not None,
            rng=rng,
        )
        replica = replica_of(model, ranks.rank)
        return _job(ranks, target, replica, state, state_of, objects, own_extra, manifest, asynchronous)

    job, error = attempt(prepare)  # where it fails, the other ranks are told in write()
    stall = time.perf_counter() - begun
    if not asynchronous:
        write(ranks, target, job, error)
        log.info("saved %s in %.3f s", target, time.perf_counter() - begun)
        return None
    handle = SaveHandle(target, stall, ranks.thread.submit(_in_background, ranks, target, job, error))
    ranks.kept[_LATEST] = handle
    _under_way.add(handle)
    before_shutdown(_settle_all)
    log.info("saving %s in the background: the training stalled for %.3f s", target, stall)
    return handle


def settle(ranks: Ranks) -> None:
    """Waits for the save in the background, whose group the next call uses, too. Raises what nobody was told of."""
    latest = ranks.kept.get(_LATEST)
    if latest is not None:
        ranks.kept[_LATEST] = None
        latest._settle()


def settle_at(path: Path) -> None:
    """The same of any ranks, for a save of this process into the folder `path`."""
    for handle in list(_under_way):
        if handle.path == path:
            handle._settle()


_under_way: weakref.WeakSet[SaveHandle] = weakref.WeakSet()


def _settle_all() -> None:
    """Before process groups go: all saves are over, and their errors told."""
    for handle in list(_under_way):
        handle._settle()


def _check(step: int | None, extra: dict[str, Any] | None) -> None:
    if step is not None and (isinstance(step, bool) or not isinstance(step, int)):
        raise ValueError(f"step={step!r} is no int: pass the number of steps done")
    if extra is not None and not (isinstance(extra, dict) and all(isinstance(key, str) for key in extra)):
        raise ValueError("extra must be a dict with names as keys, such as {'sampler': sampler}")


def state_of_object(value: Any) -> Any:
    """What is saved of a value in `extra`."""
    return value.state_dict() if callable(getattr(value, "state_dict", None)) else value


def _pickled(key: str, value: Any) -> tuple[bytes, str]:
    """What is saved of a value in `extra`, and a digest, which is the same on ranks that have equal values."""
    try:
        data = writer.to_bytes(value)
        try:
            alike = _in_order(value)
        except RecursionError:  # it holds itself: it is compared as it is
            alike = value
        told = data if alike is value else writer.to_bytes(alike)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(f"extra[{key!r}] cannot be pickled: {error}") from error
    return data, hashlib.sha256(told).hexdigest()


def _in_order(value: Any) -> Any:
    """A value with lists for the sets that it holds: processes go through equal sets of text in different orders. The
    value itself where it holds none."""
    kind = type(value)
    if kind in (set, frozenset):
        return [kind.__name__, *sorted(pickle.dumps(_in_order(one)) for one in value)]
    if kind not in (dict, list, tuple):
        return value
    held = list(value.values()) if kind is dict else value
    ordered = [_in_order(one) for one in held]
    if all(a is b for a, b in zip(held, ordered, strict=True)):
        return value
    return dict(zip(value, ordered, strict=True)) if kind is dict else kind(ordered)


def _objects(
    ranks: Ranks,
    part: PartOfModel | None,
    state: OptimizerState | None,
    scaler: Any,
    rng: bool,
) -> dict[tuple[str, ...], bytes]:
    """All that is no tensor, but `extra`, by its place in a nested state dict. Every rank has its own `rng`."""
    found: dict[tuple[str, ...], bytes] = {}
    if state is not None:
        for name, value in state.objects.items():
            parameter, _, key = name.removeprefix(STATE).rpartition(".")
            found[("optimizer", "state", parameter, key)] = writer.to_bytes(value)
    if ranks.rank == 0 and state is not None:
        found[("optimizer", "param_groups")] = writer.to_bytes(state.groups)
    elif state is not None and part is not None and part.replica == 0:  # of parameters that rank 0 does not have
        found[("optimizer", "param_groups_of", str(ranks.rank))] = writer.to_bytes(state.groups)
    if ranks.rank == 0 and scaler is not None:
        found[("scaler",)] = writer.to_bytes(scaler.state_dict())
    if rng:
        found[("rng", str(ranks.rank))] = writer.to_bytes(random_state.capture())
    return found


def _job(
    ranks: Ranks,
    target: Path,
    replica: int,
    state: ModelState,
    of_optimizer: OptimizerState | None,
    objects: dict[tuple[str, ...], bytes],
    extra: dict[str, tuple[bytes, str]],
    manifest: Manifest,
    stage: bool,
) -> Job:
    """The plan of this rank's file and what goes into it. extra: by key, the bytes and their digest."""
    pieces = state.pieces + (of_optimizer.pieces if of_optimizer is not None else [])
    cuts = list(layout.chunks(pieces))
    plan = [planned(pieces[chunk.piece], chunk) for chunk in cuts]
    tensors: Iterable[torch.Tensor] = _chunk_tensors(pieces, cuts)
    if stage:
        tensors = _staged(ranks, plan, tensors)
    plan += [Planned(".".join(path), path) for path in objects]

    def contents() -> Iterator[torch.Tensor | bytes]:
        yield from tensors
        yield from objects.values()

    whole = state.tensors
    note = {
        "path": str(target),
        "facts": hashlib.sha256(repr((whole, sorted(manifest.aliases.items()))).encode()).hexdigest(),
        "names": len(whole),
        "step": manifest.step,
        "replica": replica,
        "parts": (manifest.optimizer and manifest.optimizer["class"], manifest.scaler, manifest.rng),
        "kinds": manifest.optimizer["kinds"] if manifest.optimizer else {},
        "extra": {key: digest for key, (_, digest) in extra.items()},
        "extra bytes": {key: data for key, (data, _) in extra.items()},
    }
    return Job(plan, contents(), note, manifest)


def _chunk_tensors(pieces: list[Piece], cuts: list[Chunk]) -> Iterator[torch.Tensor]:
    """The chunks' elements on the CPU, in the shapes of their boxes."""
    for chunk in cuts:
        flat = pieces[chunk.piece].tensor.reshape(-1)
        yield flat[chunk.start : chunk.start + chunk.numel].view(chunk.sizes).cpu()


def _staged(ranks: Ranks, plan: list[Planned], tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of the chunks in host memory, which is kept and used again by the next save."""
    before: dict[Any, torch.Tensor] = ranks.kept.get(_STAGE, {})
    now: dict[Any, torch.Tensor] = {}
    for box, tensor in zip(plan, tensors, strict=True):
        key = box.name, box.offsets
        home = before.get(key)
        if home is None or home.shape != tensor.shape or home.dtype != tensor.dtype:
            home = torch.empty(tensor.shape, dtype=tensor.dtype)
        now[key] = home.copy_(tensor)
    ranks.kept[_STAGE] = now
    return list(now.values())


def _in_background(ranks: Ranks, target: Path, job: Job | None, error: BaseException | None) -> None:
    try:
        write(ranks, target, job, error)
    except BaseException as failure:
        log.error("the save of %s in the background failed: %s", target, failure)
        raise
    log.info("saved %s in the background", target)
