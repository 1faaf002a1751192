"""How a problem is cut into tiles, and how tiles are read and written.

Inside the backend tensors are (b, s, heads_kv, group, d) views, and what belongs to pairs of query and key is
(b, heads_kv, group, len_q, len_kv). A tile stacks the query heads of a group as rows of one matrix, so that keys are
never repeated and the gradients of shared keys are summed by the product itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# A tile of scores, of one head or of several short ones, is 0.5 MiB in fp32: it stays in a core's second-level cache,
# and is large enough that NumPy's cost per call does not show.
ROWS = 256
KEYS = 512
SCORES = ROWS * KEYS


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


def head_tiles(q: np.ndarray, len_kv: int, grad_dims: int) -> Iterator[tuple[slice, slice]]:
    """Cut (batch, heads_kv) so that a tile's scores, and grad_dims numbers a key, fit SCORES where they can."""
    batch, len_q, heads_kv, group, _ = q.shape
    scores = min(len_q * group, max(group, ROWS)) * min(len_kv, KEYS)
    pairs = max(1, SCORES // max(1, scores, grad_dims * len_kv))
    num_batches, num_heads = max(1, pairs // max(1, heads_kv)), min(pairs, heads_kv)
    for b in range(0, batch, num_batches):
        for h in range(0, heads_kv, max(1, num_heads)):
            yield slice(b, min(b + num_batches, batch)), slice(h, min(h + num_heads, heads_kv))


def row_tiles(q: np.ndarray) -> Iterator[slice]:
    """Cut len_q so that the rows of a group of heads make tiles of about ROWS."""
    len_q, step = q.shape[1], max(1, ROWS // max(1, q.shape[3]))
    for start in range(0, len_q, step):
        yield slice(start, min(start + step, len_q))


def load(x: np.ndarray, tile: tuple[slice, slice, slice], real: np.dtype) -> np.ndarray:
    """Read (batches, rows, heads) of a grouped view as a contiguous (batches, heads, group * rows, d)."""
    loaded = x[tile].transpose(0, 2, 3, 1, 4).astype(real, order="C", copy=False)
    return loaded.reshape(*loaded.shape[:2], -1, loaded.shape[-1])


def store(x: np.ndarray, tile: tuple[slice, slice, slice], rows: np.ndarray) -> None:
    """Write what `load` would read, rounded to the dtype of x."""
    target = x[tile].transpose(0, 2, 3, 1, 4)
    target[...] = rows.reshape(target.shape)
