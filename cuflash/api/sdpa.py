"""Attention with the name, argument order and meaning of PyTorch's ``scaled_dot_product_attention``."""

from __future__ import annotations

from typing import Any

from cuflash import ops
from cuflash.api.served import refuse_unserved
from cuflash.errors import UnsupportedProblem
from cuflash.ops import Options

Array = Any


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
    return_lse: bool = False,
    out: Array | None = None,
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
    attn_mask : array of bool, optional
        True where a query and a key take part; broadcasts to (b, heads_q, len_q, len_kv). Not with `is_causal`. Masks
        of numbers to add are not supported yet.
    dropout_p : float
        Must be 0: dropout is not supported yet.
    is_causal : bool
        Query ``i`` sees keys 0 to ``i``.
    scale : float, optional
        Factor of ``query @ key.T``, of any sign; ``dim_qk ** -0.5`` by default.
    enable_gqa : bool
        Let heads_q be a multiple of heads_kv; query head ``h`` then uses key/value head ``h // (heads_q // heads_kv)``.
    return_lse : bool
        Also return the log-sum-exp.
    out : array, (b, heads_q, len_q, dim_v), optional
        Written and returned instead of a new array; NumPy, CuPy and torch only. May not overlap the other arguments.

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
        If the arguments ask for something that is not supported yet, or that no kernel runs on this device.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> x = np.ones((1, 2, 3, 4), np.float32)
    >>> cuflash.scaled_dot_product_attention(x, x, x, is_causal=True).shape
    (1, 2, 3, 4)
    """
    refuse_unserved(dropout_p)
    if "float" in str(getattr(attn_mask, "dtype", "")):
        raise UnsupportedProblem(
            f"attn_mask is {attn_mask.dtype}; masks of numbers to add to the scores are not supported yet. "
            "Pass a boolean mask, True where a query and a key take part."
        )
    options = Options(scale, is_causal, alignment="top-left", enable_gqa=enable_gqa, sdpa=True)
    out, lse = ops.forward(options, query, key, value, attn_mask, out=out)
    return (out, lse) if return_lse else out
