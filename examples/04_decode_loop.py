"""A decoding loop: each step appends one key and value to a cache in place and attends to all that is in it.

A small language model's attention layer answers 40 tokens for 3 prompts of different lengths, which share one cache.
Every step is one call; what it returns is compared with attention of the whole sequence at once.
"""

import numpy as np

import cuflash

try:
    import cupy as xp

    xp.cuda.runtime.getDeviceCount()
except Exception:  # no CuPy, no driver or no GPU: NumPy runs the same calls on the CPU
    xp = np

prompts, steps, room = [17, 96, 50], 40, 160
batch, heads, heads_kv, dim = len(prompts), 8, 2, 64
rng = np.random.default_rng(0)


def projected(heads: int) -> xp.ndarray:
    """What a layer would compute of every token: queries, keys or values, (b, prompt and answer, heads, dim)."""
    return xp.asarray(rng.standard_normal((batch, max(prompts) + steps, heads, dim), dtype=np.float32))


q, k, v = projected(heads), projected(heads_kv), projected(heads_kv)

# Positions turn queries and keys; the cache holds turned keys, so that a step turns its own token alone.
angles = np.outer(np.arange(room), 10_000.0 ** -np.linspace(0, 1, dim // 2, endpoint=False))
cos, sin = (xp.asarray(f(angles).astype(np.float32)) for f in (np.cos, np.sin))


def turned(x: xp.ndarray, positions: range) -> xp.ndarray:
    """Rows of (b, s, h, dim) turned by their positions, a column with the one half of the columns away."""
    first, second = x[..., : dim // 2], x[..., dim // 2 :]
    c, s = cos[positions.start : positions.stop, None], sin[positions.start : positions.stop, None]
    return xp.concatenate([first * c - second * s, first * s + second * c], axis=-1)


k_cache, v_cache = xp.full((2, batch, room, heads_kv, dim), np.nan, np.float32)  # rows that nobody uses are not read
for b, length in enumerate(prompts):
    k_cache[b, :length] = turned(k[b : b + 1, :length], range(length))[0]
    v_cache[b, :length] = v[b, :length]
used = xp.asarray(prompts, dtype=np.int32)  # stays where the arrays are: no step waits for the GPU

answers = []
for step in range(steps):
    token = [slice(length + step, length + step + 1) for length in prompts]
    q_new, k_new, v_new = (xp.stack([x[b, at] for b, at in enumerate(token)]) for x in (q, k, v))
    answers.append(
        cuflash.flash_attn_with_kvcache(
            q_new, k_cache, v_cache, k_new, v_new, cos, sin, used, causal=True, rotary_interleaved=False
        )
    )
    used += 1
answers = xp.concatenate(answers, axis=1)
print(f"{steps} steps for {batch} prompts of {prompts} tokens: {answers.shape} {answers.dtype} on {xp.__name__}")

error = 0.0
for b, length in enumerate(prompts):
    whole = range(length + steps)
    whole_q, whole_k = (turned(x[b : b + 1, : len(whole)], whole) for x in (q, k))
    expected = cuflash.flash_attn_func(whole_q, whole_k, v[b : b + 1, : len(whole)], causal=True)
    error = max(error, float(xp.abs(answers[b] - expected[0, length:]).max()))
print(f"largest difference from attention of each whole sequence: {error:.1e}")
assert error < 1e-5

written = int(xp.isfinite(k_cache[..., 0, 0]).sum())
print(f"rows of the cache in use: {written}, as many as there are tokens: {written == sum(prompts) + batch * steps}")
assert written == sum(prompts) + batch * steps
