"""Mistakes that type checkers find: each line is an error, or its comment is unused; never run."""

from typing import Any

import numpy as np

import cuflash

Array = np.ndarray[tuple[int, int, int, int], np.dtype[np.float16]]


def misspelt(q: Array, starts: Any) -> None:
    cuflash.flash_attn_func(q, q, q, causl=True)  # type: ignore[call-overload]  # pyright: ignore
    cuflash.flash_attn_kvpacked_func(q, q, atn_bias=q)  # type: ignore[call-overload]  # pyright: ignore
    cuflash.flash_attn_qkvpacked_func(q, retrun_lse=True)  # type: ignore[call-overload]  # pyright: ignore
    cuflash.flash_attn_varlen_func(q, q, q, starts, starts, seqsed_k=starts)  # type: ignore[call-overload]  # pyright: ignore
    cuflash.flash_attn_varlen_kvpacked_func(q, q, starts, starts, valdate=True)  # type: ignore[call-overload]  # pyright: ignore
    cuflash.flash_attn_varlen_qkvpacked_func(q, starts, seqused_r=starts)  # type: ignore[call-overload]  # pyright: ignore
    cuflash.flash_attn_vjp(q, q, q, windw_size=(1, 0))  # type: ignore[call-overload]  # pyright: ignore
    cuflash.flash_attn_bakward  # type: ignore[attr-defined]  # noqa: B018  # pyright: ignore
    cuflash.attention_map(q, q, dropout_p=0.1)  # type: ignore[call-arg]  # pyright: ignore
    cuflash.mha_fwd(q, q, q, causal=True)  # type: ignore[call-arg]  # pyright: ignore


def wrong_kind(q: Array, starts: Any) -> None:
    cuflash.flash_attn_func(q, q, q, alignment="bottom")  # type: ignore[call-overload]  # pyright: ignore
    cuflash.flash_attn_qkvpacked_func(q, dropout_scheme="bit")  # type: ignore[call-overload]  # pyright: ignore


def wrong_number(q: Array, lse: Any) -> None:
    out, lse, more = cuflash.flash_attn_func(q, q, q, return_lse=True)  # type: ignore[misc]  # pyright: ignore
    out, pullback = cuflash.flash_attn_vjp(q, q, q)
    dq, dk, dv, dbias, dsink = pullback(out)  # type: ignore[misc]  # pyright: ignore
    dq, dk, dv = cuflash.flash_attn_backward(q, q, q, q, q, lse, sink=q)  # type: ignore[misc]  # pyright: ignore
