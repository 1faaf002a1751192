"""Causal attention in one call, checked against the formula written out in NumPy."""

import numpy as np

import cuflash

try:
    import cupy as xp

    xp.cuda.runtime.getDeviceCount()
except Exception:  # no CuPy, no driver or no GPU: NumPy runs the same calls on the CPU
    xp = np

batch, length, heads, dim = 2, 300, 4, 64
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((batch, length, heads, dim), dtype=np.float32) for _ in range(3))

out = cuflash.flash_attn_func(xp.asarray(q), xp.asarray(k), xp.asarray(v), causal=True)
print(f"flash_attn_func on {xp.__name__} arrays: {out.shape} {out.dtype}")

scores = np.einsum("bihd,bjhd->bhij", q, k) / dim**0.5
scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
expected = np.einsum("bhij,bjhd->bihd", weights / weights.sum(axis=-1, keepdims=True), v)

error = float(xp.abs(out - xp.asarray(expected)).max())
print(f"largest difference from softmax(q kᵀ / √d) v: {error:.1e}")
assert error < 1e-5
