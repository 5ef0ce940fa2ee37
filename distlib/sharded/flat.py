"""One flat buffer of a unit: whole parameters that the module computes with, and pieces that the optimizer sees.

    whole      |  part 0  |  part 1  |  part 2  |     compute dtype; every rank's parts together
    shard                 |  part 1  |                what this rank gives to a gather
    master                |  part 1  |                what the optimizer writes: the same memory, or under mixed
                                                      precision a copy of its own in the optimizer's dtype

`full[i]` are leaves on `whole`, `pieces[i]` on `master`. Parameters of one flat agree in dtype and in whether they
are trained. With optimizer state divided over replicas too, `master` is only this replica's subpart of the shard.

Where the optimizer works in the host's memory and the model on another device, `master` lies in pinned memory, under
mixed precision beside `staged`, what goes to the device in the compute dtype:

    host      master | part 1 |  --optimizer-->  staged | part 1 |  --one copy-->  shard      device
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from distlib import streams
from distlib.sharded.files import file_zeros
from distlib.sharded.groups import Grid
from distlib.sharded.layout import Entry, FlatLayout, lay_out
from distlib.sharded.options import HALF, Options
from distlib.sharded.units import Place
from distlib.shards import Shard, mark


class Flat:
    """See the file. Made in three steps: the layout, `settle` on memory, `load` of first values."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        hangs: Sequence[Sequence[Place]],
        grid: Grid,
        options: Options,
        device: torch.device,
    ) -> None:
        first = parameters[0]
        self.device = device
        self.host = options.host
        self.told = True  # somebody said that pieces were written
        self.names = [places[0].name for places in hangs]
        self.places = [list(places) for places in hangs]
        everywhere = [(i, place) for i, places in enumerate(self.places) for place in places]
        self._places_in: dict[nn.Module | None, list[tuple[int, Place]]] = {None: everywhere}  # with the entry's number
        self.trained = first.requires_grad
        self.grid = grid
        chosen = options.mixed_precision.param
        casts = chosen is not None and first.dtype.is_floating_point
        self.compute: torch.dtype = chosen if casts and chosen is not None else first.dtype
        self.dtype: torch.dtype = torch.float32 if casts and first.dtype in HALF else first.dtype
        self.subparts = grid.replicas if options.shard_optimizer == "world" else 1
        entries = [Entry(name, p.shape) for name, p in zip(self.names, parameters, strict=True)]
        whole = options.ownership == "whole"
        itemsize = min(self.compute.itemsize, self.dtype.itemsize)
        self.layout: FlatLayout = lay_out(entries, itemsize, grid.partition_size, self.subparts, whole)
        self._whole_pieces = whole
        self.full: list[nn.Parameter] = []
        self.pieces: list[nn.Parameter] = []
        self._sent: streams.Event = None  # passes when the last copy from the host's memory has read it

    # ------------------------------------------------------------ memory

    @property
    def mixed(self) -> bool:
        """Whether the model computes in another dtype than the optimizer works in."""
        return self.compute != self.dtype

    @property
    def apart(self) -> bool:
        """Whether the optimizer works on other memory than the model."""
        return self.mixed or self.host

    @property
    def owned(self) -> tuple[int, int]:
        """The elements of `whole` (begin, end) that this rank's optimizer writes."""
        subpart = self.grid.replica if self.subparts > 1 else None
        return self.layout.bounds(self.grid.part, subpart)

    def settle(self, whole: torch.Tensor, freed: bool, offload: Path | None) -> None:
        """Take `whole` (1-D, compute dtype) as memory; `freed`: it comes and goes, so the shard needs its own."""
        begin, end = self.layout.bounds(self.grid.part)
        first, last = self.owned
        self.whole = whole
        self.shard = torch.empty(end - begin, dtype=self.compute, device=self.device) if freed else whole[begin:end]
        # This rank's own subpart of the shard, in the compute dtype.
        self.own = self.shard[first - begin : last - begin]
        self.master = self.staged = self.own
        if self.apart:
            size = last - first
            if offload is not None:
                self.master = file_zeros(offload, size, self.dtype)
            elif self.host:
                self.master = streams.pinned(size, self.dtype, self.device, lasting=True)
            else:
                self.master = torch.empty(size, dtype=self.dtype, device=self.device)
        if self.host:
            self.staged = self.master
            if self.mixed:
                self.staged = streams.pinned(size, self.compute, self.device, lasting=True)
        grads = [
            # .data: a version counter of its own, so that a change of one parameter is not taken for one of another
            whole[offset : offset + entry.numel].data.view(entry.shape)
            for entry, offset in zip(self.layout.entries, self.layout.offsets, strict=True)
        ]
        self.full = [nn.Parameter(view, requires_grad=self.trained) for view in grads]
        self.ranges = self.layout.pieces(first, last)
        for piece in self.ranges:
            if freed or self.apart:
                view = self.master[piece.where - first : piece.where - first + piece.numel].data
            else:  # the same counter as the leaf: writing between forward and backward is noticed, as in torch
                view = grads[piece.entry].view(-1)[piece.at : piece.at + piece.numel]
            parameter = nn.Parameter(self.shaped(piece.entry, view), requires_grad=self.trained)
            entry = self.layout.entries[piece.entry]
            compute = self.staged[piece.where - first : piece.where - first + piece.numel] if self.mixed else None
            group = self.grid.world if self.subparts > 1 else self.grid.reduce
            replicas = 1 if self.subparts > 1 else self.grid.replicas
            replica = 0 if self.subparts > 1 else self.grid.replica
            shard = Shard(
                entry.name,
                entry.shape,
                piece.at,
                piece.numel,
                group,
                self.grid.world,
                replica,
                replicas,
                compute,
                offload,
            )
            mark(parameter, shard)
            self.pieces.append(parameter)

    def shaped(self, entry: int, piece: torch.Tensor) -> torch.Tensor:
        """A 1-D piece as the optimizer sees it: in the parameter's own shape where ranks own whole parameters."""
        shape = self.layout.entries[entry].shape
        return piece.view(shape) if self._whole_pieces and piece.numel() == shape.numel() else piece

    def view_on(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The parameters' slices, in their shapes, of a 1-D buffer of the layout's length."""
        return [
            buffer[offset : offset + entry.numel].view(entry.shape)
            for entry, offset in zip(self.layout.entries, self.layout.offsets, strict=True)
        ]

    @torch.no_grad()
    def load(self, whole: torch.Tensor) -> None:
        """Take values from a 1-D tensor of the layout's length: this rank's part of them."""
        begin, end = self.layout.bounds(self.grid.part)
        first, last = self.owned
        self.writable()
        self.shard.copy_(whole[begin:end])
        if self.apart:
            self.master.copy_(whole[first:last])
        if self.host and self.mixed:
            self.staged.copy_(self.master)

    # ------------------------------------------------------------ the optimizer wrote

    @torch.no_grad()
    def write_compute(self) -> None:
        """What the optimizer wrote goes to where the model computes: cast to the compute dtype, where the optimizer did
        not do so itself, and from the host to the device."""
        if self.host and not (self.trained or self.told):
            return  # no optimizer writes it
        self.told = False
        if self.mixed:
            pieces: list[tuple[nn.Parameter, Shard]] = [(p, p._distlib_shard) for p in self.pieces if p.numel()]
            behind = [(piece, shard) for piece, shard in pieces if not shard.is_written(piece)]
            if len(behind) == len(pieces) > 0:  # an optimizer that knows of no copies: all at once
                self.staged.copy_(self.master)
            else:
                for piece, shard in behind:
                    assert shard.compute is not None
                    shard.compute.copy_(piece.view(-1))
            for _, shard in pieces:
                shard.may_be_written()
        if self.host:
            self.own.copy_(self.staged, non_blocking=True)
            self._sent = streams.record(streams.current(self.device))

    def writable(self) -> None:
        """Returns when the host may write pieces: no copy to the device still reads them. After a backward, which
        brought gradients to the host, it never waits."""
        if not streams.has_passed(self._sent):
            streams.finish(self._sent)
        self._sent = None

    # ------------------------------------------------------------ what the module holds

    def show_full(self) -> None:
        """The module's parameters are the whole ones."""
        self.show(self.full)

    def show_pieces(self) -> None:
        """The module's parameters are this rank's pieces."""
        self.show(self.pieces)

    def come_and_go(self, yes: bool) -> None:
        """Says whether whole parameters lose their memory after use: a weight pass must then not read them."""
        for parameter in self.full:
            parameter._distlib_comes_and_goes = yes

    def show(self, parameters: Sequence[nn.Parameter], part: nn.Module | None = None) -> None:
        """The module's parameters are these, one per entry. part: only those inside of it."""
        if part is not None and part not in self._places_in:
            inside = set(part.modules())
            self._places_in[part] = [(i, place) for i, place in self._places_in[None] if place.owner in inside]
        for i, place in self._places_in[part]:
            if place.intercepts:
                setattr(place.owner, place.key, parameters[i])
            else:
                place.owner._parameters[place.key] = parameters[i]
