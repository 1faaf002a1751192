"""Exact attention by tiles with an online softmax, forward and backward; memory grows with the lengths only.

With x_ij = softmax_scale * q_i.k_j, or softcap * tanh(x / softcap) of it,

    s_ij = x_ij - slope * |i + off - j| + bias_ij
    lse_i = log(exp(sink) + sum_j exp(s_ij))    P_ij = exp(s_ij - lse_i)    out_i = sum_j D_ij P_ij v_j

over visible j; D_ij is 0 where dropout drops and 1 / (1 - p) elsewhere. Every term is there only if it was asked for.
A row that sees no key has out 0, lse -inf, or the sink, and gradients 0. Query head h uses key/value head
h // (heads_q // heads_kv).

16-bit and fp32 arrays are computed in fp32, fp64 in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cuflash import dtypes
from cuflash.reference import tiled
from cuflash.reference.features import Features
from cuflash.reference.paged import PagedRows
from cuflash.reference.tiles import grouped_pairs

# inf - inf, log(0) and casts beyond fp16 are decided here on purpose; their values are the documented ones.
_quiet = np.errstate(all="ignore")


class Gradients(NamedTuple):
    """Gradients of one call."""

    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dbias: np.ndarray | None = None
    """The shape of the bias, in the accumulator dtype: summed over the axes along which the bias was broadcast."""
    dsink: np.ndarray | None = None
    """(heads_q,) in the accumulator dtype; None without a sink."""


@_quiet
def forward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    out: np.ndarray | None = None,
    row_state: np.ndarray | None = None,
    **features: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of dense tensors.

    Parameters
    ----------
    q, k, v : ndarray
        (b, len_q, heads_q, dim_qk), (b, len_kv, heads_kv, dim_qk) and (b, len_kv, heads_kv, dim_v), any strides.
    out : ndarray, optional
        Filled in place and returned, any strides.
    row_state : ndarray, optional
        (b, heads_q, len_q, 2) in the accumulator dtype, filled with the largest logit of each row and the sum of
        exponentials relative to it: what `backward` needs beyond lse for rows of P to sum to 1 whatever their size.
    **features
        The fields of `Features`; `mask` and `softmax_scale` are needed.

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
    lse = np.empty((batch, heads_q, len_q), _real(q))
    tiled.forward(q, k, v, out, lse, Features(**features).policies(q.shape, k.shape), row_state)
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
    dlse: np.ndarray | None = None,
    row_state: np.ndarray | None = None,
    bias_grad: bool = False,
    **features: Any,
) -> Gradients:
    """Gradients of `forward` for the upstream gradients `dout` of out and `dlse` of lse (None: zero).

    `lse` may hold -inf or +inf for rows that see no key; with `row_state` it says no more than which those are. dq, dk
    and dv are shaped and typed like q, k and v; `bias_grad` asks for the gradient of the bias.
    """
    dq, dk, dv = (np.empty(x.shape, x.dtype) for x in (q, k, v))
    features = Features(**features)
    sums = _Sums(features, k.shape[-2], bias_grad, _real(q))
    policies = features.policies(q.shape, k.shape)
    grads = {"dq": dq, "dk": dk, "dv": dv, **sums.of(0, len(q))}
    tiled.backward(dout, q, k, v, out, lse, dlse, policies, row_state=row_state, **grads)
    return Gradients(dq, dk, dv, sums.dbias, sums.dsink)


@_quiet
def forward_varlen(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cu_seqlens_q: np.ndarray,
    cu_seqlens_k: np.ndarray,
    *,
    seqused_q: np.ndarray | None = None,
    seqused_k: np.ndarray | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    out: np.ndarray | None = None,
    row_state: np.ndarray | None = None,
    **features: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of packed sequences: `forward` for each of them, its mask aligned to its own lengths.

    Parameters
    ----------
    q, k, v : ndarray
        (total_q, heads_q, dim_qk), (total_kv, heads_kv, dim_qk) and (total_kv, heads_kv, dim_v), any strides.
    cu_seqlens_q, cu_seqlens_k : ndarray of int
        (b + 1,) first row of each sequence, and the end of the last.
    seqused_q, seqused_k : ndarray of int, optional
        (b,) queries and keys of each sequence that take part, from its first; the others are not read. They set the
        mask's alignment. Rows of no sequence, and rows not used, get out 0 and lse -inf.
    max_seqlen_q, max_seqlen_k : int, optional
        What dropout's ``word`` scheme numbers pairs by; None is the longest sequence of cu_seqlens.
    row_state : ndarray, optional
        (heads_q, total_q, 2), filled as by `forward`.
    **features
        The fields of `Features`.

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
    lse = np.full((heads_q, total_q), -np.inf, _real(q))
    out[...] = 0
    if row_state is not None:
        row_state[...] = 0
    features = Features(**features)
    longest = _longest(cu_seqlens_q, max_seqlen_q), _longest(cu_seqlens_k, max_seqlen_k)
    for b, rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k):
        q1, k1, v1 = q[None, rows], k[None, keys], v[None, keys]
        policies = features.policies(q1.shape, k1.shape, first=b, longest=longest)
        state = None if row_state is None else row_state[None, :, rows]
        tiled.forward(q1, k1, v1, out[None, rows], lse[None, :, rows], policies, state)
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
    seqused_q: np.ndarray | None = None,
    seqused_k: np.ndarray | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dlse: np.ndarray | None = None,
    row_state: np.ndarray | None = None,
    bias_grad: bool = False,
    **features: Any,
) -> Gradients:
    """Gradients of `forward_varlen`; rows and keys that take no part get 0."""
    dq, dk, dv = (np.zeros(x.shape, x.dtype) for x in (q, k, v))
    features = Features(**features)
    sums = _Sums(features, k.shape[-2], bias_grad, _real(q))
    longest = _longest(cu_seqlens_q, max_seqlen_q), _longest(cu_seqlens_k, max_seqlen_k)
    for b, rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k):
        q1, k1, v1 = q[None, rows], k[None, keys], v[None, keys]
        policies = features.policies(q1.shape, k1.shape, first=b, longest=longest)
        lse1, dlse1 = lse[None, :, rows], None if dlse is None else dlse[None, :, rows]
        state = None if row_state is None else row_state[None, :, rows]
        grads = {"dq": dq[None, rows], "dk": dk[None, keys], "dv": dv[None, keys], **sums.of(b, 1)}
        tiled.backward(dout[None, rows], q1, k1, v1, out[None, rows], lse1, dlse1, policies, row_state=state, **grads)
    return Gradients(dq, dk, dv, sums.dbias, sums.dsink)


@_quiet
def forward_paged(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    block_table: np.ndarray,
    seqused_k: np.ndarray,
    *,
    cu_seqlens_q: np.ndarray | None = None,
    seqused_q: np.ndarray | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    out: np.ndarray | None = None,
    **features: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention over keys and values in the pages of a cache.

    Key j of sequence b is row ``j % page_size`` of page ``block_table[b, j // page_size]``. A cache without pages,
    (b, len, heads_kv, d), is one of b pages with ``block_table = arange(b)[:, None]``.

    Parameters
    ----------
    q : ndarray
        (b, len_q, heads_q, dim_qk), or (total_q, heads_q, dim_qk) with `cu_seqlens_q`.
    k, v : ndarray
        (num_pages, page_size, heads_kv, dim_qk) and (num_pages, page_size, heads_kv, dim_v), any page size and strides.
    block_table : ndarray of int
        (b, max_pages) page numbers; those behind a sequence's last page are not read.
    seqused_k : ndarray of int
        (b,) keys of each sequence.

    Returns
    -------
    out, lse : ndarray
        As `forward` for dense queries and as `forward_varlen` for packed ones, whose other keywords are these.
    """
    packed = cu_seqlens_q is not None
    heads_q = q.shape[-2]
    if out is None:
        out = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
    lse = np.full((heads_q, len(q)) if packed else (len(q), heads_q, q.shape[1]), -np.inf, _real(q))
    out[...] = 0
    features = Features(**features)
    len_q = _longest(cu_seqlens_q, max_seqlen_q) if packed else q.shape[1]
    longest = len_q, int(seqused_k.max(initial=0)) if max_seqlen_k is None else max_seqlen_k
    for b, (table, length) in enumerate(zip(block_table, seqused_k.tolist(), strict=True)):
        begin, end = cu_seqlens_q[b : b + 2].tolist() if packed else (0, q.shape[1])
        rows = slice(begin, end if seqused_q is None else min(begin + int(seqused_q[b]), end))
        if rows.start == rows.stop:
            continue
        element = None if packed else slice(b, b + 1)
        length = min(length, k.shape[1] * len(table))
        q1, k1, v1 = q[element, rows], PagedRows(k, table, length), PagedRows(v, table, length)
        policies = features.policies(q1.shape, k1.shape, first=b, longest=longest)
        tiled.forward(q1, k1, v1, out[element, rows], lse[element, :, rows], policies)
    return out, lse


class _Sums:
    """The gradients that sequences add to."""

    def __init__(self, features: Features, heads_kv: int, bias_grad: bool, real: np.dtype) -> None:
        self.heads_kv = heads_kv
        self.dbias = np.zeros(features.bias.shape, real) if bias_grad else None
        self.dsink = None if features.sink is None else np.zeros(features.sink.shape, real)

    def of(self, first: int, batch: int) -> dict[str, np.ndarray | None]:
        """Views of what batch elements from `first` on add to, as `tiled.backward` takes them."""
        dbias = None if self.dbias is None else grouped_pairs(self.dbias, self.heads_kv)
        if dbias is not None and len(dbias) > 1:
            dbias = dbias[first : first + batch]
        return {"dbias": dbias, "dsink": None if self.dsink is None else self.dsink.reshape(self.heads_kv, -1)}


def _real(q: np.ndarray) -> np.dtype:
    """The dtype of scores, sums and lse."""
    return dtypes.of(q.dtype).accumulator


def _longest(cu_seqlens: np.ndarray, max_seqlen: int | None) -> int:
    """The length of the longest sequence, unless it is given."""
    return int(np.diff(cu_seqlens).max(initial=0)) if max_seqlen is None else max_seqlen


def _sequences(
    cu_seqlens_q: np.ndarray, cu_seqlens_k: np.ndarray, seqused_q: np.ndarray | None, seqused_k: np.ndarray | None
) -> Iterator[tuple[int, slice, slice]]:
    """Number, packed query rows in use and packed keys in use of every sequence that has queries."""
    spans_q, spans_k = _spans(cu_seqlens_q, seqused_q), _spans(cu_seqlens_k, seqused_k)
    for b, (rows, keys) in enumerate(zip(spans_q, spans_k, strict=True)):
        if rows.start < rows.stop:
            yield b, rows, keys


def _spans(cu_seqlens: np.ndarray, seqused: np.ndarray | None) -> list[slice]:
    """The rows in use of every packed sequence."""
    begin, end = cu_seqlens[:-1], cu_seqlens[1:]
    end = end if seqused is None else np.minimum(begin + seqused, end)
    return [slice(*span) for span in zip(begin.tolist(), end.tolist(), strict=True)]
