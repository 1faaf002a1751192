"""The gradients of attention, for every kind of array."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from cuflash import ops
from cuflash.api.keywords import BackwardOptions, Generator, Pullback, VjpOptions, WrittenMask, WrittenScore
from cuflash.arrays import Array, ArrayT
from cuflash.dropout import Scheme
from cuflash.dtypes import Precision
from cuflash.errors import REFUSALS, shorten
from cuflash.masks import Alignment
from cuflash.numbers import flag
from cuflash.ops import Arrays, CapturedGradients, Gradients, asked, new, with_mods

if TYPE_CHECKING:
    from cuflash.blocks import BlockMask


@overload
def flash_attn_backward(
    dout: Array, q: ArrayT, k: ArrayT, v: ArrayT, out: Array, lse: Array, *, sink: None = ...,
    bias_grad: Literal[False] = ..., captured_grad: Literal[False] = ..., **keywords: Unpack[BackwardOptions],
) -> tuple[ArrayT, ArrayT, ArrayT]: ...  # fmt: skip
@overload
def flash_attn_backward(
    dout: Array, q: ArrayT, k: ArrayT, v: ArrayT, out: Array, lse: Array, *, sink: Array | None = ...,
    bias_grad: bool = ..., captured_grad: Literal[True], **keywords: Unpack[BackwardOptions],
) -> CapturedGradients[ArrayT]: ...  # fmt: skip
@overload
def flash_attn_backward(
    dout: Array, q: ArrayT, k: ArrayT, v: ArrayT, out: Array, lse: Array, *, sink: None = ...,
    bias_grad: Literal[True], captured_grad: Literal[False] = ..., **keywords: Unpack[BackwardOptions],
) -> Gradients[ArrayT, Array, None]: ...  # fmt: skip
@overload
def flash_attn_backward(
    dout: Array, q: ArrayT, k: ArrayT, v: ArrayT, out: Array, lse: Array, *, sink: Array,
    bias_grad: Literal[False] = ..., captured_grad: Literal[False] = ..., **keywords: Unpack[BackwardOptions],
) -> Gradients[ArrayT, None, Array]: ...  # fmt: skip
@overload
def flash_attn_backward(
    dout: Array, q: ArrayT, k: ArrayT, v: ArrayT, out: Array, lse: Array, *, sink: Array,
    bias_grad: Literal[True], captured_grad: Literal[False] = ..., **keywords: Unpack[BackwardOptions],
) -> Gradients[ArrayT, Array, Array]: ...  # fmt: skip
@overload
def flash_attn_backward(
    dout: Array, q: ArrayT, k: ArrayT, v: ArrayT, out: Array, lse: Array, *, sink: Array | None = ...,
    bias_grad: bool = ..., captured_grad: bool = ..., **keywords: Unpack[BackwardOptions],
) -> tuple[ArrayT, ArrayT, ArrayT] | Gradients[ArrayT, Any, Any] | CapturedGradients[ArrayT]: ...  # fmt: skip
def flash_attn_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
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
    dropout_p: float = 0.0,
    rng_state: Array | None = None,
    dropout_scheme: Scheme = "byte",
    unbiased_dropout: bool = False,
    deterministic: bool = False,
    bias_grad: bool = False,
    captured_grad: bool = False,
    precision: Precision = "full",
    dlse: Array | None = None,
    dq: Array | None = None,
    dk: Array | None = None,
    dv: Array | None = None,
    validate: bool = False,
) -> tuple[Array, Array, Array] | Gradients[Any, Any, Any] | CapturedGradients[Any]:
    """Gradients of q, k and v, and of a bias and a sink, given those of the output.

    Parameters
    ----------
    dout : array, shaped like `out`
        Gradient of the output.
    q, k, v : array
        The tensors of the forward: (b, s, h, d), or packed (total, h, d) when `cu_seqlens_q` is given.
    out, lse : array
        What the forward returned for them with ``return_lse=True``. Both -inf and +inf in `lse` mark a query that sees
        no key. Rows of probabilities sum to 1 within ``abs(lse) * 2**-22`` (2^-51 for float64), which one number rounds
        away; `flash_attn_vjp` hands over more.
    softmax_scale, causal, window_size, softcap, alignment, attn_mask, alibi_slopes, attn_bias, sink
        As in the forward.
    score_mod, mask_mod, block_mask
        As in the forward.
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, validate
        As in `flash_attn_varlen_func`.
    dropout_p, dropout_scheme, unbiased_dropout
        As in the forward.
    rng_state : array of uint64, (2,), optional
        What the forward returned with ``return_rng_state=True``; needed with dropout.
    deterministic : bool
        Give the same bits on every run, for some of the speed.
    bias_grad : bool
        Also compute the gradient of `attn_bias`, whose broadcast axes must then have size 1.
    captured_grad : bool
        Also compute the gradients of the arrays of real numbers that `score_mod` reads. On a GPU they are added up in
        whatever order blocks come; with `deterministic` exactly, which no order changes, in scratch memory of 104 bytes
        a number (712 in fp64), and rounded once.
    precision : {"full", "tf32"}
        As in the forward; ``tf32`` rounds `dout` as well.
    dlse : array, shaped like `lse`, optional
        Gradient of the log-sum-exp; zero by default.
    dq, dk, dv : array, optional
        Written and returned instead of new arrays; NumPy, CuPy and torch only. May have no element in
        common with the other arguments or with each other; slices of one buffer that lie between theirs are fine.

    Returns
    -------
    dq, dk, dv : array
        Shaped and typed like q, k and v. Where nothing is visible they are 0.
    Gradients
        Instead, with `bias_grad` or a sink: the same with the fields `dbias` and `dsink`, in float32 (dbias of float64
        tensors in float64), None where not asked for.
    CapturedGradients
        Instead, with `captured_grad`: the same with the field `dcaptured`, a tuple of one gradient for each array that
        `score_mod` reads, in the order of first use, in float32 (float64 for float64 tensors); None for integers.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        As `flash_attn_func`.
    """
    try:
        options = asked(
            softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap, alignment=alignment,
            dropout_p=dropout_p, dropout_scheme=dropout_scheme, unbiased_dropout=unbiased_dropout,
            max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, deterministic=deterministic, bias_grad=bias_grad,
            validate=validate, precision=precision,
        )  # fmt: skip
        arrays = new(  # the forward's by position, as each keyword is looked for among all fields
            Arrays, q, k, v, attn_mask, attn_bias, alibi_slopes, sink, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
            rng_state=rng_state, dout=dout, lse=lse, dlse=dlse, out=out, dq=dq, dk=dk, dv=dv,
        )  # fmt: skip
        if captured_grad is not False or score_mod is not None or mask_mod is not None or block_mask is not None:
            options, arrays = with_mods(options, arrays, score_mod, mask_mod, captured_grad, block_mask)
        return ops.backward(options, arrays)
    except REFUSALS as error:
        shorten(error)
        raise


@overload
def flash_attn_vjp(
    q: ArrayT, k: ArrayT, v: ArrayT, *, sink: None = ..., bias_grad: Literal[False] = ...,
    captured_grad: Literal[False] = ..., return_lse: Literal[False] = ..., **keywords: Unpack[VjpOptions],
) -> tuple[ArrayT, Pullback[tuple[ArrayT, ArrayT, ArrayT]]]: ...  # fmt: skip
@overload
def flash_attn_vjp(
    q: ArrayT, k: ArrayT, v: ArrayT, *, sink: Array | None = ..., bias_grad: bool = ...,
    captured_grad: Literal[True], return_lse: Literal[False] = ..., **keywords: Unpack[VjpOptions],
) -> tuple[ArrayT, Pullback[CapturedGradients[ArrayT]]]: ...  # fmt: skip
@overload
def flash_attn_vjp(
    q: ArrayT, k: ArrayT, v: ArrayT, *, sink: None = ..., bias_grad: Literal[True],
    captured_grad: Literal[False] = ..., return_lse: Literal[False] = ..., **keywords: Unpack[VjpOptions],
) -> tuple[ArrayT, Pullback[Gradients[ArrayT, Array, None]]]: ...  # fmt: skip
@overload
def flash_attn_vjp(
    q: ArrayT, k: ArrayT, v: ArrayT, *, sink: Array, bias_grad: Literal[False] = ...,
    captured_grad: Literal[False] = ..., return_lse: Literal[False] = ..., **keywords: Unpack[VjpOptions],
) -> tuple[ArrayT, Pullback[Gradients[ArrayT, None, Array]]]: ...  # fmt: skip
@overload
def flash_attn_vjp(
    q: ArrayT, k: ArrayT, v: ArrayT, *, sink: Array, bias_grad: Literal[True],
    captured_grad: Literal[False] = ..., return_lse: Literal[False] = ..., **keywords: Unpack[VjpOptions],
) -> tuple[ArrayT, Pullback[Gradients[ArrayT, Array, Array]]]: ...  # fmt: skip
@overload
def flash_attn_vjp(
    q: ArrayT, k: ArrayT, v: ArrayT, *, sink: None = ..., bias_grad: Literal[False] = ...,
    captured_grad: Literal[False] = ..., return_lse: Literal[True], **keywords: Unpack[VjpOptions],
) -> tuple[tuple[ArrayT, Array], Pullback[tuple[ArrayT, ArrayT, ArrayT]]]: ...  # fmt: skip
@overload
def flash_attn_vjp(
    q: ArrayT, k: ArrayT, v: ArrayT, *, sink: Array | None = ..., bias_grad: bool = ...,
    captured_grad: Literal[True], return_lse: Literal[True], **keywords: Unpack[VjpOptions],
) -> tuple[tuple[ArrayT, Array], Pullback[CapturedGradients[ArrayT]]]: ...  # fmt: skip
@overload
def flash_attn_vjp(
    q: ArrayT, k: ArrayT, v: ArrayT, *, sink: None = ..., bias_grad: Literal[True],
    captured_grad: Literal[False] = ..., return_lse: Literal[True], **keywords: Unpack[VjpOptions],
) -> tuple[tuple[ArrayT, Array], Pullback[Gradients[ArrayT, Array, None]]]: ...  # fmt: skip
@overload
def flash_attn_vjp(
    q: ArrayT, k: ArrayT, v: ArrayT, *, sink: Array, bias_grad: Literal[False] = ...,
    captured_grad: Literal[False] = ..., return_lse: Literal[True], **keywords: Unpack[VjpOptions],
) -> tuple[tuple[ArrayT, Array], Pullback[Gradients[ArrayT, None, Array]]]: ...  # fmt: skip
@overload
def flash_attn_vjp(
    q: ArrayT, k: ArrayT, v: ArrayT, *, sink: Array, bias_grad: Literal[True],
    captured_grad: Literal[False] = ..., return_lse: Literal[True], **keywords: Unpack[VjpOptions],
) -> tuple[tuple[ArrayT, Array], Pullback[Gradients[ArrayT, Array, Array]]]: ...  # fmt: skip
@overload
def flash_attn_vjp(
    q: ArrayT, k: ArrayT, v: ArrayT, *, sink: Array | None = ..., bias_grad: bool = ...,
    captured_grad: bool = ..., return_lse: bool = ..., **keywords: Unpack[VjpOptions],
) -> tuple[ArrayT | tuple[ArrayT, Array], Pullback[tuple[Any, ...]]]: ...  # fmt: skip
def flash_attn_vjp(
    q: Array,
    k: Array,
    v: Array,
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
    dropout_p: float = 0.0,
    generator: Generator = None,
    dropout_scheme: Scheme = "byte",
    unbiased_dropout: bool = False,
    num_splits: int = 0,
    deterministic: bool = False,
    bias_grad: bool = False,
    captured_grad: bool = False,
    precision: Precision = "full",
    return_lse: bool = False,
    validate: bool = False,
) -> tuple[Array | tuple[Array, Array], Pullback[tuple[Any, ...]]]:
    """Attention and the function that pulls gradients back through it.

    Rows of probabilities sum to 1 in the gradient whatever the size of their scores, to within the order in which the
    products of q and k are added: it is another one in the forward of 16-bit tensors on Hopper.

    Parameters
    ----------
    q, k, v : array
        (b, s, h, d), or packed (total, h, d) when `cu_seqlens_q` is given. They, the output, the log-sum-exp and
        two numbers a row are kept until the pullback is dropped.
    softmax_scale, causal, window_size, softcap, alignment, attn_mask, alibi_slopes, attn_bias, sink
        As for `flash_attn_func`.
    score_mod, mask_mod, block_mask
        As for `flash_attn_func` and, with `cu_seqlens_q`, `flash_attn_varlen_func`.
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, validate
        As for `flash_attn_varlen_func`.
    dropout_p, generator, dropout_scheme, unbiased_dropout
        As for `flash_attn_func`; the pullback drops what the forward dropped.
    num_splits : int
        As for `flash_attn_func`; the pullback splits no keys.
    deterministic : bool
        Make the pullback give the same bits on every run, for some of the speed.
    bias_grad : bool
        Let the pullback return the gradient of `attn_bias` too.
    captured_grad : bool
        Let the pullback return the gradients of the arrays of real numbers that `score_mod` reads too.
    precision : {"full", "tf32"}
        As for `flash_attn_func`; the pullback has the same.
    return_lse : bool
        Also return the log-sum-exp.

    Returns
    -------
    out : array
        As from `flash_attn_func`; (out, lse) with `return_lse`.
    pullback : callable
        ``pullback(dout, dlse=None) -> (dq, dk, dv)``, or `Gradients` or `CapturedGradients`, as from
        `flash_attn_backward`.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        As `flash_attn_func`.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> q = k = v = np.ones((1, 3, 2, 4), np.float32)
    >>> out, pullback = cuflash.flash_attn_vjp(q, k, v, causal=True)
    >>> dq, dk, dv = pullback(np.ones_like(out))
    """
    try:
        options = asked(
            softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap, alignment=alignment,
            dropout_p=dropout_p, dropout_scheme=dropout_scheme, unbiased_dropout=unbiased_dropout,
            max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, num_splits=num_splits, deterministic=deterministic,
            bias_grad=bias_grad, validate=validate, precision=precision,
        )  # fmt: skip
        arrays = new(
            Arrays, q=q, k=k, v=v, mask=attn_mask, bias=attn_bias, alibi=alibi_slopes, sink=sink,
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_k, seqused_q=seqused_q, seqused_kv=seqused_k,
        )  # fmt: skip
        if captured_grad is not False or score_mod is not None or mask_mod is not None or block_mask is not None:
            options, arrays = with_mods(options, arrays, score_mod, mask_mod, captured_grad, block_mask)
        return_lse = flag("return_lse", return_lse)
        out, lse, pullback = ops.vjp(options, arrays, generator)
        return ((out, lse) if return_lse else out), pullback
    except REFUSALS as error:
        shorten(error)
        raise
