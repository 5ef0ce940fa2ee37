"""What goes before the tensors of a message: what they are, in a fixed number of bytes. Pure.

    | kind | step | micro-batch | tensors | checksum | slot | text ...   |      int64 each, then UTF-8 padded with zeros
    0      8      16            24        32         40     48        1024

Both ends make one, the sender of what it sends, the receiver of what it expects; they are compared.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from distlib.pipeline.program import Spec

BYTES = 1024
_NUMBERS = struct.Struct("=6q")
_TEXT = BYTES - _NUMBERS.size
HELLO, DATA, ABORT = 1, 2, 3  # kinds; what never came is none of them
_NO_SLOT = -1


class Header(NamedTuple):
    """kind: HELLO opens a channel, DATA goes with tensors, ABORT with the words of a fault.

    step: by the sender's count, or the receiver's. tensors: how many. checksum, text: of their shapes and dtypes. slot:
    its offset in the sender's arena, where the tensors lie in one.
    """

    kind: int
    step: int = 0
    micro_batch: int = -1
    tensors: int = 0
    checksum: int = 0
    slot: int = _NO_SLOT
    text: str = ""

    @staticmethod
    def of(micro_batch: int, specs: Iterable[Spec], step: int = 0) -> Header:
        """Of tensors with these specs; requires_grad does not count."""
        found = _of_tensors(tuple((tuple(s.shape), s.dtype) for s in specs))
        return found._replace(step=step, micro_batch=micro_batch)

    def in_slot(self, offset: int) -> Header:
        """The same, of tensors in a slot."""
        return self._replace(slot=offset)

    def pack(self) -> Tensor:
        """As uint8 [BYTES]."""
        buffer = bytearray(BYTES)
        _NUMBERS.pack_into(buffer, 0, *self[:6])
        text = self.text.encode()
        buffer[_NUMBERS.size : _NUMBERS.size + min(len(text), _TEXT)] = text[:_TEXT]
        return torch.frombuffer(buffer, dtype=torch.uint8)

    @staticmethod
    def unpack(packed: Tensor) -> Header:
        """From what `pack` made."""
        buffer = packed.numpy().tobytes()
        text = buffer[_NUMBERS.size :].rstrip(b"\0").decode(errors="ignore")
        kind, step, micro_batch, tensors, checksum, slot = _NUMBERS.unpack_from(buffer)
        return Header(kind, step, micro_batch, tensors, checksum, slot, text)

    def agrees(self, other: Header) -> bool:
        """Whether two ends mean the same message."""
        return self[:5] == other[:5]


def empty() -> Tensor:
    """Room for a packed header."""
    return torch.zeros(BYTES, dtype=torch.uint8)


def disagreement(sent: Header, expected: Header, sender: int, receiver: int) -> str:
    """Words for two headers that do not agree, the same on both ends; `sender`, `receiver` are global ranks."""
    if sent.step != expected.step:
        return (
            f"rank {sender} is at its step {sent.step}, rank {receiver} at its step {expected.step}: one of them took "
            "a step that the other did not, or was refused its batch. Every rank must take every step"
        )
    if sent.micro_batch != expected.micro_batch:
        return (
            f"rank {sender} sent micro-batch {sent.micro_batch}, rank {receiver} expects micro-batch "
            f"{expected.micro_batch}: their tables differ. Every rank must run the same schedule on equal batches"
        )
    return (
        f"rank {sender} sent {sent.text}; rank {receiver} expects {expected.text}. Was one of them given a batch of "
        "another size, or another sequence length? Give every rank inputs of equal shapes, or say shape_header=True"
    )


@lru_cache(maxsize=1024)
def _of_tensors(tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...]) -> Header:
    words = [f"{str(dtype).removeprefix('torch.')} {list(shape)}" for shape, dtype in tensors]
    checksum = zlib.crc32(";".join(words).encode())
    return Header(DATA, tensors=len(tensors), checksum=checksum, text=_shortened(words))


def _shortened(words: Sequence[str]) -> str:
    """A list of tensors that fits into a header, with how many were left out."""
    room = _TEXT - 40
    kept: list[str] = []
    for word in words:
        if len(", ".join([*kept, word])) > room:
            break
        kept.append(word)
    more = [f"... {len(words) - len(kept)} more"] if len(kept) < len(words) else []
    return ", ".join([*kept, *more]) or "no tensor"
