"""Exact attention by tiles with an online softmax, forward and backward; memory grows with the lengths only.

With x_ij = softmax_scale * q_i.k_j, softcap * tanh(x / softcap) of it, or what a written score makes of that,

    s_ij = x_ij - slope * |i + off - j| + bias_ij
    lse_i = log(exp(sink) + sum_j exp(s_ij))    P_ij = exp(s_ij - lse_i)    out_i = sum_j D_ij P_ij v_j

over visible j; D_ij is 0 where dropout drops and 1 / (1 - p) elsewhere. Every term is there only if it was asked for.
A row that sees no key has out 0, lse -inf or what the caller wants instead, or the sink, and gradients 0. Query head h
uses key/value head h // (heads_q // heads_kv).

16-bit and fp32 arrays are computed in fp32, fp64 in fp64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from cuflash import dtypes
from cuflash.masks import Mask
from cuflash.reference import loops, pool, tangents
from cuflash.reference.features import Features
from cuflash.reference.loops import GradientJob
from cuflash.reference.paged import PagedRows
from cuflash.reference.pool import Scratch
from cuflash.reference.tangents import Tangents
from cuflash.reference.tiles import grouped_pairs
from cuflash.reference.written import CapturedSums


class Gradients(NamedTuple):
    """Gradients of one call."""

    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dbias: np.ndarray | None = None
    """The shape of the bias, in the accumulator dtype: summed over the axes along which the bias was broadcast."""
    dsink: np.ndarray | None = None
    """(heads_q,) in the accumulator dtype; None without a sink."""
    dcaptured: tuple[np.ndarray, ...] | None = None
    """In the accumulator dtype, of the arrays of real numbers that the written score reads; None if not wanted."""


def forward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    out: np.ndarray | None = None,
    row_state: np.ndarray | None = None,
    empty_lse: float = -np.inf,
    along: Tangents | None = None,
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
    empty_lse : float
        The lse of queries that see no key.
    along : Tangents, optional
        Those of out and lse are filled, along the others; not together with `row_state`.
    **features
        The fields of `Features`; `band` and `softmax_scale` are needed.

    Returns
    -------
    out : ndarray
        (b, len_q, heads_q, dim_v), the dtype of `q`.
    lse : ndarray
        (b, heads_q, len_q) natural logarithms in the accumulator dtype.
    """
    batch, len_q, heads_q, _ = q.shape
    if out is None:
        out = np.empty((batch, len_q, heads_q, v.shape[-1]), q.dtype)
    lse = np.empty((batch, heads_q, len_q), _real(q))
    policies = Features(**features).policies(q.shape, k.shape)
    if along is None:
        jobs = loops.forward(q, k, v, out, lse, policies, row_state, empty_lse)
    else:
        jobs = tangents.forward_along(_of_sequence(along, q, k), q, k, v, out, lse, policies, empty_lse)
    pool.run(jobs, lse.size * k.shape[1])
    return out, lse


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
    delta: np.ndarray | None = None,
    bias_grad: bool = False,
    captured_grad: bool = False,
    along: Tangents | None = None,
    **features: Any,
) -> Gradients:
    """Gradients of `forward` for the upstream gradients `dout` of out and `dlse` of lse (None: zero).

    `lse` may hold -inf or +inf for rows that see no key; with `row_state` it says no more than which those are. dq, dk
    and dv are shaped and typed like q, k and v; `bias_grad` asks for the gradient of the bias, `captured_grad` for
    those of what the written score reads. `delta`, shaped and typed like lse, is filled with the sum of dout * out of
    each row less its dlse, and 0 where it sees no key.

    `along` asks for the tangents of the gradients instead: second derivatives of (dout . out + dlse . lse) times a
    change of q, k, v, the bias and the sink, and what follows from one of dout and dlse; `delta` is left alone.
    """
    dq, dk, dv = (np.empty(x.shape, x.dtype) for x in (q, k, v))
    rules = Features(**features)
    sums = _Sums(rules, len(q), k.shape[-2], bias_grad, captured_grad, _real(q))
    policies = rules.policies(q.shape, k.shape)
    grads = {"row_state": row_state, "dq": dq, "dk": dk, "dv": dv, **sums.of(0, len(q))}
    if along is None:
        sums.add(0, loops.backward(dout, q, k, v, out, lse, dlse, policies, row_delta=delta, **grads))
    else:
        sums.add(0, tangents.backward_along(_of_sequence(along, q, k), dout, q, k, v, lse, dlse, policies, **grads))
    return sums.run(dq, dk, dv, scores=lse.size * k.shape[1])


def forward_varlen(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cu_seqlens_q: np.ndarray,
    cu_seqlens_kv: np.ndarray,
    *,
    seqused_q: np.ndarray | None = None,
    seqused_kv: np.ndarray | None = None,
    len_q: int | None = None,
    len_kv: int | None = None,
    out: np.ndarray | None = None,
    row_state: np.ndarray | None = None,
    empty_lse: float = -np.inf,
    tail_lse: float = -np.inf,
    along: Tangents | None = None,
    **features: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of packed sequences: `forward` for each of them, its mask aligned to its own lengths.

    Parameters
    ----------
    q, k, v : ndarray
        (total_q, heads_q, dim_qk), (total_kv, heads_kv, dim_qk) and (total_kv, heads_kv, dim_v), any strides.
    cu_seqlens_q, cu_seqlens_kv : ndarray of int
        (b + 1,) first row of each sequence, and the end of the last.
    seqused_q, seqused_kv : ndarray of int, optional
        (b,) queries and keys of each sequence that take part, from its first; the others are not read. They set the
        mask's alignment. Rows of no sequence, and rows not used, get out 0 and `tail_lse`.
    len_q, len_kv : int, optional
        What dropout's ``word`` scheme numbers pairs by; None is the longest sequence of cu_seqlens.
    row_state : ndarray, optional
        (heads_q, total_q, 2), filled as by `forward`.
    empty_lse, tail_lse : float
        The lse of queries that see no key, and of rows that take part in nothing.
    along : Tangents, optional
        As of `forward`; 0 for what takes part in nothing.
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
    lse = np.full((heads_q, total_q), tail_lse, _real(q))
    out[...] = 0
    for x in (row_state, *(() if along is None else (along.out, along.lse))):
        if x is not None:
            x[...] = 0
    rules = Features(**features)
    longest = _longest(cu_seqlens_q, len_q), _longest(cu_seqlens_kv, len_kv)
    jobs, scores = [], 0
    for b, rows, keys in _sequences(cu_seqlens_q, cu_seqlens_kv, seqused_q, seqused_kv):
        q1, k1, v1 = q[None, rows], k[None, keys], v[None, keys]
        policies = rules.policies(q1.shape, k1.shape, first=b, longest=longest)
        of_one = q1, k1, v1, out[None, rows], lse[None, :, rows], policies
        if along is None:
            state = None if row_state is None else row_state[None, :, rows]
            jobs.append(loops.forward(*of_one, state, empty_lse))
        else:
            jobs.append(tangents.forward_along(_of_sequence(along, q1, k1, b, rows, keys), *of_one, empty_lse))
        scores += heads_q * q1.shape[1] * k1.shape[1]
    pool.run(chain.from_iterable(jobs), scores)
    return out, lse


def backward_varlen(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    cu_seqlens_q: np.ndarray,
    cu_seqlens_kv: np.ndarray,
    *,
    seqused_q: np.ndarray | None = None,
    seqused_kv: np.ndarray | None = None,
    len_q: int | None = None,
    len_kv: int | None = None,
    dlse: np.ndarray | None = None,
    row_state: np.ndarray | None = None,
    delta: np.ndarray | None = None,
    bias_grad: bool = False,
    captured_grad: bool = False,
    along: Tangents | None = None,
    **features: Any,
) -> Gradients:
    """Gradients of `forward_varlen`, or their tangents; rows and keys that take no part get 0, in `delta` too."""
    dq, dk, dv = (np.zeros(x.shape, x.dtype) for x in (q, k, v))
    if delta is not None:
        delta[...] = 0
    rules = Features(**features)
    sums = _Sums(rules, len(cu_seqlens_q) - 1, k.shape[-2], bias_grad, captured_grad, _real(q))
    longest = _longest(cu_seqlens_q, len_q), _longest(cu_seqlens_kv, len_kv)
    scores = 0
    for b, rows, keys in _sequences(cu_seqlens_q, cu_seqlens_kv, seqused_q, seqused_kv):
        q1, k1, v1 = q[None, rows], k[None, keys], v[None, keys]
        policies = rules.policies(q1.shape, k1.shape, first=b, longest=longest)
        lse1 = lse[None, :, rows]
        dlse1, state, delta1 = (None if x is None else x[None, :, rows] for x in (dlse, row_state, delta))
        grads = {"dq": dq[None, rows], "dk": dk[None, keys], "dv": dv[None, keys], **sums.of(b, 1)}
        grads["row_state"] = state
        of_one, dout1 = (lse1, dlse1, policies), dout[None, rows]
        if along is None:
            sums.add(b, loops.backward(dout1, q1, k1, v1, out[None, rows], *of_one, row_delta=delta1, **grads))
        else:
            along1 = _of_sequence(along, q1, k1, b, rows, keys)
            sums.add(b, tangents.backward_along(along1, dout1, q1, k1, v1, *of_one, **grads))
        scores += q.shape[-2] * q1.shape[1] * k1.shape[1]
    return sums.run(dq, dk, dv, scores=scores)


def forward_paged(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    table: np.ndarray,
    seqused_kv: np.ndarray | None = None,
    *,
    cu_seqlens_q: np.ndarray | None = None,
    cu_seqlens_kv: np.ndarray | None = None,
    seqused_q: np.ndarray | None = None,
    leftpad: np.ndarray | None = None,
    len_q: int | None = None,
    len_kv: int | None = None,
    out: np.ndarray | None = None,
    empty_lse: float = -np.inf,
    tail_lse: float = -np.inf,
    **features: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention over keys and values in the pages of a cache.

    Key j of sequence b is row ``j % page_size`` of page ``table[b, j // page_size]``. A cache without pages,
    (b, len, heads_kv, d), is one of b pages with ``table = arange(b)[:, None]``.

    Parameters
    ----------
    q : ndarray
        (b, len_q, heads_q, dim_qk), or (total_q, heads_q, dim_qk) with `cu_seqlens_q`.
    k, v : ndarray
        (num_pages, page_size, heads_kv, dim_qk) and (num_pages, page_size, heads_kv, dim_v), any page size and strides.
    table : ndarray of int
        (b, max_pages) page numbers; those behind a sequence's last page are not read.
    seqused_kv : ndarray of int
        (b,) keys of each sequence; None takes the differences of `cu_seqlens_kv`.
    leftpad : ndarray of int, optional
        (b,) how many of these, from the first, are none.

    Returns
    -------
    out, lse : ndarray
        As `forward` for dense queries and as `forward_varlen` for packed ones, whose other keywords are these.
    """
    packed, heads_q = cu_seqlens_q is not None, q.shape[-2]
    if seqused_kv is None:
        assert cu_seqlens_kv is not None
        seqused_kv = np.diff(cu_seqlens_kv)
    if out is None:
        out = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
    lse = np.full((heads_q, len(q)) if packed else (len(q), heads_q, q.shape[1]), tail_lse, _real(q))
    out[...] = 0
    rules = Features(**features)
    len_q = q.shape[1] if cu_seqlens_q is None else _longest(cu_seqlens_q, len_q)
    longest = len_q, int(seqused_kv.max(initial=0)) if len_kv is None else len_kv
    jobs, scores = [], 0
    for b, (pages, length) in enumerate(zip(table, seqused_kv.tolist(), strict=True)):
        begin, end = (0, q.shape[1]) if cu_seqlens_q is None else cu_seqlens_q[b : b + 2].tolist()
        rows = slice(begin, end if seqused_q is None else min(begin + int(seqused_q[b]), end))
        if rows.start == rows.stop:
            continue
        element = None if packed else slice(b, b + 1)
        first = 0 if leftpad is None else int(leftpad[b])
        length = max(min(length, k.shape[1] * len(pages)) - first, 0)
        q1, k1, v1 = q[element, rows], PagedRows(k, pages, length, first), PagedRows(v, pages, length, first)
        policies = rules.policies(q1.shape, k1.shape, first=b, longest=longest)
        jobs.append(loops.forward(q1, k1, v1, out[element, rows], lse[element, :, rows], policies, empty_lse=empty_lse))
        scores += heads_q * q1.shape[1] * length
    pool.run(chain.from_iterable(jobs), scores)
    return out, lse


class _Sums:
    """The gradients that sequences add to, and the jobs that do so."""

    def __init__(
        self, rules: Features, batch: int, heads_kv: int, bias_grad: bool, captured_grad: bool, real: np.dtype
    ) -> None:
        self._heads_kv, self._real = heads_kv, real
        self._captured = None
        if captured_grad and rules.score_mod is not None:
            read = zip(rules.score_mod.operands, rules.of_score_mod, strict=True)
            self._captured = CapturedSums({i: x for i, (operand, x) in enumerate(read) if operand.kind == "real"})
        self._dbias = np.zeros(rules.bias.shape, real) if bias_grad and rules.bias is not None else None
        self._dsink = None
        if rules.sink is not None:
            self._dsink = np.zeros((batch, heads_kv, len(rules.sink) // heads_kv), real)
        self._parts: dict[tuple[int, int], list[GradientJob]] = {}

    def of(self, first: int, batch: int) -> dict[str, Any]:
        """Views of what batch elements from `first` on add to, as `loops.backward` takes them."""
        dbias = None if self._dbias is None else grouped_pairs(self._dbias, self._heads_kv)
        # Sequences of different lengths that share a bias' gradient must be cut alike, to share whole parts of it.
        shared = dbias is not None and len(dbias) == 1
        if dbias is not None and not shared:
            dbias = dbias[first : first + batch]
        dsink = None if self._dsink is None else self._dsink[first : first + batch]
        return {"dbias": dbias, "dsink": dsink, "most_heads": 1 if shared else None}

    def add(self, first: int, jobs: Iterable[tuple[tuple[int, int], GradientJob]]) -> None:
        """Take in the jobs of batch elements from `first` on; they run in this order where they add to the same."""
        for (batch, head), job in jobs:
            if self._dbias is None:
                part = len(self._parts), 0
            else:
                part = 0 if self._dbias.ndim < 4 or len(self._dbias) == 1 else first + batch, head
            self._parts.setdefault(part, []).append(job)

    def run(self, dq: np.ndarray, dk: np.ndarray, dv: np.ndarray, scores: int) -> Gradients:
        """Run the jobs and return the gradients that they fill and add to."""
        parts = list(self._parts.values())
        if self._captured is None:
            runs = [partial(_in_order, jobs, None) for jobs in parts]
        else:
            shares = self._captured.parts(len(parts))
            runs = [partial(_in_order, list(chain.from_iterable(parts[which])), sums) for which, sums in shares]
        pool.run(runs, scores)
        with np.errstate(all="ignore"):
            dsink = None if self._dsink is None else self._dsink.sum(axis=0).ravel()
            dcaptured = None if self._captured is None else self._captured.totals(self._real)
        return Gradients(dq, dk, dv, self._dbias, dsink, dcaptured)


def _of_sequence(
    along: Tangents,
    q: np.ndarray,
    k: np.ndarray,
    first: int = 0,
    rows: slice | None = None,
    keys: slice | None = None,
) -> Tangents:
    """The tangents of dense q and k, or of the packed sequence of that number, as the loops take them."""
    rules = Features(band=Mask(), softmax_scale=1.0, bias=along.bias, sink=along.sink)
    scores, sink, _ = rules.policies(q.shape, k.shape, first=first)
    if rows is not None:
        along = along._replace(lse=None if along.lse is None else along.lse[None, :, rows])
        spans = {"q": rows, "k": keys, "v": keys, "out": rows}
        given = {name: x for name in spans if (x := getattr(along, name)) is not None}
        along = along._replace(**{name: x[None, spans[name]] for name, x in given.items()})
    return along._replace(bias=scores.bias, sink=sink)


def _in_order(jobs: Iterable[GradientJob], dcaptured: dict[int, np.ndarray] | None, scratch: Scratch) -> None:
    for job in jobs:
        job(scratch, dcaptured)


def _real(q: np.ndarray) -> np.dtype:
    """The dtype of scores, sums and lse."""
    dtype = dtypes.of(q.dtype)
    assert dtype is not None
    return dtype.accumulator


def _longest(cu_seqlens: np.ndarray, max_seqlen: int | None) -> int:
    """The length of the longest sequence, unless it is given."""
    return int(np.diff(cu_seqlens).max(initial=0)) if max_seqlen is None else max_seqlen


def _sequences(
    cu_seqlens_q: np.ndarray, cu_seqlens_kv: np.ndarray, seqused_q: np.ndarray | None, seqused_kv: np.ndarray | None
) -> Iterator[tuple[int, slice, slice]]:
    """Number, packed query rows in use and packed keys in use of every sequence that has queries."""
    spans_q, spans_k = _spans(cu_seqlens_q, seqused_q), _spans(cu_seqlens_kv, seqused_kv)
    for b, (rows, keys) in enumerate(zip(spans_q, spans_k, strict=True)):
        if rows.start < rows.stop:
            yield b, rows, keys


def _spans(cu_seqlens: np.ndarray, seqused: np.ndarray | None) -> list[slice]:
    """The rows in use of every packed sequence."""
    begin, end = cu_seqlens[:-1], cu_seqlens[1:]
    end = end if seqused is None else np.minimum(begin + seqused, end)
    return [slice(*span) for span in zip(begin.tolist(), end.tolist(), strict=True)]
