"""Naive attention and its analytic gradients, straight from the formulas, to judge every backend by.

Independent of cuflash: plain NumPy arrays and plain arguments in, one whole (len_q, len_kv) score matrix a head inside.
`attention` computes in float64 throughout. `naive_in_dtype` does the same steps the way an unfused program would, with
every intermediate matrix rounded to the dtype of the inputs: its error says what the dtype can give (`assert_close`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

Array = np.ndarray


class Attention(NamedTuple):
    """Results in the layout of the inputs; the gradients are None unless `dout` was given."""

    out: Array
    lse: Array
    dq: Array | None = None
    dk: Array | None = None
    dv: Array | None = None


def attention(
    q: Array, k: Array, v: Array, dout: Array | None = None, dlse: Array | None = None, **options
) -> Attention:
    """Float64 attention of (b, s, h, d) arrays, or of packed (total, h, d) arrays when `cu_seqlens_q` is given.

    Options: causal, window=(left, right) with -1 for unbounded, alignment, softcap, scale (None: dim ** -0.5), mask
    (bool, broadcastable to (b, heads_q, len_q, len_kv)), cu_seqlens_q, cu_seqlens_k, seqused_k. With `dout`, also the
    gradients of sum(out * dout) + sum(lse * dlse).
    """
    return _attention(_Precision(np.float64, np.float64), q, k, v, dout, dlse, **options)


def naive_in_dtype(
    q: Array, k: Array, v: Array, dout: Array | None = None, dlse: Array | None = None, **options
) -> Attention:
    """`attention` in the dtype of `q`: sums in fp32 (fp64 for fp64), every matrix rounded to the dtype in between."""
    work = np.float64 if q.dtype == np.float64 else np.float32
    return _attention(_Precision(work, q.dtype), q, k, v, dout, dlse, **options)


def assert_close(actual: Array, exact: Array, naive: Array, name: str) -> None:
    """Check max|actual - exact| <= 2 max|naive - exact| + eps, after the places of inf, -inf and nan.

    eps is one unit in the last place of the largest value in the dtype of `actual`, for the final rounding, and 32
    units of fp32 (fp64 for fp64) relative to the larger of 1 and that value, for the sums inside.
    """
    assert actual.shape == exact.shape == naive.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    dtype = actual.dtype
    actual, exact, naive = (np.asarray(x, np.float64) for x in (actual, exact, naive))
    for kind in (np.isnan, np.isposinf, np.isneginf):
        different = np.argwhere(kind(actual) != kind(exact))
        if len(different):
            index = tuple(map(int, different[0]))
            raise AssertionError(
                f"{name}: {kind.__name__} differs at {len(different)} of {actual.size} places, "
                f"first {index}: got {actual[index]}, expected {exact[index]}"
            )
    if not np.isfinite(exact).any():
        return
    error, naive_error = _error(actual, exact), _error(naive, exact).max()
    largest = np.abs(exact[np.isfinite(exact)]).max()
    inside = np.float64 if dtype == np.float64 else np.float32
    eps = float(ml_dtypes.finfo(dtype).eps) * largest + 32 * float(np.finfo(inside).eps) * max(1.0, largest)
    allowed = 2 * naive_error + eps
    index = np.unravel_index(error.argmax(), error.shape)
    assert error[index] <= allowed, (
        f"{name}: worst at {tuple(map(int, index))}: got {actual[index]:.9g}, expected {exact[index]:.9g}; error "
        f"{error[index]:.3e} > allowed {allowed:.3e} = 2 * {naive_error:.3e} (naive {dtype}) + {eps:.3e}"
    )


def _error(x: Array, exact: Array) -> Array:
    """|x - exact|, and 0 where either is not finite."""
    error = np.zeros(exact.shape)
    finite = np.isfinite(x) & np.isfinite(exact)
    error[finite] = np.abs(x[finite] - exact[finite])
    return error


def assert_all_close(actual: Attention, exact: Attention, naive: Attention, name: str = "") -> None:
    """`assert_close` for every result that both `actual` and `exact` have; `exact` must have what `actual` has."""
    for field, a, e, n in zip(Attention._fields, actual, exact, naive, strict=True):
        if a is not None:
            assert_close(a, e, n, f"{name} {field}".strip())


class _Precision(NamedTuple):
    work: type  # products and sums
    store: np.dtype | type  # every matrix between them

    def round(self, x: Array) -> Array:
        return x.astype(self.store).astype(self.work)


def _attention(
    precision: _Precision,
    q: Array,
    k: Array,
    v: Array,
    dout: Array | None,
    dlse: Array | None,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    alignment: str = "bottom-right",
    softcap: float = 0.0,
    scale: float | None = None,
    mask: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    seqused_k: Array | None = None,
) -> Attention:
    q, k, v = (np.asarray(x, precision.work) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dense = cu_seqlens_q is None
    group = q.shape[-2] // k.shape[-2]
    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    lse = np.full((q.shape[0], q.shape[2], q.shape[1]) if dense else (q.shape[1], q.shape[0]), -np.inf)
    dq, dk, dv = (np.zeros(x.shape) for x in (q, k, v))

    for b in range(q.shape[0] if dense else len(cu_seqlens_q) - 1):
        if dense:
            rows, keys = (b, slice(0, q.shape[1])), (b, slice(0, k.shape[1]))
        else:
            stop = cu_seqlens_k[b + 1] if seqused_k is None else cu_seqlens_k[b] + seqused_k[b]
            rows, keys = (slice(cu_seqlens_q[b], cu_seqlens_q[b + 1]),), (slice(cu_seqlens_k[b], stop),)
        len_q, len_kv = q[rows].shape[0], k[keys].shape[0]
        band = _visible(len_q, len_kv, causal, window, alignment)
        for h in range(q.shape[-2]):
            keep = band if mask is None else band & np.broadcast_to(mask, (q.shape[0], q.shape[2], *band.shape))[b, h]
            at_q, at_kv = (*rows, h), (*keys, h // group)
            at_lse = (b, h) if dense else (h, *rows)
            head = _Head(precision, q[at_q], k[at_kv], v[at_kv], keep, scale, softcap)
            out[at_q], lse[at_lse] = head.out, head.lse
            if dout is not None:
                dlse_head = np.zeros(len_q) if dlse is None else dlse[at_lse]
                dq_head, dk_head, dv_head = head.gradients(dout[at_q].astype(precision.work), dlse_head)
                dq[at_q] = dq_head
                dk[at_kv] += dk_head
                dv[at_kv] += dv_head

    if dout is None:
        return Attention(precision.round(out), lse)
    return Attention(*(precision.round(x) if x is not lse else x for x in (out, lse, dq, dk, dv)))


def _visible(len_q: int, len_kv: int, causal: bool, window: tuple[int, int], alignment: str) -> Array:
    """(len_q, len_kv) booleans of the band, from its definition."""
    left, right = window
    if causal:
        right = 0
    i, j = np.arange(len_q)[:, None], np.arange(len_kv)[None, :]
    diagonal = i + (len_kv - len_q if alignment == "bottom-right" else 0)
    keep = np.ones((len_q, len_kv), bool)
    if left >= 0:
        keep &= j >= diagonal - left
    if right >= 0:
        keep &= j <= diagonal + right
    return keep


class _Head:
    """One head of one sequence: (len_q, d), (len_kv, d) and (len_kv, dv) matrices."""

    def __init__(
        self, precision: _Precision, q: Array, k: Array, v: Array, keep: Array, scale: float, softcap: float
    ) -> None:
        r: Callable[[Array], Array] = precision.round
        self.r, self.q, self.k, self.v, self.scale = r, q, k, v, scale
        scores = r(r(q @ k.T) * scale)
        self.slope = 1.0
        if softcap:
            tanh = r(np.tanh(r(scores / softcap)))
            scores = r(softcap * tanh)
            self.slope = 1 - tanh**2
        scores = np.where(keep, scores, -np.inf)
        empty = ~keep.any(axis=1)
        top = np.where(empty, 0, scores.max(axis=1, initial=-np.inf))[:, None]
        weights = np.exp(scores - top)
        total = weights.sum(axis=1, keepdims=True) + empty[:, None]
        self.p = r(weights / total)
        self.out = r(self.p @ v)
        self.lse = np.where(empty, -np.inf, (top + np.log(total))[:, 0])
        self.empty = empty

    def gradients(self, dout: Array, dlse: Array) -> tuple[Array, Array, Array]:
        """dq, dk, dv; d(out)/d(p) is v, d(lse)/d(score) is p, and softmax's Jacobian is diag(p) - p p^T."""
        r = self.r
        dp = r(dout @ self.v.T)
        delta = (dout * self.out).sum(axis=1) - np.where(self.empty, 0, dlse)
        ds = r(r(self.p * (dp - delta[:, None])) * self.slope)
        return r(r(ds @ self.k) * self.scale), r(r(ds.T @ self.q) * self.scale), r(self.p.T @ dout)
