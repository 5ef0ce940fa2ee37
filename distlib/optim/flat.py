"""`FlatOptimizer`: what AdamW, SGD and Lion share. A step is: norm, scale, one pass over all segments.

scale      1 / the scaler's scale, times the clip coefficient
adopt      every parameter's state is a view of its group's flat buffer, or lies in its group's file
tables     which memory is stepped alike, neighbours merged; kept until an address changes
pass       parameter, gradient, state in; parameter, state, compute copy out
written    versions count up; shards learn that their compute copy is new
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distlib import native
from distlib.cuda import library
from distlib.cuda.step import Recipe
from distlib.optim import kernels, norm
from distlib.optim.device import Gate, GroupSteps
from distlib.optim.files import FileState
from distlib.optim.kernels import Hyper, Kind, Row, Segment, Table
from distlib.optim.memory import REMAINDER, MemoryState, flat, is_dense
from distlib.optim.parameters import check_parameter, check_step, copy_in_pass, name_of, written
from distlib.shards import shard_of

Key = tuple[float, bool]  # what parameters of a group are stepped alike by: the number of the step, no state before


class FlatOptimizer(torch.optim.Optimizer, ABC):
    """Base of distlib's optimizers: ordinary torch optimizers whose state is flat and whose step is one pass.

    Parameters are dense or strided fp32 (or fp64) tensors on one device, with gradients of fp32, bf16 or fp16 (fp64);
    those without a gradient are skipped. Where some are pieces of a sharded model, every rank must make the same calls.
    On a GPU (device.py) the host waits for nothing, and a step can be captured in a CUDA graph.

    grad_norm: a 0-dim fp64 tensor, the norm of the gradients of the last step with max_norm, before clipping.
    """

    # torch.amp.GradScaler then hands over `grad_scale` and `found_inf` as attributes, and does not unscale.
    _step_supports_amp_scaling = True
    _counts_steps = False

    # The model whose gradients max_norm and a scaler look at; None: the optimizer's parameters are all of it.
    trained: norm.Trained | None = None

    def __init__(self, params: Any, defaults: dict[str, Any], max_norm: float | None, offload: Path | None) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm={max_norm}: must be above 0, or None for no clipping")
        self.max_norm = max_norm
        self.offload = None if offload is None else Path(offload)
        self.grad_norm: torch.Tensor | None = None
        self._stores: list[MemoryState | FileState] = []
        self._tables: dict[int, tuple[Any, list[tuple[int, Table]]]] = {}  # by group: what they are made from, tables
        self._on_device: dict[int, GroupSteps] = {}  # by group
        self._measured: torch.Tensor | None = None  # the scaler's sum of squares, for the step that it starts
        super().__init__(params, defaults)

    # ------------------------------------------------------------ what a subclass says

    @abstractmethod
    def _states(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The names of the state that the group's parameters need; at most two."""

    @abstractmethod
    def _recipe(self, group: dict[str, Any]) -> Recipe:
        """The same, of a step whose number only the device knows."""

    @abstractmethod
    def _hyper(self, group: dict[str, Any], step: float, first: bool) -> Hyper:
        """The scalars of a step. step: its number, from 1; first: the parameters had no state before."""

    # ------------------------------------------------------------ torch's interface

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Raises ValueError or NotImplementedError, by name, for parameters that cannot be stepped here."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            for index, p in enumerate(group["params"]):
                who = name_of(self.param_groups, len(self.param_groups) - 1, index)
                check_parameter(p, who, REMAINDER in self._states(group))
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step. closure: computes the loss again, and the gradients. Returns its result, or None.

        With max_norm, or a scaler, or sharded parameters: all ranks that train the model must call it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        measured, self._measured = self._measured, None
        found_inf, given = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        device = norm.device_of(self._all_params())
        if library.serves(device):
            self._queue(device, measured, given, found_inf)
            return loss
        if found_inf is not None and float(found_inf) > 0:
            return loss
        scale = 1.0 if given is None else 1.0 / float(given)
        if self.max_norm is not None:
            squares = self._squares() if measured is None else measured
            self.grad_norm = squares.sqrt() * scale
            scale *= float(norm.coefficient(self.grad_norm, self.max_norm))
        self._step(scale)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and interchangeable with that of torch's optimizer. State in files is read into memory."""
        taken = super().state_dict()
        for index, store in enumerate(self._stores):
            if isinstance(store, FileState):
                for number, i in zip(taken["param_groups"][index]["params"], range(len(store.params)), strict=True):
                    if store.has[i]:
                        read = {name: store.read(i, name) for name in store.names}
                        taken["state"][number] = {**taken["state"].get(number, {}), **read}
        return taken

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; takes what torch's optimizer of this name saved. Values are copied into flat memory or files."""
        super().load_state_dict(state_dict)
        self._keep_dtypes(state_dict)
        for group in self.param_groups:
            self._check_group(group)
        for index, group in enumerate(self.param_groups):
            names, store = self._states(group), self._store(index, group)
            if isinstance(store, FileState):
                store.forget()
            for i, p in enumerate(group["params"]):
                if p in self.state:
                    self._check_state(self.state[p], p, names, name_of(self.param_groups, index, i))
                    if any(self.state[p].get(name) is not None for name in names):
                        store.adopt(i, self.state[p], names)
                    if self._counts_steps:
                        store.adopt_step(i, self.state[p])

    def _keep_dtypes(self, state_dict: dict[str, Any]) -> None:
        """torch casts state to the parameter's dtype: moments and remainders of bf16 parameters would lose bits."""
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, p in zip(numbers, self._all_params(), strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if p.dtype is torch.bfloat16 and name != "step" and isinstance(value, torch.Tensor):
                    self.state[p][name] = value.to(p.device)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the groups, and state as plain tensors."""
        if any(isinstance(store, FileState) for store in self._stores):
            raise RuntimeError("an optimizer whose state lies in files cannot be copied or pickled; use state_dict()")
        return {**super().__getstate__(), "max_norm": self.max_norm, "offload": self.offload}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("grad_norm", None)
        self.__dict__.setdefault("_stores", [])
        self.__dict__.setdefault("_measured", None)
        self._tables, self._on_device = {}, {}

    # ------------------------------------------------------------ the step

    def _all_params(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _squares(self) -> torch.Tensor:
        """Of all gradients that max_norm is about, over all ranks."""
        own, trained = self._all_params(), self.trained
        if trained is None:
            return norm.total_squares(own)
        return norm.total_squares(trained.after(own), trained.pipeline, trained.device)

    def _queue(
        self,
        device: torch.device,
        measured: torch.Tensor | None,
        loss_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
    ) -> None:
        """One step of parameters on a device, by its kernels."""
        squares = None
        if self.max_norm is not None:
            squares = self._squares() if measured is None else measured
            self.grad_norm = torch.zeros((), dtype=torch.float64, device=device)
        normed = None if squares is None else self.grad_norm
        gate = Gate(squares, normed, _scalar(loss_scale, device), _scalar(found_inf, device))
        stepped: list[torch.Tensor] = []
        alive: list[torch.Tensor] = []
        for index, group in enumerate(self.param_groups):
            store = self._store(index, group)
            if isinstance(store, FileState):
                raise ValueError(
                    f"parameter group {index} is on {device}, its state is to be in files at {store.folder}: wrap the "
                    "model in ShardedDataParallel with that offload=, which keeps pieces in the host's memory"
                )
            chosen, firsts = self._adopt(index, group, store)
            if not chosen:
                continue
            stepped += [group["params"][i] for i in chosen]
            self._ready(index, group, store, chosen, firsts, alive, found_inf is not None)
            lr = group["lr"]
            on_device = isinstance(lr, torch.Tensor) and lr.device == device
            recipe = self._recipe(group if not on_device else {**group, "lr": 0.0})
            recipe = replace(recipe, maximize=bool(group.get("maximize")), max_norm=self.max_norm or 0.0)
            self._on_device[index].step(recipe, _scalar(lr, device) if on_device else None, store, chosen, gate)
        written(stepped)

    def _ready(
        self,
        index: int,
        group: dict[str, Any],
        store: MemoryState,
        chosen: list[int],
        firsts: list[bool],
        alive: list[torch.Tensor],
        may_skip: bool,
    ) -> None:
        """Tables of this step's memory, on the device."""
        names = self._states(group)
        for i, first in zip(chosen, firsts, strict=True):
            if not self._counts_steps and first != (store.asked[i] == 0):
                store.asked[i] = 0.0 if first else 1.0  # state came, or went, by other ways than steps
                store.step_views[i].fill_(store.asked[i])
        # Counted alike before, so counted alike after: numbers of first occurrence tell the classes.
        keys = [(store.asked[i], store.history[i]) for i in chosen]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        of = {i: numbers[key] for i, key in zip(chosen, keys, strict=True)}
        store.ask(chosen, may_skip)
        steps = self._on_device.setdefault(index, GroupSteps())
        signature = [_where(store.params[i], of[i]) for i in chosen]
        made_of = None if None in signature else (chosen, names, signature, id(store))
        if steps.knows(made_of):
            return
        classes: dict[int, tuple[int, dict[kernels.Kind, list[Row]]]] = {}
        for i in chosen:
            segment = _segment(store, i, names)
            if not is_dense(segment.param):
                who = name_of(self.param_groups, index, i)
                raise ValueError(f"{who} has gaps in its memory (strides {segment.param.stride()}): make it contiguous")
            ready = _for_core(segment)
            if ready.grad is not segment.grad:
                alive.append(ready.grad)
            _, kinds = classes.setdefault(of[i], (i, {}))
            kinds.setdefault(kernels.kind_of(ready), []).append(kernels.row_of(ready))
        steps.make(made_of, store.device, list(classes.values()))

    def _step(self, scale: float) -> None:
        on_cpu = norm.device_of(self._all_params()).type in ("cpu", "meta")
        kernels.warn_once(on_cpu)
        batches: list[tuple[Hyper, Table]] = []
        plain: list[tuple[Hyper, Segment]] = []
        streams: list[tuple[FileState, list[int], list[Hyper], dict[int, Segment]]] = []
        stepped: list[torch.Tensor] = []
        alive: list[torch.Tensor] = []  # what tables point to and only this step holds
        for index, group in enumerate(self.param_groups):
            signed = -scale if group.get("maximize") else scale
            store = self._store(index, group)
            chosen, firsts = self._adopt(index, group, store)
            stepped += [group["params"][i] for i in chosen]
            if self._counts_steps:
                self._count(store, chosen)
                numbers = store.steps.tolist()
            else:
                numbers = [1.0] * len(store.params)
            keys = [(numbers[i], first) for i, first in zip(chosen, firsts, strict=True)]
            hypers = {key: _scaled(self._hyper(group, *key), signed) for key in set(keys)}
            if isinstance(store, FileState):
                segments = {i: _flat_segment(store.params[i]) for i in chosen}
                streams.append((store, chosen, [hypers[key] for key in keys], segments))
            elif native.core() is None or not on_cpu:
                names = self._states(group)
                for i, key in zip(chosen, keys, strict=True):
                    plain.append((hypers[key], _segment(store, i, names)))
            else:
                tables, rest = self._group_tables(index, group, store, chosen, keys, alive)
                batches += [(hypers[key], table) for key, table in tables]
                plain += [(hypers[key], segment) for key, segment in rest]
        kernels.step_tables(batches)
        for hyper, segment in plain:
            kernels.step_plainly(hyper, segment)
        for store, chosen, hyper_list, segments in streams:
            _stream(store, chosen, dict(zip(chosen, hyper_list, strict=True)), segments)
        written(stepped)

    def _store(self, index: int, group: dict[str, Any]) -> MemoryState | FileState:
        """The group's state; a new one where the group has other parameters than before."""
        params = group["params"]
        while len(self._stores) <= index:
            self._stores.append(MemoryState([]))
        store = self._stores[index]
        if store.ids == tuple(map(id, params)):
            return store
        self._tables.pop(index, None)
        folder, names = self._folder(index, params), self._states(group)
        # A rule without state (SGD without momentum) has nothing to keep in a file.
        store = MemoryState(params) if folder is None or not names else FileState(params, names, folder)
        self._stores[index] = store
        return store

    def _folder(self, index: int, params: Sequence[torch.Tensor]) -> Path | None:
        """Where the group's state goes: the optimizer's `offload`, or what the shards ask for."""
        shards = [shard_of(p) for p in params]
        asked = {s.offload for s in shards if s is not None}
        if self.offload is not None or not asked:
            return self.offload
        if len(asked) > 1 or any(s is None for s in shards):
            raise ValueError(
                f"parameter group {index} holds parameters whose state is to be kept in different places "
                f"({', '.join(sorted(map(str, asked)))}): give each place a group of its own"
            )
        return asked.pop()

    def _adopt(self, index: int, group: dict[str, Any], store: MemoryState | FileState) -> tuple[list[int], list[bool]]:
        """The indices of parameters to be stepped, their state in place; and which had none before."""
        names = self._states(group)
        if isinstance(store, FileState) and names != store.names:
            raise ValueError(
                f"parameter group {index}: its state in {store.folder} is {store.names}, but {names} is needed "
                "now; an optimizer with `offload` cannot change what it keeps"
            )
        chosen, firsts = [], []
        for i, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            if not _is_usual(p, store.layouts[i]):
                check_step(p, store.layouts[i], name_of(self.param_groups, index, i), REMAINDER in names)
            state = self.state[p] if names or self._counts_steps else {}
            first = store.adopt(i, state, names)
            if self._counts_steps:
                store.adopt_step(i, state)
            chosen.append(i)
            firsts.append(first)
        return chosen, firsts

    @staticmethod
    def _count(store: MemoryState | FileState, chosen: list[int]) -> None:
        if len(chosen) == len(store.params):
            store.steps.add_(1)
        elif chosen:
            store.steps[torch.tensor(chosen)] += 1

    def _group_tables(
        self,
        index: int,
        group: dict[str, Any],
        store: MemoryState,
        chosen: list[int],
        keys: list[Key],
        alive: list[torch.Tensor],
    ) -> tuple[list[tuple[Key, Table]], list[tuple[Key, Segment]]]:
        """Tables for the core, and segments that it cannot step because they have gaps, by key."""
        names = self._states(group)
        # Step numbers advance together as a rule: numbered by first occurrence, the same tables serve the next step.
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        by_number = list(numbers)
        signature = [_where(store.params[i], numbers[key]) for i, key in zip(chosen, keys, strict=True)]
        kept = self._tables.get(index)
        if kept is not None and kept[0] == (chosen, names, signature) and None not in signature:
            return [(by_number[number], table) for number, table in kept[1]], []
        rest: list[tuple[Key, Segment]] = []
        divided: dict[tuple[int, Kind], list[Row]] = {}
        for i, key in zip(chosen, keys, strict=True):
            segment = _segment(store, i, names)
            if not is_dense(segment.param) or segment.param.dtype is torch.bfloat16:
                rest.append((key, segment))
                continue
            ready = _for_core(segment)
            if ready.grad is not segment.grad:
                alive.append(ready.grad)
            divided.setdefault((numbers[key], kernels.kind_of(ready)), []).append(kernels.row_of(ready))
        tables = [(number, Table.of(kind, rows)) for (number, kind), rows in divided.items()]
        self._tables[index] = (chosen, names, signature), tables
        return [(by_number[number], table) for number, table in tables], rest

    # ------------------------------------------------------------ checks

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuses what torch's optimizers have and this one has not; also in loaded state."""
        for name, fix in (("amsgrad", "use torch.optim"), ("differentiable", "use torch.optim")):
            if group.get(name):
                raise ValueError(
                    f"{type(self).__name__}: {name}=True is not supported; {fix}.{type(self).__name__} for it"
                )

    def _check_state(self, state: dict[str, Any], p: torch.Tensor, names: Sequence[str], who: str) -> None:
        for name in names:
            have = state.get(name)
            if isinstance(have, torch.Tensor) and have.shape != p.shape:
                raise ValueError(
                    f"{who}: the loaded {name} has shape {tuple(have.shape)}, the parameter {tuple(p.shape)}"
                )


# ---------------------------------------------------------------- segments


def _scalar(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """As kernels read it; a scaler's numbers are where the loss was, which may be the CPU."""
    return None if tensor is None else tensor.to(device, torch.float32, non_blocking=True).view(())


def _scaled(hyper: Hyper, scale: float) -> Hyper:
    return Hyper(**{**vars(hyper), "scale": scale})


def _is_usual(p: torch.Tensor, layout: Any) -> bool:
    """Whether `check_step` would have nothing to say, at a glance: what most parameters are in most steps."""
    g = p.grad
    return (
        g is not None
        and p.dtype is g.dtype is torch.float32
        and not p.is_meta
        and g.layout is torch.strided
        and (p.dtype, p.shape, p.stride()) == layout
        and shard_of(p) is None
    )


def _where(p: torch.Tensor, number: int) -> tuple[int, int, torch.dtype, int, int] | None:
    """All that a row depends on; None where it has to be made anew in every step."""
    g = p.grad
    assert g is not None
    if not (p.is_contiguous() and g.is_contiguous()) or (p.dtype is torch.float64 and g.dtype is not torch.float64):
        return None
    copy = copy_in_pass(p)
    return p.data_ptr(), g.data_ptr(), g.dtype, 0 if copy is None else copy.data_ptr(), number


def _states_of(views: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (views[0] if views else None), (views[1] if len(views) > 1 else None)


def _segment(store: MemoryState, index: int, names: Sequence[str]) -> Segment:
    p = store.params[index]
    assert p.grad is not None
    m, v = _states_of([store.view(index, name) for name in names if name != REMAINDER])
    return Segment(p, p.grad, m, v, store.view(index, REMAINDER) if REMAINDER in names else copy_in_pass(p))


def _for_core(segment: Segment) -> Segment:
    """With the gradient in the parameter's layout, and in fp64 for a parameter in fp64: copied where it is not."""
    p, g = segment.param, segment.grad
    dtype = torch.float64 if p.dtype is torch.float64 else g.dtype
    if g.dtype is dtype and (g.stride() == p.stride() or (g.is_contiguous() and p.is_contiguous())):
        return segment
    return segment._replace(grad=torch.empty_strided(p.size(), p.stride(), dtype=dtype, device=p.device).copy_(g))


def _flat_segment(p: torch.Tensor) -> Segment:
    """Parameter, gradient and compute copy as they lie in memory, 1-D; the state comes with the stream."""
    assert p.grad is not None
    ready = _for_core(Segment(p, p.grad, copy=copy_in_pass(p)))
    copy = None if ready.copy is None else ready.copy.view(-1)
    return Segment(flat(p), flat(ready.grad), copy=copy)


def _stream(store: FileState, chosen: list[int], hypers: dict[int, Hyper], segments: dict[int, Segment]) -> None:
    def step(pieces: list[Any]) -> None:
        batch = []
        for s, states in pieces:
            whole = segments[s.index]
            p, g = whole.param.narrow(0, s.start, s.count), whole.grad.narrow(0, s.start, s.count)
            copy = None if whole.copy is None else whole.copy.narrow(0, s.start, s.count)
            batch.append((hypers[s.index], Segment(p, g, *_states_of(states), copy)))
        kernels.step_segments(batch)

    store.stream(chosen, step)
