"""One checkpoint written by all ranks: begin together, write alone, finish together."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distlib.checkpoint import folder, writer
from distlib.checkpoint.layout import Chunk, Piece
from distlib.checkpoint.manifest import Manifest
from distlib.checkpoint.model_state import MODEL
from distlib.checkpoint.optimizer_state import STATE
from distlib.checkpoint.ranks import Ranks
from distlib.checkpoint.writer import Planned, RankFile

_PLANS, _PLAN = "plans", "plan"


@dataclass
class Job:
    """What this rank is to write. contents: by plan; made while it is written, unless it was staged."""

    plan: list[Planned]
    contents: Iterable[torch.Tensor | bytes]
    note: dict[str, Any]  # what rank 0 compares
    manifest: Manifest  # without files


def planned(piece: Piece, chunk: Chunk) -> Planned:
    """The record of a chunk."""
    shape = tuple(piece.shape)
    return Planned(piece.name, path_of(piece.name), piece.tensor.dtype, shape, chunk.offsets, chunk.sizes)


def path_of(name: str) -> tuple[str, ...]:
    """Where a tensor stands in the nested state dict that DCP's tools make of a checkpoint."""
    if name.startswith(STATE):
        parameter, _, key = name.removeprefix(STATE).rpartition(".")
        return "optimizer", "state", parameter, key
    return "model", name.removeprefix(MODEL)


def write(ranks: Ranks, target: Path, job: Job | None, error: BaseException | None) -> None:
    """Begin together, write alone, finish together."""
    what = f"save to {target}"
    note = {key: value for key, value in job.note.items() if key != "extra bytes"} if job is not None else None
    start = ranks.agree(note, error, lambda notes: _begin(target, notes), what)
    assert job is not None
    token, by_rank, kinds, job.manifest.replicas = start
    if job.manifest.optimizer is not None:
        job.manifest.optimizer["kinds"] = kinds
    aside = folder.aside(target, folder.SAVING, token)
    own = _extra_of(job, by_rank, ranks.rank)
    plan = job.plan + [record for record, _ in own]

    def write_own() -> RankFile:
        def contents() -> Iterator[torch.Tensor | bytes]:
            yield from job.contents
            yield from (data for _, data in own)

        records = writer.write_rank_file(aside / writer.file_name(ranks.rank), contents())
        return RankFile(records, None if ranks.kept.get(_PLAN) == plan else plan)

    written, error = ranks.patiently(write_own)
    if isinstance(error, FileNotFoundError):
        error = RuntimeError(f"{error}: {target.parent} must be on a file system that all ranks share")
    try:
        ranks.agree(written, error, lambda files: _finish(ranks, target, token, job, by_rank, files), what)
    except BaseException:
        ranks.kept.pop(_PLAN, None)
        ranks.kept.pop(_PLANS, None)
        if ranks.rank == 0:
            folder.discard(target, token)
        raise
    ranks.kept[_PLAN] = plan


def _begin(target: Path, notes: list[dict[str, Any]]) -> tuple[str, list[str], dict[str, str], list[int]]:
    """On rank 0: that all ranks save the same; the folder.

    Returns its token, the keys of `extra` that differ, the kinds of optimizer state that any rank knows, and each
    rank's replica.
    """
    words = {
        "path": "different paths",
        "facts": "models whose names, shapes, dtypes or ties differ",
        "step": "different steps",
        "parts": "different parts (optimizer, scaler, rng)",
    }
    for rank, note in enumerate(notes):
        for key, told in words.items():
            if note[key] != notes[0][key]:
                raise ValueError(f"ranks 0 and {rank} save {told}: {notes[0][key]} and {note[key]}")
        if note["extra"].keys() != notes[0]["extra"].keys():
            raise ValueError(
                f"extra has the keys {sorted(notes[0]['extra'])} on rank 0, {sorted(note['extra'])} on rank {rank}"
            )
    kinds: dict[str, str] = {}
    for rank, note in enumerate(notes):
        for key, kind in note["kinds"].items():
            if kinds.setdefault(key, kind) != kind:
                raise ValueError(
                    f"optimizer state '{key}' is a {kind} on rank {rank}, a {kinds[key]} on a rank before it"
                )
    token = secrets.token_hex(8)
    folder.begin(target, token)
    differ = [key for key in notes[0]["extra"] if len({note["extra"][key] for note in notes}) > 1]
    return token, differ, kinds, [note["replica"] for note in notes]


def _extra_of(job: Job, by_rank: list[str], rank: int) -> list[tuple[Planned, bytes]]:
    """What this rank writes of `extra`: its own where ranks differ; the rest is rank 0's to write."""
    found = []
    for key, data in job.note["extra bytes"].items():
        if key in by_rank:
            path: tuple[str, ...] = ("extra_by_rank", key, str(rank))
        elif rank == 0:
            path = ("extra", key)
        else:
            continue
        found.append((Planned(".".join(path), path), data))
    return found


def _finish(ranks: Ranks, target: Path, token: str, job: Job, by_rank: list[str], files: list[RankFile]) -> None:
    """On rank 0: index, manifest, and the folder in its place."""
    before = ranks.kept.get(_PLANS) or [None] * ranks.size
    plans = [file.plan if file.plan is not None else old for file, old in zip(files, before, strict=True)]
    if any(plan is None for plan in plans):
        raise RuntimeError("a rank says that its plan is the last save's, of which rank 0 knows nothing")
    aside = folder.aside(target, folder.SAVING, token)
    manifest = job.manifest
    aliases = {MODEL + alias: MODEL + name for alias, name in manifest.aliases.items()}
    manifest.save_id = token
    manifest.by_rank = by_rank
    manifest.shared = [key for key in job.note["extra"] if key not in by_rank]
    manifest.files = writer.write_index(aside, plans, [file.records for file in files], aliases)
    folder.on_phase("indexed")
    folder.write_file(aside / folder.MANIFEST, manifest.to_bytes())
    folder.on_phase("manifest")
    folder.commit(target, token)
    ranks.kept[_PLANS] = plans
