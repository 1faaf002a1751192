"""Numbers of every size, of NumPy and of the kernels, on the CPU and on a GPU."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import oracle
import pytest
from test_known_limits import Backend, backend  # noqa: F401, the fixture is asked for by name
from test_launch import launches  # noqa: F401, asked for by the other

FP16, BF16, FP32, FP64 = np.float16, ml_dtypes.bfloat16, np.float32, np.float64
LEAST, MOST = float(np.finfo(FP32).min), float(np.finfo(FP32).max)
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


@pytest.mark.parametrize("level", [-1e4, 2e5, -1e9, 1e10, -1e31, 2.4e38, LEAST, MOST])
def test_finite_logits_of_any_size_are_weighed(backend: Backend, level: float) -> None:  # noqa: F811
    for dtype in dtypes_of(backend):
        q, k, v, dout = whole_numbers(dtype, 9, 70)
        bias = np.full((1, 1, 9, 70), level, FP32)
        logits = rounded_logits(q, k, level)
        exact = oracle.attention(q * dtype(0), k, v, dout, bias=logits)
        out, lse, dq, dk, dv = backend(q, k, v, dout, attn_bias=bias, softmax_scale=0.25)
        np.testing.assert_allclose(out.astype(FP64), exact.out, atol=CLOSE[dtype])
        np.testing.assert_allclose(lse, exact.lse, rtol=1e-6)
        np.testing.assert_allclose(dv.astype(FP64), exact.dv, atol=4 * CLOSE[dtype])
        assert_sums_to_one(dv, dout, dtype)
        assert np.isfinite(dq.astype(FP64)).all() and np.isfinite(dk.astype(FP64)).all()
