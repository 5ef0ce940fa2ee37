"""Selective recomputation: results of expensive operations are kept in forward and given back in the recomputation.

    forward        norm   mm*   gelu   mm*   add          * kept: the policy says so
    recomputation  norm   <-    gelu   (stops: nothing behind it is needed)

The second mm was kept in vain: what one recomputation did not ask for is not kept in the forwards to come. Should it be
asked for after all, it is recomputed: keeping saves time and never decides a value.

Papers: Reducing Activation Recomputation in Large Transformer Models (Korthikanti et al., arXiv 2205.05198).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from distlib import writes
from distlib.activations.live import has_storage, storage_key
from distlib.activations.origins import Operation, Origins, Remembered, says_what_it_writes, tensors_in, written

Policy = Callable[..., Any]  # policy(operation, *args, **kwargs) -> whether its result is kept
Key = tuple[Operation, int]  # the n-th call of an operation in a block

_NAMES = (
    "mm.default addmm.default bmm.default baddbmm.default addbmm.default linear.default _scaled_mm.default "
    "_int_mm.default convolution.default mkldnn_convolution.default cudnn_convolution.default "
    "_scaled_dot_product_flash_attention.default _scaled_dot_product_flash_attention_for_cpu.default "
    "_scaled_dot_product_efficient_attention.default _scaled_dot_product_cudnn_attention.default "
    "_scaled_dot_product_attention_math_for_mps.default _scaled_dot_product_fused_attention_overrideable.default"
).split()


def _known(names: Collection[str]) -> frozenset[Operation]:
    """Those of the operations that this version of torch has."""
    found = set()
    for name in names:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(torch.ops.aten, packet, None), overload, None)
        if operation is not None:
            found.add(operation)
    return frozenset(found)


MATMUL_LIKE = _known(_NAMES)


def is_random(operation: Operation, args: Any, kwargs: Any) -> bool:
    """Whether this call draws random numbers. Such a call is always recomputed: it must advance the generator again,
    for the draws behind it to be the same."""
    if torch.Tag.nondeterministic_seeded not in getattr(operation, "tags", ()):
        return False
    for index, argument in enumerate(operation._schema.arguments):
        if argument.name == "dropout_p":  # attention draws only where it drops
            given = args[index] if index < len(args) else kwargs.get("dropout_p", argument.default_value)
            return bool(given)
    return True


def make_policy(chosen: Collection[Operation] | Policy | None) -> Policy:
    """A policy from a collection of operations, from a callable (as it is), or (None) from MATMUL_LIKE.

    Raises:
        ValueError: an element that is not one overload of an operation, or one that always draws random numbers; or
            only operations that write, view, cast, or are made of others, of which nothing would be kept.
    """
    if isinstance(chosen, torch._ops.OpOverload | torch._ops.OpOverloadPacket | type):
        raise ValueError(f"policy={chosen!r} is no collection: pass a set, {{torch.ops.aten.mm.default, ...}}")
    if callable(chosen):
        return chosen
    operations = MATMUL_LIKE if chosen is None else frozenset(chosen)
    if not operations:
        raise ValueError('policy is an empty set of operations: that is policy="full"')
    for operation in operations:
        if not isinstance(operation, torch._ops.OpOverload):
            hint = ", for instance torch.ops.aten.mm.default" if not isinstance(operation, str) else ""
            raise ValueError(
                f"policy has {operation!r}, which is not an overload of an operation{hint}: pass overloads such as "
                "torch.ops.aten.mm.default"
            )
        draws = torch.Tag.nondeterministic_seeded in operation.tags
        if draws and not any(argument.name == "dropout_p" for argument in operation._schema.arguments):
            raise ValueError(
                f"policy has {operation}, which draws random numbers: its result cannot be kept, or the draws "
                "behind it would differ in the recomputation. Leave it out"
            )
    in_vain = {str(operation): _never_kept(operation) for operation in operations}
    if all(in_vain.values()):
        operation, does = next(iter(in_vain.items()))
        raise ValueError(
            f"policy has {operation}, which {does}: nothing would be kept. Name others, as aten.mm.default"
        )
    return _Among(operations)


def _never_kept(operation: Operation) -> str | None:
    """What such an operation does, of whose calls no result is kept; None of others."""
    if operation is torch.ops.aten._to_copy.default:
        return "casts or copies, which is always recomputed"
    if operation._schema.is_mutable:
        return "writes to its arguments"
    if any(value.alias_info for value in operation._schema.returns):
        return "returns a view, or what it was given"
    if torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "CompositeImplicitAutograd"):
        return "is made of other operations (a matmul of mm or bmm), which may be named instead"
    return None


class _Among:
    """The policy of a set of operations; an object, so that a module that holds it can be pickled."""

    def __init__(self, operations: frozenset[Operation]) -> None:
        self._operations = operations

    def __call__(self, operation: Operation, *_: Any, **__: Any) -> bool:
        return operation in self._operations

    def __reduce__(self) -> tuple:
        return _named, (sorted(operation.name() for operation in self._operations),)


def _named(names: list[str]) -> _Among:
    """The policy of the operations with these names, as "aten::mm" or "aten::add.Tensor"."""
    found = []
    for name in names:
        space, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        found.append(getattr(getattr(getattr(torch.ops, space), packet), overload or "default"))
    return _Among(frozenset(found))


class Kept:
    """A result that is kept, how it came to be, and the versions of what is in its memory: a change of it before its
    use is noticed."""

    def __init__(self, result: Any, origin: int) -> None:
        self.result = tree_map(_alone, result)
        self.origin = origin
        self._versions = [(leaf, leaf._version) for leaf in self._leaves()]

    def watch(self, tensor: torch.Tensor) -> None:
        """Another tensor in its memory, which counts changes of its own."""
        self._versions.append((alone := _alone(tensor), alone._version))

    @property
    def unchanged(self) -> bool:
        """Whether it is what the operation computed. Else it is recomputed."""
        return all(tensor._version == version for tensor, version in self._versions)

    def storages(self) -> dict[int, int]:
        """Bytes by storage."""
        return {storage_key(leaf): leaf.untyped_storage().nbytes() for leaf in self._leaves() if has_storage(leaf)}

    def _leaves(self) -> list[torch.Tensor]:
        return [leaf for leaf in tree_leaves(self.result) if isinstance(leaf, torch.Tensor)]


def _alone(leaf: Any) -> Any:
    """The tensor without its history, which refers to the block's graph; changes in place still count up its version,
    for which the guard lets the key through that does it."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return leaf.detach()


class Selection:
    """What is kept of one forward of a block.

    given: tensors that the block was given. wasted: calls that are not worth keeping, learned from recomputation to
    recomputation; casts: those of its parameters. Both are shared by all forwards of the block.
    """

    def __init__(
        self, policy: Policy, wasted: set[Key], casts: Remembered, block: nn.Module, given: Collection[torch.Tensor]
    ) -> None:
        self.policy = policy
        self.wasted = wasted
        self.kept: dict[Key, Kept] = {}
        self._ran = False
        self._casts, self._constants = casts, Remembered()
        self._block = block
        self._arguments = frozenset(storage_key(tensor) for tensor in given if has_storage(tensor))

    def modes(self) -> tuple[TorchDispatchMode, TorchDispatchMode]:
        """For around the forward, where results are kept, and around the recomputation, where they are given. They
        hold this, and not the other way round: what nobody runs backward goes at once."""
        return _Keeping(self), _Giving(self)

    def origins(self) -> Origins:
        """For a run of the block."""
        return Origins(self._block, self._arguments, self._constants, self._casts)

    def ran(self) -> None:
        """The forward is complete. A recomputation before that is for a derivative within the block."""
        self._ran = True

    def take(self, key: Key) -> Kept | None:
        """What a recomputation uses; while the forward runs, it stays for the one of the backward."""
        return self.kept.pop(key, None) if self._ran else self.kept.get(key)

    def storages(self) -> dict[int, int]:
        """Bytes of what is kept, by storage."""
        found: dict[int, int] = {}
        for kept in self.kept.values():
            found.update(kept.storages())
        return found

    def learn(self) -> int:
        """A recomputation is complete: what it left is freed, and not kept again. Returns its bytes."""
        if not self._ran:
            return 0
        freed = sum(self.storages().values())
        self.wasted.update(self.kept)
        self.kept.clear()
        return freed


class _Watching(TorchDispatchMode, ABC):
    """Sees every operation of a run of the block, and counts its calls: by that, one run's are known in the other."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __init__(self, selection: Selection) -> None:
        super().__init__()
        self._selection = selection
        self._begin()

    def _begin(self) -> None:
        self._calls: defaultdict[Operation, int] = defaultdict(int)
        self._origins = self._selection.origins()

    def __enter__(self) -> Any:
        self._begin()  # entered again where the graph was retained: by then nothing is left, all is recomputed
        self._hearing = writes.heard_by(self._written_unseen)
        self._hearing.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hearing.__exit__(*error)

    def _written_unseen(self, tensor: torch.Tensor) -> None:
        """By a collective that is no operation of torch."""
        self._origins.wrote(hash("a collective"), tensor)
        self._wrote(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        does = _what_it_does(func)
        if does == "views":
            return func(*args, **kwargs)
        origin = self._origins.of_call(func, args, kwargs)
        if does == "computes":
            key = (func, self._calls[func])
            self._calls[func] += 1
            result = self._result(key, origin, args, kwargs)
            self._origins.made(origin, result)
            return result
        result = func(*args, **kwargs)
        if does == "casts":
            self._origins.cast(origin, args[0], result)
            return result
        self._origins.made(origin, result)
        for tensor in written(func, args, kwargs):
            self._origins.wrote(origin, tensor)
            self._wrote(tensor)
        return result

    @abstractmethod
    def _result(self, key: Key, origin: int, args: Any, kwargs: Any) -> Any:
        """The result of a call, computed or not."""

    def _wrote(self, tensor: torch.Tensor) -> None:
        """An operation of the block has written there."""


class _Keeping(_Watching):
    def _begin(self) -> None:
        super()._begin()
        self._in_memory: defaultdict[int, set[Key]] = defaultdict(set)  # storage -> calls whose results lie there

    def _result(self, key: Key, origin: int, args: Any, kwargs: Any) -> Any:
        operation, selection = key[0], self._selection
        result = operation(*args, **kwargs)
        self._watch(result)
        if (
            key not in selection.wasted
            and selection.policy(operation, *args, **kwargs)
            and not is_random(operation, args, kwargs)
        ):
            selection.kept[key] = kept = Kept(result, origin)
            for storage in kept.storages():
                self._in_memory[storage].add(key)
        return result

    def _watch(self, result: Any) -> None:
        """Some operations return no view, and yet what they were given, such as the one behind a Linear without bias:
        changes of that count in it alone."""
        if self._in_memory:
            for leaf in tensors_in(result):
                if has_storage(leaf):
                    for key in self._in_memory.get(storage_key(leaf), ()):
                        self._selection.kept[key].watch(leaf)

    def _wrote(self, tensor: torch.Tensor) -> None:
        """The block will do so again in the recomputation: what is kept is of no use, whether its own version counts
        that or not."""
        if self._in_memory and has_storage(tensor):
            for key in list(self._in_memory.get(storage_key(tensor), ())):
                for storage in self._selection.kept.pop(key).storages():
                    self._in_memory[storage].discard(key)
                self._selection.wasted.add(key)


class _Giving(_Watching):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._selection.kept:  # nothing is left to be given
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _result(self, key: Key, origin: int, args: Any, kwargs: Any) -> Any:
        kept = self._selection.take(key)
        if kept is not None and kept.origin == origin:  # else this is another call: the forward did more, or less
            if kept.unchanged:
                return kept.result
            self._selection.wasted.add(key)
        return key[0](*args, **kwargs)


@functools.cache
def _what_it_does(operation: Operation) -> str:
    """What it "computes" may be kept. It "writes" to arguments. It "views" them: there is nothing to keep. It "casts":
    autocast remembers those of parameters from forward to forward, so that the n-th in one run is not the n-th in
    another, and none is kept."""
    if operation is torch.ops.aten._to_copy.default:
        return "casts"
    schema = getattr(operation, "_schema", None)
    if schema is None:
        return "views"
    if schema.is_mutable or not says_what_it_writes(operation):
        return "writes"
    return "views" if any(value.alias_info for value in schema.returns) else "computes"
