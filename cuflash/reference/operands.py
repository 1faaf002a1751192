"""What the loops multiply: keys and values in shape, products in scratch, and where rows are put."""

from __future__ import annotations

import threading

import numpy as np

from cuflash.reference import tiles
from cuflash.reference.dropout import KeepMask
from cuflash.reference.paged import PagedRows
from cuflash.reference.pool import Scratch, key_scratch
from cuflash.reference.tiles import FEW_ROWS, KeyTiles, Tile, key_tiles, store, view


class Keys:
    """The keys and values of some heads, for all jobs on their rows; the first that needs them brings them in shape."""

    def __init__(
        self,
        k: np.ndarray | PagedRows,
        v: np.ndarray | PagedRows,
        at: tuple[slice, slice, slice],
        real: np.dtype,
        readers: int,
        prefix: str = "",
    ) -> None:
        self._k, self._v, self._at, self._real, self._readers, self._prefix = k, v, at, real, readers, prefix
        self._scratch: Scratch | None = None
        self._tiles: tuple[KeyTiles, KeyTiles, KeyTiles] | None = None
        self._lock = threading.Lock()

    def __del__(self) -> None:
        self.give_back()

    def give_back(self) -> None:
        """Leave the scratch that they were brought into shape in to others."""
        if self._scratch is not None:
            key_scratch.give_back(self._scratch)
            self._scratch = self._tiles = None

    def tiles(self, scratch: Scratch) -> tuple[KeyTiles, KeyTiles, KeyTiles]:
        """Keys, keys turned, and values; where they are read a tile at a time, into the scratch of the job."""
        if self._readers < FEW_ROWS:
            return self._made(scratch)
        with self._lock:
            if self._tiles is None:
                self._scratch = key_scratch.borrow()
                self._tiles = self._made(self._scratch)
            return self._tiles

    def _made(self, scratch: Scratch) -> tuple[KeyTiles, KeyTiles, KeyTiles]:
        k, v = (
            key_tiles(x, self._at, self._real, self._prefix + name, self._readers, scratch)
            for x, name in ((self._k, "k"), (self._v, "v"))
        )
        return k, k.turned(), v


def product(name: str, a: np.ndarray, b: np.ndarray, scratch: Scratch) -> np.ndarray:
    """Matrices a @ b, in the scratch array of that name."""
    return np.matmul(a, b, out=scratch(name, (*a.shape[:-1], b.shape[-1]), a.dtype))


def add_product(total: np.ndarray, a: np.ndarray, b: np.ndarray, scratch: Scratch, first: bool) -> None:
    """Add matrices a @ b to the total, or begin it with them."""
    if first:
        np.matmul(a, b, out=total)
    else:
        total += product("product", a, b, scratch)


def place_of(
    x: np.ndarray, tile: tuple[slice, slice, slice], real: np.dtype, scratch: Scratch, name: str
) -> np.ndarray:
    """Where rows of the result x can be computed: there, or in scratch."""
    there = view(x, tile, real)
    return scratch(name, tiles.shape_of(x, tile), real) if there is None else there


def keep_rows(x: np.ndarray, tile: tuple[slice, slice, slice], rows: np.ndarray) -> None:
    """Store rows that were computed in their `place_of`."""
    if not np.may_share_memory(x, rows):
        store(x, tile, rows)


def kept_of(dropout: KeepMask, tile: Tile) -> np.ndarray:
    """What dropout keeps of a tile, (batches, heads, group * rows, keys)."""
    kept = dropout.tile((tile.batches, tile.heads), tile.rows, tile.keys)
    return kept.reshape(*kept.shape[:2], -1, kept.shape[-1])


def sink_rows(sink: np.ndarray, like: np.ndarray) -> np.ndarray:
    """A tile's (heads, group) sinks for every row, shaped and typed like (batches, heads, group * rows, 1)."""
    rows = np.repeat(sink, like.shape[2] // sink.shape[1], axis=1)
    return np.broadcast_to(rows[..., None], like.shape).astype(like.dtype)


def add_reduced(target: np.ndarray, x: np.ndarray) -> None:
    """Add x to target, summed along the axes where target has size 1."""
    axes = tuple(axis for axis, size in enumerate(target.shape) if size == 1)
    target += x.sum(axis=axes, keepdims=True)


def part_of(dbias: np.ndarray | None, batches: slice, heads: slice) -> tuple[int, int]:
    """Which part of dbias, of grouped pairs, these heads add to: its first batch element and head."""
    every_batch, every_head = (False, False) if dbias is None else (len(dbias) == 1, dbias.shape[1] == 1)
    return 0 if every_batch else batches.start, 0 if every_head else heads.start
