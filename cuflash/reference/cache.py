"""Attention over a cache of keys and values, which a call may add to first."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuflash import dtypes
from cuflash.problem import Rotary
from cuflash.reference.attention import forward_paged


def forward_cache(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    seqused_kv: np.ndarray,
    *,
    table: np.ndarray | None = None,
    leftpad: np.ndarray | None = None,
    cache_batch: np.ndarray | None = None,
    k_new: np.ndarray | None = None,
    v_new: np.ndarray | None = None,
    rotary_cos: np.ndarray | None = None,
    rotary_sin: np.ndarray | None = None,
    rotary: Rotary | None = None,
    **others: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of dense queries over a cache.

    Parameters
    ----------
    q : ndarray
        (b, len_q, heads_q, dim_qk).
    k, v : ndarray
        (b_cache, len_cache, heads_kv, dim), or (num_pages, page_size, heads_kv, dim) with a `table`; written where keys
        are appended.
    seqused_kv : ndarray of int
        (b,) rows of the cache that each sequence uses before the call, left padding included.
    table : ndarray of int, optional
        (b, max_pages), as `forward_paged` has it.
    leftpad : ndarray of int, optional
        (b,) rows before a sequence's first key.
    cache_batch : ndarray of int, optional
        (b,) batch element of the cache that holds a sequence; its own number by default.
    k_new, v_new : ndarray, optional
        (b, n, heads_kv, dim), which become rows ``seqused_kv`` to ``seqused_kv + n``.
    rotary_cos, rotary_sin : ndarray, optional
        (rows, rotary_dim / 2): what keys are turned by before they are appended, and queries before they attend.
    rotary : Rotary, optional
        How.
    **others
        As `forward_paged` takes them.

    Returns
    -------
    out, lse : ndarray
        As `forward`.
    """
    batch, used = len(q), seqused_kv.astype(np.int64)
    if table is None:  # a cache without pages is one of large ones
        table = (np.arange(batch) if cache_batch is None else cache_batch)[:, None]
    if k_new is not None and v_new is not None:
        positions = used[:, None] + np.arange(k_new.shape[1])
        if rotary is not None and rotary_cos is not None and rotary_sin is not None:
            k_new = turned(k_new, rotary_cos[positions], rotary_sin[positions], rotary)
            of_queries = used[:, None] + (0 if rotary.together else 1) * np.arange(q.shape[1])
            q = turned(q, rotary_cos[of_queries], rotary_sin[of_queries], rotary)
        page, row = np.divmod(positions, k.shape[1])
        pages = np.take_along_axis(table, page, axis=1)
        k[pages, row], v[pages, row] = k_new, v_new
        used = used + k_new.shape[1]
    return forward_paged(q, k, v, table, used, leftpad=leftpad, **others)


def turned(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, rotary: Rotary) -> np.ndarray:
    """Rows (b, n, heads, dim) whose first columns are turned pair by pair, by the (b, n, dim / 2) cosines and sines."""
    dtype = dtypes.of(x.dtype)
    assert dtype is not None
    real = dtype.accumulator
    a, b = _pairs(x.astype(real), rotary)
    cos, sin = (angle.astype(real)[:, :, None] for angle in (cos, sin))
    result = x.copy()
    with np.errstate(all="ignore"):
        for pairs, values in zip(_pairs(result, rotary), (a * cos - b * sin, b * cos + a * sin), strict=True):
            pairs[...] = values
    return result


def _pairs(x: np.ndarray, rotary: Rotary) -> tuple[np.ndarray, np.ndarray]:
    """Views of the first and of the second number of every pair."""
    if rotary.interleaved:
        return x[..., : rotary.dim : 2], x[..., 1 : rotary.dim : 2]
    return x[..., : rotary.dim // 2], x[..., rotary.dim // 2 : rotary.dim]
