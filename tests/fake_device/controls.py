"""Loads the fake device into this process, and what tests ask of it."""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fake_device import build, module

MODES = {"off": 0, "raise": 1, "collect": 2}
CURRENT, HOST = -1, -2  # in the place of a stream's number
DEPTH = 12  # frames of a stack that are kept
TORCH, HERE = str(Path(torch.__file__).parent), str(Path(__file__).parent)  # whose frames tell nobody anything

Stack = tuple[tuple[str, int, str], ...]  # file, line, function; the innermost first


@dataclass(frozen=True)
class Sync:
    """The host waited for the device: by what, and where."""

    what: str
    stack: str

    def __str__(self) -> str:
        return f"{self.what}\n{self.stack}"


_library: ctypes.CDLL | None = None
_stacks: list[Stack] = []
_numbers: dict[Stack, int] = {}


def why_not() -> str | None:
    """Why there can be no fake device here, or None: for a test's skip. Compiles it if that has not been done."""
    return build.why_not()


def load(devices: int | None = None) -> torch.device:
    """Registers the device "fake" in this process, and returns its first. Again: only returns it.

    devices: how many there are; $DISTLIB_FAKE_DEVICES, or 1, by default.
    RuntimeError: this process has run a backward before, so that autograd has no thread for the device.
    """
    global _library
    if _library is None:
        wish = devices if devices is not None else os.environ.get("DISTLIB_FAKE_DEVICES", "1")
        if not str(wish).isdecimal() or not 1 <= int(wish) <= 64:
            raise ValueError(f"{wish!r} fake devices: devices and $DISTLIB_FAKE_DEVICES are a number from 1 to 64")
        count = int(wish)
        library = ctypes.CDLL(str(build.library()))
        library.fake_answer.restype = ctypes.c_void_p
        library.fake_rng_state.restype = ctypes.c_int64
        library.fake_start(count, _take_stack, _tell_stack)
        torch.utils.rename_privateuse1_backend("fake")
        torch._register_device_module("fake", module.make(library, count))
        _library = library
        atexit.register(time.sleep, 0.02)  # autograd's thread needs the GIL to let go of its last graph
        _check_autograd()
    elif devices is not None and devices != torch.accelerator.device_count():
        raise ValueError(f"there are {torch.accelerator.device_count()} fake devices in this process, not {devices}")
    return torch.device("fake", 0)


def _check_autograd() -> None:
    """Autograd makes its threads, one per device, at a process' first backward."""
    x = torch.zeros(1, device="fake", requires_grad=True)
    try:
        (x * 2).sum().backward()
    except RuntimeError as error:
        raise RuntimeError(
            "load() must come before the first backward of a process: call it at the start of a rank (tests/ranks.py)"
        ) from error
    del x
    torch.accelerator.empty_cache()
    reset()


def _loaded() -> ctypes.CDLL:
    if _library is None:
        raise RuntimeError("there is no fake device in this process yet: call fake_device.load() first")
    return _library


# ---- races ----------------------------------------------------------------------------------------------------


def races(mode: str) -> None:
    """What happens on a race: "raise" (at the start), "collect" (see `collected`), or "off": nothing is tracked."""
    if mode not in MODES:
        raise ValueError(f"races({mode!r}): use one of {', '.join(MODES)}")
    _loaded().fake_set_mode(MODES[mode])


def collected() -> list[str]:
    """The races since the last call, or since `reset`, in the mode "collect"."""
    _loaded().fake_take_races()
    return _answer()


def lag(queries: int) -> None:
    """Makes the device slow: an event, asked whether it has passed, says no `queries` times first; 0 at the start."""
    _loaded().fake_set_lag(ctypes.c_int64(queries))


def reset() -> None:
    """Forgets races and host synchronisations. What has been queued is done, as after a synchronisation."""
    _loaded().fake_reset()


def touch(tensor: torch.Tensor, write: bool, name: str = "a kernel", stream: torch.Stream | int | None = None) -> None:
    """A foreign kernel reads or writes `tensor`. Raises RuntimeError if that is a race.

    stream: the one that the kernel is launched on, or its `stream_id`; None: the current one.
    """
    first, size = _extent(tensor)
    touch_memory(first, size, write, name, stream, str(list(tensor.shape)))


def touch_memory(
    address: int,
    size: int,
    write: bool,
    name: str = "a kernel",
    stream: torch.Stream | int | None = None,
    shape: str = "",
) -> None:
    """The same for `size` bytes from `address`; memory that is not the device's is nobody's business."""
    number = CURRENT if stream is None else stream if isinstance(stream, int) else stream.stream_id
    _touch(address, size, write, name, shape or f"{size} bytes", number)


def check_host(tensor: torch.Tensor, write: bool = False) -> None:
    """The host reads or writes a pinned tensor. RuntimeError if a copy under way may still use it."""
    first, size = _extent(tensor)
    _touch(first, size, write, "the host", str(list(tensor.shape)), HOST)


def _touch(address: int, size: int, write: bool, name: str, shape: str, stream: int) -> None:
    raced = _loaded().fake_touch(
        ctypes.c_void_p(address),
        ctypes.c_int64(size),
        int(write),
        name.encode(),
        shape.encode(),
        ctypes.c_int64(stream),
    )
    if raced:
        raise RuntimeError(_answer()[0])


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The address of a tensor's first element, and the bytes to the end of its last."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


# ---- host synchronisations ------------------------------------------------------------------------------------


def host_syncs() -> list[Sync]:
    """Where the host has waited for the device since `reset`: items, blocking copies, synchronisations, nonzero."""
    _loaded().fake_syncs()
    found = []
    for text in _answer():
        number, _, what = text.partition(":")
        found.append(Sync(what, _text(int(number))))
    return found


# ---- between C++ and Python -----------------------------------------------------------------------------------


def _answer() -> list[str]:
    size = ctypes.c_int64()
    data = _loaded().fake_answer(ctypes.byref(size))
    return ctypes.string_at(data, size.value).decode(errors="replace").rstrip("\0").split("\0") if size.value else []


@ctypes.CFUNCTYPE(ctypes.c_int64)
def _take_stack() -> int:
    """The number of this thread's Python stack; -1 where there is none, as in autograd's threads between hooks."""
    frame = sys._getframe().f_back
    frames = []
    while frame is not None and len(frames) < DEPTH:
        code = frame.f_code
        if not code.co_filename.startswith((TORCH, HERE)):
            frames.append((code.co_filename, frame.f_lineno, code.co_name))
        frame = frame.f_back
    if not frames:
        return -1
    key = tuple(frames)
    number = _numbers.get(key)
    if number is None:
        _stacks.append(key)
        number = _numbers.setdefault(key, len(_stacks) - 1)
    return number


@ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
def _tell_stack(number: int, buffer: int, capacity: int) -> int:
    text = _text(number).encode()[:capacity]
    ctypes.memmove(buffer, text, len(text))
    return len(text)


def _text(number: int) -> str:
    if number < 0:
        return "  (no Python: a thread of autograd)"
    return "\n".join(f"  {file}:{line} in {name}" for file, line, name in _stacks[number])
