"""Attention of new queries over a cache of keys and values, as language models decode."""

from __future__ import annotations

from typing import Any, Literal, overload

from cuflash import ops
from cuflash.api.keywords import WrittenMask, WrittenScore
from cuflash.arrays import Array, ArrayT
from cuflash.errors import REFUSALS, InvalidArgument, shorten
from cuflash.numbers import flag, is_array
from cuflash.ops import Arrays, Options, asked, new, with_mods


@overload
def flash_attn_with_kvcache(
    q: ArrayT, k_cache: ArrayT, v_cache: ArrayT, k: ArrayT | None = ..., v: ArrayT | None = ...,
    rotary_cos: Array | None = ..., rotary_sin: Array | None = ..., cache_seqlens: int | Array | None = ...,
    cache_batch_idx: Array | None = ..., cache_leftpad: Array | None = ..., block_table: Array | None = ...,
    softmax_scale: float | None = ..., causal: bool = ..., window_size: tuple[int, int] = ..., softcap: float = ...,
    rotary_interleaved: bool = ..., alibi_slopes: Array | None = ..., num_splits: int = ...,
    return_softmax_lse: Literal[False] = ..., *, attn_mask: Array | None = ..., attn_bias: Array | None = ...,
    sink: Array | None = ..., score_mod: WrittenScore = ..., mask_mod: WrittenMask = ..., out: ArrayT | None = ...,
) -> ArrayT: ...  # fmt: skip
@overload
def flash_attn_with_kvcache(
    q: ArrayT, k_cache: ArrayT, v_cache: ArrayT, k: ArrayT | None = ..., v: ArrayT | None = ...,
    rotary_cos: Array | None = ..., rotary_sin: Array | None = ..., cache_seqlens: int | Array | None = ...,
    cache_batch_idx: Array | None = ..., cache_leftpad: Array | None = ..., block_table: Array | None = ...,
    softmax_scale: float | None = ..., causal: bool = ..., window_size: tuple[int, int] = ..., softcap: float = ...,
    rotary_interleaved: bool = ..., alibi_slopes: Array | None = ..., num_splits: int = ..., *,
    return_softmax_lse: Literal[True], attn_mask: Array | None = ..., attn_bias: Array | None = ...,
    sink: Array | None = ..., score_mod: WrittenScore = ..., mask_mod: WrittenMask = ..., out: ArrayT | None = ...,
) -> tuple[ArrayT, Array]: ...  # fmt: skip
@overload
def flash_attn_with_kvcache(
    q: ArrayT, k_cache: ArrayT, v_cache: ArrayT, k: ArrayT | None = ..., v: ArrayT | None = ...,
    rotary_cos: Array | None = ..., rotary_sin: Array | None = ..., cache_seqlens: int | Array | None = ...,
    cache_batch_idx: Array | None = ..., cache_leftpad: Array | None = ..., block_table: Array | None = ...,
    softmax_scale: float | None = ..., causal: bool = ..., window_size: tuple[int, int] = ..., softcap: float = ...,
    rotary_interleaved: bool = ..., alibi_slopes: Array | None = ..., num_splits: int = ...,
    return_softmax_lse: bool = ..., *, attn_mask: Array | None = ..., attn_bias: Array | None = ...,
    sink: Array | None = ..., score_mod: WrittenScore = ..., mask_mod: WrittenMask = ..., out: ArrayT | None = ...,
) -> ArrayT | tuple[ArrayT, Array]: ...  # fmt: skip
def flash_attn_with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k: Array | None = None,
    v: Array | None = None,
    rotary_cos: Array | None = None,
    rotary_sin: Array | None = None,
    cache_seqlens: int | Array | None = None,
    cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None,
    block_table: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Array | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    attn_mask: Array | None = None,
    attn_bias: Array | None = None,
    sink: Array | None = None,
    score_mod: WrittenScore = None,
    mask_mod: WrittenMask = None,
    out: Array | None = None,
) -> Array | tuple[Array, Array]:
    """Attention of new queries over a cache of keys and values, to which new ones may be appended in place.

    The keys of sequence ``b`` are rows ``cache_leftpad[b]`` to ``cache_seqlens[b] + len_new`` of the cache, the last
    ``len_new`` of which are `k` and `v` of this call. Masks are aligned to the last of them, as in `flash_attn_func`.
    Lengths in arrays stay on the GPU: a call does not wait for it, and a captured graph goes on to be right when they
    change. Rows of the cache that no sequence uses are not read, whatever they hold.

    Parameters
    ----------
    q : array, (b, len_q, heads_q, dim_qk)
        Queries, as for `flash_attn_func`.
    k_cache : array, (b_cache, len_cache, heads_kv, dim_qk)
        Keys; (num_pages, page_size, heads_kv, dim_qk) with `block_table`, pages of any size. Written if `k` is given.
    v_cache : array, (b_cache, len_cache, heads_kv, dim_v)
        Values; (num_pages, page_size, heads_kv, dim_v) with `block_table`.
    k, v : array, (b, len_new, heads_kv, dim_qk) and (b, len_new, heads_kv, dim_v), optional
        Keys and values that are written behind those of each sequence, before it attends. `cache_seqlens` is needed
        with them, and stays as it is: add ``len_new`` for the next call. Rows without room on a GPU are not written.
    rotary_cos, rotary_sin : array, (rows, rotary_dim / 2), optional
        Cosines and sines of the angles by which the first `rotary_dim` columns of `k` and q are turned, in their dtype
        or float32, a row for each position in the cache. Position ``cache_seqlens[b] + i`` is that of new key ``i``,
        and of query ``i`` if `causal` or a window is asked for; else all queries are at ``cache_seqlens[b]``. Only with
        `k`. q itself stays as it is.
    cache_seqlens : int or array of int32, (b,), optional
        Rows of the cache in use before the call, left padding included; all rows by default.
    cache_batch_idx : array of int32, (b,), optional
        Which batch element of the cache holds a sequence; ``arange(b)`` by default. Where two sequences share one and
        both append to it, either may win. Not with `block_table`.
    cache_leftpad : array of int32, (b,), optional
        The row of the cache at which a sequence begins; 0 by default.
    block_table : array of int32, (b, max_pages), optional
        Row ``r`` of sequence ``b`` is row ``r % page_size`` of page ``block_table[b, r // page_size]``. Pages may be
        shared, and numbers of pages behind the rows in use are not read.
    softmax_scale, causal, window_size, softcap, alibi_slopes, num_splits
        As for `flash_attn_func`.
    rotary_interleaved : bool
        Turn columns ``2 i`` and ``2 i + 1`` together, as GPT-J does; else ``i`` and ``i + rotary_dim / 2``, as GPT-NeoX
        and Llama do.
    return_softmax_lse : bool
        Also return the log-sum-exp.
    attn_mask, attn_bias : array, optional
        As for `flash_attn_func`, of the shape (b, heads_q, len_q, rows): there are as many columns as a sequence has
        room for in the cache, and column 0 is its first key, behind the left padding.
    sink : array of float32, (heads_q,), optional
        As for `flash_attn_func`.
    score_mod, mask_mod : callable, optional
        As for `flash_attn_func`: ``q`` counts from the first of the new queries, and ``k`` from a sequence's first key,
        behind the left padding. An array (b,) of their distances, which a function reads, tells the two apart.
    out : array, (b, len_q, heads_q, dim_v), optional
        As for `flash_attn_func`.

    Returns
    -------
    out : array, (b, len_q, heads_q, dim_v)
        In the dtype of q.
    softmax_lse : array, (b, heads_q, len_q)
        With `return_softmax_lse`: the log-sum-exp, in float32 (float64 for float64 tensors).

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        As `flash_attn_func`. Values of `cache_seqlens` and of the like are checked where they are in host memory.

    Notes
    -----
    Appending and turning is one kernel before attention. Arrays of JAX and other libraries that do not let theirs be
    written are read, and cannot be appended to.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> k_cache, v_cache = np.zeros((2, 1, 16, 2, 8), np.float32)
    >>> q, k, v = np.ones((3, 1, 1, 2, 8), np.float32)
    >>> out = cuflash.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=3, causal=True)
    >>> k_cache[0, 2:5, 0, 0]
    array([0., 1., 0.], dtype=float32)
    """
    try:
        options, arrays, cached = cache_call(
            q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad,
            block_table, softmax_scale, causal, window_size, softcap, rotary_interleaved, alibi_slopes, num_splits,
            attn_mask, attn_bias, sink, out,
        )  # fmt: skip
        if score_mod is not None or mask_mod is not None:
            options, arrays = with_mods(options, arrays, score_mod, mask_mod)
        results = ops.forward(options, arrays, None, cached)
        return (results[0], results[1]) if flag("return_softmax_lse", return_softmax_lse) else results[0]
    except REFUSALS as error:
        shorten(error)
        raise


def cache_call(
    q: Array, k_cache: Array, v_cache: Array, k: Array | None, v: Array | None, rotary_cos: Array | None,
    rotary_sin: Array | None, cache_seqlens: int | Array | None, cache_batch_idx: Array | None,
    cache_leftpad: Array | None, block_table: Array | None, softmax_scale: float | None, causal: bool,
    window_size: tuple[int, int], softcap: float, rotary_interleaved: bool, alibi_slopes: Array | None,
    num_splits: int, attn_mask: Array | None, attn_bias: Array | None, sink: Array | None, out: Array | None,
) -> tuple[Options, Arrays, int | None]:  # fmt: skip
    """The options, the arrays, and how many rows are in use of every sequence where that is a number."""
    if cache_seqlens is None and k is not None:
        raise InvalidArgument(
            "k is given but cache_seqlens is None; pass how many rows of the cache are in use, behind which k goes."
        )
    options = asked(
        softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap, num_splits=num_splits,
        vocabulary="kvcache", cache=True, rotary_interleaved=rotary_interleaved,
    )  # fmt: skip
    cached: Any = None
    if cache_seqlens is not None and not (is_array(cache_seqlens) and len(cache_seqlens.shape)):
        cached, cache_seqlens = cache_seqlens, None
    arrays = new(
        Arrays, q, k_cache, v_cache, attn_mask, attn_bias, alibi_slopes, sink,
        seqused_kv=cache_seqlens, table=block_table, k_new=k, v_new=v, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
        leftpad=cache_leftpad, cache_batch=cache_batch_idx, out=out,
    )  # fmt: skip
    return options, arrays, cached
