"""Attention prepared for one kind of arrays, for programs that repeat a call often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cuflash.api.cache import cache_call
from cuflash.api.keywords import WrittenMask, WrittenScore
from cuflash.arrays import Array, ArrayT
from cuflash.errors import REFUSALS, InvalidArgument, shorten
from cuflash.masks import Alignment
from cuflash.numbers import shown
from cuflash.ops import Arrays, BoundAttention, PreparedAttention, asked, new, with_mods

if TYPE_CHECKING:
    from cuflash.blocks import BlockMask

__all__ = ["BoundAttention", "PreparedAttention", "flash_attn_prepare"]


def flash_attn_prepare(
    q: ArrayT,
    k: ArrayT | None,
    v: ArrayT | None,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alignment: Alignment = "bottom-right",
    num_splits: int = 0,
    attn_mask: Array | None = None,
    attn_bias: Array | None = None,
    alibi_slopes: Array | None = None,
    sink: Array | None = None,
    score_mod: WrittenScore = None,
    mask_mod: WrittenMask = None,
    block_mask: BlockMask | None = None,
    out: ArrayT | None = None,
    cache: Sequence[ArrayT] | None = None,
    cache_seqlens: int | Array | None = None,
    cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None,
    block_table: Array | None = None,
    rotary_cos: Array | None = None,
    rotary_sin: Array | None = None,
    rotary_interleaved: bool = True,
) -> PreparedAttention[ArrayT]:
    """Check, plan and compile attention for arrays of one kind, and return the call that is left.

    It takes other arrays of the same shapes, strides, dtype and device. `flash_attn_func` does the same work only once,
    but looks up in every call which one it is, some microseconds that matter where kernels are short. With a `cache` it
    is `flash_attn_with_kvcache`.

    Parameters
    ----------
    q, k, v : array
        As for `flash_attn_func`, arrays of CuPy or NumPy or torch tensors; neither read nor kept. With a `cache`, k and
        v are like what every call appends to it; None if nothing is appended.
    softmax_scale, causal, window_size, softcap, alignment, num_splits
        As for `flash_attn_func`; with a `cache`, masks are aligned bottom-right.
    attn_mask, attn_bias, alibi_slopes, sink : array, optional
        As for `flash_attn_func`. Kept, and read anew in every call.
    score_mod, mask_mod : callable, optional
        As for `flash_attn_func` and, with a `cache`, `flash_attn_with_kvcache`. Traced once; arrays that they read are
        kept, and read anew in every call.
    block_mask : BlockMask, optional
        As for `flash_attn_func`, without a `cache`. Kept.
    out : array, (b, len_q, heads_q, dim_v), optional
        Like the array that every call will be given to write to; None if calls return new arrays. Not written.
    cache : (array, array), optional
        ``k_cache`` and ``v_cache`` of `flash_attn_with_kvcache`; kept, and what is appended to in every call.
    cache_seqlens, cache_batch_idx, cache_leftpad, block_table, rotary_cos, rotary_sin, rotary_interleaved
        As for `flash_attn_with_kvcache`, with a `cache` alone. Arrays are kept, and read anew in every call.

    Returns
    -------
    PreparedAttention
        ``call(q, k, v, out=None) -> (out, lse)``, where lse is the log-sum-exp; with a `cache` also
        ``call(q, k, v, cache_seqlens=n)`` where that is a number. It runs on the stream that is current when it is
        called and refuses arrays of another kind. ``call.bind(q, k, v)`` is the same for arrays that stay, which costs
        the host the launches alone.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        As `flash_attn_func`, and for arrays of JAX and other libraries.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> q = k = v = np.ones((1, 3, 2, 4), np.float32)
    >>> attend = cuflash.flash_attn_prepare(q, k, v, causal=True)
    >>> out, lse = attend(q, k, v)

    Layers that take turns with the same shapes::

        attend = cuflash.flash_attn_prepare(q, k, v, causal=True)
        for layer in layers:
            x, lse = attend(*layer.project(x))

    A token after the other, with lengths that count up on the GPU::

        attend = cuflash.flash_attn_prepare(q, k, v, cache=(k_cache, v_cache), cache_seqlens=lengths, causal=True)
        for layer in layers:
            x, lse = attend(*layer.project(x))
        lengths += 1
    """
    try:
        if cache is not None:
            if alignment != "bottom-right":
                raise InvalidArgument(
                    f"alignment is {shown(alignment)} and there is a cache; expected 'bottom-right', as a new query's "
                    "own key is among the last."
                )
            if not isinstance(cache, Sequence) or len(cache) != 2:
                raise InvalidArgument(f"cache is {shown(cache)}; expected a tuple (k_cache, v_cache).")
            k_cache, v_cache = cache
            options, arrays, cached = cache_call(
                q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad,
                block_table, softmax_scale, causal, window_size, softcap, rotary_interleaved, alibi_slopes, num_splits,
                attn_mask, attn_bias, sink, out,
            )  # fmt: skip
            if score_mod is not None or mask_mod is not None:
                options, arrays = with_mods(options, arrays, score_mod, mask_mod)
            if block_mask is not None:
                raise InvalidArgument(
                    "block_mask is given and there is a cache, of which as much is in use as every call says. "
                    "Pass causal, window_size or mask_mod."
                )
            return PreparedAttention(options, arrays, cached)
        of_cache = {
            "cache_seqlens": cache_seqlens, "cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad,
            "block_table": block_table, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin,
        }  # fmt: skip
        for name, value in of_cache.items():
            if value is not None:
                raise InvalidArgument(f"{name} is given but cache is not; pass cache=(k_cache, v_cache) too.")
        options = asked(
            softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap, alignment=alignment,
            num_splits=num_splits,
        )  # fmt: skip
        arrays = new(Arrays, q, k, v, attn_mask, attn_bias, alibi_slopes, sink, out=out)
        if score_mod is not None or mask_mod is not None or block_mask is not None:
            options, arrays = with_mods(options, arrays, score_mod, mask_mod, block_mask=block_mask)
        return PreparedAttention(options, arrays)
    except REFUSALS as error:
        shorten(error)
        raise
