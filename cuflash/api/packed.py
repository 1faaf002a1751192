"""Attention of queries, keys and values that lie in one array, with flash-attn's names, argument order and meaning."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

from cuflash.api.flash import flash_attn_func, flash_attn_varlen_func
from cuflash.api.keywords import FlashOptions, VarlenOptions
from cuflash.arrays import Array, ArrayT
from cuflash.errors import REFUSALS, InvalidArgument, shorten


@overload
def flash_attn_kvpacked_func(
    q: ArrayT, kv: Array, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *, return_lse: Literal[False] = ...,
    return_rng_state: Literal[False] = ..., **keywords: Unpack[FlashOptions],
) -> ArrayT: ...  # fmt: skip
@overload
def flash_attn_kvpacked_func(
    q: ArrayT, kv: Array, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *, return_lse: Literal[True],
    return_rng_state: Literal[False] = ..., **keywords: Unpack[FlashOptions],
) -> tuple[ArrayT, Array]: ...  # fmt: skip
@overload
def flash_attn_kvpacked_func(
    q: ArrayT, kv: Array, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *, return_lse: Literal[False] = ...,
    return_rng_state: Literal[True], **keywords: Unpack[FlashOptions],
) -> tuple[ArrayT, Array | None]: ...  # fmt: skip
@overload
def flash_attn_kvpacked_func(
    q: ArrayT, kv: Array, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *, return_lse: Literal[True],
    return_rng_state: Literal[True], **keywords: Unpack[FlashOptions],
) -> tuple[ArrayT, Array, Array | None]: ...  # fmt: skip
@overload
def flash_attn_kvpacked_func(
    q: ArrayT, kv: Array, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., *, return_attn_probs: Literal[True], return_lse: bool = ...,
    return_rng_state: Literal[False] = ..., **keywords: Unpack[FlashOptions],
) -> tuple[ArrayT, Array, Array]: ...  # fmt: skip
@overload
def flash_attn_kvpacked_func(
    q: ArrayT, kv: Array, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., *, return_attn_probs: Literal[True], return_lse: bool = ...,
    return_rng_state: Literal[True], **keywords: Unpack[FlashOptions],
) -> tuple[ArrayT, Array, Array, Array | None]: ...  # fmt: skip
@overload
def flash_attn_kvpacked_func(
    q: ArrayT, kv: Array, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: bool = ..., *, return_lse: bool = ..., return_rng_state: bool = ...,
    **keywords: Unpack[FlashOptions],
) -> ArrayT | tuple[Any, ...]: ...  # fmt: skip
def flash_attn_kvpacked_func(
    q: Array,
    kv: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    return_lse: bool = False,
    return_rng_state: bool = False,
    **keywords: Unpack[FlashOptions],
) -> Array | tuple[Array | None, ...]:
    """`flash_attn_func` of keys and values in one array.

    Parameters
    ----------
    q : array, (b, len_q, heads_q, dim)
        Queries.
    kv : array, (b, len_kv, 2, heads_kv, dim)
        Keys, then values.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As for `flash_attn_func`.
    return_lse, return_rng_state
        As for `flash_attn_func`.
    **keywords
        The other keywords of `flash_attn_func`.

    Returns
    -------
    out : array, (b, len_q, heads_q, dim)
        And with `return_lse` the log-sum-exp, (b, heads_q, len_q).

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        As `flash_attn_func`.
    """
    try:
        k, v = _unpacked("kv", kv, ("b", "s", "2", "h", "d"))
        options = (
            dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        )  # fmt: skip
        return flash_attn_func(q, k, v, *options, return_lse=return_lse, return_rng_state=return_rng_state, **keywords)
    except REFUSALS as error:
        shorten(error)
        raise


@overload
def flash_attn_qkvpacked_func(
    qkv: Array, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *, return_lse: Literal[False] = ...,
    return_rng_state: Literal[False] = ..., **keywords: Unpack[FlashOptions],
) -> Array: ...  # fmt: skip
@overload
def flash_attn_qkvpacked_func(
    qkv: Array, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *, return_lse: Literal[True],
    return_rng_state: Literal[False] = ..., **keywords: Unpack[FlashOptions],
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def flash_attn_qkvpacked_func(
    qkv: Array, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *, return_lse: Literal[False] = ...,
    return_rng_state: Literal[True], **keywords: Unpack[FlashOptions],
) -> tuple[Array, Array | None]: ...  # fmt: skip
@overload
def flash_attn_qkvpacked_func(
    qkv: Array, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *, return_lse: Literal[True],
    return_rng_state: Literal[True], **keywords: Unpack[FlashOptions],
) -> tuple[Array, Array, Array | None]: ...  # fmt: skip
@overload
def flash_attn_qkvpacked_func(
    qkv: Array, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., *, return_attn_probs: Literal[True], return_lse: bool = ...,
    return_rng_state: Literal[False] = ..., **keywords: Unpack[FlashOptions],
) -> tuple[Array, Array, Array]: ...  # fmt: skip
@overload
def flash_attn_qkvpacked_func(
    qkv: Array, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., *, return_attn_probs: Literal[True], return_lse: bool = ...,
    return_rng_state: Literal[True], **keywords: Unpack[FlashOptions],
) -> tuple[Array, Array, Array, Array | None]: ...  # fmt: skip
@overload
def flash_attn_qkvpacked_func(
    qkv: Array, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: bool = ..., *, return_lse: bool = ..., return_rng_state: bool = ...,
    **keywords: Unpack[FlashOptions],
) -> Array | tuple[Any, ...]: ...  # fmt: skip
def flash_attn_qkvpacked_func(
    qkv: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    return_lse: bool = False,
    return_rng_state: bool = False,
    **keywords: Unpack[FlashOptions],
) -> Array | tuple[Array | None, ...]:
    """`flash_attn_func` of queries, keys and values in one array.

    Parameters
    ----------
    qkv : array, (b, s, 3, h, dim)
        Queries, then keys, then values.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As for `flash_attn_func`.
    return_lse, return_rng_state
        As for `flash_attn_func`.
    **keywords
        The other keywords of `flash_attn_func`.

    Returns
    -------
    out : array, (b, s, h, dim)
        And with `return_lse` the log-sum-exp, (b, h, s).

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        As `flash_attn_func`.
    """
    try:
        q, k, v = _unpacked("qkv", qkv, ("b", "s", "3", "h", "d"))
        options = (
            dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        )  # fmt: skip
        return flash_attn_func(q, k, v, *options, return_lse=return_lse, return_rng_state=return_rng_state, **keywords)
    except REFUSALS as error:
        shorten(error)
        raise


@overload
def flash_attn_varlen_kvpacked_func(
    q: ArrayT, kv: Array, cu_seqlens_q: Array, cu_seqlens_k: Array, max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ..., dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *, return_lse: Literal[False] = ...,
    return_rng_state: Literal[False] = ..., **keywords: Unpack[VarlenOptions],
) -> ArrayT: ...  # fmt: skip
@overload
def flash_attn_varlen_kvpacked_func(
    q: ArrayT, kv: Array, cu_seqlens_q: Array, cu_seqlens_k: Array, max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ..., dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *, return_lse: Literal[True],
    return_rng_state: Literal[False] = ..., **keywords: Unpack[VarlenOptions],
) -> tuple[ArrayT, Array]: ...  # fmt: skip
@overload
def flash_attn_varlen_kvpacked_func(
    q: ArrayT, kv: Array, cu_seqlens_q: Array, cu_seqlens_k: Array, max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ..., dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *, return_lse: Literal[False] = ...,
    return_rng_state: Literal[True], **keywords: Unpack[VarlenOptions],
) -> tuple[ArrayT, Array | None]: ...  # fmt: skip
@overload
def flash_attn_varlen_kvpacked_func(
    q: ArrayT, kv: Array, cu_seqlens_q: Array, cu_seqlens_k: Array, max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ..., dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *, return_lse: Literal[True],
    return_rng_state: Literal[True], **keywords: Unpack[VarlenOptions],
) -> tuple[ArrayT, Array, Array | None]: ...  # fmt: skip
@overload
def flash_attn_varlen_kvpacked_func(
    q: ArrayT, kv: Array, cu_seqlens_q: Array, cu_seqlens_k: Array, max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ..., dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., *, return_attn_probs: Literal[True], return_lse: bool = ...,
    return_rng_state: Literal[False] = ..., **keywords: Unpack[VarlenOptions],
) -> tuple[ArrayT, Array, Array]: ...  # fmt: skip
@overload
def flash_attn_varlen_kvpacked_func(
    q: ArrayT, kv: Array, cu_seqlens_q: Array, cu_seqlens_k: Array, max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ..., dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., *, return_attn_probs: Literal[True], return_lse: bool = ...,
    return_rng_state: Literal[True], **keywords: Unpack[VarlenOptions],
) -> tuple[ArrayT, Array, Array, Array | None]: ...  # fmt: skip
@overload
def flash_attn_varlen_kvpacked_func(
    q: ArrayT, kv: Array, cu_seqlens_q: Array, cu_seqlens_k: Array, max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ..., dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: bool = ..., *, return_lse: bool = ..., return_rng_state: bool = ...,
    **keywords: Unpack[VarlenOptions],
) -> ArrayT | tuple[Any, ...]: ...  # fmt: skip
def flash_attn_varlen_kvpacked_func(
    q: Array,
    kv: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    return_lse: bool = False,
    return_rng_state: bool = False,
    **keywords: Unpack[VarlenOptions],
) -> Array | tuple[Array | None, ...]:
    """`flash_attn_varlen_func` of keys and values in one array.

    Parameters
    ----------
    q : array, (total_q, heads_q, dim)
        Queries of all sequences.
    kv : array, (total_kv, 2, heads_kv, dim)
        Keys, then values.
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        As for `flash_attn_varlen_func`.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As for `flash_attn_func`.
    return_lse, return_rng_state
        As for `flash_attn_func`.
    **keywords
        The other keywords of `flash_attn_varlen_func`.

    Returns
    -------
    out : array, (total_q, heads_q, dim)
        And with `return_lse` the log-sum-exp, (heads_q, total_q).

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        As `flash_attn_func`.
    """
    try:
        k, v = _unpacked("kv", kv, ("total", "2", "h", "d"))
        options = (
            dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        )  # fmt: skip
        return flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options, return_lse=return_lse,
            return_rng_state=return_rng_state, **keywords,
        )  # fmt: skip
    except REFUSALS as error:
        shorten(error)
        raise


@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: Array, cu_seqlens: Array, max_seqlen: int | None = ..., dropout_p: float = ...,
    softmax_scale: float | None = ..., causal: bool = ..., window_size: tuple[int, int] = ..., softcap: float = ...,
    alibi_slopes: Array | None = ..., deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *,
    return_lse: Literal[False] = ..., return_rng_state: Literal[False] = ..., **keywords: Unpack[VarlenOptions],
) -> Array: ...  # fmt: skip
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: Array, cu_seqlens: Array, max_seqlen: int | None = ..., dropout_p: float = ...,
    softmax_scale: float | None = ..., causal: bool = ..., window_size: tuple[int, int] = ..., softcap: float = ...,
    alibi_slopes: Array | None = ..., deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *,
    return_lse: Literal[True], return_rng_state: Literal[False] = ..., **keywords: Unpack[VarlenOptions],
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: Array, cu_seqlens: Array, max_seqlen: int | None = ..., dropout_p: float = ...,
    softmax_scale: float | None = ..., causal: bool = ..., window_size: tuple[int, int] = ..., softcap: float = ...,
    alibi_slopes: Array | None = ..., deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *,
    return_lse: Literal[False] = ..., return_rng_state: Literal[True], **keywords: Unpack[VarlenOptions],
) -> tuple[Array, Array | None]: ...  # fmt: skip
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: Array, cu_seqlens: Array, max_seqlen: int | None = ..., dropout_p: float = ...,
    softmax_scale: float | None = ..., causal: bool = ..., window_size: tuple[int, int] = ..., softcap: float = ...,
    alibi_slopes: Array | None = ..., deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *,
    return_lse: Literal[True], return_rng_state: Literal[True], **keywords: Unpack[VarlenOptions],
) -> tuple[Array, Array, Array | None]: ...  # fmt: skip
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: Array, cu_seqlens: Array, max_seqlen: int | None = ..., dropout_p: float = ...,
    softmax_scale: float | None = ..., causal: bool = ..., window_size: tuple[int, int] = ..., softcap: float = ...,
    alibi_slopes: Array | None = ..., deterministic: bool = ..., *, return_attn_probs: Literal[True],
    return_lse: bool = ..., return_rng_state: Literal[False] = ..., **keywords: Unpack[VarlenOptions],
) -> tuple[Array, Array, Array]: ...  # fmt: skip
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: Array, cu_seqlens: Array, max_seqlen: int | None = ..., dropout_p: float = ...,
    softmax_scale: float | None = ..., causal: bool = ..., window_size: tuple[int, int] = ..., softcap: float = ...,
    alibi_slopes: Array | None = ..., deterministic: bool = ..., *, return_attn_probs: Literal[True],
    return_lse: bool = ..., return_rng_state: Literal[True], **keywords: Unpack[VarlenOptions],
) -> tuple[Array, Array, Array, Array | None]: ...  # fmt: skip
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: Array, cu_seqlens: Array, max_seqlen: int | None = ..., dropout_p: float = ...,
    softmax_scale: float | None = ..., causal: bool = ..., window_size: tuple[int, int] = ..., softcap: float = ...,
    alibi_slopes: Array | None = ..., deterministic: bool = ..., return_attn_probs: bool = ..., *,
    return_lse: bool = ..., return_rng_state: bool = ..., **keywords: Unpack[VarlenOptions],
) -> Array | tuple[Any, ...]: ...  # fmt: skip
def flash_attn_varlen_qkvpacked_func(
    qkv: Array,
    cu_seqlens: Array,
    max_seqlen: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    return_lse: bool = False,
    return_rng_state: bool = False,
    **keywords: Unpack[VarlenOptions],
) -> Array | tuple[Array | None, ...]:
    """`flash_attn_varlen_func` of queries, keys and values in one array.

    Parameters
    ----------
    qkv : array, (total, 3, h, dim)
        Queries, then keys, then values.
    cu_seqlens : array of int32, (b + 1,)
        The row at which each sequence starts, and the end of the last.
    max_seqlen : int, optional
        At least as long as the longest sequence; None reads `cu_seqlens`, as in `flash_attn_varlen_func`.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As for `flash_attn_func`.
    return_lse, return_rng_state
        As for `flash_attn_func`.
    **keywords
        The other keywords of `flash_attn_varlen_func`.

    Returns
    -------
    out : array, (total, h, dim)
        And with `return_lse` the log-sum-exp, (h, total).

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        As `flash_attn_func`.
    """
    try:
        q, k, v = _unpacked("qkv", qkv, ("total", "3", "h", "d"))
        options = (
            dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        )  # fmt: skip
        return flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *options, return_lse=return_lse,
            return_rng_state=return_rng_state, **keywords,
        )  # fmt: skip
    except REFUSALS as error:
        shorten(error)
        raise


def _unpacked(name: str, x: Array, axes: tuple[str, ...]) -> list[Array]:
    """Views of the q, k and v in one array; the axis that is named by a number holds them."""
    axis = next(i for i, a in enumerate(axes) if a.isdigit())
    shape = getattr(x, "shape", None)
    if shape is None:
        raise InvalidArgument(f"{name} is a {type(x).__name__}; expected an array ({', '.join(axes)}).")
    if len(shape) != len(axes) or shape[axis] != int(axes[axis]):
        raise InvalidArgument(f"{name} has shape {tuple(shape)}; expected ({', '.join(axes)}).")
    return [x[(slice(None),) * axis + (i,)] for i in range(shape[axis])]
