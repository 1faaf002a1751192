"""From q.k to logits: which pairs exist, the soft cap, and the terms that depend on the position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cuflash.masks import Mask
from cuflash.reference import tiles
from cuflash.reference.tiles import Tile, stacked


@dataclass(frozen=True, slots=True)
class Scores:
    """The logits of one dense problem, s = softcap * tanh(x / softcap) - slope * |distance| + bias."""

    mask: Mask
    len_q: int
    len_kv: int
    unit: float  # x = unit * q.k
    softcap: float = 0.0  # 0: s = x + ...
    keep: np.ndarray | None = None  # bool, grouped pairs; None: the band alone decides
    slopes: np.ndarray | None = None  # (b|1, heads_kv, group, 1, 1)
    bias: np.ndarray | None = None  # grouped pairs

    def kv_tiles(self, batches: slice, heads: slice, rows: slice) -> Iterator[tuple[Tile, np.ndarray | None]]:
        """Key tiles that some of these query rows see, each with its boolean mask, or None when all of it is seen."""
        off = self.mask.offset(self.len_q, self.len_kv)
        # Row i sees keys [i + first, i + end).
        first = -self.len_q - self.len_kv if self.mask.left is None else off - self.mask.left
        end = self.len_q + self.len_kv if self.mask.right is None else off + self.mask.right + 1
        last_row = rows.stop - 1
        for start in range(max(rows.start + first, 0), min(last_row + end, self.len_kv), tiles.KEYS):
            tile = Tile(batches, heads, rows, slice(start, min(start + tiles.KEYS, last_row + end, self.len_kv)))
            keep = None
            if last_row + first > start or rows.start + end < tile.keys.stop:
                distance = _distances(tile)
                keep = (first <= distance) & (distance < end)
            if self.keep is not None:
                seen = tile.of(self.keep)
                if not seen.any():
                    continue
                keep = seen if keep is None else seen & keep
            yield tile, keep

    def capped(self, x: np.ndarray) -> np.ndarray:
        """Apply softcap * tanh(x / softcap) in place."""
        if not self.softcap:
            return x
        return np.multiply(np.tanh(np.divide(x, self.softcap, out=x), out=x), self.softcap, out=x)

    def slope(self, capped: np.ndarray) -> np.ndarray | float:
        """The derivative of `capped`, 1 - tanh(x / softcap)^2, from its result."""
        return 1 - np.square(capped / self.softcap) if self.softcap else 1.0

    def finish(self, capped: np.ndarray, tile: Tile, keep: np.ndarray | None, group: int) -> np.ndarray:
        """Add ALiBi and bias and set what is not kept to -inf, whatever it was, in place."""
        s = stacked(capped, group)
        if self.slopes is not None:
            off = self.mask.offset(self.len_q, self.len_kv)
            distance = np.abs(_distances(tile) - off).astype(s.dtype)
            s -= tile.of(self.slopes) * distance
        if self.bias is not None:
            s += tile.of(self.bias).astype(s.dtype, copy=False)
        if keep is not None:
            np.copyto(s, -np.inf, where=~keep)
        return capped


def _distances(tile: Tile) -> np.ndarray:
    """Key minus query, (rows, keys)."""
    return np.arange(tile.keys.start, tile.keys.stop) - np.arange(tile.rows.start, tile.rows.stop)[:, None]
