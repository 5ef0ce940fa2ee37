"""Tensors as collectives take them: strided, on one device, contiguous, or with contiguous stand-ins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch


def readable(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Contiguous tensors with the same values, on the same device."""
    return [_strided(t).contiguous().resolve_conj().resolve_neg() for t in tensors]


def writable(tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], Callable[[], None] | None]:
    """Contiguous stand-ins for tensors that are not, and what copies them home; None where there are none."""
    if all(t.is_contiguous() and not t.is_conj() and not t.is_neg() for t in map(_strided, tensors)):
        return tensors, None
    inner = readable(tensors)

    def finish() -> None:
        with torch.no_grad():
            for home, stand_in in zip(tensors, inner, strict=True):
                if home is not stand_in:
                    home.copy_(stand_in)

    return inner, finish


def device_of(what: str, tensors: Iterable[torch.Tensor]) -> torch.device | None:
    """The device of all of them; None: there are none. ValueError where they are on several."""
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise ValueError(f"{what}: tensors on {names} were given to one call: move them to one device")
    return devices.pop() if devices else None


def check_dtype(what: str, tensors: Iterable[torch.Tensor]) -> None:
    """ValueError where they have several dtypes: it is bytes that travel."""
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(f"{what}: tensors of {names} were given to one call, which converts none: convert them first")


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout is not torch.strided:
        raise ValueError(f"a tensor of layout {tensor.layout} was given; only strided tensors can be communicated")
    return tensor


def as_one(pieces: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The flat tensor of which equal contiguous pieces are the parts, in order; None where they lie elsewhere."""
    first = pieces[0]
    each = first.numel()
    start, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for i, piece in enumerate(pieces):
        if piece.numel() != each or piece.untyped_storage().data_ptr() != storage:
            return None
        if piece.storage_offset() != start + i * each:
            return None
    return first.as_strided((each * len(pieces),), (1,), start)


_NCCL = {torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool}
_NCCL |= {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor that is only moved, as NCCL takes it: one of a dtype that it does not have is bytes to it."""
    return tensor if tensor.dtype in _NCCL else tensor.view(-1).view(torch.uint8)


def outputs(
    what: str, size: int, output: torch.Tensor | Sequence[torch.Tensor], each: int
) -> tuple[list[torch.Tensor], Callable[[], None] | None]:
    """One contiguous tensor of `each` elements per rank to be filled, and what then copies them home."""
    if isinstance(output, torch.Tensor):
        _check_flat(what, "output", output, each, size)
        inner, finish = writable([output])
        return list(inner[0].view(size, each).unbind(0)), finish
    _check_list(what, "output", output, each, size)
    return writable(list(output))


def inputs(what: str, size: int, input: torch.Tensor | Sequence[torch.Tensor], each: int) -> list[torch.Tensor]:
    """One contiguous tensor of `each` elements per rank to be sent."""
    if isinstance(input, torch.Tensor):
        _check_flat(what, "input", input, each, size)
        return list(readable([input])[0].view(size, each).unbind(0))
    _check_list(what, "input", input, each, size)
    return readable(input)


def _check_flat(what: str, name: str, tensor: torch.Tensor, each: int, size: int) -> None:
    if tensor.numel() != each * size:
        raise ValueError(f"{what}: {name} has {tensor.numel()} elements; {size} ranks of {each} need {each * size}")


def _check_list(what: str, name: str, tensors: Sequence[torch.Tensor], each: int, size: int) -> None:
    if len(tensors) != size:
        raise ValueError(f"{what}: {len(tensors)} {name} tensors given, the group has {size} ranks")
    for r, tensor in enumerate(tensors):
        if tensor.numel() != each:
            raise ValueError(f"{what}: {name}[{r}] has {tensor.numel()} elements, {each} are needed")


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor in one dimension of stride 1 (one of 0 or 1 elements may have any stride)."""
    return tensor.as_strided((tensor.numel(),), (1,))


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, as uint8."""
    return flat(tensor).view(torch.uint8)
