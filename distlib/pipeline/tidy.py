"""From calls as they were written down to a program: dead glue is dropped, writes in place become versions.

0  v1 = leaf(v0)               0  v1 = leaf(v0)
1  v2 = v1[:, 0]               1  v2 = v1[:, 0]
2  v3 = v1.mean()              .                           nobody reads it
3  v4 = v2.zero_()             2  writes v1                reads v2 and v1; whoever reads v1 from here on reads
4  v5 = leaf(v1)               3  v5 = leaf(v1 of 2)       the version of call 2
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distlib.pipeline.program import Call, Context, LeafCall, Program, Read, Spec, Template, Value, refs


@dataclass(frozen=True, eq=False)
class Draft:
    """A call as it was written down. reads: values of its arguments. memories: that it wrote. flows: of its results.
    differentiable: arguments that require a gradient. effect: it matters though nobody reads its result. changed: as of
    LeafCall."""

    target: str | Callable[..., Any]
    number: int | None
    args: tuple[Template, ...]
    kwargs: Mapping[str, Template]
    result: Template
    reads: tuple[int, ...]
    memories: frozenset[int]
    flows: Mapping[int, tuple[int, ...]]
    differentiable: tuple[int, ...]
    context: Context | None
    random: bool
    effect: bool
    changed: tuple[str, ...] = ()


def tidy(
    drafts: Sequence[Draft],
    values: Sequence[Value],
    specs: Mapping[Read, Spec],
    output: Template,
    leaves: Sequence[str],
    inside: Mapping[str, tuple[str, ...]],
    inputs: int,
    context: Context,
    dtype: torch.dtype | None,
) -> Program:
    """The program of a run. specs: by value and the draft that wrote the version; the rest: see Program."""
    changes = _needed(drafts, values, output)
    writer: dict[int, int | None] = {v: None for v, value in enumerate(values) if value.origin is not None}
    kept: list[Call] = []
    versions: dict[Read, Spec] = {(v, None): specs[v, None] for v in writer}
    leaf_calls = []
    for old, draft in enumerate(drafts):
        if old not in changes:
            continue
        index, changed = len(kept), changes[old]
        reads = tuple((v, writer[v]) for v in sorted({*draft.reads, *changed}))
        made = tuple(dict.fromkeys(refs(draft.result)))
        flows = dict(draft.flows)
        for v in changed:
            if specs[v, old].requires_grad:
                flows[v] = tuple(sorted({v, *draft.differentiable}))
        if draft.number is not None:
            assert isinstance(draft.target, str)
            given = [ref for part in (*draft.args, *draft.kwargs.values()) for ref in refs(part)]
            leaf_calls.append(
                LeafCall(
                    draft.number,
                    draft.target,
                    index,
                    tuple(versions[v, writer[v]] for v in given),
                    tuple(specs[v, old] for v in made),
                    draft.changed,
                )
            )
        for v in (*made, *changed):
            writer[v] = index
            versions[v, index] = specs[v, old]
        kept.append(
            Call(
                index,
                draft.target,
                draft.number,
                draft.args,
                draft.kwargs,
                draft.result,
                reads,
                draft.memories,
                changed,
                flows,
                draft.context,
                draft.random,
            )
        )
    ends = tuple((v, writer[v]) for v in dict.fromkeys(refs(output)))
    return Program(
        tuple(kept),
        tuple(values),
        versions,
        output,
        ends,
        tuple(leaf_calls),
        tuple(leaves),
        inside,
        inputs,
        context,
        dtype,
    )


def _needed(drafts: Sequence[Draft], values: Sequence[Value], output: Template) -> dict[int, tuple[int, ...]]:
    """The drafts that matter, each with the values that it changes and somebody reads later."""
    created = {v: index for index, draft in enumerate(drafts) for v in refs(draft.result)}
    written = {memory for draft in drafts for memory in draft.memories}
    live = set(refs(output))
    live |= {v for v, value in enumerate(values) if isinstance(value.origin, str) and value.memory in written}
    found: dict[int, tuple[int, ...]] = {}
    for index in reversed(range(len(drafts))):
        draft = drafts[index]
        made = set(refs(draft.result))
        changed = {v for v in live if values[v].memory in draft.memories and created.get(v, -1) < index}
        if draft.number is None and not (draft.effect or draft.random or changed or made & live):
            continue
        found[index] = tuple(sorted(changed))
        live -= made
        live |= {*draft.reads, *changed}
    return found
