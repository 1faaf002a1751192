"""What is computed on the CPU does not depend on NumPy's error state, whatever the numbers: every feature is silent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from inputs import BF16, FP16, FP32, FP64

import cuflash
from cuflash import mods

STARTS = np.array([0, 3, 3, 9], np.int32)
SINK = np.array([0.5, -1, 1e30, -np.inf], FP32)
SLOPES = np.array([0.5, 1e30, 0, -1], FP32)
MASK = np.arange(81).reshape(9, 9) % 4 > 0
DRAWN = {"dropout_p": 0.5, "generator": (1, 4)}


def calls(q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray, bias: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Every public function that computes, and every feature, of (1, 9, 4, 8) queries and two key heads."""
    real = FP64 if q.dtype == FP64 else FP32
    dlse = np.full((1, 4, 9), 1e30, real)
    wide_k, wide_v = (np.repeat(x, 2, axis=2) for x in (k, v))
    kv, qkv = np.stack([k, v], 2), np.stack([q, wide_k, wide_v], 2)
    turned = [x.swapaxes(1, 2).copy() for x in (q, k, v)]
    packed = [x[0] for x in (q, k, v)]
    lengths = {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS}
    table, pages = np.array([[1, 0], [0, 1], [1, 1]], np.int32), [x[0, :8].reshape(2, 4, 2, 8) for x in (k, v)]

    def vjp(*arrays: np.ndarray, dout: np.ndarray, dlse: np.ndarray | None = None, **options: Any) -> list[Any]:
        out, pullback = cuflash.flash_attn_vjp(*arrays, **options)
        return [out, *pullback(dout, dlse)]

    def written(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s * SLOPES[h] + mods.log(mods.abs(s)) / (q - k) - mods.exp(SINK[h] * 100)

    def backward() -> Any:
        out, lse = cuflash.flash_attn_func(q, k, v, return_lse=True)
        return cuflash.flash_attn_backward(g, q, k, v, out, lse, dq=np.empty_like(q))

    def mha() -> list[Any]:
        results = cuflash.mha_fwd(q, k, v, p_dropout=0.5, gen_=(1, 4), return_softmax=True)
        return [
            *results,
            *cuflash.mha_bwd(
                g, q, k, v, results[0], results[4], p_dropout=0.5, philox_seed=results[5], philox_offset=results[6]
            ),
        ]

    def mha_ck() -> list[Any]:
        results = cuflash.mha_fwd_ck(q, k, v, attn_bias_=bias)
        return [*results, *cuflash.mha_bwd_ck(g, q, k, v, results[0], results[4], None, None, None, bias, True)]

    def mha_varlen(forward: Any, backward: Any) -> list[Any]:
        results = forward(*packed, None, STARTS, STARTS)
        return [*results, *backward(g[0], *packed, results[0], results[4], None, None, None, STARTS, STARTS)]

    def mem_eff() -> list[Any]:
        results = cuflash.mem_eff_forward(q, k, v, attn_bias_=bias)
        return [
            *results,
            *cuflash.mem_eff_backward(
                g, q, k, v, results[0], results[4], None, None, None, attn_bias=bias, bias_requires_grad=True
            ),
        ]

    def efficient() -> list[Any]:
        results = cuflash.efficient_attention_forward(q, wide_k, wide_v, bias, compute_log_sumexp=True)
        return [
            *results,
            *cuflash.efficient_attention_backward(
                g, q, wide_k, wide_v, bias, results[0], None, None, None, None, results[1], 0.0, None, None, 0, True
            ),
        ]

    return {
        "func": lambda: cuflash.flash_attn_func(q, k, v, return_lse=True),
        "kvpacked": lambda: cuflash.flash_attn_kvpacked_func(q, kv, causal=True),
        "qkvpacked": lambda: cuflash.flash_attn_qkvpacked_func(qkv, window_size=(2, 1)),
        "probabilities": lambda: cuflash.flash_attn_func(q, k, v, **DRAWN, return_attn_probs=True),
        "pages": lambda: cuflash.flash_attn_varlen_func(
            packed[0], *pages, STARTS, np.array([0, 5, 13, 20], np.int32), block_table=table
        ),
        "varlen": lambda: cuflash.flash_attn_varlen_func(*packed, STARTS, STARTS, return_attn_probs=True),
        "prepared": lambda: cuflash.flash_attn_prepare(q, k, v)(q, k, v),
        "sdpa": lambda: cuflash.scaled_dot_product_attention(*turned, attn_mask=bias, enable_gqa=True),
        "vjp": lambda: vjp(q, k, v, dout=g, dlse=dlse, causal=True),
        "sink": lambda: vjp(q, k, v, dout=g, sink=SINK),
        "slopes": lambda: vjp(q, k, v, dout=g, alibi_slopes=SLOPES),
        "mask": lambda: vjp(q, k, v, dout=g, attn_mask=MASK),
        "bias": lambda: vjp(q, k, v, dout=g, attn_bias=bias, bias_grad=True, softcap=2.0),
        "cap": lambda: vjp(q, k, v, dout=g, softcap=1e30, softmax_scale=1e30),
        "dropout": lambda: vjp(q, k, v, dout=g, **DRAWN),
        "written": lambda: vjp(q, k, v, dout=g, score_mod=written, mask_mod=mods.causal(), captured_grad=True),
        "flex": lambda: cuflash.flex_attention(*turned, written, enable_gqa=True, return_lse=True),
        "word": lambda: vjp(q, k, v, dout=g, **DRAWN, dropout_scheme="word"),
        "packed": lambda: vjp(*packed, dout=g[0], **lengths, sink=SINK),
        "backward": backward,
        "mha": mha,
        "mha-ck": mha_ck,
        "mha-varlen": lambda: mha_varlen(cuflash.mha_varlen_fwd, cuflash.mha_varlen_bwd),
        "mha-varlen-ck": lambda: mha_varlen(cuflash.mha_varlen_fwd_ck, cuflash.mha_varlen_bwd_ck),
        "mem-eff": mem_eff,
        "efficient": efficient,
    }


@pytest.mark.parametrize("numbers", ["tiny", "subnormal", "large", "infinite", "nan"])
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32, FP64], ids=["fp16", "bf16", "fp32", "fp64"])
def test_no_function_depends_on_the_error_state(dtype: Any, numbers: str) -> None:
    rng = np.random.default_rng(0)
    heads = {"q": 4, "k": 2, "v": 2, "g": 4}
    draw = {name: rng.standard_normal((1, 9, count, 8)) for name, count in heads.items()}
    draw["bias"] = rng.standard_normal((1, 4, 9, 9))
    limits = ml_dtypes.finfo(dtype)
    with np.errstate(all="ignore"):
        draw = {name: x.astype(dtype) for name, x in draw.items()}
        bent = {
            "tiny": lambda x: x * limits.tiny,
            "subnormal": lambda x: x * limits.smallest_subnormal,
            "large": lambda x: np.where(x > 0, limits.max, x),
            "infinite": lambda x: np.where(x > 1, dtype(np.inf), x),
            "nan": lambda x: np.where(x > 1.5, dtype(np.nan), x),
        }[numbers]
        bent = {name: bent(x).astype(dtype) for name, x in draw.items()}
    for changed in ({"g"}, {"v"}, {"q", "bias"}, set(draw)):
        arguments = {name: bent[name] if name in changed else x for name, x in draw.items()}
        for name, call in calls(**arguments).items():
            with np.errstate(all="ignore"):
                expected = list(call())
            with np.errstate(all="raise"):
                results = list(call())
            for one, other in zip(_flat(results), _flat(expected), strict=True):
                if one is not None:
                    one, other = (x.astype(FP32) if getattr(x, "dtype", None) == BF16 else x for x in (one, other))
                    np.testing.assert_array_equal(one, other, err_msg=f"{name} of {numbers} {sorted(changed)}")


def _flat(results: list[Any]) -> list[Any]:
    """The results, those of captured arrays one by one."""
    return [x for result in results for x in (result if isinstance(result, tuple) else (result,))]
