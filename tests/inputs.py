"""Random arrays of the types that attention takes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

FP16, BF16, FP32, FP64 = np.float16, ml_dtypes.bfloat16, np.float32, np.float64


def random(*shape: int, dtype: Any = FP16, seed: int = 0) -> np.ndarray:
    """Standard normal numbers, others for every shape and seed."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def arrays(shape: dict, dtype: type, seed: int = 0) -> list[np.ndarray]:
    """q, k, v, dout and dlse of a dense problem; `shape` has b, h, hk, sq, sk, d, dv."""
    b, h, hk, sq, sk, d, dv = (shape[x] for x in ("b", "h", "hk", "sq", "sk", "d", "dv"))
    rng = np.random.default_rng(seed)
    shapes = (b, sq, h, d), (b, sk, hk, d), (b, sk, hk, dv), (b, sq, h, dv), (b, h, sq)
    q, k, v, dout, dlse = (rng.standard_normal(s) for s in shapes)
    return [*(x.astype(dtype) for x in (q, k, v, dout)), dlse.astype(FP64 if dtype is FP64 else FP32)]


def scaled(kind: str, rows: int, keys: int, dim: int, seed: int) -> list[np.ndarray]:
    """q, k, v and dout in fp32, of one head, with numbers of some range."""
    rng = np.random.default_rng(seed)
    q, k, v, dout = (rng.standard_normal((n, dim)) for n in (rows, keys, keys, rows))
    channels = np.exp2(rng.integers(-10, 11, dim))
    match kind:
        case "large":
            q, k, v = q * 2.0**-60, k * 2.0**60, v * 2.0**40
        case "tiny":
            q, k, v, dout = (x * 2.0**-100 for x in (q, k, v, dout))
        case "channels":  # what is small in q is large in k
            q, k, v = q * channels, k / channels, v * channels
        case "keys":
            v *= np.exp2(rng.integers(-30, 31, (keys, 1)))
        case "lognormal":
            q, k, v, dout = (x * np.exp(rng.standard_normal(x.shape)) for x in (q, k, v, dout))
        case "hidden":  # behind the causal mask
            k[rows:], v[rows:] = k[rows:] * 1e6, v[rows:] * 1e25
    return [x.astype(np.float32)[None, :, None] for x in (q, k, v, dout)]
