"""Optimizer state in memory: one flat buffer per kind of state and dtype; every parameter's state is a view of one."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch

_HUGE = 2 << 20  # bytes of a huge page: smaller buffers gain nothing from one


REMAINDER = "remainder"  # the state that makes an fp32 master of a bf16 parameter: see AdamW


def state_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the state `name` of a parameter of `dtype`."""
    if name == REMAINDER:
        return torch.int16
    return torch.float32 if dtype is torch.bfloat16 else dtype


def zeros(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A flat tensor of zeros; those of a host's memory take pages when first written, huge ones where there are any."""
    size = numel * dtype.itemsize
    if size < _HUGE or device.type != "cpu":
        return torch.zeros(numel, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            pages.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without huge pages: small ones do
            return torch.zeros(numel, dtype=dtype)
    return torch.frombuffer(pages, dtype=dtype)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill a range of memory without gaps or overlaps, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(tensor.stride(), tensor.size(), strict=True) if sz > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements as they lie in memory: 1-D."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def layout_of(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, tuple[int, ...]]:
    """What the state of a parameter has in common with it. It must stay as it is."""
    return tensor.dtype, tensor.shape, tensor.stride()


class MemoryState:
    """The state of one parameter group, on its parameters' device.

    params: all of the group's; those of one dtype follow each other in its flat buffers, in order, without gaps. steps:
    (parameters,) fp32. asked: how often the host had a parameter stepped, which a device may have skipped. history:
    parameters with the same number were asked for in the same ones of the steps that may have been skipped. Buffers
    come with the first use of their name.
    """

    def __init__(self, params: Sequence[torch.Tensor]) -> None:
        self.params = list(params)
        self.ids = tuple(map(id, params))
        self.layouts = [layout_of(p) for p in params]
        self.device = params[0].device if params else torch.device("cpu")
        self.steps = torch.zeros(len(params), dtype=torch.float32, device=self.device)
        self.asked = [0.0] * len(params)
        self.history = [0] * len(params)
        self._histories = 0
        self.step_views = list(self.steps.unbind())
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._used: set[tuple[int, str]] = set()  # what may hold something else than zeros
        self._views: dict[str, list[torch.Tensor | None]] = {}
        self._offsets: list[int] = []
        self._numel: dict[torch.dtype, int] = {}
        for p in params:
            self._offsets.append(self._numel.get(p.dtype, 0))
            self._numel[p.dtype] = self._offsets[-1] + p.numel()

    def view(self, index: int, name: str) -> torch.Tensor:
        """The state `name` of parameter `index`: its shape and, where that is dense, its strides."""
        views = self._views.setdefault(name, [None] * len(self.params))
        view = views[index]
        if view is None:
            p = self.params[index]
            key = name, p.dtype
            if key not in self._buffers:
                self._buffers[key] = zeros(self._numel[p.dtype], state_dtype(name, p.dtype), p.device)
            piece = self._buffers[key].narrow(0, self._offsets[index], p.numel())
            view = (
                piece.as_strided(p.size(), p.stride(), piece.storage_offset()) if is_dense(p) else piece.view(p.size())
            )
            views[index] = view
        return view

    def ask(self, chosen: Sequence[int], may_skip: bool) -> None:
        """A step of the parameters `chosen`; `may_skip`: perhaps the device skips it, and the host does not know."""
        parted: dict[int, int] = {}
        for i in chosen:
            self.asked[i] += 1
            if may_skip and len(chosen) < len(self.params):
                if self.history[i] not in parted:
                    self._histories += 1
                    parted[self.history[i]] = self._histories
                self.history[i] = parted[self.history[i]]

    def adopt(self, index: int, state: dict, names: Sequence[str]) -> bool:
        """Makes `state` of parameter `index` views of the buffers, with the values it has. True: it had none."""
        fresh = False
        for name in names:
            have, view = state.get(name), self.view(index, name)
            if have is view:
                continue
            if have is None:
                fresh = True
                if (index, name) in self._used:
                    view.zero_()  # of state that was taken away since
            else:
                view.copy_(have)
            state[name] = view
            self._used.add((index, name))
        return fresh

    def adopt_step(self, index: int, state: dict) -> None:
        """The same for the number of steps."""
        have, view = state.get("step"), self.step_views[index]
        if have is not view:
            self.asked[index] = 0.0 if have is None else float(have)
            view.fill_(self.asked[index])
            state["step"] = view
