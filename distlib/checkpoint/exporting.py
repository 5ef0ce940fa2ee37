"""`export()`: the module's weights of a checkpoint in one safetensors file, tensor by tensor."""

from __future__ import annotations

import json
import math
import os
import secrets
import struct
from pathlib import Path
from typing import Any

import torch

from distlib.checkpoint import folder, saving
from distlib.checkpoint.model_state import MODEL
from distlib.checkpoint.reader import Checkpoint

ALIASES = "distlib.aliases"
# The names that the safetensors format has for dtypes.
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def export(path: str | os.PathLike[str], file: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Write the parameters and buffers of a checkpoint into one safetensors file. One process calls it, without ranks.

    Names are the module's own. The format forbids that two names share memory: tied parameters are stored once, under
    the name that comes first in the module, and the file's metadata tell the others, as JSON in "distlib.aliases":
    {"lm_head.weight": "wte.weight"}. The metadata say {"format": "pt"} too, as `transformers` wants, which ties
    such parameters itself.

    A save of this process into the folder, in the background, is waited for. Needs memory for one tensor at a time;
    checksums are checked. `file` is replaced in one move at the end. Needs
    `pip install distlib-train[checkpoint]`.

    Args:
        path: a checkpoint folder.
        file: to write.
        dtype: of floating-point tensors in the file; default: as saved.

    Raises:
        ValueError, RuntimeError: as `load`. ImportError: safetensors is not installed.
    """
    safe_open = _safe_open()
    if dtype is not None and not (dtype.is_floating_point and dtype in _NAMES):
        raise ValueError(f"dtype={dtype}: choose a floating-point type, such as torch.bfloat16")
    source = folder.real(path)
    saving.settle_at(source)
    folder.recover(source)
    checkpoint = Checkpoint(source)
    aliases = checkpoint.manifest.aliases
    names = [n for n in checkpoint.tensors if n.startswith(MODEL) and n.removeprefix(MODEL) not in aliases]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    if aliases:
        header["__metadata__"][ALIASES] = json.dumps(aliases)
    place = 0
    for name in names:
        entry = checkpoint.tensors[name]
        kind = dtype if dtype is not None and entry.properties.dtype.is_floating_point else entry.properties.dtype
        if kind not in _NAMES:
            raise ValueError(f"'{name.removeprefix(MODEL)}' is {kind}, which safetensors files cannot hold")
        size = math.prod(entry.size) * kind.itemsize
        facts = {"dtype": _NAMES[kind], "shape": list(entry.size), "data_offsets": [place, place + size]}
        header[name.removeprefix(MODEL)] = facts
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    to = Path(file)
    aside = to.with_name(f".{to.name}.{folder.SAVING}-{secrets.token_hex(8)}")
    try:
        with aside.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                tensor = checkpoint.tensor(name)
                if dtype is not None and tensor.is_floating_point():
                    tensor = tensor.to(dtype)
                out.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
            out.flush()
            os.fsync(out.fileno())
        with safe_open(aside, framework="pt") as written:  # the library's own opinion of what was written
            if set(written.keys()) != {name.removeprefix(MODEL) for name in names}:
                raise RuntimeError(f"{aside}: safetensors does not find in it what was written to it")
        os.replace(aside, to)
    finally:
        aside.unlink(missing_ok=True)


def _safe_open() -> Any:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError("export needs the package safetensors: pip install 'distlib-train[checkpoint]'") from error
    return safe_open
