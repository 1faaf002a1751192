"""The loops: attention and its gradients of one dense problem, and the tangents of both, tile by tile.

The algorithm is FlashAttention (Dao et al. 2022, arXiv 2205.14135) in the loop order of FlashAttention-2 (Dao 2023,
arXiv 2307.08691), with x = unit * q.k and s the logit that `Scores` makes of it. All loops come as jobs of some heads
each (and of some rows, in a forward), which may run in any order and at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from copy import copy
from functools import cached_property
from typing import NamedTuple

import numpy as np

from cuflash.reference import tiles
from cuflash.reference.dropout import KeepMask
from cuflash.reference.features import Policies
from cuflash.reference.paged import PagedRows
from cuflash.reference.pool import Job, Scratch, key_scratch
from cuflash.reference.softmax import (
    FEW_KEYS,
    SMALL_LOGIT,
    RowSoftmax,
    RowTangents,
    delta_of,
    moderate,
    normalizers,
    row_sums,
    weights,
)
from cuflash.reference.tiles import FEW_ROWS, KeyTiles, Tile, grouped, head_tiles, load, stacked, store, view

GradientJob = Callable[[Scratch, dict[int, np.ndarray] | None], object]
"""A job of the backward, which also takes what it adds the gradients of captured arrays to, by number; None if those
are not wanted."""

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
                q_tile = load(q, at_q, real, scratch, "q", scores.unit)
                small = worth and scores.fewest_keys(rows) >= FEW_KEYS and keys.small_logits(q_tile)
                softmax = RowSoftmax(q_tile.shape[:-1], v.shape[-1], real, scratch, small)
                for tile, keep in scores.kv_tiles(batches, heads, rows):
                    s = _product("s", q_tile, k_columns[tile.keys], scratch)
                    s = scores.finish(scores.written(scores.capped(s), tile, group), tile, keep, group)
                    softmax.update(s, v_rows[tile.keys], None if dropout is None else _kept(dropout, tile))
                if sink is not None:
                    softmax.add_sink(_sink_rows(sink[heads], softmax.l))
                place = view(out, at_q, real) if dropout is None else None
                out_tile, lse_tile = softmax.finish(empty_lse, place)
                if place is None:
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


class Tangents(NamedTuple):
    """How the arrays of a call change: shaped like what they are tangents of; None is zero."""

    q: np.ndarray | None = None
    k: np.ndarray | None = None
    v: np.ndarray | None = None
    bias: np.ndarray | None = None
    sink: np.ndarray | None = None
    out: np.ndarray | None = None
    """Filled by the forward, like that of lse; a backward reads those of dout and dlse here."""
    lse: np.ndarray | None = None


def forward_along(
    tangents: Tangents,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    policies: Policies,
    empty_lse: float = -np.inf,
) -> Iterator[Job]:
    """Fill out and lse as `forward` does, and their tangents in the same pass (`RowTangents`).

    The tangents of a bias and a sink are grouped pairs and (heads_kv, group).
    """
    assert tangents.out is not None and tangents.lse is not None
    scores, sink, dropout = policies
    real, heads_kv = lse.dtype, k.shape[2]
    q, k, v, out, dout = (grouped(x, heads_kv) for x in (q, k, v, out, tangents.out))
    dq, dk, dv = (None if x is None else grouped(x, heads_kv) for x in tangents[:3])
    lse, dlse = (grouped(x.transpose(0, 2, 1)[..., None], heads_kv) for x in (lse, tangents.lse))
    group = q.shape[3]
    row_tiles = list(scores.row_tiles(group))
    every_key = scores.keys_of(slice(0, scores.len_q))

    def job(keys: _Keys, dkeys: _Keys, batches: slice, heads: slice, row_tiles: list[slice]) -> Job:
        def run(scratch: Scratch) -> None:
            _, k_columns, v_rows = keys.tiles(scratch)
            _, dk_columns, dv_rows = dkeys.tiles(scratch)
            for rows in row_tiles:
                at_q = batches, rows, heads
                q_tile = load(q, at_q, real, scratch, "q", scores.unit)
                dq_tile = None if dq is None else load(dq, at_q, real, scratch, "tangent q", scores.unit)
                softmax = RowTangents(q_tile.shape[:-1], v.shape[-1], real, scratch)
                for tile, keep in scores.kv_tiles(batches, heads, rows):
                    k_tile, dk_tile = k_columns[tile.keys], None if dk is None else dk_columns[tile.keys]
                    capped = scores.capped(_product("s", q_tile, k_tile, scratch))
                    ds = _product_along("ds", q_tile, k_tile, dq_tile, dk_tile, scratch)
                    ds = scores.tangent(ds, scores.slope(capped), tangents.bias, tile, keep, group)
                    s = scores.finish(capped, tile, keep, group)
                    kept = None if dropout is None else _kept(dropout, tile)
                    softmax.update_along(s, ds, v_rows[tile.keys], None if dv is None else dv_rows[tile.keys], kept)
                if sink is not None:
                    dsink = None if tangents.sink is None else _sink_rows(tangents.sink[heads], softmax.l)
                    softmax.add_sink_along(_sink_rows(sink[heads], softmax.l), dsink)
                keep_scale = 1 if dropout is None else dropout.dropout.keep_scale
                out_tile, lse_tile, dout_tile, dlse_tile = softmax.finish_along(empty_lse)
                store(out, at_q, out_tile * keep_scale)
                store(lse, at_q, lse_tile)
                store(dout, at_q, dout_tile * keep_scale)
                store(dlse, at_q, dlse_tile)

        return run

    loaded = 2 * (k.shape[-1] + v.shape[-1]) * min(scores.len_kv, 2 * tiles.KEYS)
    for batches, heads in head_tiles(q, scores.len_kv, loaded):
        at = batches, every_key, heads
        keys = _Keys(k, v, at, real, readers=scores.len_q * group)
        dkeys = _Keys(k if dk is None else dk, v if dv is None else dv, at, real, scores.len_q * group, "tangent ")
        for end in range(len(row_tiles), 0, -ROW_TILES):
            yield job(keys, dkeys, batches, heads, row_tiles[max(end - ROW_TILES, 0) : end])


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
) -> Iterator[tuple[tuple[int, int], GradientJob]]:
    """Fill dq, dk, dv and row_delta and add to dbias and dsink: FlashAttention-2, algorithm 2, query tiles outside.

    delta_i = dout_i . out_i - dlse_i    dP = keep * keep_scale * dout v^T    dS = P * (dP - delta)    dX = dS * ds/dx
    dv = (keep * keep_scale * P)^T dout    dq = unit * dX k    dk = dX^T (unit * q)
    dbias = dS    dsink = -sum_i exp(sink - lse_i) delta_i    dcaptured = sum_ij dS_ij * ds_ij/dcaptured

    The factor of `normalizers` is the same for a whole row, and taken into dout and delta instead of P.
    dbias is of grouped pairs and sums over the axes where it has size 1; dsink is (b, heads_kv, group). Jobs come with
    the first batch element and head of the part of dbias that they add to; those with equal ones add to the same part.
    What they add gradients of captured arrays to they are given when they run.
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

    def job(batches: slice, heads: slice) -> GradientJob:
        every = batches, every_key, heads
        keys = _Keys(k, v, every, real, scores.len_q * group)

        def run(scratch: Scratch, dcaptured: dict[int, np.ndarray] | None) -> None:
            k_rows, k_columns, v_rows = keys.tiles(scratch)
            v_columns = v_rows.turned()
            dk_sum, dv_sum = (_place(x, every, real, scratch, name) for name, x in (("dk sum", dk), ("dv sum", dv)))

            def clear(start: int, stop: int) -> None:
                if start < stop:
                    dk_sum[:, :, start:stop] = dv_sum[:, :, start:stop] = 0

            begun = 0  # sums of keys before this one
            # The last rows come first: with a causal mask they see the most keys, whose sums begin with theirs.
            for rows in reversed(row_tiles):
                at_q, first = (batches, rows, heads), rows is row_tiles[-1]
                q_tile = load(q, at_q, real, scratch, "q", scores.unit)
                dout_tile, out_tile = (load(x, at_q, real, scratch, name) for x, name in ((dout, "dout"), (out, "out")))
                lse_tile = load(lse, at_q, real, scratch, "lse")
                dlse_tile = 0.0 if dlse is None else load(dlse, at_q, real, scratch, "dlse")
                delta = delta_of(dout_tile, out_tile, lse_tile, dlse_tile)
                if row_delta is not None:
                    store(row_delta, at_q, delta)
                state_tile = None if row_state is None else load(row_state, at_q, real, scratch, "state")
                shift, factor = normalizers(lse_tile, state_tile)
                if state_tile is not None:
                    np.multiply(dout_tile, factor, out=dout_tile)
                    delta = delta * factor
                if sink is not None and dsink is not None:
                    share = weights(_sink_rows(sink[heads], lse_tile), shift)
                    dsink[batches, heads] -= stacked(share * delta, group).sum(axis=(3, 4))
                dq_sum, none_yet = _place(dq, at_q, real, scratch, "dq sum"), True
                for tile, keep in scores.kv_tiles(batches, heads, rows):
                    if first:
                        clear(begun, tile.keys.start)
                        begun = tile.keys.stop
                    capped = scores.capped(_product("s", q_tile, k_columns[tile.keys], scratch))
                    slope = scores.slope(capped)
                    written = scores.written_with_slopes(capped, tile, group, dcaptured is not None)
                    p = weights(scores.finish(capped, tile, keep, group), shift)
                    dp = _product("dp", dout_tile, v_columns[tile.keys], scratch)
                    if dropout is None:
                        _add_product(dv_sum[:, :, tile.keys], p.mT, dout_tile, scratch, first)
                    else:
                        kept, keep_scale = _kept(dropout, tile), dropout.dropout.keep_scale
                        _add_product(dv_sum[:, :, tile.keys], (p * kept).mT, dout_tile * keep_scale, scratch, first)
                        dp = np.where(kept, dp * keep_scale, 0)
                    ds = np.multiply(p, np.subtract(dp, delta, out=dp), out=dp)
                    if dbias is not None:
                        _add_reduced(tile.of(dbias), stacked(ds, group))
                    if written is not None:
                        if dcaptured is not None:
                            written.add_captured(stacked(ds, group), dcaptured)
                        written.to_score(stacked(ds, group))
                    dx = ds if slope is None else np.multiply(ds, slope, out=ds)
                    _add_product(dq_sum, dx, k_rows[tile.keys], scratch, none_yet)
                    _add_product(dk_sum[:, :, tile.keys], dx.mT, q_tile, scratch, first)
                    none_yet = False
                if first:
                    clear(begun, scores.len_kv)
                if none_yet:
                    dq_sum.fill(0)
                _keep(dq, at_q, np.multiply(dq_sum, scores.unit, out=dq_sum))
            if not row_tiles:
                clear(0, scores.len_kv)
            _keep(dk, every, dk_sum)
            _keep(dv, every, dv_sum)
            keys.give_back()  # no other job reads them

        return run

    for batches, heads in head_tiles(q, scores.len_kv, 4 * (k.shape[-1] + v.shape[-1]) * scores.len_kv, most_heads):
        every_batch, every_head = (False, False) if dbias is None else (len(dbias) == 1, dbias.shape[1] == 1)
        yield (0 if every_batch else batches.start, 0 if every_head else heads.start), job(batches, heads)


def backward_along(
    tangents: Tangents,
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    lse: np.ndarray,
    dlse: np.ndarray | None,
    policies: Policies,
    *,
    row_state: np.ndarray | None = None,
    dq: np.ndarray,
    dk: np.ndarray,
    dv: np.ndarray,
    dbias: np.ndarray | None = None,
    dsink: np.ndarray | None = None,
    most_heads: int | None = None,
) -> Iterator[tuple[tuple[int, int], GradientJob]]:
    """Fill dq, dk and dv and add to dbias and dsink the tangents of what `backward` gives; its jobs.

    With a prime for the tangent, s' that of the logits and mean = sum_j P_j s'_j, over all keys of a row and the sink,

        P' = P * (s' - mean)    delta = sum_j P_j dP_j - dlse    delta' = sum_j (P'_j dP_j + P_j dP'_j) - dlse'
        dS' = P' * (dP - delta) + P * (dP' - delta')

    and the products of `backward` by the rule of products. The sums of a row come first, so each of its tiles is
    computed twice. The Hessian of (dout . out + dlse . lse) is symmetric: this pulls gradients back through it as well.
    """
    scores, sink, dropout = policies
    real, heads_kv = lse.dtype, k.shape[2]
    dout, q, k, v, dq, dk, dv = (grouped(x, heads_kv) for x in (dout, q, k, v, dq, dk, dv))
    along_q, along_k, along_v, along_dout = (
        None if x is None else grouped(x, heads_kv) for x in (*tangents[:3], tangents.out)
    )
    lse = grouped(lse.transpose(0, 2, 1)[..., None], heads_kv)
    dlse, along_dlse = (
        None if x is None else grouped(x.transpose(0, 2, 1)[..., None], heads_kv) for x in (dlse, tangents.lse)
    )
    row_state = None if row_state is None else grouped(row_state.swapaxes(1, 2), heads_kv)
    group = q.shape[3]
    row_tiles = list(scores.row_tiles(group))
    every_key = slice(0, scores.len_kv)
    keep_scale = 1 if dropout is None else dropout.dropout.keep_scale

    def job(batches: slice, heads: slice) -> GradientJob:
        def run(scratch: Scratch, _: object) -> None:
            every = batches, every_key, heads
            readers = scores.len_q * group
            keys = _Keys(k, v, every, real, readers)
            k_rows, k_columns, v_rows = keys.tiles(scratch)
            v_columns = v_rows.turned()
            turned = _Keys(
                k if along_k is None else along_k, v if along_v is None else along_v, every, real, readers, "tangent "
            )
            dk_rows, dk_columns, dv_rows = turned.tiles(scratch)
            dv_columns = dv_rows.turned()
            shape = batches.stop - batches.start, heads.stop - heads.start, scores.len_kv
            dk_sum, dv_sum = (scratch(name, (*shape, x.shape[-1]), real) for name, x in (("dk sum", k), ("dv sum", v)))
            dk_sum.fill(0)
            dv_sum.fill(0)

            def rows_of(x: np.ndarray | None, at: tuple[slice, slice, slice], name: str) -> np.ndarray | None:
                return None if x is None else load(x, at, real, scratch, name)

            def pairs(row: _Row, tile: Tile, keep: np.ndarray | None) -> _Pairs:
                k_tile, dk_tile = k_columns[tile.keys], None if along_k is None else dk_columns[tile.keys]
                capped = scores.capped(_product("s", row.q, k_tile, scratch))
                ds = _product_along("ds", row.q, k_tile, row.dq, dk_tile, scratch)
                slope = scores.slope(capped)
                curvature = None if slope is None else scores.curvature(capped, slope, ds)
                ds = scores.tangent(ds, slope, tangents.bias, tile, keep, group)
                p = weights(scores.finish(capped, tile, keep, group), row.shift)
                np.multiply(p, row.factor, out=p)
                v_tile, dv_tile = v_columns[tile.keys], None if along_v is None else dv_columns[tile.keys]
                dp = _product("dp", row.dout, v_tile, scratch)
                ddp = _product_along("ddp", row.dout, v_tile, row.ddout, dv_tile, scratch)
                kept = None
                if dropout is not None:
                    kept = _kept(dropout, tile) * real.type(keep_scale)
                    dp, ddp = (np.where(kept, x * kept, 0) for x in (dp, ddp))
                return _Pairs(p, ds, dp, ddp, slope, curvature, kept)

            for rows in row_tiles:
                at_q = batches, rows, heads
                lse_tile = load(lse, at_q, real, scratch, "lse")
                row = _Row(
                    load(q, at_q, real, scratch, "q", scores.unit),
                    None if along_q is None else load(along_q, at_q, real, scratch, "tangent q", scores.unit),
                    load(dout, at_q, real, scratch, "dout"),
                    rows_of(along_dout, at_q, "tangent dout"),
                    *normalizers(lse_tile, rows_of(row_state, at_q, "state")),
                )
                mean, delta, ddelta = (np.zeros_like(lse_tile) for _ in range(3))
                for tile, keep in scores.kv_tiles(batches, heads, rows):
                    p, ds, dp, ddp, *_ = pairs(row, tile, keep)
                    mean += row_sums(p * ds)
                    delta += row_sums(p * dp)
                    ddelta += row_sums(p * (ds * dp + ddp))
                share = None if sink is None else weights(_sink_rows(sink[heads], lse_tile), row.shift) * row.factor
                dshare = 0 if tangents.sink is None else _sink_rows(tangents.sink[heads], lse_tile)
                if share is not None:
                    mean += share * dshare
                ddelta -= mean * delta
                for x, total in ((dlse, delta), (along_dlse, ddelta)):
                    if x is not None:
                        total -= np.where(np.isinf(lse_tile), 0, load(x, at_q, real, scratch, "dlse"))
                if share is not None and dsink is not None:
                    change = share * ((dshare - mean) * delta + ddelta)
                    dsink[batches, heads] -= stacked(change, group).sum(axis=(3, 4))
                dq_sum = scratch("dq sum", row.q.shape, real)
                dq_sum.fill(0)
                for tile, keep in scores.kv_tiles(batches, heads, rows):
                    p, ds, dp, ddp, slope, curvature, kept = pairs(row, tile, keep)
                    change = p * (ds - mean)
                    of_values = change, p
                    if kept is not None:
                        of_values = change * kept, p * kept
                    dv_sum[:, :, tile.keys] += of_values[0].mT @ row.dout
                    if row.ddout is not None:
                        dv_sum[:, :, tile.keys] += of_values[1].mT @ row.ddout
                    dp -= delta
                    dx = p * dp
                    ddx = change * dp + p * (ddp - ddelta)
                    if dbias is not None:
                        _add_reduced(tile.of(dbias), stacked(ddx, group))
                    if slope is not None:
                        ddx = ddx * slope + dx * curvature
                        dx = dx * slope
                    dq_sum += _product("dq", ddx, k_rows[tile.keys], scratch)
                    dk_sum[:, :, tile.keys] += _product("dk", ddx.mT, row.q, scratch)
                    if along_k is not None:
                        dq_sum += _product("dq", dx, dk_rows[tile.keys], scratch)
                    if row.dq is not None:
                        dk_sum[:, :, tile.keys] += _product("dk", dx.mT, row.dq, scratch)
                store(dq, at_q, np.multiply(dq_sum, scores.unit, out=dq_sum))
            store(dk, every, dk_sum)
            store(dv, every, dv_sum)

        return run

    for batches, heads in head_tiles(q, scores.len_kv, 6 * (k.shape[-1] + v.shape[-1]) * scores.len_kv, most_heads):
        every_batch, every_head = (False, False) if dbias is None else (len(dbias) == 1, dbias.shape[1] == 1)
        yield (0 if every_batch else batches.start, 0 if every_head else heads.start), job(batches, heads)


class _Row(NamedTuple):
    """A tile of rows on its way to second derivatives."""

    q: np.ndarray  # times the unit of scores, like its tangent
    dq: np.ndarray | None
    dout: np.ndarray
    ddout: np.ndarray | None
    shift: np.ndarray
    factor: np.ndarray | float


class _Pairs(NamedTuple):
    """A tile of pairs on its way to second derivatives."""

    p: np.ndarray
    ds: np.ndarray  # s'
    dp: np.ndarray
    ddp: np.ndarray  # dP'
    slope: np.ndarray | None
    curvature: np.ndarray | None  # slope'
    kept: np.ndarray | None  # what dropout multiplies P by


class _Keys:
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
        self._k, self._v = (KeyTiles(x, at, real, prefix + name, readers) for x, name in ((k, "k"), (v, "v")))
        self._readers = readers
        self._scratch: Scratch | None = None
        self._tiles: tuple[KeyTiles, KeyTiles, KeyTiles] | None = None
        if self._k.whole is not None and self._v.whole is not None:
            self._tiles = self._k, self._k.turned(), self._v
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
        if self._tiles is not None:
            return self._tiles
        if self._readers < FEW_ROWS:
            return self._made(scratch)
        with self._lock:
            if self._tiles is None:
                self._scratch = key_scratch.borrow()
                self._tiles = self._made(self._scratch)
            return self._tiles

    def _made(self, scratch: Scratch) -> tuple[KeyTiles, KeyTiles, KeyTiles]:
        k, v = (copy(x) for x in (self._k, self._v))
        for x in (k, v):
            x.load(scratch)
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


def _product_along(
    name: str, a: np.ndarray, b: np.ndarray, da: np.ndarray | None, db: np.ndarray | None, scratch: Scratch
) -> np.ndarray:
    """The tangent of matrices a @ b along da and db (None: zero), in the scratch array of that name."""
    terms = [(x, y) for x, y in ((da, b), (a, db)) if x is not None and y is not None]
    if not terms:
        zeros = scratch(name, (*a.shape[:-1], b.shape[-1]), a.dtype)
        zeros.fill(0)
        return zeros
    total = _product(name, *terms[0], scratch)
    return total if len(terms) == 1 else np.add(total, _product("term", *terms[1], scratch), out=total)


def _add_product(total: np.ndarray, a: np.ndarray, b: np.ndarray, scratch: Scratch, first: bool) -> None:
    """Add matrices a @ b to the total, or begin it with them."""
    if first:
        np.matmul(a, b, out=total)
    else:
        total += _product("product", a, b, scratch)


def _place(x: np.ndarray, tile: tuple[slice, slice, slice], real: np.dtype, scratch: Scratch, name: str) -> np.ndarray:
    """Where rows of the result x can be computed: there, or in scratch."""
    there = view(x, tile, real)
    return scratch(name, tiles.shape_of(x, tile), real) if there is None else there


def _keep(x: np.ndarray, tile: tuple[slice, slice, slice], rows: np.ndarray) -> None:
    """Store rows that were computed in their `_place`."""
    if not np.may_share_memory(x, rows):
        store(x, tile, rows)


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
