"""Weight gradients that wait: a Linear, Conv or Embedding whose backward gives its input's gradient only.

    forward     token = Hold(x, weight, bias)         keeps x; its edges lead to the parameters
                y     = linear(x, weight, bias)       torch's own, of detached parameters: an input gradient only
                out   = Join(y, token)                the same values
    backward    Join   hands g, the gradient of out, to y and to Hold
                linear gives the input's gradient, by torch's own kernel
                Hold   split: (x, g) wait in a list   plain: the parameters' gradients, now

Hold comes first so that x is saved before the operator saves what it needs: a checkpoint's recomputation then stops
before the block's last product, as it does in plain torch, and costs no operation more.

Zero Bubble Pipeline Parallelism (Qi et al., arXiv 2401.10241).
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional


class Entry(Protocol):
    """Weight gradients that wait for their pass.

    name: of the module, or of the graph's node. leaves: whose gradients these are. tensors: kept until then.
    """

    name: str
    leaves: tuple[Tensor, ...]

    @property
    def tensors(self) -> Sequence[Tensor]: ...

    def compute(self) -> tuple[Tensor | None, ...]:
        """One gradient per leaf, once: lets go of what it keeps."""


# Every Hold has an edge to it. A backward with respect to this and not to the weights visits Hold and no weight.
ANCHOR = torch.zeros((), requires_grad=True)

_collecting: dict[int, list[Entry]] = {}  # by the thread that called backward
_refusing: set[int] = set()  # threads inside of a block in which a plain backward is a mistake


@contextmanager
def collecting(entries: list[Entry]) -> Iterator[None]:
    """Backwards that this thread runs inside add their weight gradients to `entries` instead of computing them."""
    me = threading.get_ident()
    if me in _collecting:
        raise RuntimeError("an input pass runs inside of another one's backward; run one after the other")
    _collecting[me] = entries
    try:
        yield
    finally:
        del _collecting[me]


@contextmanager
def refusing() -> Iterator[None]:
    """A backward of this thread that reaches a weight and is no input pass raises."""
    me = threading.get_ident()
    if me in _refusing:
        raise RuntimeError("`with WeightQueue()` inside of another one; a micro-batch has one queue")
    _refusing.add(me)
    try:
        yield
    finally:
        _refusing.discard(me)


def _collector(device: torch.device) -> list[Entry] | None:
    """The list of the backward that is running; None: a plain one. Devices but the CPU have autograd threads of their
    own, which do not say who called them."""
    me = threading.get_ident()
    entries = _collecting.get(me)
    if entries is None and me in _refusing:
        raise RuntimeError(
            "a backward inside of `with WeightQueue() as queue` that is not the queue's: call queue.backward(outputs, "
            "gradients) instead of backward()"
        )
    if entries is not None or device.type == "cpu" or not _collecting:
        return entries
    if len(_collecting) > 1:
        raise RuntimeError(
            f"{len(_collecting)} threads run input passes at once on {device}: whose weight gradients these are cannot "
            "be told. Run one at a time in a process"
        )
    return next(iter(_collecting.values()))


# ---------------------------------------------------------------- one call of an operator

Gradients = Callable[[Tensor, Tensor, bool, bool], tuple[Tensor | None, Tensor | None]]


class _Call:
    """One call of a module in a forward.

    gradients: (x, g, weight wanted, bias wanted) -> their gradients. g: on its way from Join to Hold.
    """

    __slots__ = ("bias", "g", "gradients", "name", "weight")

    def __init__(self, name: str, weight: Tensor, bias: Tensor | None, gradients: Gradients) -> None:
        self.name = name
        self.weight = weight
        self.bias = bias
        self.gradients = gradients
        self.g: Tensor | None = None


class _Waiting:
    """The weight gradients of one call: its input and its output's gradient, until they are computed."""

    __slots__ = ("_g", "_gradients", "_versions", "_wanted", "_x", "leaves", "name")

    def __init__(self, call: _Call, x: Tensor, g: Tensor, wanted: tuple[bool, bool]) -> None:
        pair = (call.weight, call.bias)
        self.name = call.name
        self.leaves = tuple(
            leaf for leaf, is_wanted in zip(pair, wanted, strict=True) if is_wanted and leaf is not None
        )
        self._x: Tensor | None = x
        self._g: Tensor | None = g
        self._versions = x._version, g._version
        self._wanted = wanted
        self._gradients = call.gradients

    @property
    def tensors(self) -> Sequence[Tensor]:
        return [t for t in (self._x, self._g) if t is not None]

    def compute(self) -> tuple[Tensor | None, ...]:
        x, g = self._x, self._g
        assert x is not None and g is not None
        self._x = self._g = None
        for tensor, version, what in zip((x, g), self._versions, ("input", "output's gradient"), strict=True):
            if tensor._version != version:
                raise RuntimeError(
                    f"module {self.name!r}: its {what}, {_shape(tensor)}, was changed in place between the input pass "
                    "and the weight pass, which needs it. Run the weight pass first, or write to a copy"
                )
        return tuple(_in_dtype_of_leaves(self._gradients, x, g, self._wanted, self.leaves))


def _in_dtype_of_leaves(
    gradients: Gradients, x: Tensor, g: Tensor, wanted: tuple[bool, bool], leaves: Sequence[Tensor]
) -> list[Tensor]:
    """The wanted gradients, computed in the dtype of the forward whatever autocast says now."""
    kind = g.device.type
    if torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            both = gradients(x, g, *wanted)
    else:
        both = gradients(x, g, *wanted)
    found = [t for t in both if t is not None]
    return [t if t.dtype == leaf.dtype else t.to(leaf.dtype) for t, leaf in zip(found, leaves, strict=True)]


class Hold(torch.autograd.Function):
    """Keeps the input of a call, and knows what to do with it once the gradient of the output is there."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return weight.new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        g, call.g = call.g, None
        if g is None:
            return None, None, None, None, None
        (x,) = ctx.saved_tensors
        wanted = bool(ctx.needs_input_grad[2]), bool(ctx.needs_input_grad[3])
        waiting = _Waiting(call, x, g, wanted)
        entries = _collector(g.device)
        if entries is not None:
            entries.append(waiting)
            return None, None, None, None, None
        found = iter(waiting.compute())
        weight, bias = (next(found) if w else None for w in wanted)
        return None, None, weight, bias, None


class _Join(torch.autograd.Function):
    """The operator's output, with edges to the operator and to Hold."""

    @staticmethod
    def forward(ctx: Any, call: _Call, y: Tensor, token: Tensor) -> Tensor:
        ctx.call = call
        ctx.set_materialize_grads(False)
        return y.detach()  # no view of y: the caller may write to it in place, as to any output of the operator

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"module {call.name!r} was prepared for a split backward, which has no second derivative: "
                "create_graph=True is refused. Call distlib.pipeline.split_backward.restore(module) first"
            )
        call.g = g
        return None, g, None


def _call(
    module: nn.Module, x: Tensor, operator: Callable[[Tensor, Tensor, Tensor | None], Tensor], gradients: Gradients
) -> Tensor:
    """operator(x, weight, bias), whose parameters' gradients are `gradients`."""
    weight: Tensor = module.weight
    bias: Tensor | None = getattr(module, "bias", None)
    call = _Call(module.__dict__.get(_NAME, type(module).__name__), weight, bias, gradients)
    token = Hold.apply(call, x.detach(), weight, bias, ANCHOR)
    y = operator(x, weight.detach(), None if bias is None else bias.detach())
    return _Join.apply(call, y, token)


def _plain(module: nn.Module) -> bool:
    """Whether this call has nothing to defer: torch's own forward does it."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return True
    weight: Tensor = module.weight
    bias = getattr(module, "bias", None)
    if not weight.is_leaf or (bias is not None and not bias.is_leaf):  # torch.func.functional_call and its like
        return True
    return not (weight.requires_grad or (bias is not None and bias.requires_grad))


def _as_autocast(x: Tensor) -> Tensor:
    """x in the dtype in which autocast computes products: what plain torch saves for the weight's gradient."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


# ---------------------------------------------------------------- the operators

# Each is the `forward` of an instance. Pickle stores a method by its name, so all are called that: a pickled module
# comes back as torch's own.


def _linear_gradients(x: Tensor, g: Tensor, weight: bool, bias: bool) -> tuple[Tensor | None, Tensor | None]:
    flat = g.reshape(-1, g.shape[-1])
    return flat.t().mm(x.reshape(-1, x.shape[-1])) if weight else None, flat.sum(0) if bias else None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """functional.linear as it is for a weight that requires a gradient: one product, whatever the strides of x. For
    detached weights torch would take a batched product here, with other roundings."""
    if x.dim() < 3 or x.is_contiguous():
        return functional.linear(x, weight, bias)
    y = functional.linear(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias.to(y.dtype)


class _Linear:
    @staticmethod
    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        if _plain(self):
            return type(self).forward(self, input)
        return _call(self, _as_autocast(input), _linear, _linear_gradients)


class _Transposed:
    """A Linear whose weight is (inputs, outputs)."""

    @staticmethod
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if _plain(self):
            return type(self).forward(self, x)

        def operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            assert bias is not None
            return torch.addmm(bias, x.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])

        def gradients(x: Tensor, g: Tensor, weight: bool, bias: bool) -> tuple[Tensor | None, Tensor | None]:
            flat = g.reshape(-1, g.shape[-1])
            return x.reshape(-1, x.shape[-1]).t().mm(flat) if weight else None, flat.sum(0) if bias else None

        return _call(self, _as_autocast(x), operator, gradients)


class _Conv:
    @staticmethod
    def forward(self: nn.Conv2d, input: Tensor) -> Tensor:
        if _plain(self):
            return type(self).forward(self, input)
        padding = conv_padding(self)
        assert padding is not None
        if self.padding_mode != "zeros":
            input = functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = [0] * len(padding)
        dims, stride, dilation, groups = len(padding), list(self.stride), list(self.dilation), self.groups
        shape, strides, outputs = self.weight.shape, self.weight.stride(), self.out_channels
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]

        def operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return convolve(x, weight, bias, self.stride, padding, self.dilation, groups)

        def gradients(x: Tensor, g: Tensor, weight: bool, bias: bool) -> tuple[Tensor | None, Tensor | None]:
            if g.dim() == dims + 1:  # no batch
                x, g = x.unsqueeze(0), g.unsqueeze(0)
            # Only the shape is read. The parameter itself may be gathered no longer.
            like = torch.empty_strided(shape, strides, dtype=g.dtype, device=g.device)
            _, by_weight, by_bias = torch.ops.aten.convolution_backward(
                g, x, like, [outputs], stride, padding, dilation, False, [0] * dims, groups, [False, weight, bias]
            )
            return by_weight, by_bias

        return _call(self, _as_autocast(input), operator, gradients)


class _Embedding:
    @staticmethod
    def forward(self: nn.Embedding, input: Tensor) -> Tensor:
        if _plain(self):
            return type(self).forward(self, input)
        rows, scale, sparse = self.num_embeddings, self.scale_grad_by_freq, self.sparse
        none = -1 if self.padding_idx is None else self.padding_idx

        def operator(x: Tensor, weight: Tensor, _: Tensor | None) -> Tensor:
            return functional.embedding(x, weight, self.padding_idx, self.max_norm, self.norm_type, scale, sparse)

        def gradients(x: Tensor, g: Tensor, weight: bool, _: bool) -> tuple[Tensor | None, Tensor | None]:
            return torch.ops.aten.embedding_backward(g, x, rows, none, scale, sparse), None

        return _call(self, input, operator, gradients)


def conv_padding(module: nn.Module) -> list[int] | None:
    """Padding of a convolution in elements per side; None where the two sides differ ("same", even kernels)."""
    if not isinstance(module.padding, str):
        return list(module.padding)
    if module.padding == "valid":
        return [0] * len(module.kernel_size)
    total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    return None if any(t % 2 for t in total) else [t // 2 for t in total]


# ---------------------------------------------------------------- rewiring instances

LAZY = "lazy: run a forward first, then prepare again"
_NAME = "_distlib_name"
_FORWARDS: dict[type[nn.Module], Any] = {
    nn.Linear: _Linear.forward,
    nn.Conv1d: _Conv.forward,
    nn.Conv2d: _Conv.forward,
    nn.Conv3d: _Conv.forward,
    nn.Embedding: _Embedding.forward,
}
_OF_OTHERS = {"transformers.pytorch_utils.Conv1D": _Transposed.forward}  # by name: what is not there is not imported


def _forward_of(kind: type) -> Any:
    return _FORWARDS.get(kind) or _OF_OTHERS.get(f"{kind.__module__}.{kind.__qualname__}")


def _kind(module: nn.Module) -> type[nn.Module] | None:
    return next((kind for kind in type(module).__mro__ if _forward_of(kind) is not None), None)


def is_deferring(module: nn.Module) -> bool:
    """Whether `defer` rewired this instance."""
    known = (*_FORWARDS.values(), *_OF_OTHERS.values())
    return getattr(module.__dict__.get("forward"), "__func__", None) in known


def why_not(module: nn.Module) -> str | None:
    """Why a module's weight gradient cannot wait; None if it can. Ties to other modules are not looked at."""
    kind = _kind(module)
    if kind is None:
        return f"{type(module).__name__} is no Linear, Conv or Embedding"
    if getattr(module, "parametrizations", None):
        return "parametrized: its weight is computed in each forward"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "MultiheadAttention uses its weight without calling it"
    if type(module).forward is not kind.forward:
        return f"subclass {type(module).__name__} has a forward of its own"
    if "forward" in module.__dict__ and not is_deferring(module):
        if getattr(module.__dict__["forward"], "__func__", None) is not kind.forward:
            return "the instance's forward was replaced"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter: something computes it in each forward"
    for parameter in module._parameters.values():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            return LAZY
        if parameter is not None and type(parameter) is not nn.Parameter:
            return f"its parameters are {type(parameter).__name__}, a kind of tensor with operators of its own"
        if parameter is not None and parameter.is_complex():
            return "complex weights"
    if issubclass(kind, nn.modules.conv._ConvNd):
        if type(module)._conv_forward is not kind._conv_forward:
            return f"subclass {type(module).__name__} has a _conv_forward of its own"
        if conv_padding(module) is None:
            return "padding='same' with an even kernel pads one side more"
    return None


def defer(module: nn.Module, name: str) -> None:
    """Rewires one instance: class, parameters, hooks and state_dict stay. `why_not(module)` must be None."""
    kind = _kind(module)
    assert kind is not None
    object.__setattr__(module, "forward", types.MethodType(_forward_of(kind), module))
    object.__setattr__(module, _NAME, name)


def undo(module: nn.Module) -> None:
    """Takes `defer` back."""
    if is_deferring(module):
        del module.__dict__["forward"], module.__dict__[_NAME]
