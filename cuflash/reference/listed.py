"""Block masks on the tiles of one dense problem: which keys are visited, and in which tiles pairs are tested."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cuflash.reference.tiles import Tile
from cuflash.reference.written import Written

if TYPE_CHECKING:
    from cuflash.blocks import BlockMask

_GAP = 32
"""Fewer hidden keys than these are visited with their neighbours: a tile of its own costs as much as they do."""


class Listed(NamedTuple):
    """A block mask, and where its batch elements and query heads begin."""

    block_mask: BlockMask
    first: int  # number of the first batch element
    group: int  # query heads of a key head

    @property
    def height(self) -> int:
        """Queries of a block."""
        return self.block_mask.block_size[0]

    def key_tiles(
        self, batches: slice, heads: slice, rows: slice, keys: slice, step: int
    ) -> Iterator[tuple[slice, bool]]:
        """At most `step` of these keys at a time, of blocks that some of the rows list, and whether all are seen."""
        batches = slice(self.first + batches.start, self.first + batches.stop)
        heads = slice(heads.start * self.group, heads.stop * self.group)
        seen, full = self.block_mask.seen(batches, heads, rows)
        listed, size = np.flatnonzero(seen), self.block_mask.block_size[1]
        for run in np.split(listed, np.flatnonzero((np.diff(listed) - 1) * size >= _GAP) + 1):
            if not len(run):  # where no block is listed
                return
            end = min((int(run[-1]) + 1) * size, keys.stop)
            for start in range(max(int(run[0]) * size, keys.start), end, step):
                stop = min(start + step, end)
                yield slice(start, stop), bool(full[start // size : -(-stop // size)].all())

    def mask(self, tile: Tile) -> np.ndarray:
        """Which pairs of a tile are seen, of a shape that broadcasts to grouped pairs."""
        return Written(self.block_mask.rule.mod, self.block_mask.rule.arrays, self.first, self.group).mask(tile)
