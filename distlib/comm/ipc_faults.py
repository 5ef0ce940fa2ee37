"""What a kernel's status means, in words: which collective, which number, which ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from distlib import native

_REDUCES = ("all_reduce", "reduce", "reduce_scatter")
_ROOTED = ("reduce", "broadcast", "gather", "scatter")


@dataclass(frozen=True)
class Place:
    """A rank in its group. labels: the ranks' global ranks; pids: their processes, by group rank."""

    group: str
    rank: int
    labels: list[int]
    pids: dict[int, int]

    def rank_name(self, r: int) -> str:
        return f"rank {self.labels[r]} (pid {self.pids[r]})"


@lru_cache(maxsize=1)
def _dtype_names() -> dict[int, str]:
    dtypes = {d for d in vars(torch).values() if isinstance(d, torch.dtype)}
    return {native.dtype_codes(d)[1]: str(d).removeprefix("torch.") for d in dtypes}


def collective_text(what: Any) -> str:
    """A collective, as its ranks compare it: `all_reduce(float32, 100 elements, sum)`."""
    kind = native.KINDS[what.kind]
    if kind == "barrier":
        return kind
    text = f"{kind}({_dtype_names().get(what.dtype, 'other dtype')}, {what.count} elements"
    if kind in _REDUCES:
        text += f", {native.OPS[what.op]}"
    if kind in _ROOTED:
        text += f", root {what.root}"
    return text + ")"


def failure_text(place: Place, status: Any, operation: Any) -> tuple[str, str]:
    """Why a kernel ended early: a sentence, and one of native.CODES. operation: it, where it is still known."""
    what = operation.what if operation is not None else ("a message" if status.is_message else "a collective")
    where = f"{what} #{status.sequence} of group '{place.group}'"
    code = native.CODES[status.code]
    if code == "timeout":
        late = [place.rank_name(r) for r in range(len(place.labels)) if status.missing >> r & 1]
        limit = "its timeout" if operation is None else f"the timeout of {operation.seconds:.1f} s"
        return f"{where} ran into {limit} on {place.rank_name(place.rank)}, waiting for: {', '.join(late)}", code
    if code != "mismatch":
        return f"{where} was ended on {place.rank_name(place.rank)}", code
    if status.src < 0:
        calls = [
            f"rank {label} called {collective_text(status.seen[r])}"
            + ("" if status.seen[r].sequence == status.sequence else f" as its #{status.seen[r].sequence}")
            for r, label in enumerate(place.labels)
        ]
        text = f"ranks disagree in call #{status.sequence} of group '{place.group}': {'; '.join(calls)}. "
        return text + "Every rank must make the same calls in the same order", code
    src, dst = place.labels[status.src], place.labels[status.dst]
    tags = ""
    if status.is_message:
        where = f"message #{status.sequence} from rank {src} to rank {dst} of group '{place.group}'"
        if status.sent_tag != status.expected_tag:
            tags = (
                f"; its tag is {status.sent_tag}, not {status.expected_tag}: on a device messages between two ranks "
                "are received in the order in which they were sent"
            )
    sizes = f"rank {src} sends {status.sent} bytes to rank {dst}, which expects {status.expected}"
    return f"{where}: {sizes}{tags}", code
