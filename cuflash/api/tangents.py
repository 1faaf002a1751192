"""Attention with directional derivatives, in forward mode."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cuflash import ops
from cuflash.api.keywords import Generator, WrittenMask, WrittenScore
from cuflash.arrays import Array, ArrayT
from cuflash.dropout import Scheme
from cuflash.errors import REFUSALS, shorten
from cuflash.masks import Alignment
from cuflash.ops import Arrays, Tangents, asked, new, with_mods

if TYPE_CHECKING:
    from cuflash.blocks import BlockMask


def flash_attn_jvp(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    dq: Array | None = None,
    dk: Array | None = None,
    dv: Array | None = None,
    *,
    dbias: Array | None = None,
    dsink: Array | None = None,
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
    dropout_p: float = 0.0,
    generator: Generator = None,
    dropout_scheme: Scheme = "byte",
    unbiased_dropout: bool = False,
    validate: bool = False,
) -> tuple[ArrayT, Array, ArrayT, Array]:
    """Attention and how its results change as what it reads changes: the Jacobian times a vector, in one pass.

    With x = softmax_scale * q.k, logits s and probabilities P, and a prime for what changes,

        x'_ij = softmax_scale * (q'_i.k_j + q_i.k'_j)    s'_ij = ds/dx * x'_ij + bias'_ij
        lse'_i = sum_j P_ij s'_ij    out'_i = sum_j P_ij (v'_j + (s'_ij - lse'_i) v_j)

    over the keys that query i sees. A sink is one more term of the first sum; dropout drops terms of the second and
    scales the others. All sums are taken beside those of the softmax (Lu and Song 2024, arXiv 2410.11081, "Simplifying,
    Stabilizing and Scaling Continuous-Time Consistency Models", in the appendix), and no product of lengths is stored.

    Parameters
    ----------
    q, k, v : array
        (b, s, h, d), or packed (total, h, d) when `cu_seqlens_q` is given.
    dq, dk, dv : array, optional
        How q, k and v change, shaped and typed like them; None is not at all.
    dbias, dsink : array, optional
        How `attn_bias` and `sink` change, shaped and typed like them; None is not at all. At pairs that are hidden,
        by a mask or by a bias of -inf, `dbias` has no effect.
    softmax_scale, causal, window_size, softcap, alignment, attn_mask, alibi_slopes, attn_bias, sink, block_mask
        As for `flash_attn_func`.
    score_mod, mask_mod
        As for `flash_attn_func`. The arrays that they read do not change.
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, validate
        As for `flash_attn_varlen_func`.
    dropout_p, generator, dropout_scheme, unbiased_dropout
        As for `flash_attn_func`; which probabilities are dropped does not change.

    Returns
    -------
    out, lse : array
        As from `flash_attn_func` with ``return_lse=True``.
    tangent_out, tangent_lse : array
        How they change, shaped and typed like them. 0 for queries that see no key.

    Raises
    ------
    InvalidArgument
        As `flash_attn_func`; and if a tangent is not like what it is of.
    UnsupportedProblem
        If no kernel computes it: what a kernel does not support, such as `block_mask`, whose rule as `mask_mod`
        is the same.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> q = k = v = np.ones((1, 3, 2, 4), np.float32)
    >>> out, lse, tangent_out, tangent_lse = cuflash.flash_attn_jvp(q, k, v, dv=2 * v)
    >>> float(tangent_out[0, 0, 0, 0]), float(tangent_lse[0, 0, 0])
    (2.0, 0.0)
    """
    try:
        options = asked(
            softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap, alignment=alignment,
            dropout_p=dropout_p, dropout_scheme=dropout_scheme, unbiased_dropout=unbiased_dropout,
            max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, validate=validate,
        )  # fmt: skip
        arrays = new(
            Arrays, q=q, k=k, v=v, mask=attn_mask, bias=attn_bias, alibi=alibi_slopes, sink=sink,
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_k, seqused_q=seqused_q, seqused_kv=seqused_k,
        )  # fmt: skip
        if score_mod is not None or mask_mod is not None or block_mask is not None:
            options, arrays = with_mods(options, arrays, score_mod, mask_mod, block_mask=block_mask)
        out, lse, tangent_out, tangent_lse = ops.jvp(options, arrays, Tangents(dq, dk, dv, dbias, dsink), generator)
        return out, lse, tangent_out, tangent_lse
    except REFUSALS as error:
        shorten(error)
        raise
