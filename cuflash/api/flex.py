"""Attention with scores and masks that are written as functions, by the name and arguments of PyTorch's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from cuflash import ops
from cuflash.api.keywords import WrittenMask, WrittenScore
from cuflash.arrays import Array, ArrayT
from cuflash.errors import REFUSALS, shorten
from cuflash.numbers import flag
from cuflash.ops import Arrays, asked, new, with_mods

if TYPE_CHECKING:
    from cuflash.blocks import BlockMask


@overload
def flex_attention(
    query: ArrayT, key: ArrayT, value: ArrayT, score_mod: WrittenScore = ..., block_mask: BlockMask | None = ...,
    scale: float | None = ..., enable_gqa: bool = ..., return_lse: Literal[False] = ..., *,
    mask_mod: WrittenMask = ..., out: Array | None = ...,
) -> ArrayT: ...  # fmt: skip
@overload
def flex_attention(
    query: ArrayT, key: ArrayT, value: ArrayT, score_mod: WrittenScore = ..., block_mask: BlockMask | None = ...,
    scale: float | None = ..., enable_gqa: bool = ..., *, return_lse: Literal[True],
    mask_mod: WrittenMask = ..., out: Array | None = ...,
) -> tuple[ArrayT, Array]: ...  # fmt: skip
@overload
def flex_attention(
    query: ArrayT, key: ArrayT, value: ArrayT, score_mod: WrittenScore = ..., block_mask: BlockMask | None = ...,
    scale: float | None = ..., enable_gqa: bool = ..., return_lse: bool = ..., *,
    mask_mod: WrittenMask = ..., out: Array | None = ...,
) -> ArrayT | tuple[ArrayT, Array]: ...  # fmt: skip
def flex_attention(
    query: Array,
    key: Array,
    value: Array,
    score_mod: WrittenScore = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    *,
    mask_mod: WrittenMask = None,
    out: Array | None = None,
) -> Array | tuple[Array, Array]:
    """Exact attention of (b, h, s, d) tensors with a score and a mask that are written as Python functions.

    It is ``softmax(score_mod(scale * query @ key.T))`` over the keys that `block_mask` and `mask_mod` show, times the
    values. PyTorch's ``flex_attention`` differs: its functions call those of torch, where these here call those of
    `cuflash.mods`, its block masks are torch's own, and it takes no function as a mask. What a function reads may hold
    other numbers in every call, and a function may be made anew: those that do the same are one.

    Parameters
    ----------
    query : array, (b, heads_q, len_q, dim_qk)
        In float16, bfloat16, float32 or float64. The last dimension of every tensor must be contiguous; the other
        strides are free.
    key : array, (b, heads_kv, len_kv, dim_qk)
        Keys.
    value : array, (b, heads_kv, len_kv, dim_v)
        Values.
    score_mod : callable, ``(score, b, h, q, k) -> score``, optional
        As for `flash_attn_func`. Tensors of torch that it reads have gradients; for those of NumPy arrays call
        `flash_attn_vjp` with ``captured_grad=True``.
    block_mask : BlockMask, optional
        Which blocks of scores hold a pair that is seen, from `create_block_mask`; others are not visited. A query that
        sees no key has output 0 and log-sum-exp -inf.
    scale : float, optional
        Factor of ``query @ key.T``, of any sign; ``dim_qk ** -0.5`` by default.
    enable_gqa : bool
        Let heads_q be a multiple of heads_kv; query head ``h`` then uses key/value head ``h // (heads_q // heads_kv)``.
    return_lse : bool
        Also return the log-sum-exp.
    mask_mod : callable, ``(b, h, q, k) -> bool``, optional
        Whether a query sees a key, tested at every pair.
    out : array, (b, heads_q, len_q, dim_v), optional
        Written and returned instead of a new array; NumPy, CuPy and torch only. May have no element in
        common with the other arguments, nor with what the functions read.

    Returns
    -------
    out : array, (b, heads_q, len_q, dim_v)
        In the dtype of query.
    lse : array, (b, heads_q, len_q)
        With `return_lse`: natural logarithm of the sum of exponentials of each query's scores, in float32 (float64 for
        float64 tensors).

    Raises
    ------
    InvalidArgument
        If an argument is wrong or does not fit another, or a function cannot be traced.
    UnsupportedProblem
        If no kernel runs the problem on the GPU; the message says of each family why not.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> x = np.ones((1, 2, 6, 4), np.float32)
    >>> slopes = np.array([0.5, 0.25], np.float32)
    >>> def score(s, b, h, q, k):
    ...     return s - slopes[h] * (q - k)
    >>> cuflash.flex_attention(x, x, x, score, mask_mod=cuflash.mods.causal()).shape
    (1, 2, 6, 4)
    >>> causal = cuflash.create_block_mask(cuflash.mods.causal(), len_q=6, len_kv=6)
    >>> cuflash.flex_attention(x, x, x, score, causal).shape
    (1, 2, 6, 4)
    """
    try:
        return_lse = flag("return_lse", return_lse)
        options = asked(softmax_scale=scale, enable_gqa=enable_gqa, layout="bhsd", vocabulary="sdpa")
        arrays = new(Arrays, q=query, k=key, v=value, out=out)
        if score_mod is not None or mask_mod is not None or block_mask is not None:
            options, arrays = with_mods(options, arrays, score_mod, mask_mod, block_mask=block_mask)
        results = ops.forward(options, arrays)
        return results[:2] if return_lse else results[0]
    except REFUSALS as error:
        shorten(error)
        raise
