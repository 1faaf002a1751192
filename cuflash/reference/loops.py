"""The two loops: attention and its gradients of one dense problem, tile by tile.

The algorithm is FlashAttention (Dao et al. 2022, arXiv 2205.14135) in the loop order of FlashAttention-2 (Dao 2023,
arXiv 2307.08691), with x = unit * q.k and s the logit that `Scores` makes of it. Both loops come as jobs of some heads
each (and of some rows, in the forward), which may run in any order and at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from cuflash.reference import tiles
from cuflash.reference.features import Policies
from cuflash.reference.operands import (
    Keys,
    add_product,
    add_reduced,
    keep_rows,
    kept_of,
    part_of,
    place_of,
    product,
    sink_rows,
)
from cuflash.reference.paged import PagedRows
from cuflash.reference.pool import Job, Scratch
from cuflash.reference.scores import Scores
from cuflash.reference.softmax import FEW_KEYS, RowSoftmax, delta_of, fastest_power, normalizers, weights
from cuflash.reference.tiles import grouped, head_tiles, load, stacked, store, view

GradientJob = Callable[[Scratch, dict[int, np.ndarray] | None], object]
"""A job of the backward, which also takes what it adds the gradients of captured arrays to, by number; None if those
are not wanted."""

ROW_TILES = 4
"""Of so many tiles of rows one job is made at most."""
JOB_SCORES = 2**18
"""And of so many scores, if two tiles have not more: a millisecond."""


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
    plain = scores.plain
    worth = plain and scores.len_q * group >= tiles.FEW_ROWS
    power = fastest_power(real)

    def job(keys: Keys, batches: slice, heads: slice, row_tiles: list[slice]) -> Job:
        def run(scratch: Scratch) -> None:
            _, k_columns, v_rows = keys.tiles(scratch)

            def attend(rows: slice) -> RowSoftmax:
                q_tile = load(q, (batches, rows, heads), real, scratch, "q", scores.unit)
                softmax = RowSoftmax(q_tile.shape[:-1], v.shape[-1], real, scratch)
                for tile, hidden in scores.kv_tiles(batches, heads, rows):
                    s = product("s", q_tile, k_columns[tile.keys], scratch)
                    if not plain or hidden is not None:
                        s = scores.finish(scores.written(scores.capped(s), tile, group), tile, hidden, group)
                    softmax.update(s, v_rows[tile.keys], None if dropout is None else kept_of(dropout, tile))
                return softmax

            def attend_unshifted(rows: slice) -> RowSoftmax | None:
                q_tile = load(q, (batches, rows, heads), real, scratch, "q", scores.unit * power.unit)
                softmax = RowSoftmax(q_tile.shape[:-1], v.shape[-1], real, scratch, power)
                for tile, hidden in scores.kv_tiles(batches, heads, rows):
                    x = product("s", q_tile, k_columns[tile.keys], scratch)
                    kept = None if dropout is None else kept_of(dropout, tile)
                    if not softmax.update_unshifted(x, v_rows[tile.keys], kept, hidden, group):
                        return None
                return softmax if softmax.sound() else None

            unshifted = worth
            for rows in row_tiles:
                at_q = batches, rows, heads
                softmax = None
                if unshifted and scores.fewest_keys(rows) >= FEW_KEYS:
                    softmax = attend_unshifted(rows)
                    # Where logits, or values, were too large once, they are likely so again.
                    unshifted = softmax is not None
                if softmax is None:
                    softmax = attend(rows)
                if sink is not None:
                    softmax.add_sink(sink_rows(sink[heads], softmax.l))
                place = view(out, at_q, real) if dropout is None else None
                out_tile, lse_tile = softmax.finish(empty_lse, place)
                if place is None:
                    store(out, at_q, out_tile if dropout is None else out_tile * dropout.dropout.keep_scale)
                store(lse, at_q, lse_tile)
                if row_state is not None:
                    store(row_state, at_q, softmax.state(lse_tile))

        return run

    loaded = (k.shape[-1] + v.shape[-1]) * min(scores.len_kv, 2 * tiles.KEYS)
    for batches, heads in head_tiles(q, scores.len_kv, loaded, row_tiles=row_tiles):
        keys = Keys(k, v, (batches, every_key, heads), real, readers=scores.len_q * group)
        heads_q = (batches.stop - batches.start) * (heads.stop - heads.start) * group
        for share in _shares(row_tiles, scores, heads_q):
            yield job(keys, batches, heads, share)


def _shares(row_tiles: list[slice], scores: Scores, heads: int) -> Iterator[list[slice]]:
    """The tiles of rows of one job each; under a causal mask, where they see more and more keys, first and last ones.

    They are cut by sizes alone, not by the number of threads, so that results do not depend on that.
    """
    if not row_tiles:
        return
    number, some = len(row_tiles), row_tiles[len(row_tiles) // 2]
    keys = scores.keys_of(some)
    most = JOB_SCORES // max((some.stop - some.start) * heads * (keys.stop - keys.start), 1)
    if scores.band.right is not None:
        most = min(max(most, 2), number // 2)
    step = max(min(most, ROW_TILES), 1)
    order = sorted(range(number), key=lambda i: min(i, number - 1 - i))
    for at in range(0, number, step):
        yield [row_tiles[i] for i in order[at : at + step]]


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
    row_tiles = list(scores.row_tiles(group, parts=4))
    every_key = slice(0, scores.len_kv)

    def job(batches: slice, heads: slice) -> GradientJob:
        every = batches, every_key, heads
        keys = Keys(k, v, every, real, scores.len_q * group)

        def run(scratch: Scratch, dcaptured: dict[int, np.ndarray] | None) -> None:
            k_rows, k_columns, v_rows = keys.tiles(scratch)
            v_columns = v_rows.turned()
            dk_sum, dv_sum = (place_of(x, every, real, scratch, name) for name, x in (("dk sum", dk), ("dv sum", dv)))

            def clear(start: int, stop: int) -> None:
                if start < stop:
                    dk_sum[:, :, start:stop] = dv_sum[:, :, start:stop] = 0

            begun = 0  # sums of keys before this one
            # The last rows come first: with a causal mask they see the most keys, whose sums begin with theirs.
            for rows in reversed(row_tiles):
                at_q, first = (batches, rows, heads), rows is row_tiles[-1]
                q_tile = load(q, at_q, real, scratch, "q", scores.unit)
                dout_tile = None if row_state is not None else view(dout, at_q, real)  # which would be overwritten
                out_tile = view(out, at_q, real)
                if dout_tile is None:
                    dout_tile = load(dout, at_q, real, scratch, "dout")
                if out_tile is None:
                    out_tile = load(out, at_q, real, scratch, "out")
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
                    share = weights(sink_rows(sink[heads], lse_tile), shift)
                    dsink[batches, heads] -= stacked(share * delta, group).sum(axis=(3, 4))
                dq_sum, none_yet = place_of(dq, at_q, real, scratch, "dq sum"), True
                for tile, hidden in scores.kv_tiles(batches, heads, rows):
                    if first:
                        clear(begun, tile.keys.start)
                        begun = tile.keys.stop
                    capped = scores.capped(product("s", q_tile, k_columns[tile.keys], scratch))
                    slope = scores.slope(capped)
                    written = scores.written_with_slopes(capped, tile, group, dcaptured is not None)
                    p = weights(scores.finish(capped, tile, hidden, group), shift)
                    dp = product("dp", dout_tile, v_columns[tile.keys], scratch)
                    if dropout is None:
                        add_product(dv_sum[:, :, tile.keys], p.mT, dout_tile, scratch, first)
                    else:
                        kept, keep_scale = kept_of(dropout, tile), dropout.dropout.keep_scale
                        add_product(dv_sum[:, :, tile.keys], (p * kept).mT, dout_tile * keep_scale, scratch, first)
                        dp = np.where(kept, dp * keep_scale, 0)
                    ds = np.multiply(p, np.subtract(dp, delta, out=dp), out=dp)
                    if dbias is not None:
                        add_reduced(tile.of(dbias), stacked(ds, group))
                    if written is not None:
                        if dcaptured is not None:
                            written.add_captured(stacked(ds, group), dcaptured)
                        written.to_score(stacked(ds, group))
                    dx = ds if slope is None else np.multiply(ds, slope, out=ds)
                    add_product(dq_sum, dx, k_rows[tile.keys], scratch, none_yet)
                    add_product(dk_sum[:, :, tile.keys], dx.mT, q_tile, scratch, first)
                    none_yet = False
                if first:
                    clear(begun, scores.len_kv)
                if none_yet:
                    dq_sum.fill(0)
                keep_rows(dq, at_q, np.multiply(dq_sum, scores.unit, out=dq_sum))
            if not row_tiles:
                clear(0, scores.len_kv)
            keep_rows(dk, every, dk_sum)
            keep_rows(dv, every, dv_sum)
            keys.give_back()  # no other job reads them

        return run

    for batches, heads in head_tiles(q, scores.len_kv, 4 * (k.shape[-1] + v.shape[-1]) * scores.len_kv, most_heads):
        yield part_of(dbias, batches, heads), job(batches, heads)
