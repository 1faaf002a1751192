"""Multi-head attention with an additive bias and its gradient: PyTorch's functions for ROCm's Composable Kernel."""

from __future__ import annotations

from typing import Any

from cuflash.api.pytorch import explicit
from cuflash.errors import REFUSALS, shorten
from cuflash.generator import PhiloxGenerator
from cuflash.ops import Arrays, asked, new

Array = Any


def mha_fwd_ck(
    q: Array,
    k: Array,
    v: Array,
    out_: Array | None = None,
    p_dropout: float = 0.0,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int | None = -1,
    window_size_right: int | None = -1,
    return_softmax: bool = False,
    gen_: PhiloxGenerator | tuple[int, int] | None = None,
    attn_bias_: Array | None = None,
    *,
    backend: str | None = None,
) -> tuple[Array, ...]:
    """Attention of dense tensors with an additive bias; eight results.

    Parameters
    ----------
    q, k, v, out_, p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, gen_, backend
        As for `mha_fwd`.
    return_softmax : bool
        Also return which probabilities were dropped.
    attn_bias_ : array, broadcastable to (b, heads_q, len_q, len_kv), optional
        Added to the scaled scores, in the dtype of q or float32, with any strides; -inf hides a pair.

    Returns
    -------
    out, q, k, v, softmax_lse : array
        As from `mha_fwd`.
    seed, offset : array of int64, ()
        For `mha_bwd_ck`; empty without dropout.
    random : array of uint8
        With `return_softmax` a byte for each pair, (b, heads_q, len_q, len_kv), which was kept where it is at most
        ``floor((1 - p_dropout) * 255)``: it is 0 there and 255 elsewhere. Otherwise empty.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        As `mha_fwd`.
    """
    try:
        options = asked(
            softmax_scale=softmax_scale, causal=is_causal,
            window_size=explicit.window(window_size_left, window_size_right),
            dropout_p=p_dropout, vocabulary="mha_fwd",
        )  # fmt: skip
        arrays = new(Arrays, q=q, k=k, v=v, bias=attn_bias_, out=out_)
        return tuple(explicit.forward(explicit.CK, options, backend, arrays, gen_, return_softmax, random=True))
    except REFUSALS as error:
        shorten(error)
        raise


def mha_varlen_fwd_ck(
    q: Array,
    k: Array,
    v: Array,
    out_: Array | None,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    seqused_k: Array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    p_dropout: float = 0.0,
    softmax_scale: float | None = None,
    zero_tensors: bool = False,
    is_causal: bool = False,
    window_size_left: int | None = -1,
    window_size_right: int | None = -1,
    return_softmax: bool = False,
    gen_: PhiloxGenerator | tuple[int, int] | None = None,
    attn_bias_: Array | None = None,
    *,
    backend: str | None = None,
    validate: bool = False,
) -> tuple[Array, ...]:
    """Attention of packed sequences with an additive bias; eight results.

    Parameters
    ----------
    q, k, v, out_, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k, zero_tensors
        As for `mha_varlen_fwd`.
    p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, gen_, backend
        As for `mha_fwd`.
    return_softmax : bool
        As for `mha_fwd_ck`.
    attn_bias_ : array, broadcastable to (b, heads_q, max_seqlen_q, max_seqlen_k), optional
        As for `mha_fwd_ck`; pairs are numbered from 0 in every sequence.
    validate : bool
        As for `flash_attn_varlen_func`.

    Returns
    -------
    out, q, k, v : array
        As from `mha_varlen_fwd`.
    softmax_lse : array, (b, heads_q, max_seqlen_q)
        As from `mha_varlen_fwd` with ``convention="rocm"``.
    seed, offset, random : array
        As from `mha_fwd_ck`, with (b, heads_q, max_seqlen_q, max_seqlen_k) bytes.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        As `mha_fwd`.
    """
    try:
        options = asked(
            softmax_scale=softmax_scale, causal=is_causal,
            window_size=explicit.window(window_size_left, window_size_right),
            dropout_p=p_dropout, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, vocabulary="mha_fwd",
            validate=validate,
        )  # fmt: skip
        explicit.require(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        arrays = new(
            Arrays, q=q, k=k, v=v, bias=attn_bias_, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_k,
            seqused_kv=seqused_k, out=out_,
        )  # fmt: skip
        return tuple(
            explicit.forward(explicit.CK, options, backend, arrays, gen_, return_softmax, zero_tensors, random=True)
        )
    except REFUSALS as error:
        shorten(error)
        raise


def mha_bwd_ck(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    softmax_lse: Array,
    dq_: Array | None = None,
    dk_: Array | None = None,
    dv_: Array | None = None,
    attn_bias_: Array | None = None,
    bias_requires_grad: bool = False,
    grad_bias: Array | None = None,
    p_dropout: float = 0.0,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int | None = -1,
    window_size_right: int | None = -1,
    deterministic: bool = False,
    philox_seed: Array | int | None = None,
    philox_offset: Array | int | None = None,
    *,
    backend: str | None = None,
) -> tuple[Array, ...]:
    """Gradients of `mha_fwd_ck`, that of the bias among them; five results.

    Parameters
    ----------
    dout, q, k, v, out, softmax_lse, dq_, dk_, dv_, deterministic
        As for `mha_bwd`.
    attn_bias_, p_dropout, softmax_scale, is_causal, window_size_left, window_size_right
        As in the forward.
    bias_requires_grad : bool
        Compute the gradient of the bias.
    grad_bias : array, shaped like the bias, optional
        Filled and returned instead of a new array.
    philox_seed, philox_offset : array or int, optional
        What the forward returned, needed with dropout.
    backend : {"flash", "mem_eff", "default"}, optional
        As for `preferred_backend`, for this call.

    Returns
    -------
    dq, dk, dv : array
        Shaped and typed like q, k and v.
    softmax_d : array, (b, heads_q, len_q)
        ``(1 - p_dropout) * sum(dout * out)`` of each row.
    dbias : array or None
        Typed like the bias and shaped like it, with size 1 along axes of stride 0: summed over what it is broadcast
        over. None unless `bias_requires_grad`.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        As `mha_fwd`.
    """
    try:
        options = asked(
            softmax_scale=softmax_scale, causal=is_causal,
            window_size=explicit.window(window_size_left, window_size_right),
            dropout_p=p_dropout, deterministic=deterministic, vocabulary="mha_bwd",
        )  # fmt: skip
        arrays = new(
            Arrays, q=q, k=k, v=v, bias=attn_bias_, dout=dout, lse=softmax_lse, out=out, dq=dq_, dk=dk_, dv=dv_
        )
        return tuple(
            explicit.backward(
                explicit.CK, options, backend, arrays, philox_seed=philox_seed, philox_offset=philox_offset,
                grad_bias=grad_bias, bias_requires_grad=bias_requires_grad,
            )
        )  # fmt: skip
    except REFUSALS as error:
        shorten(error)
        raise


def mha_varlen_bwd_ck(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    softmax_lse: Array,
    dq_: Array | None,
    dk_: Array | None,
    dv_: Array | None,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    attn_bias_: Array | None = None,
    bias_requires_grad: bool = False,
    grad_bias: Array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    p_dropout: float = 0.0,
    softmax_scale: float | None = None,
    zero_tensors: bool = False,
    is_causal: bool = False,
    window_size_left: int | None = -1,
    window_size_right: int | None = -1,
    deterministic: bool = False,
    philox_seed: Array | int | None = None,
    philox_offset: Array | int | None = None,
    *,
    seqused_k: Array | None = None,
    backend: str | None = None,
    validate: bool = False,
) -> tuple[Array, ...]:
    """Gradients of `mha_varlen_fwd_ck`, that of the bias among them; five results.

    Parameters
    ----------
    dout, q, k, v, out, softmax_lse, dq_, dk_, dv_, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, zero_tensors
        As for `mha_varlen_bwd` with ``convention="rocm"``.
    attn_bias_, bias_requires_grad, grad_bias, p_dropout, softmax_scale, is_causal, window_size_left, window_size_right
        As for `mha_bwd_ck`.
    deterministic, philox_seed, philox_offset, backend
        As for `mha_bwd_ck`.
    seqused_k : array of int32, (b,), optional
        As in the forward; PyTorch's backward has no such argument.
    validate : bool
        As for `flash_attn_varlen_func`.

    Returns
    -------
    dq, dk, dv : array
        Shaped and typed like q, k and v.
    softmax_d : array, (b, heads_q, max_seqlen_q)
        As from `mha_bwd_ck`.
    dbias : array or None
        As from `mha_bwd_ck`.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        As `mha_fwd`.
    """
    try:
        options = asked(
            softmax_scale=softmax_scale, causal=is_causal,
            window_size=explicit.window(window_size_left, window_size_right),
            dropout_p=p_dropout, deterministic=deterministic, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
            vocabulary="mha_bwd", validate=validate,
        )  # fmt: skip
        explicit.require(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        arrays = new(
            Arrays, q=q, k=k, v=v, bias=attn_bias_, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_k,
            seqused_kv=seqused_k, dout=dout, lse=softmax_lse, out=out, dq=dq_, dk=dk_, dv=dv_,
        )  # fmt: skip
        return tuple(
            explicit.backward(
                explicit.CK, options, backend, arrays, philox_seed=philox_seed, philox_offset=philox_offset,
                grad_bias=grad_bias, bias_requires_grad=bias_requires_grad, zero_tensors=zero_tensors,
            )
        )  # fmt: skip
    except REFUSALS as error:
        shorten(error)
        raise
