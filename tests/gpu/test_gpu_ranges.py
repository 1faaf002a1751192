"""How exact fp32 and fp64 are on a GPU, whatever the range of numbers and however long the sums: beside naive ones."""

from __future__ import annotations

from typing import Any

import flash_words
import numpy as np
import pytest
from inputs import scaled

from cuflash import ops

pytestmark = pytest.mark.gpu

_ROWS = 1024
"""Queries at a time, of which all scores are written down."""


def attention(xp: Any, dtype: type, q: Any, k: Any, v: Any, dout: Any) -> list[Any]:
    """out, dq, dk and dv of one head by whole matrices in one type."""
    q, k, v, dout = (x[0, :, 0].astype(dtype) for x in (q, k, v, dout))  # of NumPy's long doubles on the host
    scale = dtype(q.shape[1] ** -0.5)
    out, dq, dk, dv = (xp.zeros_like(x) for x in (dout, q, k, v))
    for first in range(0, len(q), _ROWS):
        rows = slice(first, first + _ROWS)
        p = q[rows] @ k.T
        p *= scale
        p -= p.max(axis=1, keepdims=True)
        xp.exp(p, out=p)
        p /= p.sum(axis=1, keepdims=True)
        out[rows] = p @ v
        ds = dout[rows] @ v.T
        ds -= (dout[rows] * out[rows]).sum(axis=1, keepdims=True)
        ds *= p
        ds *= scale
        dq[rows] = ds @ k
        dk += ds.T @ q[rows]
        dv += p.T @ dout[rows]
    return [out, dq, dk, dv]


def size(xp: Any, x: Any) -> float:
    """The root of the mean square of numbers whose squares fp64 may not have."""
    most = float(xp.abs(x).max())
    return most * float(xp.sqrt(xp.square(x / most).mean())) if most else 0.0


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", [1000, 8192, 65_536])
@pytest.mark.parametrize("kind", ["normal", "lognormal", "large", "tiny"])
@pytest.mark.parametrize("family", ["sm80", "simt"])
def test_fp32_is_as_exact_as_naive_fp32(cp: Any, family: str, kind: str, length: int, dim: int) -> None:
    if family == "simt" and length > 1000:
        pytest.skip("sums of as many terms round more than those of blocks do")
    q, k, v, dout = (cp.asarray(x) for x in scaled(kind, length, length, dim, seed=length + dim))
    options = flash_words.options({}, family=family)
    out, _, pullback = ops.vjp(options, flash_words.arrays({}, q=q, k=k, v=v))
    results = [out, *pullback(dout)[:3]]
    exact, naive = (attention(cp, dtype, q, k, v, dout) for dtype in (np.float64, np.float32))
    for name, x, e, n in zip(("out", "dq", "dk", "dv"), results, exact, naive, strict=True):
        error, allowed = size(cp, x[0, :, 0] - e), 2 * size(cp, n - e) + 2.0**-23 * size(cp, e) + 2.0**-126
        print(f"{family} {kind} {length} d{dim} {name}: {error / max(allowed, 1e-300):.3f} of what is allowed")
        assert error <= allowed, f"{name}: {error:.3g}, {allowed:.3g} are allowed"


@pytest.mark.parametrize(
    "lengths", [(64, 8192), (8192, 64), (300, 500)], ids=lambda lengths: "x".join(map(str, lengths))
)
@pytest.mark.parametrize("kind", ["normal", "lognormal"])
@pytest.mark.parametrize("dim", [40, 64, 128])
@pytest.mark.parametrize("family", ["sm80", "simt"])
def test_fp64_is_as_exact_as_naive_fp64(cp: Any, family: str, dim: int, kind: str, lengths: tuple[int, int]) -> None:
    inputs = [x.astype(np.float64) * (1 + 2.0**-30) for x in scaled(kind, *lengths, dim, seed=sum(lengths) + dim)]
    q, k, v, dout = map(cp.asarray, inputs)
    options = flash_words.options({}, family=family)
    out, _, pullback = ops.vjp(options, flash_words.arrays({}, q=q, k=k, v=v))
    results = [out, *pullback(dout)[:3]]
    exact, naive = (attention(np, dtype, *inputs) for dtype in (np.longdouble, np.float64))
    for name, x, e, n in zip(("out", "dq", "dk", "dv"), results, exact, naive, strict=True):
        error = size(np, cp.asnumpy(x)[0, :, 0] - e)
        allowed = 2 * size(np, n - e) + 2.0**-52 * size(np, e)
        print(f"{family} {kind} {lengths} d{dim} {name}: {error / allowed:.3f} of what is allowed")
        assert error <= allowed, f"{name}: {error:.3g}, {allowed:.3g} are allowed"
