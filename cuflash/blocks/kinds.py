"""Which blocks of scores a mask leaves empty and which it fills: by bounds where they tell, else pair by pair.

Neither is held for more than some blocks at a time, so memory grows with the number of blocks that are visible.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cuflash.blocks.bounds import Bounds, bounds
from cuflash.blocks.lists import EMPTY, FULL, PARTIAL
from cuflash.mods import Traced
from cuflash.mods.evaluate import evaluate
from cuflash.mods.expression import Node, in_order

UNKNOWN = -1
"""Of a block that is to be looked at pair by pair."""

_AT_ONCE = 2**18
"""Blocks whose bounds are held, and pairs that are computed, at a time: some megabytes."""

REAL = np.float32
"""Real numbers in a block mask have 32 bits whatever the tensors have: its lists are made before these are known."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Queries and keys of one head, cut into blocks."""

    len_q: int
    len_kv: int
    block_size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of blocks; the last ones may be cut short."""
        rows, columns = self.block_size
        return -(-self.len_q // rows), -(-self.len_kv // columns)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """The first row of blocks and the end of so many at a time."""
        rows, columns = self.shape
        step = max(1, _AT_ONCE // max(columns, 1))
        for start in range(0, rows, step):
            yield start, min(start + step, rows)


def reads(traced: Traced, position: str) -> bool:
    """Whether a mask depends on a position."""
    return any(node.op == "position" and node.value == position for node in in_order(traced.mod.expression))


def of_rule(traced: Traced, grid: Grid, b: int, h: int) -> Iterator[np.ndarray]:
    """The kinds of all blocks of a head, some rows of blocks at a time."""
    by_key = _without(traced.mod.expression, "q")
    whole: dict[Node, Bounds] = {}
    for start, stop in grid.chunks():
        known = {node: limits for node, limits in whole.items() if node in by_key}
        positions = {
            "b": _at(b), "h": _at(h),
            "q": _spans(start, stop, grid.block_size[0], grid.len_q, axis=0),
            "k": _spans(0, grid.shape[1], grid.block_size[1], grid.len_kv, axis=1),
        }  # fmt: skip
        limits = bounds(traced.mod.expression, positions, traced.arrays, known)
        whole = whole or known
        kinds = np.where(limits.low == 1, FULL, np.where(limits.high == 0, EMPTY, UNKNOWN))
        kinds = np.broadcast_to(kinds, (stop - start, grid.shape[1])).astype(np.int8)
        yield looked_at(kinds, start, traced, grid, b, h)


def of_array(seen: np.ndarray, grid: Grid) -> Iterator[np.ndarray]:
    """The same of a boolean array, (len_q|1, len_kv|1)."""
    rows, columns = grid.block_size
    pad = grid.shape[1] * columns - grid.len_kv

    def reduced(x: np.ndarray, fill: bool) -> np.ndarray:
        x = np.broadcast_to(x, (grid.len_kv,))
        return np.pad(x, (0, pad), constant_values=fill).reshape(grid.shape[1], columns)

    for i in range(grid.shape[0]):
        block = seen[i * rows : (i + 1) * rows] if len(seen) > 1 else seen
        some = reduced(np.logical_or.reduce(block, axis=0), False).any(axis=1)
        every = reduced(np.logical_and.reduce(block, axis=0), True).all(axis=1)
        yield np.where(every, FULL, np.where(some, PARTIAL, EMPTY)).astype(np.int8)[None]


def looked_at(kinds: np.ndarray, start: int, traced: Traced, grid: Grid, b: int, h: int) -> np.ndarray:
    """The kinds of blocks of rows from `start` on, with those that were unknown found pair by pair, in place."""
    rows, columns = np.nonzero(kinds == UNKNOWN)
    high, wide = (min(size, n) for size, n in zip(grid.block_size, (grid.len_q, grid.len_kv), strict=True))
    blocks = max(1, _AT_ONCE // max(high * wide, 1))
    piece = max(1, min(high, _AT_ONCE // max(wide, 1)))
    for first in range(0, len(rows), blocks):
        at = slice(first, first + blocks)
        some, every = np.zeros(len(rows[at]), bool), np.ones(len(rows[at]), bool)
        # Where the last block is cut short, its last query or key stands for those that are not there.
        keys = np.minimum(columns[at, None, None] * grid.block_size[1] + np.arange(wide), grid.len_kv - 1)
        for above in range(0, high, piece):
            inside = np.arange(above, min(above + piece, high))[:, None]
            queries = np.minimum((start + rows[at, None, None]) * grid.block_size[0] + inside, grid.len_q - 1)
            seen = visible(traced, b, h, queries, keys)
            some |= seen.any(axis=(1, 2))
            every &= seen.all(axis=(1, 2))
        kinds[rows[at], columns[at]] = np.where(every, FULL, np.where(some, PARTIAL, EMPTY))
    return kinds


def visible(traced: Traced, b: int | np.ndarray, h: int | np.ndarray, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Whether queries see keys, bool, at positions that broadcast, with as many axes as q and k have."""
    positions = {"b": b, "h": h, "q": q, "k": k}
    [seen] = evaluate(traced.mod.expression, score=None, positions=positions, captured=traced.arrays, real=REAL)
    return seen.reshape((1,) * (q.ndim - seen.ndim) + seen.shape)


def _at(index: int) -> Bounds:
    return Bounds(np.array(float(index)), np.array(float(index)))


def _spans(start: int, stop: int, size: int, length: int, axis: int) -> Bounds:
    """The first and the last position of blocks, as a column or a row."""
    first = np.expand_dims(np.arange(start, stop, dtype=np.float64) * size, 1 - axis)
    return Bounds(first, np.minimum(first + size, length) - 1)


def _without(result: Node, position: str) -> set[Node]:
    """The parts of an expression that do not depend on a position."""
    free: set[Node] = set()
    for node in in_order(result):
        if not (node.op == "position" and node.value == position) and all(x in free for x in node.args):
            free.add(node)
    return free
