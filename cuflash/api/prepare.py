"""Attention prepared for one kind of arrays, for programs that repeat a call often."""

from __future__ import annotations

from cuflash.arrays import ArrayT
from cuflash.errors import REFUSALS, shorten
from cuflash.masks import Alignment
from cuflash.ops import PreparedAttention, asked


def flash_attn_prepare(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alignment: Alignment = "bottom-right",
    num_splits: int = 0,
    out: ArrayT | None = None,
) -> PreparedAttention[ArrayT]:
    """Check, plan and compile `flash_attn_func` for arrays of one kind, and return the call that is left.

    It takes other arrays of the same shapes, strides, dtype and device. `flash_attn_func` does the same work only once,
    but looks up in every call which one it is, some microseconds that matter where kernels are short.

    Parameters
    ----------
    q, k, v : array
        As for `flash_attn_func`, arrays of CuPy or NumPy or torch tensors; neither read nor kept.
    softmax_scale, causal, window_size, softcap, alignment, num_splits
        As for `flash_attn_func`.
    out : array, (b, len_q, heads_q, dim_v), optional
        Like the array that every call will be given to write to; None if calls return new arrays. Not written.

    Returns
    -------
    PreparedAttention
        ``call(q, k, v, out=None) -> (out, lse)``, where lse is the log-sum-exp. It runs on the stream that is current
        when it is called and refuses arrays of another kind.

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
    """
    try:
        options = asked(
            softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap, alignment=alignment,
            num_splits=num_splits,
        )  # fmt: skip
        return PreparedAttention(options, q, k, v, out)
    except REFUSALS as error:
        shorten(error)
        raise
