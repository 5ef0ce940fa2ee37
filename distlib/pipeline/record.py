"""Records one run of a model on fake tensors, as a list of calls: nothing is computed, no memory is taken.

    module(*args, **kwargs)                 the model's own Python runs, once
        embedding(tokens)                   a leaf: written down as one call, nothing of its inside
        x = x + self.position[:12]          glue: two calls of torch functions and a parameter
        for block in self.blocks:
            x = block(x)                    a leaf each

Python between the calls (loops, branches, shapes) happens while recording and is not repeated. Hence a program belongs
to one `signature`; what depends on the values of tensors is refused.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from distlib.pipeline.flow import Edges, edges_of, flows
from distlib.pipeline.ghost import faked, places
from distlib.pipeline.leaves import Names
from distlib.pipeline.program import Context, Program, Spec, Template, Value, template
from distlib.pipeline.refusals import DrawnByPython, check_opaque, line, no_log_of_fake_tensors, refusal
from distlib.pipeline.seen import Draws, Glue, intercepted, whole_functions
from distlib.pipeline.signature import device_of, signature
from distlib.pipeline.state import LeafState, statistics
from distlib.pipeline.tidy import Draft, tidy

__all__ = ["Program", "Spec", "record", "signature"]

# Functions without a result whose effect on their first argument no version counter shows.
_EFFECTS = frozenset(
    {
        Tensor.register_hook,
        Tensor.register_post_accumulate_grad_hook,
        Tensor.retain_grad,
        Tensor.requires_grad.__set__,
        Tensor.grad.__set__,
        Tensor.data.__set__,
    }
)


_FUNCTION = "an autograd.Function"


# ---------------------------------------------------------------- recording


def record(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    leaves: Sequence[str],
    dtype: torch.dtype | None = None,
) -> Program:
    """One run of `module(*args, **kwargs)` as a program.

    module: the whole model, with parameters anywhere, meta included. It is never computed with, and is as before
        afterwards. Only one thread at a time may record it.
    args, kwargs: tensors anywhere, meta included, of which shapes, strides and dtypes are read; and anything else.
    leaves: full names of modules that are called as one, none inside of another (`stages.leaves_of` finds them).
    dtype: record as if floating parameters and floating inputs had this dtype (mixed precision).

    No communication: each rank records alone, and all get the same program.

    Raises ValueError, with module and line, for what a straight list of calls cannot say: control flow or shapes that
    depend on the values of tensors; tensors that travel outside of arguments and results; activation checkpointing
    around leaves instead of inside; hooks that would be lost; leaves that are unknown or lie inside of each other.
    """
    owners = _named_leaves(module, leaves)
    opened = _opened(module, owners)
    given, spec = pytree.tree_flatten((args, dict(kwargs)))
    device = device_of(given)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    ambient = Context.now(device.type)
    with contextlib.ExitStack() as stack:
        # Of what first runs under a mode, dynamo would make nothing ever after.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(no_log_of_fake_tensors())
        stack.enter_context(torch.set_grad_enabled(ambient.grad))
        names = stack.enter_context(faked(module, mode, device, dtype))
        stack.enter_context(mode)
        recorder = _Recorder(module, names, ambient)
        copies: dict[int, Tensor] = {}
        for k, leaf in enumerate(given):
            if isinstance(leaf, Tensor):
                if id(leaf) not in copies:
                    copies[id(leaf)] = _fake_input(leaf, device, dtype)
                    recorder.input(copies[id(leaf)], k)
                given[k] = copies[id(leaf)]
        fake_args, fake_kwargs = pytree.tree_unflatten(given, spec)
        before = [(place, place.store[place.key]) for place in places(module) if place.owner in opened]
        stack.enter_context(intercepted(owners, recorder))
        stack.enter_context(recorder.drawn.as_before())
        try:
            with Draws(recorder), whole_functions(recorder), Glue(recorder):
                result = module(*fake_args, **fake_kwargs)
            recorder.drawn.require_none("the end of the model's forward")
            if recorder.asked is not None:
                raise recorder.asked
        except Exception as error:
            if (refused := refusal(error, module)) is None:
                raise
            raise refused from error
        if recorder.past is not None:
            raise ValueError(
                f"pipeline: {recorder.past} is called past torch functions, by code of torch.jit or of a C++ "
                "extension: what it does for gradients cannot be seen. Call it inside of a module of one stage"
            )
        for place, fake in before:
            if place.store.get(place.key) is not fake:
                raise ValueError(
                    f"pipeline: forward replaces {place.name} of a module that is divided among stages. Write into it "
                    f"({place.key}.copy_(...)), or move it into a module that lies in one stage"
                )
        output = recorder.template(result, "the model's output")
        recorder.check_state()
    return tidy(
        recorder.drafts,
        recorder.values,
        recorder.specs,
        output,
        tuple(owners),
        recorder.inside_of,
        len(given),
        ambient,
        dtype,
    )


def _fake_input(tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if tensor.layout != torch.strided:
        return torch.zeros(tensor.shape, dtype=kind, layout=tensor.layout, device=device)
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device=device)
    return fake.requires_grad_(tensor.requires_grad)


def _named_leaves(module: nn.Module, leaves: Sequence[str]) -> dict[str, nn.Module]:
    """The leaves by their first names; each once."""
    names = Names(module)
    found = dict(names.find(name) for name in leaves)
    if "" in found:
        raise ValueError("pipeline: the whole model is no leaf; name modules inside of it")
    for name in found:
        parent = name.rpartition(".")[0]
        while parent:
            if parent in found:
                raise ValueError(
                    f"pipeline: {name} lies inside of {parent}; a module of one stage holds no other. Give one of both"
                )
            parent = parent.rpartition(".")[0]
    return found


def _opened(module: nn.Module, leaves: Mapping[str, nn.Module]) -> set[nn.Module]:
    """Modules that lie in no leaf. They run while recording only: refuses hooks that would be lost."""
    inside = {part for leaf in leaves.values() for part in leaf.modules()}
    found = set()
    for name, part in module.named_modules():
        if part in inside:
            continue
        found.add(part)
        if part._backward_hooks or part._backward_pre_hooks:
            raise ValueError(
                f"pipeline: {name or type(part).__name__} is divided among stages, so its backward hooks would never "
                "fire. Register them on modules that lie in one stage, such as its blocks"
            )
    return found


class _Recorder:
    """Writes calls down. `inside`: the leaf or autograd.Function that runs, inside of which nothing is written."""

    def __init__(self, module: nn.Module, names: Mapping[int, str], ambient: Context) -> None:
        self.module = module
        self.ambient = ambient
        self.inside: str | None = None
        self.drew = False
        self.past: str | None = None  # an operator that no torch function announced
        self.asked: Exception | None = None  # for values that are not there, by glue that goes on all the same
        self.drawn = DrawnByPython()
        self.thread = threading.get_ident()
        self.values: list[Value] = []
        self.specs: dict[tuple[int, int | None], Spec] = {}
        self.drafts: list[Draft] = []
        self.inside_of: dict[str, tuple[str, ...]] = {}  # by leaf, names of its parameters and buffers
        self._names = names
        self._slots = {(id(place.owner), place.key): names[id(place.tensor)] for place in places(module)}
        self._tensors: list[Tensor] = []  # by value: kept, so that ids stay theirs
        self._number: dict[int, int] = {}  # id(tensor) -> the last value that it is
        self._memory: dict[int, int] = {}  # storage -> memory
        self._members: dict[int, list[int]] = {}  # memory -> its values
        self._versions: dict[int, int] = {}  # value of a parameter or buffer -> version that glue has seen
        self._leaf_calls = 0
        # Batch norms write their statistics without a new version.
        norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.training]
        self._statistics = {id(tensor) for norm in norms for tensor in norm._buffers.values()}
        self._hooks = _saving_hooks()

    @property
    def in_glue(self) -> bool:
        """Whether what runs is the code of a module that is divided."""
        return self.inside in (None, _FUNCTION)

    # ------------------------------------------------------------ values

    def input(self, tensor: Tensor, k: int) -> None:
        self._add(tensor, k)

    def _add(self, tensor: Tensor, origin: int | str | Tensor | None, writer: int | None = None) -> int:
        number = len(self.values)
        key = id(tensor) if tensor.layout != torch.strided else tensor.untyped_storage()._cdata
        memory = self._memory.setdefault(key, len(self._memory))
        self._members.setdefault(memory, []).append(number)
        self.values.append(Value(origin, memory, isinstance(origin, str) and isinstance(tensor, nn.Parameter)))
        self._tensors.append(tensor)
        self._number[id(tensor)] = number
        self.specs[number, writer] = Spec.of(tensor)
        return number

    def value_of(self, tensor: Tensor, where: str) -> int:
        """The value of a tensor that a call uses."""
        known = self._number.get(id(tensor))
        if known is not None:
            return known
        name = self._names.get(id(tensor))
        if name is not None:
            if id(tensor) in self._statistics:
                raise self._written_by_leaf(name)
            known = self._add(tensor, name)
            self._versions[known] = 0  # as fresh as when the run began
            return known
        if not isinstance(tensor, FakeTensor):
            if tensor.device.type == "meta":
                raise ValueError(
                    f"pipeline: {where} uses a tensor on the meta device that is neither parameter nor buffer"
                    f"{self._hangs(tensor)}: it has no data. Make it a buffer (register_buffer), or a tensor with data"
                )
            return self._add(tensor, tensor)
        raise ValueError(
            f"pipeline: {where} uses a tensor, {Spec.of(tensor)}, that no call returned{self._hangs(tensor)}. A stage "
            "receives what modules return: return it from the module that makes it, and pass it as an argument"
        )

    def _hangs(self, tensor: Tensor) -> str:
        for name, part in self.module.named_modules():
            for key, held in vars(part).items():
                if held is tensor:
                    return f" (attribute {name + '.' if name else ''}{key})"
        return ""

    def template(self, tree: Any, where: str) -> Template:
        return template(tree, lambda tensor: self.value_of(tensor, where), lambda leaf: check_opaque(leaf, where))

    # ------------------------------------------------------------ calls

    def call(
        self,
        target: str | Callable[..., Any],
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Run a leaf or a torch function and write it down."""
        outer, self.inside = self.inside, target if isinstance(target, str) else _FUNCTION
        if isinstance(target, str):
            self.drawn.require_none(f"the call of {target}")
        try:
            return self._call(target, run, args, kwargs)
        finally:
            self.inside = outer
            if isinstance(target, str):
                self.drawn.note()

    def _call(
        self,
        target: str | Callable[..., Any],
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        is_leaf = isinstance(target, str)
        if not is_leaf and any(isinstance(leaf, torch.Generator) for leaf in pytree.tree_leaves((args, kwargs))):
            raise ValueError(
                f"pipeline: torch function {getattr(target, '__name__', target)}{line()} draws from a torch.Generator, "
                "of which each rank would have its own. Draw from torch's default generator, or inside of a module "
                "that lies in one stage"
            )
        used = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        where = f"the call of {target}"
        arguments = self._arguments(args, kwargs, where) if is_leaf else None
        versions = [tensor._version for tensor in used]
        edges = edges_of(used) if torch.is_grad_enabled() else Edges()
        context = Context.now(self.ambient.device)
        self.drew = False
        state = LeafState(target, self.module.get_submodule(target), self._slots) if isinstance(target, str) else None
        result = run(*args, **kwargs)
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        written = [t for t, version in zip(used, versions, strict=True) if t._version != version]
        if target in _EFFECTS:
            written.append(used[0])
        written += statistics(target, args, kwargs)
        if not (is_leaf or made or written or self.drew):
            return result  # a question: its answer is Python's
        if arguments is None:
            where = f"torch function {getattr(target, '__name__', target)}{line()}"
            arguments = self._arguments(args, kwargs, where)
        elif [id(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)] != [id(t) for t in used]:
            raise ValueError(
                f"pipeline: {where} changes a list or dict that it is given; other stages would not see it. Return "
                "what is new instead"
            )
        self._refuse_saving_hooks(where)
        numbers = {id(tensor): self._number[id(tensor)] for tensor in used}
        for tensor, version in zip(used, versions, strict=True):
            self._check_version(numbers[id(tensor)], version)
        index = len(self.drafts)
        memories = {self.values[numbers[id(tensor)]].memory for tensor in written}
        for memory in memories:
            for member in self._members[memory]:
                self.specs[member, index] = Spec.of(self._tensors[member])
                if member in self._versions:
                    self._versions[member] = self._tensors[member]._version
        outputs = [(tensor, self._add(tensor, None, index)) for tensor in {id(t): t for t in made}.values()]
        self.drafts.append(
            Draft(
                target=target,
                number=self._leaf_calls if is_leaf else None,
                args=arguments[0],
                kwargs=arguments[1],
                result=self.template(result, f"the result of {target}" if is_leaf else where),
                reads=tuple(sorted(set(numbers.values()))),
                memories=frozenset(memories),
                flows=flows(outputs, edges, numbers, exact=not written),
                differentiable=tuple(sorted({numbers[k] for k in edges.ids})),
                context=context if context != self.ambient else None,
                random=self.drew,
                effect=target in _EFFECTS,
                changed=() if state is None else state.changed(self._statistics),
            )
        )
        if state is not None:
            assert isinstance(target, str)
            self.inside_of[target] = state.names
        self._leaf_calls += is_leaf
        return result

    def _arguments(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], where: str
    ) -> tuple[tuple[Template, ...], dict[str, Template]]:
        return tuple(self.template(a, where) for a in args), {k: self.template(a, where) for k, a in kwargs.items()}

    # ------------------------------------------------------------ refusals

    def _refuse_saving_hooks(self, where: str) -> None:
        if _saving_hooks() != self._hooks:
            raise ValueError(
                f"pipeline: {where} runs inside of activation checkpointing or of saved-tensor hooks that the model's "
                "forward starts; stages would run without. Switch it off there and call "
                "distlib.checkpoint_activations(module), which works inside of the blocks"
            )

    def _check_version(self, value: int, version: int) -> None:
        """Refuses buffers that glue uses and that a leaf changes without being given them."""
        if self._versions.get(value, version) != version:
            raise self._written_by_leaf(self.values[value].origin)

    @staticmethod
    def _written_by_leaf(name: Any) -> ValueError:
        return ValueError(
            f"pipeline: {name} is used outside of the module that writes it in its forward: stages would see different "
            "values. Use it in that module only"
        )

    def check_state(self) -> None:
        """The same at the end of the run."""
        for value in self._versions:
            self._check_version(value, self._tensors[value]._version)


def _saving_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)
