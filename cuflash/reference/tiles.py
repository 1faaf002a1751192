"""How a problem is cut into tiles, and how tiles are read and written.

Inside the backend tensors are (b, s, heads_kv, group, d) views, and what belongs to pairs of query and key is
(b, heads_kv, group, len_q, len_kv). A tile stacks the query heads of a group as rows of one matrix, so that keys are
never repeated and the gradients of shared keys are summed by the product itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cuflash.reference.paged import PagedRows
from cuflash.reference.pool import Scratch

# A tile of scores, of one head or of several short ones, is 0.5 MiB in fp32: it stays in a core's second-level cache,
# and is large enough that NumPy's cost per call does not show. OpenBLAS on Zen 4: 256 x 512 takes 3 % longer.
ROWS = 512
KEYS = 256
SCORES = ROWS * KEYS
FEW_ROWS = 64
"""Fewer rows of a head do not pay for bringing all its keys into shape at once."""
MANY_ROWS = 2048
"""So many rows of a head pay for turning its keys."""


class Tile(NamedTuple):
    """Some pairs of (query, key), of all query heads that share a key head."""

    batches: slice
    heads: slice  # of heads_kv
    rows: slice
    keys: slice

    def of(self, x: np.ndarray) -> np.ndarray:
        """Index (b, heads_kv, group, len_q, len_kv) by the tile; axes of size 1 broadcast."""
        spans = (self.batches, self.heads, slice(None), self.rows, self.keys)
        return x[tuple(slice(0, 1) if size == 1 else span for size, span in zip(x.shape, spans, strict=True))]


def grouped(x: np.ndarray, heads_kv: int) -> np.ndarray:
    """View (b, s, h, d) as (b, s, heads_kv, group, d)."""
    batch, length, heads, dim = x.shape
    return x.reshape(batch, length, heads_kv, heads // heads_kv, dim, copy=False)


def grouped_pairs(x: np.ndarray, heads_kv: int) -> np.ndarray:
    """View up to four axes of (b|1, h|1, len_q|1, len_kv|1) as (b|1, heads_kv|1, group|1, len_q|1, len_kv|1)."""
    batch, heads, len_q, len_kv = (1,) * (4 - x.ndim) + x.shape
    heads_kv = 1 if heads == 1 else heads_kv
    return x.reshape(batch, heads_kv, heads // max(1, heads_kv), len_q, len_kv, copy=False)


def stacked(s: np.ndarray, group: int) -> np.ndarray:
    """View a tile (batches, heads, group * rows, n) as (batches, heads, group, rows, n)."""
    return s.reshape(*s.shape[:2], group, -1, s.shape[-1], copy=False)


def head_tiles(
    q: np.ndarray, len_kv: int, kept: int, most_heads: int | None = None, row_tiles: list[slice] | None = None
) -> list[tuple[slice, slice]]:
    """Cut (batch, heads_kv) so that a tile's scores fit SCORES, and `kept` other numbers of each head some more.

    With several `row_tiles`, for which jobs of their own are made, heads share a tile; otherwise all of a head's rows
    and keys count, so that there are jobs for many threads.
    """
    batch, len_q, heads_kv, group, _ = q.shape
    if row_tiles is None or len(row_tiles) < 2:
        scores = min(len_q * group, max(group, ROWS)) * len_kv
    else:
        scores = row_tiles[0].stop * group * min(len_kv, 2 * KEYS)
    pairs = max(1, min(SCORES // max(1, scores), 4 * SCORES // max(1, kept)))
    num_heads = min(pairs, heads_kv if most_heads is None else most_heads)
    num_batches = max(1, pairs // max(1, heads_kv)) if num_heads == heads_kv else 1
    return [
        (slice(b, min(b + num_batches, batch)), slice(h, min(h + num_heads, heads_kv)))
        for b in range(0, batch, num_batches)
        for h in range(0, heads_kv, max(1, num_heads))
    ]


def load(
    x: np.ndarray | PagedRows,
    tile: tuple[slice, slice, slice],
    real: np.dtype,
    scratch: Scratch,
    name: str,
    unit: float | None = None,
) -> np.ndarray:
    """Read (batches, rows, heads) of a grouped view into the contiguous scratch (batches, heads, group * rows, d).

    With a `unit`, multiplied by it.
    """
    source = x[tile].transpose(0, 2, 3, 1, 4)
    batches, heads, group, rows, dim = source.shape
    loaded = scratch(name, (batches, heads, group * rows, dim), real)
    target = loaded.reshape(source.shape)
    if unit is None:
        target[...] = source
    else:
        np.multiply(source, unit, out=target, dtype=real, casting="unsafe")
    return loaded


def view(x: np.ndarray | PagedRows, tile: tuple[slice, slice, slice], real: np.dtype) -> np.ndarray | None:
    """What `load` would read, where it lies, if matrices can be multiplied with it there."""
    if isinstance(x, PagedRows) or x.shape[3] != 1 or x.dtype != real or not x.flags.aligned:
        return None
    _, row, _, _, number = x.strides
    if number != x.itemsize or row < x.shape[4] * x.itemsize or row % x.itemsize:
        return None
    return x[tile][:, :, :, 0].transpose(0, 2, 1, 3)


def shape_of(x: np.ndarray, tile: tuple[slice, slice, slice]) -> tuple[int, int, int, int]:
    """The shape of what `load` would read."""
    batches, rows, heads, group, dim = x[tile].shape
    return batches, heads, group * rows, dim


def store(x: np.ndarray, tile: tuple[slice, slice, slice], rows: np.ndarray) -> None:
    """Write what `load` would read, rounded to the dtype of x."""
    target = x[tile].transpose(0, 2, 3, 1, 4)
    target[...] = rows.reshape(target.shape)


@dataclass(slots=True)
class KeyTiles:
    """Keys or values of some heads as matrices of the accumulator's dtype, a tile at a time."""

    x: np.ndarray | PagedRows
    at: tuple[slice, slice, slice]  # batches, keys, heads
    real: np.dtype
    name: str
    readers: int  # query rows that read them
    scratch: Scratch
    whole: np.ndarray | None  # all of them; None where each tile is brought into shape when it is read
    columns: bool = False

    def turned(self) -> KeyTiles:
        """The same, transposed; by a copy where it pays, as BLAS multiplies with that faster."""
        whole = self.whole
        if whole is not None:
            whole = _turned(whole, self.scratch, self.name) if self.readers >= MANY_ROWS else whole.mT
        return KeyTiles(self.x, self.at, self.real, self.name, self.readers, self.scratch, whole, columns=True)

    def __getitem__(self, keys: slice) -> np.ndarray:
        """(batches, heads, keys, d), or (batches, heads, d, keys)."""
        batches, every, heads = self.at
        if self.whole is None:
            tile = load(self.x, (batches, keys, heads), self.real, self.scratch, self.name)
            return tile.mT if self.columns else tile
        if every.start:
            keys = slice(keys.start - every.start, keys.stop - every.start)
        return self.whole[..., keys] if self.columns else self.whole[:, :, keys]


def key_tiles(
    x: np.ndarray | PagedRows,
    at: tuple[slice, slice, slice],
    real: np.dtype,
    name: str,
    readers: int,
    scratch: Scratch,
) -> KeyTiles:
    """Keys or values ``at`` (batches, keys, heads), which `readers` query rows read.

    Where many rows read them they are read where they lie, if there are matrices of the dtype, or brought into shape
    once, all together; else each tile is.
    """
    whole = view(x, at, real) if readers >= FEW_ROWS else None
    if whole is None and readers >= FEW_ROWS:
        whole = load(x, at, real, scratch, name)
    return KeyTiles(x, at, real, name, readers, scratch, whole)


def _turned(rows: np.ndarray, scratch: Scratch, name: str) -> np.ndarray:
    """A copy of every matrix, transposed, whose lines are not a power of 2 apart: those would share cache sets."""
    *outer, length, dim = rows.shape
    turned = scratch(f"{name} turned", (*outer, dim, length + 16), rows.dtype)[..., :length]
    turned[...] = rows.mT
    return turned
