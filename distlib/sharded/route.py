"""Ranks of one partition group must gather the same units in the same order, or they gather nonsense.

The order's checksum rides on the small all-reduce that ends every window; ranks compare notes only where it differs.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from distlib.data_parallel.agreement import require_equal
from distlib.sharded.groups import Grid

BYTES = 8


class Route:
    """The units that this rank gathered since gradients were last averaged."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._units: list[str] = []

    def add(self, units: Sequence[str]) -> None:
        """These were gathered, in this order."""
        self._units += units

    def checksum(self) -> bytes:
        """BYTES bytes: a checksum and its complement; "or" over all ranks leaves them complements if all agree."""
        checksum = zlib.crc32("\n".join(self._units).encode()).to_bytes(BYTES // 2, "little")
        return checksum + bytes(255 - byte for byte in checksum)

    def check(self, together: bytes) -> None:
        """together: all ranks' checksums, or-ed. Partition groups may differ from each other; then begins anew.

        Raises RuntimeError on all ranks of a partition group that differ, naming the units, and ends the groups.
        """
        units, self._units = self._units, []
        half = BYTES // 2
        if self._grid.gather is None or not any(a & b for a, b in zip(together[:half], together[half:], strict=True)):
            return
        what = "The way through the model in stage 3 (the units, in the order in which they are gathered)"
        order = [(f"gather {i}", unit) for i, unit in enumerate(units)]
        try:
            require_equal(self._grid.gather, what, order, torch.device("cpu"))
        except RuntimeError as error:
            self._grid.abort(str(error))
            raise
