"""Attention with the name, argument order and meaning of PyTorch's ``scaled_dot_product_attention``."""

from __future__ import annotations

from typing import Literal, overload

from cuflash import ops
from cuflash.api.keywords import Generator
from cuflash.api.pytorch import backend as backends
from cuflash.arrays import Array, ArrayT
from cuflash.dropout import Scheme
from cuflash.errors import REFUSALS, shorten
from cuflash.numbers import flag
from cuflash.ops import Arrays, asked, new


@overload
def scaled_dot_product_attention(
    query: ArrayT, key: ArrayT, value: ArrayT, attn_mask: Array | None = ..., dropout_p: float = ...,
    is_causal: bool = ..., scale: float | None = ..., enable_gqa: bool = ..., *, generator: Generator = ...,
    dropout_scheme: Scheme = ..., unbiased_dropout: bool = ..., return_lse: Literal[False] = ...,
    out: Array | None = ..., backend: str | None = ...,
) -> ArrayT: ...  # fmt: skip
@overload
def scaled_dot_product_attention(
    query: ArrayT, key: ArrayT, value: ArrayT, attn_mask: Array | None = ..., dropout_p: float = ...,
    is_causal: bool = ..., scale: float | None = ..., enable_gqa: bool = ..., *, generator: Generator = ...,
    dropout_scheme: Scheme = ..., unbiased_dropout: bool = ..., return_lse: Literal[True],
    out: Array | None = ..., backend: str | None = ...,
) -> tuple[ArrayT, Array]: ...  # fmt: skip
@overload
def scaled_dot_product_attention(
    query: ArrayT, key: ArrayT, value: ArrayT, attn_mask: Array | None = ..., dropout_p: float = ...,
    is_causal: bool = ..., scale: float | None = ..., enable_gqa: bool = ..., *, generator: Generator = ...,
    dropout_scheme: Scheme = ..., unbiased_dropout: bool = ..., return_lse: bool = ...,
    out: Array | None = ..., backend: str | None = ...,
) -> ArrayT | tuple[ArrayT, Array]: ...  # fmt: skip
def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    generator: Generator = None,
    dropout_scheme: Scheme = "byte",
    unbiased_dropout: bool = False,
    return_lse: bool = False,
    out: Array | None = None,
    backend: str | None = None,
) -> Array | tuple[Array, Array]:
    """Exact attention of (b, h, s, d) tensors, in memory that grows with the lengths only.

    What kinds of arrays it takes, and on which streams, is as for `flash_attn_func`. Causal masks are top-left aligned,
    as in PyTorch: query ``i`` sees keys 0 to ``i``, whatever the lengths. A query that sees no key has output 0 and
    log-sum-exp -inf.

    Parameters
    ----------
    query : array, (b, heads_q, len_q, dim_qk)
        In float16, bfloat16, float32 or float64. The last dimension of every tensor must be contiguous; the other
        strides are free, so transposed views of (b, s, h, d) tensors need no copy.
    key : array, (b, heads_kv, len_kv, dim_qk)
        Keys.
    value : array, (b, heads_kv, len_kv, dim_v)
        Values.
    attn_mask : array, optional
        Broadcasts to (b, heads_q, len_q, len_kv). bool: True where a query and a key take part. Numbers, in the dtype
        of query or float32: added to the scores; -inf hides a key.
    dropout_p : float
        Chance from 0 to below 1 with which a probability is dropped; the others are divided by ``1 - dropout_p``.
    is_causal : bool
        Query ``i`` sees keys 0 to ``i`` at most, next to what `attn_mask` says.
    scale : float, optional
        Factor of ``query @ key.T``, of any sign; ``dim_qk ** -0.5`` by default.
    enable_gqa : bool
        Let heads_q be a multiple of heads_kv; query head ``h`` then uses key/value head ``h // (heads_q // heads_kv)``.
    generator, dropout_scheme, unbiased_dropout
        As for `flash_attn_func`.
    return_lse : bool
        Also return the log-sum-exp.
    out : array, (b, heads_q, len_q, dim_v), optional
        Written and returned instead of a new array; NumPy, CuPy and torch only. May have no element in
        common with the other arguments.
    backend : {"flash", "mem_eff", "default"}, optional
        As for `preferred_backend`, for this call.

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
        If an argument is wrong or does not fit another; nothing has been launched or written then.
    UnsupportedProblem
        If no kernel runs this on the device, or not the preferred one.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> x = np.ones((1, 2, 3, 4), np.float32)
    >>> cuflash.scaled_dot_product_attention(x, x, x, is_causal=True).shape
    (1, 2, 3, 4)
    """
    try:
        return_lse = flag("return_lse", return_lse)
        options = asked(
            softmax_scale=scale, causal=is_causal, alignment="top-left", dropout_p=dropout_p,
            dropout_scheme=dropout_scheme, unbiased_dropout=unbiased_dropout, enable_gqa=enable_gqa, layout="bhsd",
            vocabulary="sdpa",
        )  # fmt: skip
        numbers = attn_mask is not None and "float" in str(getattr(attn_mask, "dtype", ""))
        mask, bias = (None, attn_mask) if numbers else (attn_mask, None)
        arrays = new(Arrays, q=query, k=key, v=value, mask=mask, bias=bias, out=out)
        if not return_lse:
            return backends.call(ops.out, options, backend, arrays, generator)
        return backends.call(ops.forward, options, backend, arrays, generator)[:2]
    except REFUSALS as error:
        shorten(error)
        raise
