"""Selective recomputation: results of expensive operations are kept in forward and given back in the recomputation.

    forward        norm   mm*   gelu   mm*   add          * kept: the policy says so
    recomputation  norm   <-    gelu   (stops: nothing behind it is needed)

The second mm was kept in vain: what one recomputation did not ask for is not kept in the forwards to come. Should it be
asked for after all, it is recomputed: keeping saves time and never decides a value.

Papers: Reducing Activation Recomputation in Large Transformer Models (Korthikanti et al., arXiv 2205.05198).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from distlib.activations.live import has_storage, storage_key

Operation = Any  # torch._ops.OpOverload
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
        ValueError: an element that is not one overload of an operation, or one that always draws random numbers.
    """
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
    return _Among(operations)


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
    """A result that is kept, and the version that it had: a change of it before its use is noticed."""

    def __init__(self, result: Any) -> None:
        self.result = tree_map(_alone, result)
        self._versions = [leaf._version for leaf in self._leaves()]

    @property
    def unchanged(self) -> bool:
        """Whether it is what the operation computed. Else it is recomputed, and changed again if the block did it."""
        return [leaf._version for leaf in self._leaves()] == self._versions

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

    wasted: calls that are not worth keeping, learned from recomputation to recomputation; shared by all forwards of the
    block.
    """

    def __init__(self, policy: Policy, wasted: set[Key]) -> None:
        self.policy = policy
        self.wasted = wasted
        self.kept: dict[Key, Kept] = {}

    def modes(self) -> tuple[TorchDispatchMode, TorchDispatchMode]:
        """For around the forward, where results are kept, and around the recomputation, where they are given. They
        hold this, and not the other way round: what nobody runs backward goes at once."""
        return _Keeping(self), _Giving(self)

    def storages(self) -> dict[int, int]:
        """Bytes of what is kept, by storage."""
        found: dict[int, int] = {}
        for kept in self.kept.values():
            found.update(kept.storages())
        return found

    def learn(self) -> int:
        """A recomputation is complete: what it left is freed, and not kept again. Returns its bytes."""
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
        self._calls: defaultdict[Operation, int] = defaultdict(int)

    def __enter__(self) -> Any:
        self._calls.clear()  # entered again where the graph was retained: by then nothing is left, all is recomputed
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _can_be_kept(func):
            return func(*args, **kwargs)
        key = (func, self._calls[func])
        self._calls[func] += 1
        return self._result(key, args, kwargs)

    @abstractmethod
    def _result(self, key: Key, args: Any, kwargs: Any) -> Any:
        """The result of a call, computed or not."""


class _Keeping(_Watching):
    def _result(self, key: Key, args: Any, kwargs: Any) -> Any:
        operation, selection = key[0], self._selection
        result = operation(*args, **kwargs)
        if (
            key not in selection.wasted
            and selection.policy(operation, *args, **kwargs)
            and not is_random(operation, args, kwargs)
        ):
            selection.kept[key] = Kept(result)
        return result


class _Giving(_Watching):
    def _result(self, key: Key, args: Any, kwargs: Any) -> Any:
        kept = self._selection.kept.pop(key, None)
        if kept is not None and kept.unchanged:
            return kept.result
        if kept is not None:
            self._selection.wasted.add(key)
        return key[0](*args, **kwargs)


def _can_be_kept(operation: Operation) -> bool:
    """Not what writes to its arguments, and not views: there is nothing to keep. Not casts: autocast remembers those of
    parameters from forward to forward, so that the n-th in one run is not the n-th in another."""
    if operation is torch.ops.aten._to_copy.default:
        return False
    schema = getattr(operation, "_schema", None)
    return schema is not None and not schema.is_mutable and not any(r.alias_info for r in schema.returns)
