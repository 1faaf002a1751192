"""What can be done to scores before and after the softmax, each beside the formula that it computes.

The formula is written out once, in float64 with whole matrices; a feature is an argument of the call and one line here.
"""

from collections.abc import Callable

import numpy as np

import cuflash

try:
    import cupy as xp

    xp.cuda.runtime.getDeviceCount()
except Exception:  # no CuPy, no driver or no GPU: NumPy runs the same calls on the CPU
    xp = np

batch, length, heads, dim = 2, 200, 4, 32
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((batch, length, heads, dim), dtype=np.float32) for _ in range(3))
distance = np.arange(length)[:, None] - np.arange(length)  # how far a key lies before its query
near = (distance <= 16) & (distance >= -4)
slopes = (2.0 ** -np.arange(1, heads + 1)).astype(np.float32)
bias = rng.standard_normal((1, heads, length, length), dtype=np.float32)
seen = rng.random((batch, 1, length, length)) < 0.5
sink = np.array([0, 2, 4, 8], np.float32)


def plain(scores: np.ndarray) -> np.ndarray:
    """Scores as they are, (b, h, len_q, len_kv)."""
    return scores


def attention(change: Callable = plain, of_sink: np.ndarray | None = None, kept: np.ndarray | float = 1) -> np.ndarray:
    """softmax(change(q kᵀ / √d)) v: a sink adds a logit without a value, dropout multiplies probabilities by `kept`."""
    scores = change(np.einsum("bihd,bjhd->bhij", q.astype(np.float64), k) / dim**0.5)
    logits = np.full(heads, -np.inf) if of_sink is None else of_sink
    top = np.maximum(scores.max(axis=-1, keepdims=True), logits[:, None, None])
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True) + np.exp(logits[:, None, None] - top)
    return np.einsum("bhij,bjhd->bihd", weights / total * kept, v)


def show(name: str, expected: np.ndarray, **options: object) -> None:
    """Compare a call with its closed form."""
    on_device = {word: xp.asarray(x) if isinstance(x, np.ndarray) else x for word, x in options.items()}
    out = cuflash.flash_attn_func(xp.asarray(q), xp.asarray(k), xp.asarray(v), **on_device)
    error = float(xp.abs(out - xp.asarray(expected)).max())
    moved = np.abs(expected - attention()).max()
    print(f"{name:<34}differs from its formula by {error:.1e}, and from plain attention by {moved:.2f}")
    assert error < 5e-6 < 0.1 < moved


show("causal", attention(lambda s: np.where(distance >= 0, s, -np.inf)), causal=True)
show("a window of 16 keys back, 4 ahead", attention(lambda s: np.where(near, s, -np.inf)), window_size=(16, 4))
show("a boolean mask", attention(lambda s: np.where(seen, s, -np.inf)), attn_mask=seen)
show("soft cap at 1", attention(np.tanh), softcap=1.0)
show("ALiBi", attention(lambda s: s - slopes[:, None, None] * abs(distance)), alibi_slopes=slopes)
show("a bias", attention(lambda s: s + bias), attn_bias=bias)
show("sinks", attention(of_sink=sink), sink=sink)

# What is dropped follows from the seed and an offset alone: 8 bits of Philox for each pair of a query and a key.
probabilities = cuflash.flash_attn_func(
    *map(xp.asarray, (q, k, v)), dropout_p=0.25, generator=(7, 0), return_attn_probs=True
)[2][..., :length, :length]
kept = np.asarray((~xp.signbit(probabilities)).tolist())
print(f"{'dropout of 0.25 with seed 7':<34}drops {1 - kept.mean():.4f} of the probabilities")
assert abs(kept.mean() - 0.75) < 0.01
show("dropout", attention(kept=kept / 0.75), dropout_p=0.25, generator=(7, 0))


def everything(s: np.ndarray) -> np.ndarray:
    """The soft cap comes first, then what is added, then what is hidden."""
    added = 2 * np.tanh(s / 2) - slopes[:, None, None] * abs(distance) + bias
    return np.where(seen & (distance >= 0), added, -np.inf)


show("all of them at once", attention(everything, sink, kept / 0.75), causal=True, softcap=2.0, attn_mask=seen,
     alibi_slopes=slopes, attn_bias=bias, sink=sink, dropout_p=0.25, generator=(7, 0))  # fmt: skip
