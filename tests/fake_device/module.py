"""torch.fake: what torch expects of a device's Python module (torch.cuda is CUDA's)."""

from __future__ import annotations

import ctypes
import types
from typing import Any

import torch


def make(library: ctypes.CDLL, count: int) -> types.ModuleType:
    """The module, for torch._register_device_module."""

    def index(of: Any = None) -> int:
        if of is None:
            return torch.accelerator.current_device_index()
        if isinstance(of, int):
            return of
        found = torch.device(of).index
        return torch.accelerator.current_device_index() if found is None else found

    def get_rng_state(of: Any = None) -> torch.Tensor:
        size = library.fake_rng_state(index(of), None, ctypes.c_int64(-1), 0)
        state = torch.empty(size, dtype=torch.uint8)
        library.fake_rng_state(index(of), ctypes.c_void_p(state.data_ptr()), ctypes.c_int64(size), 0)
        return state

    def set_rng_state(state: torch.Tensor, of: Any = None) -> None:
        state = state.contiguous()
        expected = library.fake_rng_state(
            index(of), ctypes.c_void_p(state.data_ptr()), ctypes.c_int64(state.numel()), 1
        )
        if expected != state.numel():
            raise ValueError(f"a random state of the fake device has {expected} bytes, not {state.numel()}")

    def manual_seed(seed: int) -> None:
        library.fake_seed(index(), ctypes.c_uint64(seed % 2**64))

    def manual_seed_all(seed: int) -> None:
        for i in range(count):
            library.fake_seed(i, ctypes.c_uint64(seed % 2**64))

    class device:  # torch's name for it
        """With it, another device is the current one."""

        def __init__(self, of: Any) -> None:
            self.index = index(of)

        def __enter__(self) -> None:
            self.before = index()
            torch.accelerator.set_device_index(self.index)

        def __exit__(self, *_: object) -> None:
            torch.accelerator.set_device_index(self.before)

    made = types.ModuleType("torch.fake", __doc__)
    vars(made).update(
        _initialized=True,  # torch.utils.checkpoint keeps random states only then
        _is_in_bad_fork=lambda: False,
        is_available=lambda: True,
        is_initialized=lambda: True,
        init=lambda: None,
        device_count=lambda: count,
        current_device=index,
        set_device=lambda of: torch.accelerator.set_device_index(index(of)),
        synchronize=torch.accelerator.synchronize,
        current_stream=torch.accelerator.current_stream,
        get_rng_state=get_rng_state,
        set_rng_state=set_rng_state,
        manual_seed=manual_seed,
        manual_seed_all=manual_seed_all,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        device=device,
        Stream=torch.Stream,
        Event=torch.Event,
    )
    return made
