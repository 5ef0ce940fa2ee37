"""From a module to its flats: what can be sharded, how it is divided, and where first values come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from distlib import streams
from distlib.comm.group import Group
from distlib.comm.shared import can_share, shared_zeros
from distlib.data_parallel import checks
from distlib.data_parallel.agreement import exchange
from distlib.data_parallel.replicas import describe
from distlib.initialise import Init, initialise, require_init, unset
from distlib.sharded.flat import Flat
from distlib.sharded.gather import UnitState
from distlib.sharded.groups import Grid
from distlib.sharded.layout import LINE
from distlib.sharded.options import Options
from distlib.sharded.units import Place, Unit, places

LARGE = 8 << 20  # bytes


def check_module(module: nn.Module) -> None:
    """Modules that cannot be sharded: ValueError, naming the parameter and the fix."""
    checks.plain(module)
    checks.strided([*module.named_parameters(), *module.named_buffers()])
    for name, parameter in module.named_parameters():
        if parameter.is_complex():
            raise ValueError(f"{name!r} is complex: shard torch.view_as_real() of it")


def device_for(module: nn.Module, asked: torch.device | str | None, world: Group) -> torch.device:
    """Where the model will compute. ValueError, by name, where its tensors or its groups cannot be there.

    Tensors on the CPU and on the meta device can go anywhere, one unit after the other; others stay where they are.
    """
    named = [*module.named_parameters(), *module.named_buffers()]
    there = {t.device: name for name, t in reversed(named) if t.device.type not in ("cpu", "meta")}
    if asked is not None:
        device = torch.empty(0, device=asked).device  # "cuda" is the current GPU
    elif there:
        device = next(iter(there))
    elif any(t.device.type == "cpu" for _, t in named):
        device = torch.device("cpu")
    else:
        device = streams.accelerator()
        if device is None or not world.on_device(device):
            device = torch.device("cpu")
    for where, name in there.items():
        if where != device:
            raise ValueError(
                f"{name!r} is on {where}, the model is to be on {device}: move it with module.to() before wrapping, "
                "or build the module on the CPU or the meta device"
            )
    for where in {device, torch.device("cpu")}:
        if not world.on_device(where):
            raise ValueError(
                f"the process group's backend does not communicate tensors on {where}, which a model on {device} "
                "needs: use distlib.init(), or init_process_group('cpu:distlib,cuda:nccl')"
            )
    return device


def facts(
    module: nn.Module,
    units: Sequence[Unit],
    options: Options,
    partition_size: int | str | None,
    device: torch.device,
) -> list[tuple[str, str]]:
    """What must be equal on all ranks, as (name, description)."""
    found = [(f"parameter {name}", describe(p, with_strides=False)) for name, p in module.named_parameters()]
    found += [(f"trained {name}", str(p.requires_grad)) for name, p in module.named_parameters()]
    found += [(f"buffer {name}", describe(b, with_strides=False)) for name, b in module.named_buffers()]
    found.append(("units", ", ".join(unit.name or "root" for unit in units)))
    found += [(f"option {name}", str(value)) for name, value in vars(options).items() if name != "offload"]
    found.append(("option partition_size", str(partition_size)))
    found.append(("option offload", str(options.offload is not None)))
    found.append(("device", device.type))
    return found


def make_flats(
    module: nn.Module, units: Sequence[Unit], grid: Grid, options: Options, device: torch.device
) -> list[UnitState]:
    """One flat per unit, dtype, and whether it is trained.

    The root's large parameters (embedding, head) have flats of their own: they are used at different ends of the model,
    so that their gradients are complete at different times.
    """
    hangs = places(module)
    states = []
    for unit in units:
        kinds: dict[tuple[torch.dtype, bool, int], list[nn.Parameter]] = {}
        for i, parameter in enumerate(unit.parameters):
            apart = i if unit is units[0] and parameter.nbytes >= LARGE else -1
            kinds.setdefault((parameter.dtype, parameter.requires_grad, apart), []).append(parameter)
        flats = [Flat(group, [hangs[p] for p in group], grid, options, device) for group in kinds.values()]
        states.append(UnitState(unit.name, flats, unit is units[0]))
    return states


def shares_memory(grid: Grid, device: torch.device) -> bool:
    """Whether the ranks of the partition group can have one mapping of whole parameters."""
    return grid.gather is None or (device.type == "cpu" and can_share(grid.gather))


def check_place(options: Options, grid: Grid, device: torch.device) -> None:
    """Options that have no effect where the ranks are: ValueError, saying why."""
    p = grid.partition_size
    kept = options.reshard_after_forward
    if shares_memory(grid, device):
        alone = "a partition group is one rank, which holds all parameters"
        why = f"the {p} ranks of a partition group share one host's memory, so that gathers move nothing"
        why = alone if p == 1 else why
        if options.gather_dtype is not None:
            raise ValueError(f"gather_dtype={options.gather_dtype} has no effect: {why}")
        if not isinstance(kept, bool):
            raise ValueError(f"reshard_after_forward={kept} has no effect: {why}; give True or False")
    elif not isinstance(kept, bool) and not (1 < kept < p and p % kept == 0):
        raise ValueError(
            f"reshard_after_forward={kept}: a secondary partition needs a size that divides partition_size={p}, larger "
            "than 1 and smaller than it"
        )
    if options.hierarchical is True:
        topology = None if grid.gather is None else grid.gather.topology
        if topology is None or len(topology.nodes) < 2 or not topology.is_uniform or len(topology.nodes[0]) < 2:
            raise ValueError(
                "hierarchical=True has no effect: a partition group does not span several hosts with equally many "
                'ranks, two or more, on each. Give "auto", or another partition_size'
            )


def settle(states: Sequence[UnitState], grid: Grid, stage: int, offload: Path | None, device: torch.device) -> None:
    """Gives every flat its memory. A collective of the partition group."""
    flats = [flat for state in states for flat in state.flats]
    shared = shares_memory(grid, device)
    if shared and grid.gather is not None:
        starts, end = [], 0
        for flat in flats:
            starts.append(end)
            end += -(-flat.layout.numel * flat.compute.itemsize // LINE) * LINE
        mapping = shared_zeros(grid.gather, end, torch.uint8)
        for flat, start in zip(flats, starts, strict=True):
            nbytes = flat.layout.numel * flat.compute.itemsize
            flat.settle(mapping[start : start + nbytes].view(flat.compute), False, offload)
        return
    freed = stage == 3 and not shared
    for flat in flats:
        whole = torch.empty(flat.layout.numel, dtype=flat.compute, device=device)
        flat.settle(whole, freed, offload)
        if freed:
            whole.untyped_storage().resize_(0)
        else:
            whole.zero_()


def writable(flats: Sequence[Flat]) -> None:
    """Returns when pieces in the host's memory may be written."""
    for flat in flats:
        flat.writable()


@torch.no_grad()
def load_values(
    module: nn.Module,
    units: Sequence[Unit],
    states: Sequence[UnitState],
    grid: Grid,
    init: Init | None,
    device: torch.device,
) -> None:
    """Every rank's shards take the values that rank 0's module has, or gets by `init`, one unit after the other.

    Then the module holds pieces. No more than one unit is whole at a time.
    """
    hangs = places(module)
    _check_meta(module, hangs, units, init, device)
    for unit, state in zip(units, states, strict=True):
        originals = {hangs[p][0].name: p for p in unit.parameters}
        wholes = [torch.zeros(flat.layout.numel, dtype=flat.dtype, device=device) for flat in state.flats]
        fill = partial(_fill, state, wholes, originals, init)
        if any(p.device.type == "meta" for p in unit.parameters):
            _on_first(grid.world, fill)
        elif grid.world.rank == 0:
            fill()
        for flat, whole in zip(state.flats, wholes, strict=True):
            if grid.world.size > 1:
                grid.world.broadcast(whole, 0)
            flat.load(whole)
            for name, piece, leaf in zip(flat.names, flat.pieces, flat.full, strict=True):
                for made in (piece, leaf):
                    for key, value in vars(originals[name]).items():
                        made.__dict__.setdefault(key, value)
        for flat in state.flats:
            flat.show_pieces()


def _fill(
    state: UnitState, wholes: Sequence[torch.Tensor], originals: dict[str, nn.Parameter], init: Init | None
) -> None:
    """The values of a unit's parameters, those of meta ones by `init`, into a 1-D tensor per flat."""
    meta: dict[nn.Module, tuple[str, dict[str, torch.Tensor]]] = {}
    for flat, whole in zip(state.flats, wholes, strict=True):
        for name, view, hung in zip(flat.names, flat.view_on(whole), flat.places, strict=True):
            original = originals[name]
            if original.device.type != "meta":
                view.copy_(original)
                continue
            unset(view)
            for place in hung:
                place.owner._parameters[place.key] = nn.Parameter(view, requires_grad=False)
                _, new = meta.setdefault(place.owner, (place.name.rpartition(".")[0], {}))
                new[place.key] = view
    for owner, (name, new) in meta.items():
        initialise(owner, init, name, new)


def _on_first(world: Group, run: Callable[[], None]) -> None:
    """Rank 0 runs it; where it fails, it fails on all. A collective."""
    error: Exception | None = None
    if world.rank == 0:
        try:
            run()
        except Exception as own:  # noqa: BLE001 - whatever it is, the other ranks are told, and all raise
            error = own
    text = "" if error is None else str(error) or repr(error)
    told = [b""] if world.size == 1 else exchange(world, text.encode(), torch.device("cpu"))
    if error is not None:
        raise error
    if told[0]:
        raise ValueError(told[0].decode())


def _check_meta(
    module: nn.Module,
    hangs: dict[nn.Parameter, list[Place]],
    units: Sequence[Unit],
    init: Init | None,
    device: torch.device,
) -> None:
    """Modules on the meta device that nobody can initialise, by name; their buffers become zeros. All buffers come to
    `device`."""
    home = {parameter: unit for unit in units for parameter in unit.parameters}
    for prefix, owner in module.named_modules():
        for key, buffer in owner._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                owner._buffers[key] = buffer.to(device)
        parameters = [p for p in owner._parameters.values() if p is not None and p.device.type == "meta"]
        buffers = [b for b in owner._buffers.values() if b is not None and b.device.type == "meta"]
        if not (parameters or buffers):
            continue
        require_init(owner, init, prefix)
        if len({id(home[p]) for p in parameters}) > 1:
            raise ValueError(
                f"{prefix} is on the meta device and its parameters belong to several units, because some are shared "
                "with other modules: build this module on the CPU"
            )
        for key, buffer in owner._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                owner._buffers[key] = torch.empty_like(buffer, device=device)
                unset(owner._buffers[key])
        if buffers and not parameters:
            initialise(owner, init, prefix, {})
