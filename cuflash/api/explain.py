"""The choice of kernels, made visible."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cuflash import ops
from cuflash.api.keywords import WrittenMask, WrittenScore
from cuflash.arrays import Array
from cuflash.dropout import Scheme
from cuflash.dtypes import Precision
from cuflash.errors import REFUSALS, shorten
from cuflash.masks import Alignment
from cuflash.ops import Arrays, Explanation, asked, with_mods
from cuflash.problem import Problem

if TYPE_CHECKING:
    from cuflash.blocks import BlockMask


def explain(
    q: Array | Problem,
    k: Array | None = None,
    v: Array | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alignment: Alignment = "bottom-right",
    attn_mask: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Array | None = None,
    seqused_k: Array | None = None,
    alibi_slopes: Array | None = None,
    attn_bias: Array | None = None,
    sink: Array | None = None,
    score_mod: WrittenScore = None,
    mask_mod: WrittenMask = None,
    block_mask: BlockMask | None = None,
    block_table: Array | None = None,
    dropout_p: float = 0.0,
    dropout_scheme: Scheme = "byte",
    num_splits: int = 0,
    precision: Precision = "full",
    deterministic: bool = False,
    bias_grad: bool = False,
    captured_grad: bool = False,
    device: str | None = None,
    backward: bool = False,
) -> Explanation:
    """Say which kernels a call would run, with which tiles and scratch memory, and why no others; runs nothing.

    Parameters
    ----------
    q : array or Problem
        The queries of a call, as for `flash_attn_func` or, with `cu_seqlens_q`, `flash_attn_varlen_func`; or a
        `cuflash.Problem`, with a dtype of `cuflash.dtypes`, which says everything but the device.
    k, v : array
        Keys and values.
    softmax_scale, causal, window_size, softcap, alignment, attn_mask, alibi_slopes, attn_bias, sink
        As for `flash_attn_func`.
    score_mod, mask_mod, block_mask
        As for `flash_attn_func`.
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, block_table
        As for `flash_attn_varlen_func`.
    dropout_p, dropout_scheme, num_splits, precision
        As for `flash_attn_func`; `num_splits` acts without ``backward=True``.
    deterministic, bias_grad, captured_grad : bool
        As for `flash_attn_backward`; act with ``backward=True``.
    device : str, optional
        A GPU by name or architecture (``"h100"``, ``"sm_90a"``), which need not be there; the arrays' own by default.
        Needed for NumPy arrays and for a Problem.
    backward : bool
        Explain the gradients instead of the forward.

    Returns
    -------
    Explanation
        ``print()`` shows it; `plan`, `problem`, `device` and `why_not` hold the parts.

    Raises
    ------
    InvalidArgument
        If the call would be refused, or the device is not known.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> x = np.zeros((1, 1024, 8, 64), np.float16)
    >>> print(cuflash.explain(x, x, x, causal=True, device="h100"))  # doctest: +ELLIPSIS
    forward fp16 b1 h8 s1024x1024 d64 causal on NVIDIA H100 (sm_90a)
    ...
    """
    try:
        options = asked(
            softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap, alignment=alignment,
            dropout_p=dropout_p, dropout_scheme=dropout_scheme, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
            num_splits=num_splits, precision=precision, deterministic=deterministic, bias_grad=bias_grad,
        )  # fmt: skip
        arrays = Arrays(
            q=q, k=k, v=v, mask=attn_mask, bias=attn_bias, alibi=alibi_slopes, sink=sink, cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_kv=cu_seqlens_k, seqused_q=seqused_q, seqused_kv=seqused_k, table=block_table,
        )  # fmt: skip
        if captured_grad is not False or score_mod is not None or mask_mod is not None or block_mask is not None:
            options, arrays = with_mods(options, arrays, score_mod, mask_mod, captured_grad, block_mask)
        return ops.explain(options, arrays, device, backward)
    except REFUSALS as error:
        shorten(error)
        raise
