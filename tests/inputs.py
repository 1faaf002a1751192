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
