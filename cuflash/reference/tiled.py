"""The two loops: attention and its gradients of one dense problem, tile by tile.

The algorithm is FlashAttention (Dao et al. 2022, arXiv 2205.14135) in the loop order of FlashAttention-2 (Dao 2023,
arXiv 2307.08691), with x = unit * q.k and s the logit that `Scores` makes of it.
"""

from __future__ import annotations

import numpy as np

from cuflash import dtypes
from cuflash.reference.features import Policies
from cuflash.reference.paged import PagedRows
from cuflash.reference.softmax import RowSoftmax, delta_of, normalizers, weights
from cuflash.reference.tiles import Tile, grouped, head_tiles, load, row_tiles, stacked, store


def forward(
    q: np.ndarray,
    k: np.ndarray | PagedRows,
    v: np.ndarray | PagedRows,
    out: np.ndarray,
    lse: np.ndarray,
    policies: Policies,
    row_state: np.ndarray | None = None,
) -> None:
    """Fill out (b, s, h, d), lse (b, h, s) and row_state (b, h, s, 2): FlashAttention-2, algorithm 1."""
    scores, sink, dropout = policies
    real, dim_v, heads_kv = lse.dtype, v.shape[-1], k.shape[2]
    q, k, v, out = (x if isinstance(x, PagedRows) else grouped(x, heads_kv) for x in (q, k, v, out))
    lse = grouped(lse.transpose(0, 2, 1)[..., None], heads_kv)
    row_state = None if row_state is None else grouped(row_state.swapaxes(1, 2), heads_kv)
    group = q.shape[3]
    for batches, heads in head_tiles(q, scores.len_kv, 0):
        for rows in row_tiles(q):
            at_q = batches, rows, heads
            q_tile = load(q, at_q, real) * scores.unit
            softmax = RowSoftmax(q_tile.shape[:-1], dim_v, real)
            for tile, keep in scores.kv_tiles(batches, heads, rows):
                at_kv = batches, tile.keys, heads
                s = scores.finish(scores.capped(q_tile @ load(k, at_kv, real).mT), tile, keep, group)
                softmax.update(s, load(v, at_kv, real), None if dropout is None else _kept(policies, tile))
            if sink is not None:
                softmax.add_sink(_sink_rows(sink[heads], softmax.l))
            out_tile, lse_tile = softmax.finish()
            store(out, at_q, out_tile if dropout is None else out_tile * dropout.dropout.keep_scale)
            store(lse, at_q, lse_tile)
            if row_state is not None:
                store(row_state, at_q, softmax.state())


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
    dq: np.ndarray,
    dk: np.ndarray,
    dv: np.ndarray,
    dbias: np.ndarray | None = None,
    dsink: np.ndarray | None = None,
) -> None:
    """Fill dq, dk and dv and add to dbias and dsink: FlashAttention-2, algorithm 2, with query tiles outside.

    delta_i = dout_i . out_i - dlse_i    dP = keep * keep_scale * dout v^T    dS = P * (dP - delta)    dX = dS * ds/dx
    dv = (keep * keep_scale * P)^T dout    dq = unit * dX k    dk = dX^T (unit * q)
    dbias = dS    dsink = -sum_i exp(sink - lse_i) delta_i

    The factor of `normalizers` is the same for a whole row, and taken into dout and delta instead of P.
    dbias is of grouped pairs and sums over the axes where it has size 1; dsink is (heads_kv, group).
    """
    scores, sink, dropout = policies
    real, heads_kv = dtypes.of(q.dtype).accumulator, k.shape[2]
    dout, q, k, v, out, dq, dk, dv = (grouped(x, heads_kv) for x in (dout, q, k, v, out, dq, dk, dv))
    lse = grouped(lse.transpose(0, 2, 1)[..., None], heads_kv)
    dlse = None if dlse is None else grouped(dlse.transpose(0, 2, 1)[..., None], heads_kv)
    row_state = None if row_state is None else grouped(row_state.swapaxes(1, 2), heads_kv)
    group = q.shape[3]
    for batches, heads in head_tiles(q, scores.len_kv, k.shape[-1] + v.shape[-1]):
        every_key = batches, slice(0, scores.len_kv), heads
        shape = batches.stop - batches.start, heads.stop - heads.start, scores.len_kv
        dk_sum, dv_sum = np.zeros((*shape, k.shape[-1]), real), np.zeros((*shape, v.shape[-1]), real)
        for rows in row_tiles(q):
            at_q = batches, rows, heads
            q_tile = load(q, at_q, real) * scores.unit
            dout_tile, lse_tile = load(dout, at_q, real), load(lse, at_q, real)
            dlse_tile = 0.0 if dlse is None else load(dlse, at_q, real)
            delta = delta_of(dout_tile, load(out, at_q, real), lse_tile, dlse_tile)
            shift, factor = normalizers(lse_tile, None if row_state is None else load(row_state, at_q, real))
            dout_tile, delta = dout_tile * factor, delta * factor
            if dsink is not None:
                share = weights(_sink_rows(sink[heads], lse_tile), shift)
                dsink[heads] -= stacked(share * delta, group).sum(axis=(0, 3, 4))
            dq_tile = np.zeros_like(q_tile)
            for tile, keep in scores.kv_tiles(batches, heads, rows):
                k_tile, v_tile = (load(x, (batches, tile.keys, heads), real) for x in (k, v))
                capped = scores.capped(q_tile @ k_tile.mT)
                slope = scores.slope(capped)
                p = weights(scores.finish(capped, tile, keep, group), shift)
                dp = dout_tile @ v_tile.mT
                if dropout is None:
                    dv_sum[:, :, tile.keys] += p.mT @ dout_tile
                else:
                    kept, keep_scale = _kept(policies, tile), dropout.dropout.keep_scale
                    dv_sum[:, :, tile.keys] += (p * kept).mT @ (dout_tile * keep_scale)
                    dp = np.where(kept, dp * keep_scale, 0)
                ds = p * (dp - delta)
                if dbias is not None:
                    _add_reduced(tile.of(dbias), stacked(ds, group))
                dx = ds * slope
                dq_tile += dx @ k_tile
                dk_sum[:, :, tile.keys] += dx.mT @ q_tile
            store(dq, at_q, dq_tile * scores.unit)
        store(dk, every_key, dk_sum)
        store(dv, every_key, dv_sum)


def _kept(policies: Policies, tile: Tile) -> np.ndarray:
    """What dropout keeps of a tile, (batches, heads, group * rows, keys)."""
    kept = policies.dropout.tile((tile.batches, tile.heads), tile.rows, tile.keys)
    return kept.reshape(*kept.shape[:2], -1, kept.shape[-1])


def _sink_rows(sink: np.ndarray, like: np.ndarray) -> np.ndarray:
    """A tile's (heads, group) sinks for every row, shaped and typed like (batches, heads, group * rows, 1)."""
    rows = np.repeat(sink, like.shape[2] // sink.shape[1], axis=1)
    return np.broadcast_to(rows[..., None], like.shape).astype(like.dtype)


def _add_reduced(target: np.ndarray, x: np.ndarray) -> None:
    """Add x to target, summed along the axes where target has size 1."""
    axes = tuple(axis for axis, size in enumerate(target.shape) if size == 1)
    target += x.sum(axis=axes, keepdims=True)
