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
    dbias: Array | None = None
    dsink: Array | None = None


def attention(
    q: Array, k: Array, v: Array, dout: Array | None = None, dlse: Array | None = None, **options
) -> Attention:
    """Float64 attention of (b, s, h, d) arrays, or of packed (total, h, d) arrays when `cu_seqlens_q` is given.

    Options: causal, window=(left, right) with -1 for unbounded, alignment, softcap, scale (None: dim ** -0.5), mask
    (bool) and bias, both broadcastable to (b, heads_q, len_q, len_kv), alibi_slopes (heads_q,) or (b, heads_q), sink
    (heads_q,), dropout_p with dropout_scheme ("byte" or "word"), dropout_unbiased and rng_state (seed, offset),
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, and max_seqlen_q and max_seqlen_k (None: from cu_seqlens), by
    which the word scheme numbers pairs. With `dout`, also the gradients of sum(out * dout) + sum(lse * dlse); dbias
    has the shape of the bias.
    """
    return _attention(_Precision(np.float64, np.float64), q, k, v, dout, dlse, **options)


def naive_in_dtype(
    q: Array, k: Array, v: Array, dout: Array | None = None, dlse: Array | None = None, **options
) -> Attention:
    """`attention` in the dtype of `q`: sums in fp32 (fp64 for fp64), every matrix rounded to the dtype in between."""
    work = np.float64 if q.dtype == np.float64 else np.float32
    return _attention(_Precision(work, q.dtype), q, k, v, dout, dlse, **options)


def naive_in_tf32(
    q: Array, k: Array, v: Array, dout: Array | None = None, dlse: Array | None = None, **options
) -> Attention:
    """`naive_in_dtype` of fp32, every matrix that is multiplied and every one in between rounded as TF32 has it."""
    rounded = (None if x is None else to_tf32(np.asarray(x, np.float32)) for x in (q, k, v, dout))
    q, k, v, dout = rounded
    return _attention(_Tf32(np.float32, np.float32), q, k, v, dout, dlse, **options)


def to_tf32(x: Array) -> Array:
    """The nearest numbers of 11 significant bits; of two the even one."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    return np.where(np.isfinite(x), np.ldexp(np.rint(mantissa * 2048) / 2048, exponent), x).astype(np.float32)


class Tangents(NamedTuple):
    """Results and how they change."""

    out: Array
    lse: Array
    tangent_out: Array
    tangent_lse: Array


def jvp(q: Array, k: Array, v: Array, changes: dict[str, Array], **options) -> Tangents:
    """`attention` and its derivative along `changes`: of any of q, k, v, bias and sink, each in its shape."""
    tangents: list[Array] = []
    results = _attention(_Precision(np.float64, np.float64), q, k, v, None, None, (changes, tangents), **options)
    return Tangents(results.out, results.lse, *tangents)


def naive_jvp_in_dtype(q: Array, k: Array, v: Array, changes: dict[str, Array], **options) -> Tangents:
    """`jvp` as `naive_in_dtype` computes: every matrix rounded to the dtype of `q`."""
    tangents: list[Array] = []
    work = np.float64 if q.dtype == np.float64 else np.float32
    results = _attention(_Precision(work, q.dtype), q, k, v, None, None, (changes, tangents), **options)
    return Tangents(results.out, results.lse, *tangents)


def assert_close(actual: Array, exact: Array, naive: Array, name: str, dtype: np.dtype | None = None) -> None:
    """Check max|actual - exact| <= 2 max|naive - exact| + eps, after the places of inf, -inf and nan.

    eps is one unit in the last place of the largest value in the dtype of `actual`, for the final rounding, and 32
    units of fp32 (fp64 for fp64) relative to the larger of 1 and that value, for the sums inside. Sums whose errors are
    so few that chance decides between them and the naive ones are given the `dtype` of their addends, if coarser.
    """
    assert actual.shape == exact.shape == naive.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    ulp = max(float(ml_dtypes.finfo(kind).eps) for kind in (actual.dtype, dtype or actual.dtype))
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
    eps = ulp * largest + 32 * float(np.finfo(inside).eps) * max(1.0, largest)
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


class _Tf32(_Precision):
    def round(self, x: Array) -> Array:
        return to_tf32(x)


def _attention(
    precision: _Precision,
    q: Array,
    k: Array,
    v: Array,
    dout: Array | None,
    dlse: Array | None,
    along: tuple[dict[str, Array], list[Array]] | None = None,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    alignment: str = "bottom-right",
    softcap: float = 0.0,
    scale: float | None = None,
    mask: Array | None = None,
    alibi_slopes: Array | None = None,
    bias: Array | None = None,
    sink: Array | None = None,
    dropout_p: float = 0.0,
    dropout_scheme: str = "byte",
    dropout_unbiased: bool = False,
    rng_state: tuple[int, int] = (0, 0),
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    seqused_q: Array | None = None,
    seqused_k: Array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Attention:
    q, k, v = (np.asarray(x, precision.work) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dense = cu_seqlens_q is None
    heads_q, group = q.shape[-2], q.shape[-2] // k.shape[-2]
    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    lse = np.full((q.shape[0], q.shape[2], q.shape[1]) if dense else (q.shape[1], q.shape[0]), -np.inf)
    dq, dk, dv = (np.zeros(x.shape) for x in (q, k, v))
    dbias = None if bias is None else np.zeros(bias.shape)
    dsink = None if sink is None else np.zeros(sink.shape)
    tangent_out, tangent_lse = np.zeros(out.shape), np.zeros(lse.shape)
    if dense:
        max_q, max_kv = q.shape[1], k.shape[1]
    else:
        max_q, max_kv = (
            np.diff(starts).max(initial=0) if longest is None else longest
            for starts, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k))
        )

    for b in range(q.shape[0] if dense else len(cu_seqlens_q) - 1):
        if dense:
            rows, keys = (b, slice(0, q.shape[1])), (b, slice(0, k.shape[1]))
        else:
            stop_q = cu_seqlens_q[b + 1] if seqused_q is None else cu_seqlens_q[b] + seqused_q[b]
            stop = cu_seqlens_k[b + 1] if seqused_k is None else cu_seqlens_k[b] + seqused_k[b]
            rows, keys = (slice(cu_seqlens_q[b], stop_q),), (slice(cu_seqlens_k[b], stop),)
        len_q, len_kv = q[rows].shape[0], k[keys].shape[0]
        band = _visible(len_q, len_kv, causal, window, alignment)
        for h in range(heads_q):
            at_q, at_kv = (*rows, h), (*keys, h // group)
            at_lse = (b, h) if dense else (h, *rows)
            keep = band if mask is None else band & _of_head(mask, b, h, len_q, len_kv)
            terms = []
            if alibi_slopes is not None:
                slope = alibi_slopes[h] if alibi_slopes.ndim == 1 else alibi_slopes[b, h]
                terms.append(-slope * _distance(len_q, len_kv, alignment))
            if bias is not None:
                terms.append(_of_head(bias, b, h, len_q, len_kv))
            dropped = None
            if dropout_p:
                grid = b, h, heads_q, np.arange(len_q)[:, None], np.arange(len_kv)[None, :]
                if dropout_scheme == "byte":
                    kept = flash_keep(*rng_state, dropout_p, *grid)
                else:
                    kept = word_uniform(*rng_state, *grid, len_kv, max_q * max_kv) > np.float32(dropout_p)
                dropped = kept * keep_scale(dropout_p, dropout_scheme, dropout_unbiased)
            head = _Head(
                precision, q[at_q], k[at_kv], v[at_kv], keep, scale, softcap, terms, None if sink is None else sink[h],
                dropped,
            )  # fmt: skip
            out[at_q], lse[at_lse] = head.out, head.lse
            if along is not None:
                zeros = {"q": q, "k": k, "v": v, "bias": np.zeros((1, 1)) if bias is None else bias, "sink": sink}
                moved = {name: along[0].get(name, None if x is None else np.zeros_like(x)) for name, x in zeros.items()}
                tangent_out[at_q], tangent_lse[at_lse] = head.tangents(
                    *(moved[name][at].astype(precision.work) for name, at in (("q", at_q), ("k", at_kv), ("v", at_kv))),
                    _of_head(moved["bias"], b, h, len_q, len_kv).astype(precision.work),
                    0.0 if sink is None else moved["sink"][h],
                )
            if dout is not None:
                dlse_head = np.zeros(len_q) if dlse is None else dlse[at_lse]
                dq_head, dk_head, dv_head, ds, dsink_head = head.gradients(dout[at_q].astype(precision.work), dlse_head)
                dq[at_q] = dq_head
                dk[at_kv] += dk_head
                dv[at_kv] += dv_head
                if bias is not None:
                    _add_to_head(dbias, b, h, ds)
                if sink is not None:
                    dsink[h] += dsink_head

    if along is not None:
        along[1][:] = precision.round(tangent_out), tangent_lse
    if dout is None:
        return Attention(precision.round(out), lse)
    r = precision.round
    return Attention(r(out), lse, r(dq), r(dk), r(dv), dbias, dsink)


def _of_head(x: Array, b: int, h: int, len_q: int, len_kv: int) -> Array:
    """The (len_q, len_kv) part of what broadcasts to (batch, heads, longest len_q, longest len_kv)."""
    x = x.reshape((1,) * (4 - x.ndim) + x.shape)
    x = x[b if x.shape[0] > 1 else 0, h if x.shape[1] > 1 else 0]
    x = x[:len_q] if x.shape[0] > 1 else x
    x = x[:, :len_kv] if x.shape[1] > 1 else x
    return np.broadcast_to(x, (len_q, len_kv))


def _add_to_head(total: Array, b: int, h: int, x: Array) -> None:
    """The transpose of `_of_head`: add x where `_of_head` reads it, to a contiguous total."""
    total = total.reshape((1,) * (4 - total.ndim) + total.shape)
    total = total[b if total.shape[0] > 1 else 0, h if total.shape[1] > 1 else 0]
    x = x if total.shape[0] > 1 else x.sum(axis=0, keepdims=True)
    x = x if total.shape[1] > 1 else x.sum(axis=1, keepdims=True)
    total[: x.shape[0], : x.shape[1]] += x


def _visible(len_q: int, len_kv: int, causal: bool, window: tuple[int, int], alignment: str) -> Array:
    """(len_q, len_kv) booleans of the band, from its definition."""
    left, right = window
    if causal:
        right = 0
    i, j = np.arange(len_q)[:, None], np.arange(len_kv)[None, :]
    diagonal = i + _offset(len_q, len_kv, alignment)
    keep = np.ones((len_q, len_kv), bool)
    if left >= 0:
        keep &= j >= diagonal - left
    if right >= 0:
        keep &= j <= diagonal + right
    return keep


def _offset(len_q: int, len_kv: int, alignment: str) -> int:
    return len_kv - len_q if alignment == "bottom-right" else 0


def _distance(len_q: int, len_kv: int, alignment: str) -> Array:
    """(len_q, len_kv) numbers of keys between each key and the query's diagonal."""
    return np.abs(np.subtract.outer(np.arange(len_q) + _offset(len_q, len_kv, alignment), np.arange(len_kv)))


def philox(counter: tuple[Array, ...], key: tuple[int, int], rounds: int) -> tuple[Array, ...]:
    """Philox4x32 from its definition, for arrays of counters: four arrays of 32-bit words, held in 64 bits."""
    c = [np.asarray(x, np.uint64) for x in counter]
    k = [np.uint64(x) for x in key]
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for i in range(rounds):
        if i:
            k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> half) ^ c[1] ^ k[0], b & low, (a >> half) ^ c[3] ^ k[1], a & low]
    return tuple(c)


def _key(seed: int) -> tuple[int, int]:
    return seed % 2**32, seed // 2**32


def flash_keep(seed: int, offset: int, p: float, b: int, h: int, heads: int, i: Array, j: Array) -> Array:
    """What the byte scheme keeps of rows i and keys j, one call of Philox for every element."""
    r, c = i % 16, j % 32
    lane = 4 * (r % 8) + (c % 8) // 2
    byte = 8 * (c // 16) + 4 * ((c // 8) % 2) + 2 * (r // 8) + c % 2
    counter = lane.astype(np.uint64) + np.uint64((offset + 32 * (b * heads + h)) % 2**64)
    low, high = counter & np.uint64(2**32 - 1), counter >> np.uint64(32)
    words = philox((low, high, i // 16, j // 32), _key(seed), 7)
    word = np.choose(byte // 4, [x.astype(np.int64) for x in words])
    return (word >> 8 * (byte % 4)) & 255 <= _threshold(p)


def word_uniform(
    seed: int, offset: int, b: int, h: int, heads: int, i: Array, j: Array, len_kv: int, plane: int
) -> Array:
    """The word scheme's number in (0, 1] of rows i and keys j."""
    n = (i * len_kv + j).astype(np.uint64) + np.uint64((offset + int(b * heads + h) * int(plane)) % 2**64)
    call = n // np.uint64(4)
    words = philox((call % np.uint64(2**32), call // np.uint64(2**32), 0, 0), _key(seed), 10)
    word = np.choose((n % np.uint64(4)).astype(np.int64), [x.astype(np.int64) for x in words])
    # Twice rounded: to fp32, and after the fused multiply-add, whose product is exact.
    exact = word.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33
    return exact.astype(np.float32)


def keep_scale(p: float, scheme: str, unbiased: bool) -> float:
    """What kept probabilities are multiplied by."""
    return 256 / (_threshold(p) + 1) if unbiased and scheme == "byte" else 1 / (1 - p)


def _threshold(p: float) -> int:
    return int(np.floor(np.float64(np.float32(1) - np.float32(p)) * 255))


class _Head:
    """One head of one sequence: (len_q, d), (len_kv, d) and (len_kv, dv) matrices.

    `terms` are added to the scores one by one; `dropped` is what dropout multiplies probabilities by.
    """

    def __init__(
        self,
        precision: _Precision,
        q: Array,
        k: Array,
        v: Array,
        keep: Array,
        scale: float,
        softcap: float,
        terms: list[Array],
        sink: float | None,
        dropped: Array | None,
    ) -> None:
        r: Callable[[Array], Array] = precision.round
        self.r, self.q, self.k, self.v, self.scale = r, q, k, v, scale
        scores = r(r(q @ k.T) * scale)
        self.slope = 1.0
        if softcap:
            tanh = r(np.tanh(r(scores / softcap)))
            scores = r(softcap * tanh)
            self.slope = 1 - tanh**2
        for term in terms:
            scores = r(scores + r(np.asarray(term)))
        scores = np.where(keep, scores, -np.inf)
        # The sink is one more key, without a value.
        logits = scores if sink is None else np.column_stack([scores, np.full(len(q), sink, scores.dtype)])
        self.empty = (logits == -np.inf).all(axis=1)
        top = np.where(self.empty, 0, logits.max(axis=1, initial=-np.inf))[:, None]
        weights = np.exp(logits - top)
        total = weights.sum(axis=1, keepdims=True) + self.empty[:, None]
        p = r(weights / total)
        self.p, self.p_sink = p[:, : len(k)], p[:, len(k) :]
        self.dropped = 1.0 if dropped is None else dropped.astype(precision.work)
        self.p_kept = r(self.p * self.dropped)
        self.out = r(self.p_kept @ v)
        self.lse = np.where(self.empty, -np.inf, (top + np.log(total))[:, 0])

    def tangents(self, dq: Array, dk: Array, dv: Array, dbias: Array, dsink: float) -> tuple[Array, Array]:
        """How out and lse change; hidden pairs have no part in it, whatever dbias has there."""
        r = self.r
        ds = r(r(r(r(dq @ self.k.T) + r(self.q @ dk.T)) * self.scale) * self.slope)
        ds = np.where(self.p > 0, r(ds + dbias), 0)
        lse = (self.p * ds).sum(axis=1) + (self.p_sink * dsink).sum(axis=1)
        dp = r(r(self.p * (ds - lse[:, None])) * self.dropped)
        return r(r(dp @ self.v) + r(self.p_kept @ dv)), lse

    def gradients(self, dout: Array, dlse: Array) -> tuple[Array, Array, Array, Array, float]:
        """dq, dk, dv, dscores and dsink; d(lse)/d(score) is p, and softmax's Jacobian is diag(p) - p p^T."""
        r = self.r
        dp = r(r(dout @ self.v.T) * self.dropped)
        delta = ((dout * self.out).sum(axis=1) - np.where(self.empty, 0, dlse))[:, None]
        ds = r(self.p * (dp - delta))
        dx = r(ds * self.slope)
        dsink = -(self.p_sink * delta).sum()
        return r(r(dx @ self.k) * self.scale), r(r(dx.T @ self.q) * self.scale), r(self.p_kept.T @ dout), ds, dsink
