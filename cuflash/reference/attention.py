"""Exact attention by tiles with an online softmax, forward and backward; memory grows with the lengths only.

The algorithm is FlashAttention (Dao et al. 2022, arXiv 2205.14135) in the loop order of FlashAttention-2 (Dao 2023,
arXiv 2307.08691). With x = unit * q.k, a logit is s = x, or s = softcap * tanh(x) with a soft cap, and

    lse_i = log(sum_j exp(s_ij))    P_ij = exp(s_ij - lse_i)    out_i = sum_j P_ij v_j            over visible j

A row that sees no key has out 0, lse -inf and gradients 0. Query head h uses key/value head h // (heads_q // heads_kv).

16-bit and fp32 arrays are computed in fp32, fp64 in fp64. Inside, tensors are (b, s, heads_kv, group, d) views and a
tile stacks the query heads of a group as rows of one matrix, so that keys are never repeated and the gradients of
shared keys are summed by the product itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from cuflash import dtypes
from cuflash.masks import Mask

# A tile of scores, of one head or of several short ones, is 0.5 MiB in fp32: it stays in a core's second-level cache,
# and is large enough that NumPy's cost per call does not show.
_TILE_ROWS = 256
_TILE_KV = 512
_TILE_SCORES = _TILE_ROWS * _TILE_KV

# inf - inf, log(0) and casts beyond fp16 are decided here on purpose; their values are the documented ones.
_quiet = np.errstate(all="ignore")


@_quiet
def forward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    mask: Mask,
    softmax_scale: float,
    softcap: float = 0.0,
    mask_tensor: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of dense tensors.

    Parameters
    ----------
    q, k, v : ndarray
        (b, len_q, heads_q, dim_qk), (b, len_kv, heads_kv, dim_qk) and (b, len_kv, heads_kv, dim_v), any strides.
    mask : Mask
        Which keys a query sees.
    softmax_scale : float
        Factor of q.k, of any sign.
    softcap : float
        Logits become ``softcap * tanh(logit / softcap)``; 0 leaves them alone.
    mask_tensor : ndarray of bool, optional
        Broadcastable to (b, heads_q, len_q, len_kv); True lets the pair take part.
    out : ndarray, optional
        Filled in place and returned, any strides.

    Returns
    -------
    out : ndarray
        (b, len_q, heads_q, dim_v), the dtype of `q`.
    lse : ndarray
        (b, heads_q, len_q) natural logarithms in the accumulator dtype; -inf where a query sees no key.
    """
    batch, len_q, heads_q, _ = q.shape
    if out is None:
        out = np.empty((batch, len_q, heads_q, v.shape[-1]), q.dtype)
    lse = np.empty((batch, heads_q, len_q), dtypes.of(q.dtype).accumulator)
    _forward(q, k, v, out, lse, _Logits.of(q, k, mask, softmax_scale, softcap, mask_tensor))
    return out, lse


@_quiet
def backward(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    *,
    mask: Mask,
    softmax_scale: float,
    softcap: float = 0.0,
    mask_tensor: np.ndarray | None = None,
    dlse: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `forward` for the upstream gradients `dout` of out and `dlse` of lse (None: zero).

    `lse` may hold -inf or +inf for rows that see no key. Returns (dq, dk, dv), shaped and typed like (q, k, v).
    """
    dq, dk, dv = (np.empty(x.shape, x.dtype) for x in (q, k, v))
    logits = _Logits.of(q, k, mask, softmax_scale, softcap, mask_tensor)
    _backward(dout, q, k, v, out, lse, dlse, dq, dk, dv, logits)
    return dq, dk, dv


@_quiet
def forward_varlen(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cu_seqlens_q: np.ndarray,
    cu_seqlens_k: np.ndarray,
    *,
    mask: Mask,
    softmax_scale: float,
    softcap: float = 0.0,
    seqused_k: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of packed sequences: `forward` for each of them, its mask aligned to its own lengths.

    Parameters
    ----------
    q, k, v : ndarray
        (total_q, heads_q, dim_qk), (total_kv, heads_kv, dim_qk) and (total_kv, heads_kv, dim_v), any strides.
    cu_seqlens_q, cu_seqlens_k : ndarray of int
        (b + 1,) first row of each sequence, and the end of the last. Rows after it get out 0 and lse -inf.
    seqused_k : ndarray of int, optional
        (b,) keys of each sequence that take part, from its first; the others are not read.

    Returns
    -------
    out : ndarray
        (total_q, heads_q, dim_v), the dtype of `q`.
    lse : ndarray
        (heads_q, total_q) in the accumulator dtype.
    """
    total_q, heads_q, _ = q.shape
    if out is None:
        out = np.empty((total_q, heads_q, v.shape[-1]), q.dtype)
    lse = np.full((heads_q, total_q), -np.inf, dtypes.of(q.dtype).accumulator)
    out[...] = 0
    for rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k, seqused_k):
        q1, k1, v1 = q[None, rows], k[None, keys], v[None, keys]
        logits = _Logits.of(q1, k1, mask, softmax_scale, softcap, None)
        _forward(q1, k1, v1, out[None, rows], lse[None, :, rows], logits)
    return out, lse


@_quiet
def backward_varlen(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    cu_seqlens_q: np.ndarray,
    cu_seqlens_k: np.ndarray,
    *,
    mask: Mask,
    softmax_scale: float,
    softcap: float = 0.0,
    seqused_k: np.ndarray | None = None,
    dlse: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `forward_varlen`; rows and keys outside every sequence get 0. Returns (dq, dk, dv)."""
    dq, dk, dv = (np.zeros(x.shape, x.dtype) for x in (q, k, v))
    for rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k, seqused_k):
        q1, k1, v1 = q[None, rows], k[None, keys], v[None, keys]
        logits = _Logits.of(q1, k1, mask, softmax_scale, softcap, None)
        lse1, dlse1 = lse[None, :, rows], None if dlse is None else dlse[None, :, rows]
        grads = dq[None, rows], dk[None, keys], dv[None, keys]
        _backward(dout[None, rows], q1, k1, v1, out[None, rows], lse1, dlse1, *grads, logits)
    return dq, dk, dv


def _sequences(
    cu_seqlens_q: np.ndarray, cu_seqlens_k: np.ndarray, seqused_k: np.ndarray | None
) -> Iterator[tuple[slice, slice]]:
    """Packed query rows and packed keys in use of every sequence that has queries."""
    spans = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    for i, ((begin, end), (begin_kv, end_kv)) in enumerate(spans):
        if seqused_k is not None:
            end_kv = min(begin_kv + int(seqused_k[i]), end_kv)
        if begin < end:
            yield slice(begin, end), slice(begin_kv, end_kv)


@dataclass(frozen=True, slots=True)
class _Logits:
    """From q.k to logits of one call: the scale, the cap and which pairs exist."""

    mask: Mask
    keep: np.ndarray | None  # bool (b, heads_kv, group, len_q, len_kv) view; None: the band alone decides
    len_q: int
    len_kv: int
    unit: float  # x = unit * q.k
    softcap: float

    @classmethod
    def of(
        cls,
        q: np.ndarray,
        k: np.ndarray,
        mask: Mask,
        softmax_scale: float,
        softcap: float,
        mask_tensor: np.ndarray | None,
    ) -> _Logits:
        """The logits of (b, s, h, d) tensors."""
        (batch, len_q, heads_q, _), (_, len_kv, heads_kv, _) = q.shape, k.shape
        if mask_tensor is not None:
            mask_tensor = np.broadcast_to(mask_tensor, (batch, heads_q, len_q, len_kv))
            mask_tensor = mask_tensor.reshape(batch, heads_kv, heads_q // heads_kv, len_q, len_kv, copy=False)
        unit = float(softmax_scale / softcap if softcap else softmax_scale)
        return cls(mask, mask_tensor, len_q, len_kv, unit, float(softcap))

    def kv_tiles(self, batches: slice, heads: slice, rows: slice) -> Iterator[tuple[slice, np.ndarray | None]]:
        """Key tiles that some of these query rows see, each with its boolean mask, or None when all of it is seen."""
        off = self.mask.offset(self.len_q, self.len_kv)
        # Row i sees keys [i + first, i + end).
        first = -self.len_q - self.len_kv if self.mask.left is None else off - self.mask.left
        end = self.len_q + self.len_kv if self.mask.right is None else off + self.mask.right + 1
        last_row = rows.stop - 1
        for start in range(max(rows.start + first, 0), min(last_row + end, self.len_kv), _TILE_KV):
            keys = slice(start, min(start + _TILE_KV, last_row + end, self.len_kv))
            keep = None
            if last_row + first > keys.start or rows.start + end < keys.stop:
                distance = np.arange(keys.start, keys.stop) - np.arange(rows.start, rows.stop)[:, None]
                keep = (first <= distance) & (distance < end)
            if self.keep is not None:
                tile = self.keep[batches, heads, :, rows, keys]
                if not tile.any():
                    continue
                keep = tile if keep is None else tile & keep
            yield keys, keep

    def of_product(self, x: np.ndarray) -> np.ndarray:
        """Logits of x = unit * q.k, in place."""
        return np.multiply(np.tanh(x, out=x), self.softcap, out=x) if self.softcap else x

    def slope(self, s: np.ndarray) -> np.ndarray | float:
        """ds/dx at logits s: softcap * (1 - tanh(x)^2)."""
        return self.softcap - s * s / self.softcap if self.softcap else 1.0


class _RowSoftmax:
    """The online softmax of a tile of query rows (algorithm 1 of FlashAttention-2), and its inverse in the backward.

    Every case of "sees nothing" is decided here: such a row keeps m = -inf and l = 0.
    """

    def __init__(self, shape: tuple[int, ...], dim_v: int, real: np.dtype) -> None:
        self.m = np.full((*shape, 1), -np.inf, real)  # largest logit so far
        self.l = np.zeros((*shape, 1), real)  # sum of exp(s - m)
        self.acc = np.zeros((*shape, dim_v), real)  # sum of exp(s - m) v

    def update(self, s: np.ndarray, v: np.ndarray) -> None:
        """Take in a tile of logits (overwritten) and its values; what was summed so far shrinks by exp(m_old - m)."""
        m = np.maximum(self.m, s.max(axis=-1, keepdims=True))
        shift = np.where(m == -np.inf, 0, m)
        p = np.exp(np.subtract(s, shift, out=s), out=s)
        shrink = np.exp(self.m - shift)
        self.m = m
        self.l = self.l * shrink + p.sum(axis=-1, keepdims=True)
        self.acc = self.acc * shrink + p @ v

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the output rows acc / l and lse = m + log(l)."""
        return self.acc / np.where(self.l == 0, 1, self.l), self.m + np.log(self.l)

    @staticmethod
    def probabilities(s: np.ndarray, lse: np.ndarray) -> np.ndarray:
        """P = exp(s - lse) again, overwriting s; 0 in empty rows, whose lse is -inf or, by PyTorch, +inf."""
        return np.exp(np.subtract(s, np.where(lse == -np.inf, np.inf, lse), out=s), out=s)

    @staticmethod
    def delta(dout: np.ndarray, out: np.ndarray, lse: np.ndarray, dlse: np.ndarray | float) -> np.ndarray:
        """The row term of the softmax's gradient, dS = P * (dP - delta); dlse enters through d(lse)/ds = P."""
        delta = (dout * out).sum(axis=-1, keepdims=True) - dlse
        return np.where(np.isinf(lse), 0, delta)


def _forward(q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray, lse: np.ndarray, logits: _Logits) -> None:
    """Fill out (b, s, h, d) and lse (b, h, s): FlashAttention-2, algorithm 1."""
    real, dim_v, heads_kv = lse.dtype, v.shape[-1], k.shape[2]
    q, k, v, out = (_grouped(x, heads_kv) for x in (q, k, v, out))
    lse = _grouped(lse.transpose(0, 2, 1)[..., None], heads_kv)
    for batches, heads in _head_tiles(q, logits.len_kv, 0):
        for rows in _row_tiles(q):
            tile = batches, rows, heads
            q_tile = _load(q, tile, real) * logits.unit
            softmax = _RowSoftmax(q_tile.shape[:-1], dim_v, real)
            for keys, keep in logits.kv_tiles(batches, heads, rows):
                s = logits.of_product(q_tile @ _load(k, (batches, keys, heads), real).mT)
                softmax.update(_hide(s, keep), _load(v, (batches, keys, heads), real))
            out_tile, lse_tile = softmax.finish()
            _store(out, tile, out_tile)
            _store(lse, tile, lse_tile)


def _backward(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    dlse: np.ndarray | None,
    dq: np.ndarray,
    dk: np.ndarray,
    dv: np.ndarray,
    logits: _Logits,
) -> None:
    """Fill dq, dk and dv: FlashAttention-2, algorithm 2, with query tiles outside.

    delta_i = dout_i . out_i - dlse_i    dP = dout v^T    dS = P * (dP - delta)    dX = dS * ds/dx
    dv = P^T dout    dq = unit * dX k    dk = dX^T (unit * q)
    """
    real, heads_kv = dtypes.of(q.dtype).accumulator, k.shape[2]
    dout, q, k, v, out, dq, dk, dv = (_grouped(x, heads_kv) for x in (dout, q, k, v, out, dq, dk, dv))
    lse = _grouped(lse.transpose(0, 2, 1)[..., None], heads_kv)
    dlse = None if dlse is None else _grouped(dlse.transpose(0, 2, 1)[..., None], heads_kv)
    for batches, heads in _head_tiles(q, logits.len_kv, k.shape[-1] + v.shape[-1]):
        every_key = batches, slice(0, logits.len_kv), heads
        shape = batches.stop - batches.start, heads.stop - heads.start, logits.len_kv
        dk_sum, dv_sum = np.zeros((*shape, k.shape[-1]), real), np.zeros((*shape, v.shape[-1]), real)
        for rows in _row_tiles(q):
            tile = batches, rows, heads
            q_tile = _load(q, tile, real) * logits.unit
            dout_tile, lse_tile = _load(dout, tile, real), _load(lse, tile, real)
            dlse_tile = 0.0 if dlse is None else _load(dlse, tile, real)
            delta = _RowSoftmax.delta(dout_tile, _load(out, tile, real), lse_tile, dlse_tile)
            dq_tile = np.zeros_like(q_tile)
            for keys, keep in logits.kv_tiles(batches, heads, rows):
                k_tile, v_tile = (_load(x, (batches, keys, heads), real) for x in (k, v))
                s = logits.of_product(q_tile @ k_tile.mT)
                slope = logits.slope(s)
                p = _RowSoftmax.probabilities(_hide(s, keep), lse_tile)
                dv_sum[:, :, keys] += p.mT @ dout_tile
                dx = p * (dout_tile @ v_tile.mT - delta) * slope
                dq_tile += dx @ k_tile
                dk_sum[:, :, keys] += dx.mT @ q_tile
            _store(dq, tile, dq_tile * logits.unit)
        _store(dk, every_key, dk_sum)
        _store(dv, every_key, dv_sum)


def _grouped(x: np.ndarray, heads_kv: int) -> np.ndarray:
    """View (b, s, h, d) as (b, s, heads_kv, group, d)."""
    batch, length, heads, dim = x.shape
    return x.reshape(batch, length, heads_kv, heads // heads_kv, dim, copy=False)


def _head_tiles(q: np.ndarray, len_kv: int, grad_dims: int) -> Iterator[tuple[slice, slice]]:
    """Cut (batch, heads_kv) so that a tile's scores, and grad_dims numbers a key, fit _TILE_SCORES where they can."""
    batch, len_q, heads_kv, group, _ = q.shape
    scores = min(len_q * group, max(group, _TILE_ROWS)) * min(len_kv, _TILE_KV)
    pairs = max(1, _TILE_SCORES // max(1, scores, grad_dims * len_kv))
    num_batches, num_heads = max(1, pairs // max(1, heads_kv)), min(pairs, heads_kv)
    for b in range(0, batch, num_batches):
        for h in range(0, heads_kv, max(1, num_heads)):
            yield slice(b, min(b + num_batches, batch)), slice(h, min(h + num_heads, heads_kv))


def _row_tiles(q: np.ndarray) -> Iterator[slice]:
    """Cut len_q so that the rows of a group of heads make tiles of about _TILE_ROWS."""
    len_q, step = q.shape[1], max(1, _TILE_ROWS // max(1, q.shape[3]))
    for start in range(0, len_q, step):
        yield slice(start, min(start + step, len_q))


def _load(x: np.ndarray, tile: tuple[slice, slice, slice], real: np.dtype) -> np.ndarray:
    """Read (batches, rows, heads) of a grouped view as a contiguous (batches, heads, group * rows, d)."""
    loaded = x[tile].transpose(0, 2, 3, 1, 4).astype(real, order="C", copy=False)
    return loaded.reshape(*loaded.shape[:2], -1, loaded.shape[-1])


def _store(x: np.ndarray, tile: tuple[slice, slice, slice], rows: np.ndarray) -> None:
    """Write what `_load` would read, rounded to the dtype of x."""
    target = x[tile].transpose(0, 2, 3, 1, 4)
    target[...] = rows.reshape(target.shape)


def _hide(s: np.ndarray, keep: np.ndarray | None) -> np.ndarray:
    """Set the logits of pairs that are not kept to -inf, in place; keep broadcasts to (..., group, rows, keys)."""
    if keep is not None:
        np.copyto(s.reshape(*s.shape[:2], -1, *keep.shape[-2:]), -np.inf, where=~keep)
    return s
