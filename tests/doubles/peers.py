"""Peers of the bench: functions of cuflash's own with the signatures of real ones, and what they need of torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

import cuflash
from cuflash.dtypes import BF16


def module(name: str, **contents: object) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(contents)
    return made


TORCH = SimpleNamespace(from_dlpack=lambda x: x, matmul=np.matmul, empty_like=np.empty_like)
"""Of torch what peers need whose functions take the inputs as they are."""


def flash_attn_3(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False):
    return cuflash.flash_attn_func(
        q, k, v, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap
    )


def flash_attn_3_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
    return cuflash.flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options), 0


def flash_attn_3_with_kvcache(
    q, k_cache, v_cache, cache_seqlens=None, page_table=None, cu_seqlens_q=None, max_seqlen_q=None, **options
):
    if cache_seqlens is not None and page_table is None:
        return cuflash.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=cache_seqlens, **options)
    if page_table is None:
        assert cu_seqlens_q is max_seqlen_q is None
        return cuflash.flash_attn_func(q, k_cache, v_cache, **options)
    cu_seqlens_k = np.concatenate([[0], np.cumsum(cache_seqlens)]).astype(np.int32)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, int(cache_seqlens.max())
    return cuflash.flash_attn_varlen_func(q, k_cache, v_cache, *lengths, block_table=page_table, **options)


def flash_attn_4(
    q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
    deterministic=False, **packed,
):  # fmt: skip
    """As the real one, an open side of a window is None, and what is returned is out and lse."""
    assert all(side is None or side >= 0 for side in window_size)
    assert {q.dtype, k.dtype, v.dtype} == {BF16.numpy}
    function = cuflash.flash_attn_varlen_func if packed else cuflash.flash_attn_func
    return function(
        q, k, v, softmax_scale=softmax_scale, causal=causal, softcap=softcap, sink=learnable_sink, return_lse=True,
        window_size=tuple(-1 if side is None else side for side in window_size), **packed,
    )  # fmt: skip


def flash_attn_4_varlen(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, **options,
):  # fmt: skip
    assert (qv, min_seqlen_k) == (None, None)
    packed = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "seqused_k": seqused_k}
    packed |= {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k, "seqused_q": seqused_q}
    return flash_attn_4(q, k, v, **packed, **options)


class EagerTorch:
    """torch, whose ``compile`` leaves a function as it is."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("torch"), name)

    def compile(self, function: Callable[..., Any], **options: object) -> Callable[..., Any]:
        return function
