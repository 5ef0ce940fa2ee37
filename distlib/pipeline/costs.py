"""What each leaf costs: estimated from operators on fake tensors, or measured; and the stages that follow from it.

    leaf call      embedding   block 0   block 1   head
    forward            1          8         8        6
    backward           0          8         8        6      with respect to its inputs: B
    weight             1          8         8        6      with respect to its parameters: W
    output_bytes       4          4         4        .      that travel if the model is cut behind it

Glue counts with the leaf that made what it works on. Glue of inputs only, which every stage repeats, does not count.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from distlib.pipeline.cut import crossing_bytes
from distlib.pipeline.ghost import copy_with, faked, places
from distlib.pipeline.partition import split_layers
from distlib.pipeline.placing import Placing
from distlib.pipeline.program import Call, Const, Program, Ref, Spec, Template, fill, refs

# Estimated times are those of this machine; only their ratios matter.
FLOPS = 1e12  # floating-point operations a second
BANDWIDTH = 1e11  # bytes a second, read and written
REPEAT = 5  # measured runs


@dataclass(frozen=True)
class LeafCost:
    """One leaf call with its glue. forward, backward (B), weight (W): seconds of a micro-batch, estimated or measured.

    parameter_bytes: of the parameters it uses. activation_bytes: saved for its backward. output_bytes: that travel to
    later stages if the model is cut behind this call; 0 for the last.
    """

    name: str
    forward: float
    backward: float
    weight: float
    parameter_bytes: int
    activation_bytes: int
    output_bytes: int

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.weight


def estimate(program: Program, module: nn.Module) -> list[LeafCost]:
    """The cost of each leaf call from what its operators do: FLOPs and bytes read and written, forward and backward.

    module: the model or its ghost, as it was recorded. Nothing is computed; deterministic, the same on all ranks.
    """
    device = torch.device(program.context.device)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    known: dict[Any, _Times] = {}
    with faked(module, mode, device, program.dtype), mode:

        def times(call: Call) -> _Times:
            key = _key(program, module, call)
            if key not in known:
                known[key] = _estimated(_Alone(program, module, call, device))
            return known[key]

        return _costs(program, module, times)


def measure(
    program: Program, module: nn.Module, repeat: int = REPEAT, device: torch.device | None = None
) -> list[LeafCost]:
    """The same with measured times: each distinct call runs alone, on random inputs of the recorded shapes.

    repeat: runs, after one to warm up; the least time counts, as whatever else runs only adds to it. device: where;
    default: the accelerator if it was recorded for one, else the CPU. Leaves are copied there one at a time, with
    random parameters where they have no data. The generators of random numbers are left as they were. Call it on one
    rank and broadcast the result.
    """
    where = device or torch.device(program.context.device)
    known: dict[Any, _Times] = {}

    def times(call: Call) -> _Times:
        key = _key(program, module, call)
        if key not in known:
            copies = _solid(program, module, call, where)
            known[key] = _measured(_Alone(program, copies, call, where), repeat)
        return known[key]

    devices = [] if where.type == "cpu" else [where]
    with torch.random.fork_rng(devices=devices, device_type=where.type if devices else "cuda"):
        torch.manual_seed(0)
        measured = _costs(program, module, times)
    return [
        replace(cost, activation_bytes=estimated.activation_bytes)
        for cost, estimated in zip(measured, estimate(program, module), strict=True)
    ]


def split_auto(
    program: Program,
    costs: Sequence[LeafCost],
    stages: int,
    *,
    seconds_per_byte: float = 0.0,
    memory_limit: float | None = None,
    in_flight: Sequence[float] | None = None,
    state: float = 4.0,
) -> tuple[int, ...]:
    """Bounds, for `assign`, of the stages whose slowest is as fast as can be: exact (partition.split_layers).

    costs: per leaf call; add the loss to the last one. seconds_per_byte: of a message, counted on both of its sides.
    memory_limit: bytes of a stage. in_flight: micro-batches whose activations each stage holds; default: those of 1F1B,
    `stages - j`. state: bytes held per byte of parameters: 4 for a parameter, its gradient and two states of Adam.

    Raises ValueError if there are fewer leaf calls than stages, or if no split keeps the limit.
    """
    if len(costs) != len(program.leaf_calls):
        raise ValueError(f"pipeline: {len(costs)} costs are given for {len(program.leaf_calls)} leaf calls")
    if len(costs) < stages:
        names = ", ".join(cost.name for cost in costs)
        raise ValueError(
            f"pipeline: {len(costs)} leaf calls ({names}) do not make {stages} stages. Use fewer stages, or name "
            "modules deeper inside with split=[...]"
        )
    held = list(in_flight) if in_flight is not None else [float(stages - j) for j in range(stages)]
    if len(held) != stages:
        raise ValueError(f"pipeline: in_flight has {len(held)} values for {stages} stages")
    memory = [[state * cost.parameter_bytes + count * cost.activation_bytes for cost in costs] for count in held]
    found = split_layers(
        [cost.total for cost in costs],
        stages,
        communication=[seconds_per_byte * cost.output_bytes for cost in costs[:-1]],
        memory=None if memory_limit is None else memory,
        limit=memory_limit,
    )
    return found.bounds


# ---------------------------------------------------------------- from calls to leaves


@dataclass(frozen=True)
class _Times:
    forward: float
    backward: float
    weight: float
    activation_bytes: int


def _costs(program: Program, module: nn.Module, times: Callable[[Call], _Times]) -> list[LeafCost]:
    count = len(program.leaf_calls)
    if not count:
        raise ValueError(
            f"pipeline: {type(module).__name__} calls no modules of its own, between which it could be divided: put "
            "its parts into modules, or give module=None and the stages as split=[module, ...]"
        )
    stage = Placing(program, range(count)).stage
    crossing = [*crossing_bytes(program), 0]
    sums = [[0.0, 0.0, 0.0, 0] for _ in range(count)]
    used: list[set[str]] = [set() for _ in range(count)]
    first = {id(place.tensor): place for place in reversed(places(module)) if isinstance(place.tensor, nn.Parameter)}
    by_name = {place.name: place for place in first.values()}
    for call in program.calls:
        home = stage[call.index]
        if home is None:
            continue
        found = times(call)
        for k, value in enumerate((found.forward, found.backward, found.weight, found.activation_bytes)):
            sums[home][k] += value
        if isinstance(call.target, str):
            used[home] |= {first[id(p)].name for p in module.get_submodule(call.target).parameters()}
        for value, _ in call.reads:
            origin = program.values[value].origin
            if program.values[value].trained and isinstance(origin, str):
                used[home].add(origin)
    return [
        LeafCost(
            name=call.name,
            forward=sums[k][0],
            backward=sums[k][1],
            weight=sums[k][2],
            parameter_bytes=sum(by_name[n].tensor.numel() * by_name[n].tensor.element_size() for n in used[k]),
            activation_bytes=int(sums[k][3]),
            output_bytes=crossing[k],
        )
        for k, call in enumerate(program.leaf_calls)
    ]


def _key(program: Program, module: nn.Module, call: Call) -> Any:
    """Equal for calls that cost the same: class, settings and shapes of parameters; shapes of arguments."""
    versions = dict(call.reads)

    def show(item: Template) -> str:
        if isinstance(item, Ref):
            return f"{program.specs[item.value, versions[item.value]]}"
        if isinstance(item, Const):
            return repr(item.value)
        return f"[{', '.join(map(show, item.items))}]"

    arguments = tuple(map(show, call.args)), tuple((k, show(v)) for k, v in call.kwargs.items()), call.context
    trained = tuple(program.specs[read].requires_grad for read in call.reads)
    if not isinstance(call.target, str):
        return call.target, arguments, trained
    leaf = module.get_submodule(call.target)
    simple = (bool, int, float, str, tuple, type(None))
    inside = tuple(
        (type(part), tuple((k, repr(v)) for k, v in sorted(vars(part).items()) if isinstance(v, simple)))
        for part in leaf.modules()
    )
    shapes = tuple((p.shape, p.dtype, p.requires_grad) for p in leaf.parameters())
    return inside, shapes, arguments, trained


# ---------------------------------------------------------------- one call alone


_Ends = tuple[list[Tensor], list[Tensor]]  # results of a forward, and gradients for them


class _Alone:
    """A call of a program with inputs of its own, to be run again and again. inputs, parameters: that require a
    gradient. weights: all parameters, trained or not."""

    def __init__(self, program: Program, module: nn.Module, call: Call, device: torch.device) -> None:
        self._call = call
        self._context = call.context or program.context
        versions = dict(call.reads)
        self.inputs: list[Tensor] = []
        self.parameters: list[Tensor] = []
        values: dict[int, Tensor] = {}
        for v in dict.fromkeys(v for item in (*call.args, *call.kwargs.values()) for v in refs(item)):
            origin = program.values[v].origin
            values[v] = origin if isinstance(origin, Tensor) else _random(program.specs[v, versions[v]], device)
            if values[v].requires_grad:
                (self.parameters if program.values[v].trained else self.inputs).append(values[v])
        self._values = values
        self.weights = [values[v] for v in values if program.values[v].trained]
        if isinstance(call.target, str):
            leaf = module.get_submodule(call.target)
            self._run: Callable[..., Any] = leaf
            self.weights += leaf.parameters()
            self.parameters += [p for p in leaf.parameters() if p.requires_grad]
        else:
            self._run = call.target

    def forward(self) -> list[Tensor]:
        """The results through which gradients come."""
        with self._context.entered():
            # What the call writes to must be no leaf of autograd.
            given = {v: t.clone() if self._call.writes else t for v, t in self._values.items()}
            args = [fill(item, given.__getitem__) for item in self._call.args]
            kwargs = {key: fill(item, given.__getitem__) for key, item in self._call.kwargs.items()}
            result = self._run(*args, **kwargs)
        return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]

    def backward(self, ends: _Ends, leaves: Sequence[Tensor], again: bool) -> None:
        """Gradients of some leaves. again: another backward follows."""
        outputs, gradients = ends
        if outputs and leaves:
            torch.autograd.grad(outputs, leaves, gradients, retain_graph=again, allow_unused=True)


def _random(spec: Spec, device: torch.device) -> Tensor:
    """Numbers that any leaf takes: small floats, index 0, True."""
    if spec.dtype == torch.bool:
        return torch.ones(spec.shape, dtype=torch.bool, device=device)
    if not (spec.dtype.is_floating_point or spec.dtype.is_complex):
        return torch.zeros(spec.shape, dtype=spec.dtype, device=device)
    values = torch.randn(spec.shape, device=device).to(spec.dtype)
    return values.requires_grad_(spec.requires_grad)


def _estimated(alone: _Alone) -> _Times:
    def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
        work = _Work()
        with work:
            result = run()
        return work.flops / FLOPS + work.bytes / BANDWIDTH, result

    with _saved({p.untyped_storage()._cdata for p in alone.weights}) as saved:
        forward, outputs = seconds(alone.forward)
    ends = outputs, [torch.ones_like(t) for t in outputs]
    try:
        backward, both = _backwards(alone, ends, forward, seconds)
    except (DataDependentOutputException, DynamicOutputShapeException):  # Python in it asks for the values of tensors
        backward, both = forward, 2 * forward  # as of products
    return _Times(forward, backward, max(both - backward, 0.0), sum(saved.values()))


def _backwards(
    alone: _Alone, ends: _Ends, forward: float, seconds: Callable[[Callable[[], Any]], tuple[float, Any]]
) -> tuple[float, float]:
    """Of the gradients of inputs, and of all."""
    try:
        backward, _ = seconds(partial(alone.backward, ends, alone.inputs, again=True))
        both, _ = seconds(partial(alone.backward, ends, [*alone.inputs, *alone.parameters], again=False))
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        # A re-entrant checkpoint has gradients of all or of none: as of products, after another forward.
        return 2 * forward, 3 * forward
    return backward, both


class _Work(TorchDispatchMode):
    """Counts operators' FLOPs, by torch's formulas, and the bytes that they read and write; views and questions (prim)
    are free. torch's own counter of FLOPs puts hooks on modules, which a forward that calls autograd does not bear."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        if func.namespace != "prim" and not func.is_view:
            tensors = [t for t in pytree.tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return result


@contextlib.contextmanager
def _saved(parameters: set[int]) -> Iterator[dict[int, int]]:
    """Storage -> bytes of what autograd saves inside, parameters left out."""
    found: dict[int, int] = {}
    kept = []  # so that no storage's address comes twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept.append(tensor)
            found[storage._cdata] = storage.nbytes()
        return tensor.detach()  # its history would hold the graph that holds it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def _measured(alone: _Alone, repeat: int) -> _Times:
    def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
        _wait()
        begun = time.perf_counter()
        result = run()
        _wait()
        return time.perf_counter() - begun, result

    rows = []
    for _ in range(1 + repeat):  # the first warms up
        forward, outputs = seconds(alone.forward)
        ends = outputs, [torch.ones_like(t) for t in outputs]
        backward, both = _backwards(alone, ends, forward, seconds)
        rows.append((forward, backward, both))
    forward, backward, both = (min(column) for column in zip(*rows[1:], strict=True))
    return _Times(forward, backward, max(both - backward, 0.0), 0)


def with_loss(
    costs: Sequence[LeafCost], program: Program, loss_fn: Callable[[Any, Any], Tensor], target: Any, how: str
) -> list[LeafCost]:
    """The same costs, and of the last call also those of the loss.

    target: of a micro-batch. how: "measured": the loss runs, forward and backward, on random outputs of the recorded
    shapes; "estimated": it reads and writes the outputs some times.
    """
    specs = {value: program.specs[value, writer] for value, writer in program.ends}
    if how == "estimated":
        once = sum(spec.nbytes for spec in specs.values()) / BANDWIDTH
        forward, both = 3 * once, 7 * once  # as softmax and its gradient do
    else:
        device = torch.device(program.context.device)
        rows = []
        for _ in range(1 + REPEAT):
            made = {value: _random(spec, device) for value, spec in specs.items()}
            trained = [t for t in made.values() if t.requires_grad]
            _wait()
            begun = time.perf_counter()
            loss = loss_fn(fill(program.output, made.__getitem__), target)
            _wait()
            between = time.perf_counter()
            if loss.requires_grad:
                torch.autograd.grad(loss, trained, allow_unused=True)
            _wait()
            rows.append((between - begun, time.perf_counter() - begun))
        forward, both = (min(column) for column in zip(*rows[1:], strict=True))
    last = costs[-1]
    changed = replace(last, forward=last.forward + forward, backward=last.backward + max(both - forward, 0.0))
    return [*costs[:-1], changed]


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _solid(program: Program, module: nn.Module, call: Call, device: torch.device) -> nn.Module:
    """A model with only the leaf of this call, copied to a device; empty tensors get values."""
    holder = nn.Module()
    if not isinstance(call.target, str):
        return holder

    def make(tensor: Tensor) -> Tensor:
        is_cast = isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and program.dtype is not None
        dtype = program.dtype if is_cast else tensor.dtype
        if tensor.device.type != "meta":
            return tensor.detach().to(device, dtype, copy=True)
        values = torch.zeros(tensor.shape, dtype=dtype, device=device)
        return values.normal_(std=0.02) if values.is_floating_point() and isinstance(tensor, nn.Parameter) else values

    owner = holder
    *path, key = call.target.split(".")
    for step in path:
        owner.add_module(step, nn.Module())
        owner = owner.get_submodule(step)
    owner.add_module(key, copy_with(module.get_submodule(call.target), make))
    return holder
