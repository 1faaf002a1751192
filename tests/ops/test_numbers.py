"""Numbers of every size, of NumPy and of the kernels, on the CPU and on a GPU."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from backends import Backend, assert_right
from inputs import BF16, FP16, FP32, FP64, random

from cuflash import ops

LEAST = float(np.finfo(FP32).min)
CLOSE = {FP16: 4e-3, BF16: 3e-2, FP32: 2e-5, FP64: 1e-9}
"""How far results may be off beside numbers of about 1."""


def dtypes_of(place: Backend) -> list[type]:
    """What the family of a place takes."""
    return [FP16, BF16] if place.family and "sm80" in place.family else [BF16, FP32, FP64]


def whole_numbers(dtype: type, sq: int, sk: int, h: int = 2, d: int = 16) -> list[np.ndarray]:
    """q, k, v and dout, of which q and k make scores that are multiples of 1/4 in every dtype."""
    rng = np.random.default_rng([sq, sk])
    q, k = (rng.integers(-2, 3, (1, n, heads, d)) for n, heads in ((sq, h), (sk, 1)))
    v, dout = (rng.standard_normal((1, n, heads, d)) for n, heads in ((sk, 1), (sq, h)))
    return [x.astype(dtype) for x in (q, k, v, dout)]


def rounded_logits(q: np.ndarray, k: np.ndarray, level: float) -> np.ndarray:
    """(1, h, sq, sk): what is left of q.k / 4 + level in the dtype of sums."""
    real = FP64 if q.dtype == FP64 else FP32
    scores = np.einsum("bqhd,bkgd->bhqk", q.astype(real), k.astype(real)) / 4
    with np.errstate(over="ignore"):
        return scores + real(level)


def assert_sums_to_one(dv: np.ndarray, dout: np.ndarray, dtype: type) -> None:
    """Rows of P do, if the gradients of all values sum to those of all outputs."""
    given = dout.astype(FP64).sum((1, 2))
    np.testing.assert_allclose(dv.astype(FP64).sum((1, 2)), given, atol=CLOSE[dtype] * 20, rtol=CLOSE[dtype])


@pytest.mark.sample(4)
@pytest.mark.parametrize("level", [-1e4, 2e5, -1e9, 1e10, -1e31, 2.4e38, LEAST])
def test_finite_logits_of_any_size_are_weighed(backend: Backend, level: float) -> None:
    for dtype in dtypes_of(backend):
        q, k, v, dout = whole_numbers(dtype, 9, 70)
        bias = np.full((1, 1, 9, 70), level, FP32)
        logits = rounded_logits(q, k, level)
        exact = oracle.attention(q * dtype(0), k, v, dout, bias=logits)
        out, lse, dq, dk, dv = backend(q, k, v, dout, attn_bias=bias, softmax_scale=0.25, num_splits=1)
        np.testing.assert_allclose(out.astype(FP64), exact.out, atol=CLOSE[dtype])
        np.testing.assert_allclose(lse, exact.lse, rtol=1e-6)
        np.testing.assert_allclose(dv.astype(FP64), exact.dv, atol=4 * CLOSE[dtype])
        assert_sums_to_one(dv, dout, dtype)
        exact_dq = np.einsum("bhqk,bkgd->bqhd", exact.dbias, k.astype(FP64)) / 4
        exact_dk = np.einsum("bhqk,bqhd->bkd", exact.dbias, q.astype(FP64))[:, :, None] / 4
        np.testing.assert_allclose(dq.astype(FP64), exact_dq, atol=8 * CLOSE[dtype])
        np.testing.assert_allclose(dk.astype(FP64), exact_dk, atol=8 * CLOSE[dtype])


@pytest.mark.sample(4)
@pytest.mark.parametrize("feature", ["causal", "sink", "splits", "dropout", "packed", "mask", "bias-row"])
def test_large_logits_beside_everything_else(backend: Backend, feature: str) -> None:
    sq, sk, level = 70, 150, -1e9
    options: dict[str, Any] = {"num_splits": 3 if feature == "splits" and backend.family in ("sm80", "simt") else 1}
    known: dict[str, Any] = {}
    if feature in ("causal", "packed"):
        options["causal"] = known["causal"] = True
    if feature == "sink":
        options["sink"] = known["sink"] = np.array([level, level + 2048], FP32)
    if feature == "dropout":
        options |= {"dropout_p": 0.3, "generator": (5, 8)}
        known |= {"dropout_p": 0.3, "rng_state": (5, 8)}
    if feature == "mask":
        options["attn_mask"] = known["mask"] = np.random.default_rng(1).random((sq, sk)) < 0.1
    for dtype in dtypes_of(backend)[-2:-1]:
        q, k, v, dout = whole_numbers(dtype, sq, sk)
        bias = np.full((1, 1, 1 if feature == "bias-row" else sq, sk), level, FP32)
        logits = rounded_logits(q, k, level)
        if feature == "packed":
            q, k, v, dout = (x[0] for x in (q, k, v, dout))
            ends = {"cu_seqlens_q": [0, 30, 70], "cu_seqlens_k": [0, 64, 150]}
            starts = {name: np.array(x, np.int32) for name, x in ends.items()}
            parts = [logits[:, :, :30, :64], logits[:, :, 30:, 64:]]
            whole = np.zeros((2, 2, 40, 86))
            for x, part in zip(whole, parts, strict=True):
                x[:, : part.shape[2], : part.shape[3]] = part[0]
            options |= starts | {"max_seqlen_q": 40, "max_seqlen_k": 86}
            known |= starts
            bias, logits = bias[:, :, :40, :86], whole
        exact = oracle.attention(q * dtype(0), k, v, dout, bias=logits, **known)
        out, lse, _, _, dv = backend(q, k, v, dout, attn_bias=bias, softmax_scale=0.25, **options)
        np.testing.assert_allclose(out.astype(FP64), exact.out, atol=CLOSE[dtype])
        np.testing.assert_allclose(lse, exact.lse, rtol=1e-6)
        np.testing.assert_allclose(dv.astype(FP64), exact.dv, atol=8 * CLOSE[dtype])


def test_products_far_beyond_the_numbers_of_exponents(backend: Backend) -> None:
    """Equal logits of 10^11: rows are means, their gradients those of means."""
    for dtype in (each for each in dtypes_of(backend) if each != FP16):
        q, k = np.full((1, 9, 2, 64), 133120, dtype), np.full((1, 300, 1, 64), 133120, dtype)
        v, dout = (np.random.default_rng(7).standard_normal((1, n, h, 64)).astype(dtype) for n, h in ((300, 1), (9, 2)))
        for sign in (1, -1):
            out, lse, _, _, dv = backend(q * dtype(sign), k, v, dout, num_splits=1)
            mean = v.astype(FP64).mean(1, keepdims=True)
            np.testing.assert_allclose(out.astype(FP64), np.broadcast_to(mean, out.shape), atol=CLOSE[dtype])
            np.testing.assert_allclose(lse, sign * 133120.0**2 * 8, rtol=1e-6)
            assert_sums_to_one(dv, dout, dtype)


@pytest.mark.sample(5)
@pytest.mark.parametrize("softcap", [2.0**-126, 0.5, 50.0, 1e4, 1e9, 2.0**126])
def test_soft_caps_of_every_size(backend: Backend, softcap: float) -> None:
    for dtype in dtypes_of(backend):
        arrays = [random(1, n, h, 32, seed=n, dtype=dtype) for n, h in ((9, 2), (70, 1))]
        arrays = [*(x * dtype(2) for x in arrays), random(1, 70, 1, 32, seed=3, dtype=dtype)]
        arrays.append(random(1, 9, 2, 32, seed=4, dtype=dtype))
        results = backend(*arrays, softcap=softcap, num_splits=1)
        with np.errstate(over="ignore"):
            assert_right(results, arrays, softcap=softcap)


def test_small_values_come_back(backend: Backend) -> None:
    """A query that sees one key gets its value, bit for bit, down to four times the smallest normal number."""
    for dtype in dtypes_of(backend):
        least = dtype(4) * dtype(ml_dtypes.finfo(dtype).tiny)
        v = np.tile(np.array([least, -least, 3 * least, 1], dtype), (1, 5, 1, 8))
        q, k = random(1, 5, 1, 32, dtype=dtype), random(1, 5, 1, 32, seed=1, dtype=dtype)
        out, _ = backend(q, k, v, window_size=(0, 0), num_splits=1)
        assert out.tobytes() == v.tobytes(), dtype


@pytest.mark.sample(4)
@pytest.mark.parametrize("level", [0.0, 30.0, 300.0])
def test_large_values_whose_weighted_sums_fit_come_back(backend: Backend, level: float) -> None:
    """Of logits near `level`: what weights are relative to must not bring sums beyond the largest number."""
    for dtype in (each for each in dtypes_of(backend) if each in (BF16, FP32)):
        q, k, v = (random(1, n, h, 32, seed=n + h, dtype=dtype) for n, h in ((90, 2), (100, 1), (100, 1)))
        q, k, v = np.copy(q), np.copy(k), np.flip(v, 1) * dtype(2.0**106)
        q[..., 0], k[..., 0] = 4, level / 4
        out, lse = backend(q, k, v, softmax_scale=1.0, num_splits=1)
        exact = oracle.attention(q, k, v, scale=1.0)
        off = CLOSE[dtype] * (1 + level / 20)  # logits are rounded in fp32
        np.testing.assert_allclose(out.astype(FP64) * 2.0**-106, exact.out * 2.0**-106, atol=off)
        np.testing.assert_allclose(lse, exact.lse, rtol=1e-6, atol=1e-5)


def test_one_log_sum_exp_says_what_it_can(backend: Backend) -> None:
    """Without the forward's state rows of P sum to 1 within the rounding of lse: here of 1/64 of exp(lse)."""
    (dtype, *_) = dtypes_of(backend)
    q, k, v, dout = whole_numbers(dtype, 9, 70)
    bias = np.full((1, 1, 9, 70), 2e5, FP32)
    options = ops.asked(softmax_scale=0.25, family=backend.family, num_splits=1)
    arrays = ops.Arrays(*map(backend.put, (q, k, v)), bias=backend.put(bias))
    out, lse = ops.forward(options, arrays)
    gradients = ops.backward(options.replace(num_splits=0), arrays._replace(out=out, dout=backend.put(dout), lse=lse))
    dv, given = backend.get(gradients[2]).astype(FP64).sum((1, 2)), dout.astype(FP64).sum((1, 2))
    np.testing.assert_allclose(dv, given, atol=0.1 * np.abs(dout.astype(FP64)).sum(1).max())
