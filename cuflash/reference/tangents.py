"""The loops of `loops` once more, carrying tangents: how results change along changes of what is given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cuflash.reference import tiles
from cuflash.reference.features import Policies
from cuflash.reference.loops import ROW_TILES, GradientJob
from cuflash.reference.operands import Keys, add_reduced, kept_of, part_of, product, sink_rows
from cuflash.reference.pool import Job, Scratch
from cuflash.reference.scores import Hidden
from cuflash.reference.softmax import RowTangents, normalizers, row_sums, weights
from cuflash.reference.tiles import Tile, grouped, head_tiles, load, stacked, store


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

    def job(keys: Keys, dkeys: Keys, batches: slice, heads: slice, row_tiles: list[slice]) -> Job:
        def run(scratch: Scratch) -> None:
            _, k_columns, v_rows = keys.tiles(scratch)
            _, dk_columns, dv_rows = dkeys.tiles(scratch)
            for rows in row_tiles:
                at_q = batches, rows, heads
                q_tile = load(q, at_q, real, scratch, "q", scores.unit)
                dq_tile = None if dq is None else load(dq, at_q, real, scratch, "tangent q", scores.unit)
                softmax = RowTangents(q_tile.shape[:-1], v.shape[-1], real, scratch)
                for tile, hidden in scores.kv_tiles(batches, heads, rows):
                    k_tile, dk_tile = k_columns[tile.keys], None if dk is None else dk_columns[tile.keys]
                    capped = scores.capped(product("s", q_tile, k_tile, scratch))
                    ds = _product_along("ds", q_tile, k_tile, dq_tile, dk_tile, scratch)
                    slope = scores.slope(capped)
                    written = scores.written_with_slopes(capped, tile, group, of_captured=False)
                    ds = scores.tangent(ds, slope, tangents.bias, tile, hidden, group, written)
                    s = scores.finish(capped, tile, hidden, group)
                    kept = None if dropout is None else kept_of(dropout, tile)
                    softmax.update_along(s, ds, v_rows[tile.keys], None if dv is None else dv_rows[tile.keys], kept)
                if sink is not None:
                    dsink = None if tangents.sink is None else sink_rows(tangents.sink[heads], softmax.l)
                    softmax.add_sink_along(sink_rows(sink[heads], softmax.l), dsink)
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
        keys = Keys(k, v, at, real, readers=scores.len_q * group)
        dkeys = Keys(k if dk is None else dk, v if dv is None else dv, at, real, scores.len_q * group, "tangent ")
        for end in range(len(row_tiles), 0, -ROW_TILES):
            yield job(keys, dkeys, batches, heads, row_tiles[max(end - ROW_TILES, 0) : end])


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
            keys = Keys(k, v, every, real, readers)
            k_rows, k_columns, v_rows = keys.tiles(scratch)
            v_columns = v_rows.turned()
            turned = Keys(
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

            def pairs(row: _Row, tile: Tile, hidden: Hidden | None) -> _Pairs:
                k_tile, dk_tile = k_columns[tile.keys], None if along_k is None else dk_columns[tile.keys]
                capped = scores.capped(product("s", row.q, k_tile, scratch))
                ds = _product_along("ds", row.q, k_tile, row.dq, dk_tile, scratch)
                slope = scores.slope(capped)
                slope, curvature = scores.bend(capped, slope, ds, tile, group)
                ds = scores.tangent(ds, slope, tangents.bias, tile, hidden, group)
                p = weights(scores.finish(capped, tile, hidden, group), row.shift)
                np.multiply(p, row.factor, out=p)
                if scores.score_mod is not None:
                    _hide(p, ds, slope, curvature)
                v_tile, dv_tile = v_columns[tile.keys], None if along_v is None else dv_columns[tile.keys]
                dp = product("dp", row.dout, v_tile, scratch)
                ddp = _product_along("ddp", row.dout, v_tile, row.ddout, dv_tile, scratch)
                kept = None
                if dropout is not None:
                    kept = kept_of(dropout, tile) * real.type(keep_scale)
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
                for tile, hidden in scores.kv_tiles(batches, heads, rows):
                    p, ds, dp, ddp, *_ = pairs(row, tile, hidden)
                    mean += row_sums(p * ds)
                    delta += row_sums(p * dp)
                    ddelta += row_sums(p * (ds * dp + ddp))
                share = None if sink is None else weights(sink_rows(sink[heads], lse_tile), row.shift) * row.factor
                dshare = 0 if tangents.sink is None else sink_rows(tangents.sink[heads], lse_tile)
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
                for tile, hidden in scores.kv_tiles(batches, heads, rows):
                    p, ds, dp, ddp, slope, curvature, kept = pairs(row, tile, hidden)
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
                        add_reduced(tile.of(dbias), stacked(ddx, group))
                    if slope is not None:
                        ddx = ddx * slope + dx * curvature
                        dx = dx * slope
                    dq_sum += product("dq", ddx, k_rows[tile.keys], scratch)
                    dk_sum[:, :, tile.keys] += product("dk", ddx.mT, row.q, scratch)
                    if along_k is not None:
                        dq_sum += product("dq", dx, dk_rows[tile.keys], scratch)
                    if row.dq is not None:
                        dk_sum[:, :, tile.keys] += product("dk", dx.mT, row.dq, scratch)
                store(dq, at_q, np.multiply(dq_sum, scores.unit, out=dq_sum))
            store(dk, every, dk_sum)
            store(dv, every, dv_sum)

        return run

    for batches, heads in head_tiles(q, scores.len_kv, 6 * (k.shape[-1] + v.shape[-1]) * scores.len_kv, most_heads):
        yield part_of(dbias, batches, heads), job(batches, heads)


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


def _hide(p: np.ndarray, *others: np.ndarray | None) -> None:
    """Set to 0 what belongs to pairs without a weight, whose written scores may move in any way."""
    for x in others:
        if x is not None:
            np.copyto(x, 0, where=p == 0)


def _product_along(
    name: str, a: np.ndarray, b: np.ndarray, da: np.ndarray | None, db: np.ndarray | None, scratch: Scratch
) -> np.ndarray:
    """The tangent of matrices a @ b along da and db (None: zero), in the scratch array of that name."""
    terms = [(x, y) for x, y in ((da, b), (a, db)) if x is not None and y is not None]
    if not terms:
        zeros = scratch(name, (*a.shape[:-1], b.shape[-1]), a.dtype)
        zeros.fill(0)
        return zeros
    total = product(name, *terms[0], scratch)
    return total if len(terms) == 1 else np.add(total, product("term", *terms[1], scratch), out=total)
