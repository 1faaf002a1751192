"""The two loops: attention and its gradients of one dense problem, tile by tile.

The algorithm is FlashAttention (Dao et al. 2022, arXiv 2205.14135) in the loop order of FlashAttention-2 (Dao 2023,
arXiv 2307.08691), with x = unit * q.k and s the logit that `Scores` makes of it. Both loops come as jobs of some heads
each (and of some rows, in the forward), which may run in any order and at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from cuflash.reference import tiles
from cuflash.reference.dropout import KeepMask
from cuflash.reference.features import Policies
from cuflash.reference.paged import PagedRows
from cuflash.reference.pool import Job, Scratch, key_scratch
from cuflash.reference.softmax import FEW_KEYS, SMALL_LOGIT, RowSoftmax, delta_of, moderate, normalizers, weights
from cuflash.reference.tiles import FEW_ROWS, KeyTiles, Tile, grouped, head_tiles, load, stacked, store

ROW_TILES = 4
"""Of so many tiles of rows one job is made: some ten milliseconds with thousands of keys."""


def forward(
    q: np.ndarray,
    k: np.ndarray | PagedRows,
    v: np.ndarray | PagedRows,
    out: np.ndarray,
    lse: np.ndarray,
    policies: Policies,
    row_state: np.ndarray | None = None,
    empty_lse: float = -np.inf,
) -> Iterator[Job]:
    """Fill out (b, s, h, d), lse (b, h, s) and row_state (b, h, s, 2): FlashAttention-2, algorithm 1."""
    scores, sink, dropout = policies
    real, heads_kv = lse.dtype, k.shape[2]
    q, out = (grouped(x, heads_kv) for x in (q, out))
    k, v = (x if isinstance(x, PagedRows) else grouped(x, heads_kv) for x in (k, v))
    lse = grouped(lse.transpose(0, 2, 1)[..., None], heads_kv)
    row_state = None if row_state is None else grouped(row_state.swapaxes(1, 2), heads_kv)
    group = q.shape[3]
    row_tiles = list(scores.row_tiles(group))
    every_key = scores.keys_of(slice(0, scores.len_q))
    worth = scores.plain and scores.len_q * group >= tiles.MANY_ROWS

    def job(keys: _Keys, batches: slice, heads: slice, row_tiles: list[slice]) -> Job:
        def run(scratch: Scratch) -> None:
            _, k_columns, v_rows = keys.tiles(scratch)
            for rows in row_tiles:
                at_q = batches, rows, heads
                q_tile = load(q, at_q, real, scratch, "q")
                np.multiply(q_tile, scores.unit, out=q_tile)
                small = worth and scores.fewest_keys(rows) >= FEW_KEYS and keys.small_logits(q_tile)
                softmax = RowSoftmax(q_tile.shape[:-1], v.shape[-1], real, scratch, small)
                for tile, keep in scores.kv_tiles(batches, heads, rows):
                    s = _product("s", q_tile, k_columns[tile.keys], scratch)
                    s = scores.finish(scores.capped(s), tile, keep, group)
                    softmax.update(s, v_rows[tile.keys], None if dropout is None else _kept(dropout, tile))
                if sink is not None:
                    softmax.add_sink(_sink_rows(sink[heads], softmax.l))
                out_tile, lse_tile = softmax.finish(empty_lse)
                store(out, at_q, out_tile if dropout is None else out_tile * dropout.dropout.keep_scale)
                store(lse, at_q, lse_tile)
                if row_state is not None:
                    store(row_state, at_q, softmax.state(lse_tile))

        return run

    loaded = (k.shape[-1] + v.shape[-1]) * min(scores.len_kv, 2 * tiles.KEYS)
    for batches, heads in head_tiles(q, scores.len_kv, loaded):
        keys = _Keys(k, v, (batches, every_key, heads), real, readers=scores.len_q * group)
        # With a causal mask the last rows have the most keys: the longest jobs come first.
        for end in range(len(row_tiles), 0, -ROW_TILES):
            yield job(keys, batches, heads, row_tiles[max(end - ROW_TILES, 0) : end])


def backward(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    dlse: np.ndarray | None,
    policies: Policies,
    *,
    row_state: np.ndarray | None = None,
    row_delta: np.ndarray | None = None,
    dq: np.ndarray,
    dk: np.ndarray,
    dv: np.ndarray,
    dbias: np.ndarray | None = None,
    dsink: np.ndarray | None = None,
    most_heads: int | None = None,
) -> Iterator[tuple[tuple[int, int], Job]]:
    """Fill dq, dk, dv and row_delta and add to dbias and dsink: FlashAttention-2, algorithm 2, query tiles outside.

    delta_i = dout_i . out_i - dlse_i    dP = keep * keep_scale * dout v^T    dS = P * (dP - delta)    dX = dS * ds/dx
    dv = (keep * keep_scale * P)^T dout    dq = unit * dX k    dk = dX^T (unit * q)
    dbias = dS    dsink = -sum_i exp(sink - lse_i) delta_i

    The factor of `normalizers` is the same for a whole row, and taken into dout and delta instead of P.
    dbias is of grouped pairs and sums over the axes where it has size 1; dsink is (b, heads_kv, group). Jobs come with
    the first batch element and head of the part of dbias that they add to; those with equal ones add to the same part.
    """
    scores, sink, dropout = policies
    real, heads_kv = lse.dtype, k.shape[2]
    dout, q, k, v, out, dq, dk, dv = (grouped(x, heads_kv) for x in (dout, q, k, v, out, dq, dk, dv))
    lse = grouped(lse.transpose(0, 2, 1)[..., None], heads_kv)
    dlse = None if dlse is None else grouped(dlse.transpose(0, 2, 1)[..., None], heads_kv)
    row_state = None if row_state is None else grouped(row_state.swapaxes(1, 2), heads_kv)
    row_delta = None if row_delta is None else grouped(row_delta.transpose(0, 2, 1)[..., None], heads_kv)
    group = q.shape[3]
    row_tiles = list(scores.row_tiles(group))
    every_key = slice(0, scores.len_kv)

    def job(batches: slice, heads: slice) -> Job:
        def run(scratch: Scratch) -> None:
            every = batches, every_key, heads
            keys = _Keys(k, v, every, real, scores.len_q * group)
            k_rows, k_columns, v_rows = keys.tiles(scratch)
            v_columns = v_rows.turned()
            shape = batches.stop - batches.start, heads.stop - heads.start, scores.len_kv
            dk_sum, dv_sum = (scratch(name, (*shape, x.shape[-1]), real) for name, x in (("dk sum", k), ("dv sum", v)))
            dk_sum.fill(0)
            dv_sum.fill(0)
            for rows in row_tiles:
                at_q = batches, rows, heads
                q_tile, dout_tile, out_tile = (
                    load(x, at_q, real, scratch, name) for x, name in ((q, "q"), (dout, "dout"), (out, "out"))
                )
                np.multiply(q_tile, scores.unit, out=q_tile)
                lse_tile = load(lse, at_q, real, scratch, "lse")
                dlse_tile = 0.0 if dlse is None else load(dlse, at_q, real, scratch, "dlse")
                delta = delta_of(dout_tile, out_tile, lse_tile, dlse_tile)
                if row_delta is not None:
                    store(row_delta, at_q, delta)
                state_tile = None if row_state is None else load(row_state, at_q, real, scratch, "state")
                shift, factor = normalizers(lse_tile, state_tile)
                np.multiply(dout_tile, factor, out=dout_tile)
                delta = delta * factor
                if sink is not None and dsink is not None:
                    share = weights(_sink_rows(sink[heads], lse_tile), shift)
                    dsink[batches, heads] -= stacked(share * delta, group).sum(axis=(3, 4))
                dq_tile = scratch("dq sum", q_tile.shape, real)
                dq_tile.fill(0)
                for tile, keep in scores.kv_tiles(batches, heads, rows):
                    capped = scores.capped(_product("s", q_tile, k_columns[tile.keys], scratch))
                    slope = scores.slope(capped)
                    p = weights(scores.finish(capped, tile, keep, group), shift)
                    dp = _product("dp", dout_tile, v_columns[tile.keys], scratch)
                    if dropout is None:
                        dv_sum[:, :, tile.keys] += _product("dv", p.mT, dout_tile, scratch)
                    else:
                        kept, keep_scale = _kept(dropout, tile), dropout.dropout.keep_scale
                        dv_sum[:, :, tile.keys] += (p * kept).mT @ (dout_tile * keep_scale)
                        dp = np.where(kept, dp * keep_scale, 0)
                    ds = np.multiply(p, np.subtract(dp, delta, out=dp), out=dp)
                    if dbias is not None:
                        _add_reduced(tile.of(dbias), stacked(ds, group))
                    dx = ds if slope is None else np.multiply(ds, slope, out=ds)
                    dq_tile += _product("dq", dx, k_rows[tile.keys], scratch)
                    dk_sum[:, :, tile.keys] += _product("dk", dx.mT, q_tile, scratch)
                store(dq, at_q, np.multiply(dq_tile, scores.unit, out=dq_tile))
            store(dk, every, dk_sum)
            store(dv, every, dv_sum)

        return run

    for batches, heads in head_tiles(q, scores.len_kv, 4 * (k.shape[-1] + v.shape[-1]) * scores.len_kv, most_heads):
        every_batch, every_head = (False, False) if dbias is None else (len(dbias) == 1, dbias.shape[1] == 1)
        yield (0 if every_batch else batches.start, 0 if every_head else heads.start), job(batches, heads)


class _Keys:
    """The keys and values of some heads, for all jobs on their rows; the first that needs them brings them in shape."""

    def __init__(
        self,
        k: np.ndarray | PagedRows,
        v: np.ndarray | PagedRows,
        at: tuple[slice, slice, slice],
        real: np.dtype,
        readers: int,
    ) -> None:
        self._k, self._v, self._at, self._real, self._readers = k, v, at, real, readers
        self._scratch: Scratch | None = None
        self._tiles: tuple[KeyTiles, KeyTiles, KeyTiles] | None = None
        self._lock = threading.Lock()

    def __del__(self) -> None:
        if self._scratch is not None:
            key_scratch.give_back(self._scratch)

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
            KeyTiles(x, self._at, self._real, scratch, name, self._readers)
            for x, name in ((self._k, "k"), (self._v, "v"))
        )
        return k, k.turned(), v

    def small_logits(self, q_tile: np.ndarray) -> bool:
        """Whether products with these queries are at most SMALL_LOGIT, by Cauchy and Schwarz, and values moderate."""
        return _longest(q_tile.mT) * self._longest_key <= SMALL_LOGIT and self._moderate_values

    @cached_property
    def _longest_key(self) -> float:
        keys = None if self._tiles is None else self._tiles[1].whole
        return np.inf if keys is None else _longest(keys)

    @cached_property
    def _moderate_values(self) -> bool:
        values = None if self._tiles is None else self._tiles[2].whole
        return values is not None and moderate(values)


def _longest(columns: np.ndarray) -> float:
    """The largest Euclidean norm of a column; one of NaN spoils no other one's logits, so it does not count."""
    return float(np.sqrt(np.fmax.reduce(np.einsum("...dn,...dn->...n", columns, columns), axis=None, initial=0)))


def _product(name: str, a: np.ndarray, b: np.ndarray, scratch: Scratch) -> np.ndarray:
    """Matrices a @ b, in the scratch array of that name."""
    return np.matmul(a, b, out=scratch(name, (*a.shape[:-1], b.shape[-1]), a.dtype))


def _kept(dropout: KeepMask, tile: Tile) -> np.ndarray:
    """What dropout keeps of a tile, (batches, heads, group * rows, keys)."""
    kept = dropout.tile((tile.batches, tile.heads), tile.rows, tile.keys)
    return kept.reshape(*kept.shape[:2], -1, kept.shape[-1])


def _sink_rows(sink: np.ndarray, like: np.ndarray) -> np.ndarray:
    """A tile's (heads, group) sinks for every row, shaped and typed like (batches, heads, group * rows, 1)."""
    rows = np.repeat(sink, like.shape[2] // sink.shape[1], axis=1)
    return np.broadcast_to(rows[..., None], like.shape).astype(like.dtype)


def _add_reduced(target: np.ndarray, x: np.ndarray) -> None:
    """Add x to target, summed along the axes where target has size 1."""
    axes = tuple(axis for axis, size in enumerate(target.shape) if size == 1)
    target += x.sum(axis=axes, keepdims=True)
