"""Memory-efficient attention with the names, argument orders and results of PyTorch's ``me_ck_api.h``.

Arrays are NumPy's, CuPy's or torch's.
"""

from __future__ import annotations

from typing import Any

from cuflash.api.pytorch import explicit
from cuflash.errors import REFUSALS, InvalidArgument, shorten
from cuflash.generator import PhiloxGenerator
from cuflash.numbers import flag
from cuflash.ops import Arrays, asked, new

Array = Any


def mem_eff_forward(
    q: Array,
    k: Array,
    v: Array,
    p_dropout: float = 0.0,
    return_dropout_randval: bool = False,
    is_causal: bool | None = False,
    scale: float | None = None,
    attn_bias_: Array | None = None,
    out_: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    seqstart_q: Array | None = None,
    seqstart_k: Array | None = None,
    gen_: PhiloxGenerator | tuple[int, int] | None = None,
    seqused_k_: Array | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    backend: str | None = None,
    validate: bool = False,
) -> tuple[Array, ...]:
    """Attention with an additive bias; eight results.

    Parameters
    ----------
    q : array, (b, len_q, heads_q, dim)
        Queries; (total_q, heads_q, dim) when `cu_seqlens_q` or `seqstart_q` is given.
    k, v : array, (b, len_kv, heads_kv, dim) and (b, len_kv, heads_kv, dim_v)
        Keys and values, or packed ones.
    p_dropout : float
        Probability of dropping, 0 <= p < 1.
    return_dropout_randval : bool
        Also return which probabilities were dropped, as `mha_fwd_ck` does.
    is_causal : bool, optional
        Bottom-right aligned; None is False.
    scale : float, optional
        Factor of ``q @ k.T``, of any sign; ``dim ** -0.5`` by default.
    attn_bias_ : array, broadcastable to (b, heads_q, len_q, len_kv), optional
        Added to the scaled scores, in the dtype of q or float32.
    out_ : array, optional
        Filled and returned instead of a new array.
    cu_seqlens_q, cu_seqlens_k : array of int32, (b + 1,), optional
        Where packed sequences start, and the end of the last.
    seqstart_q, seqstart_k : array of int32, (b + 1,), optional
        The same by the names of xFormers; not both.
    gen_ : PhiloxGenerator, torch.Generator or (int, int), optional
        As for `mha_fwd`.
    seqused_k_ : array of int32, (b,), optional
        How many keys of each packed sequence take part.
    max_seqlen_q, max_seqlen_k : int, optional
        As for `mha_varlen_fwd`, and for packed sequences alone; PyTorch's function has no such arguments.
    backend : {"flash", "mem_eff", "default"}, optional
        As for `preferred_backend`, for this call.
    validate : bool
        As for `flash_attn_varlen_func`.

    Returns
    -------
    out, q, k, v, lse, seed, offset, random : array
        As from `mha_fwd_ck`, or `mha_varlen_fwd_ck` for packed sequences.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        As `mha_fwd`.
    """
    try:
        flag("return_dropout_randval", return_dropout_randval)
        starts = [
            _one_of(("cu_seqlens_q", cu_seqlens_q), ("seqstart_q", seqstart_q)),
            _one_of(("cu_seqlens_k", cu_seqlens_k), ("seqstart_k", seqstart_k)),
        ]
        options = asked(
            softmax_scale=scale, causal=False if is_causal is None else is_causal, dropout_p=p_dropout,
            max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, vocabulary="mem_eff_forward", validate=validate,
        )  # fmt: skip
        arrays = new(
            Arrays, q=q, k=k, v=v, bias=attn_bias_, cu_seqlens_q=starts[0], cu_seqlens_kv=starts[1],
            seqused_kv=seqused_k_, out=out_,
        )  # fmt: skip
        return tuple(explicit.forward(explicit.CK, options, backend, arrays, gen_, return_dropout_randval, random=True))
    except REFUSALS as error:
        shorten(error)
        raise


def mem_eff_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    softmax_lse: Array,
    dq_: Array | None,
    dk_: Array | None,
    dv_: Array | None,
    attn_bias: Array | None = None,
    bias_requires_grad: bool = False,
    grad_bias: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    p_dropout: float = 0.0,
    scale: float | None = None,
    is_causal: bool = False,
    deterministic: bool = False,
    zero_tensors: bool = False,
    philox_seed: Array | int | None = None,
    philox_offset: Array | int | None = None,
    *,
    seqused_k: Array | None = None,
    backend: str | None = None,
    validate: bool = False,
) -> tuple[Array, ...]:
    """Gradients of `mem_eff_forward`, that of the bias among them; four results.

    Parameters
    ----------
    dout, q, k, v, out, softmax_lse : array
        Gradient of the output; arguments and results of the forward; softmax_lse as for `mha_bwd`.
    dq_, dk_, dv_ : array or None
        Filled and returned; None makes new arrays.
    attn_bias, bias_requires_grad, grad_bias, deterministic, philox_seed, philox_offset, backend
        As for `mha_bwd_ck`.
    cu_seqlens_q, cu_seqlens_k : array of int32, (b + 1,), optional
        As in the forward.
    max_seqlen_q, max_seqlen_k : int, optional
        As for `mha_varlen_bwd`; lengths of dense tensors are theirs, and these must be them or None.
    p_dropout, scale, is_causal
        As in the forward.
    zero_tensors : bool
        As for `mha_varlen_bwd`.
    seqused_k : array of int32, (b,), optional
        As in the forward; PyTorch's backward has no such argument.
    validate : bool
        As for `flash_attn_varlen_func`.

    Returns
    -------
    dq, dk, dv : array
        Shaped and typed like q, k and v.
    dbias : array or None
        As from `mha_bwd_ck`.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        As `mha_fwd`.
    """
    try:
        options = asked(
            softmax_scale=scale, causal=is_causal, dropout_p=p_dropout, deterministic=deterministic,
            max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, vocabulary="mem_eff_backward", validate=validate,
        )  # fmt: skip
        if cu_seqlens_q is None:
            options = explicit.dense_lengths(options, q, k)
        arrays = new(
            Arrays, q=q, k=k, v=v, bias=attn_bias, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_k,
            seqused_kv=seqused_k, dout=dout, lse=softmax_lse, out=out, dq=dq_, dk=dk_, dv=dv_,
        )  # fmt: skip
        dq, dk, dv, _, dbias = explicit.gradients(
            explicit.CK, options, backend, arrays, philox_seed=philox_seed, philox_offset=philox_offset,
            grad_bias=grad_bias, bias_requires_grad=bias_requires_grad, zero_tensors=zero_tensors,
        )  # fmt: skip
        return dq, dk, dv, dbias
    except REFUSALS as error:
        shorten(error)
        raise


def _one_of(first: tuple[str, Array | None], second: tuple[str, Array | None]) -> Array | None:
    """The one of two names of an argument that was used."""
    if first[1] is not None and second[1] is not None:
        raise InvalidArgument(f"{first[0]} and {second[0]} are given together, which are one argument. Drop one.")
    return second[1] if first[1] is None else first[1]
