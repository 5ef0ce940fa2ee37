"""Ranks agree: what must be equal everywhere and which ranks differ; one finds for all; all succeed or none."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from distlib.comm.group import Group
from distlib.words import ranks_text, words_of

_SHOWN = 8  # differences listed in a message


def exchange(group: Group, note: bytes, device: torch.device) -> list[bytes]:
    """Every rank's note, in rank order. A collective: every rank of the group must call it."""
    length = torch.tensor([len(note)], dtype=torch.int64, device=device)
    lengths = torch.empty(group.size, dtype=torch.int64, device=device)
    group.all_gather(lengths, length)
    longest = int(lengths.max())
    if longest == 0:
        return [b""] * group.size
    mine = torch.frombuffer(bytearray(note.ljust(longest, b"\0")), dtype=torch.uint8).to(device)
    everyone = torch.empty(group.size * longest, dtype=torch.uint8, device=device)
    group.all_gather(everyone, mine)
    raw = everyone.cpu().numpy().tobytes()
    return [raw[r * longest : r * longest + n] for r, n in enumerate(lengths.tolist())]


def require_equal(group: Group, what: str, facts: Sequence[tuple[str, str]], device: torch.device) -> None:
    """Check that all ranks hold the same facts, in the same order. Every rank of the group must call it.

    Args:
        what: how to name the whole in the message.
        facts: (name, description) pairs, e.g. ("fc.weight", "shape (3, 4), float32").

    Raises:
        RuntimeError: on every rank, naming the facts that differ and the ranks that hold each version.
    """
    if group.size == 1 or group.counts_only:
        return
    text = "\n".join(f"{name}\t{description}" for name, description in facts)
    digests = exchange(group, hashlib.sha256(text.encode()).digest(), device)
    if len(set(digests)) == 1:
        return
    versions = [
        dict(line.split("\t", 1) for line in note.decode().splitlines())
        for note in exchange(group, text.encode(), device)
    ]
    names = list(dict.fromkeys(name for version in versions for name in version))
    lines = []
    for name in names:
        held: dict[str, list[int]] = {}
        for rank, version in enumerate(versions):
            held.setdefault(version.get(name, "absent"), []).append(rank)
        if len(held) > 1:
            lines.append(f"  {name}: " + "; ".join(f"{v} on {ranks_text(r)}" for v, r in held.items()))
    if not lines:
        lines.append("  the same names in a different order")
    if len(lines) > _SHOWN:
        lines[_SHOWN:] = [f"  and {len(lines) - _SHOWN} more"]
    raise RuntimeError(
        f"{what} must be the same on all {group.size} ranks of group {group.name!r}, but differ:\n"
        + "\n".join(lines)
        + "\nBuild the same module, with the same options, on every rank."
    )


def _portable(error: BaseException) -> Exception:
    """An error that the other ranks can raise: as it is, or in words."""
    try:
        str(pickle.loads(pickle.dumps(error))).encode()
    except Exception:  # noqa: BLE001 - for whatever reason it cannot be sent, or said
        return RuntimeError(f"{type(error).__name__}: {words_of(error)}")
    return error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {words_of(error)}")


def from_first(ranks: dist.ProcessGroup | None, find: Callable[[], Any]) -> Any:
    """What the first rank of a group finds, on all of its ranks; where it fails, it fails on all. A collective."""
    return from_rank(Group.of(ranks).ranks[0], ranks, find)


def from_rank(root: int, ranks: dist.ProcessGroup | None, find: Callable[[], Any]) -> Any:
    """The same of what the global rank `root` finds. Where it cannot be sent, that fails on all, too."""
    group = Group.of(ranks)
    found: Any = None
    sent: list[Any] = [None]  # bytes, or the error
    own: BaseException | None = None
    if group.ranks[group.rank] == root:
        try:
            found = find()
            if group.size > 1:
                sent = [pickle.dumps(found)]
        except BaseException as error:  # an interrupt, too: the others wait
            if group.size == 1:
                raise
            own, sent = error, [_portable(error)]
    if group.size == 1:
        return found
    dist.broadcast_object_list(sent, src=root, group=ranks)
    if own is not None and not isinstance(own, Exception):
        raise own
    if isinstance(sent[0], Exception):
        raise sent[0] from own
    return found if group.ranks[group.rank] == root else pickle.loads(sent[0])


def all_or_none(group: dist.ProcessGroup | None, run: Callable[[], Any]) -> Any:
    """What `run` returns on this rank; where it fails on some ranks of the group, all raise, with what these say. A
    collective."""
    size = Group.of(group).size
    if size == 1:
        return run()
    error: BaseException | None = None
    found = None
    try:
        found = run()
    except BaseException as own:  # noqa: BLE001 - whatever it is, the other ranks are told, and all raise
        error = own
    errors: list[Exception | None] = [None] * size
    dist.all_gather_object(errors, None if error is None else _portable(error), group=group)
    failed = [e for e in errors if e is not None]
    if not failed:
        return found
    if error is not None and not isinstance(error, Exception):
        raise error
    texts = list(dict.fromkeys(map(str, failed)))
    if len(texts) > 1 and all(type(e) is ValueError for e in failed):
        raise ValueError("\n".join(texts)) from error
    raise error or failed[0]
