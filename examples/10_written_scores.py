"""Scores and masks as Python functions: each beside its formula, masks as lists of blocks, and a bias that is learned.

A function of the score and its place is called once, with symbols; what it does becomes an expression, which NumPy
computes tile by tile, a GPU's kernels are compiled with, and calculus differentiates.
"""

from collections.abc import Callable

import numpy as np

import cuflash
from cuflash import mods

try:
    import cupy as xp

    xp.cuda.runtime.getDeviceCount()
except Exception:  # no CuPy, no driver or no GPU: NumPy runs the same calls on the CPU
    xp = np

batch, length, heads, dim = 2, 200, 4, 32
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((batch, length, heads, dim), dtype=np.float32) for _ in range(3))
b, h, i, j = np.ogrid[:batch, :heads, :length, :length]
scores = np.einsum("bihd,bjhd->bhij", q.astype(np.float64), k) / dim**0.5


def attention(logits: np.ndarray) -> np.ndarray:
    """softmax(logits) v, with whole matrices."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.einsum("bhij,bjhd->bihd", weights / weights.sum(axis=-1, keepdims=True), v)


def show(name: str, logits: np.ndarray, score: Callable | None = None, mask: Callable | None = None) -> None:
    """Compare a call with its closed form."""
    out = cuflash.flash_attn_func(*map(xp.asarray, (q, k, v)), score_mod=score, mask_mod=mask)
    exact = attention(logits)
    error, moved = float(abs(out - xp.asarray(exact)).max()), abs(exact - attention(scores)).max()
    print(f"{name:<40}differs from its formula by {error:.1e}, and from plain attention by {moved:.2f}")
    assert error < 5e-6 < 0.1 < moved


slopes = (2.0 ** -np.arange(1, heads + 1)).astype(np.float32)
document = np.sort(rng.integers(0, 5, length)).astype(np.int32)


def nearer_by_head(score, b, h, q, k):
    """Arrays are read by index; numbers are compiled in."""
    return mods.tanh(score / 3) * 3 - slopes[h] * mods.sqrt(mods.abs(q - k))


def own_document(b, h, q, k):
    return document[q] == document[k]


print("what it becomes:", mods.trace("score_mod", nearer_by_head).mod)
show("a score of one's own", np.tanh(scores / 3) * 3 - slopes[h] * np.sqrt(abs(i - j)), nearer_by_head)
show("a mask of one's own", np.where(document[i] == document[j], scores, -np.inf), mask=own_document)

# Ready ones compose with each other and with one's own.
causal_in_document = mods.both(own_document, mods.causal())
seen = (document[i] == document[j]) & (j <= i)
show("ALiBi in causal documents", np.where(seen, scores - slopes[h] * (i - j), -np.inf), mods.alibi(slopes),
     causal_in_document)  # fmt: skip
striped = mods.either(mods.dilated_window(-1, 0, 16), mods.sliding_window(8))
seen = (j <= i) & (((i - j) % 16 == 0) | (i - j <= 8))
show("a window and every 16th key before it", np.where(seen, scores, -np.inf), mask=striped)

# The same masks as lists of blocks: empty ones are never visited, and those that are full are not tested.
sizes = {"len_q": length, "len_kv": length, "block_size": 16}
causal = cuflash.create_block_mask(cuflash.Mask(right=0), **sizes)
of_blocks = {
    "packed documents": cuflash.create_block_mask(cu_seqlens=np.array([0, 48, 56, 130, length]), block_size=16),
    "a document of each query, causal": causal & mods.document(document),
    "a prefix of 50, then causal": causal | mods.prefix_lm(50),
    "a sliding window": causal & mods.sliding_window(16),
    "a dilated window": causal & mods.dilated_window(-1, 0, 16),
    "windows of whole blocks": causal & mods.block_window(16, 1),
    "a tree of drafts": causal & mods.tree(np.maximum(np.arange(length) - 3, -1)),
    "a boolean array": causal & ((rng.random((length, length)) < 0.2) | np.eye(length, dtype=bool)),
    "blocks of one's own": cuflash.create_block_mask(blocks=rng.random((13, 13)) < 0.5, **sizes),
}
for name, mask in of_blocks.items():
    out = cuflash.flash_attn_func(*map(xp.asarray, (q, k, v)), block_mask=mask)
    exact = attention(np.where(mask.to_dense(), scores, -np.inf))
    error = float(abs(out - xp.asarray(exact)).max())
    full, partial, empty = mask.counts
    print(f"{name:<40}{full} blocks full, {partial} partial, {empty} empty; differs by {error:.1e}")
    assert error < 5e-6

# A score has gradients of what it reads. Here a bias by distance learns that head h is to fetch the value that lies
# 3 h + 1 rows before its query, whatever queries and keys hold.
table, reach = xp.zeros((heads, 33), np.float32), 16
behind = 3 * np.arange(heads) + 1
wanted = np.stack([np.roll(v[:, :, head], behind[head], axis=1) for head in range(heads)], axis=2)
calm, k, v, wanted = map(xp.asarray, (0.1 * q, k, v, wanted))
for _step in range(60):
    out, pullback = cuflash.flash_attn_vjp(calm, k, v, score_mod=mods.relative_bias(table), captured_grad=True)
    error = (out - wanted)[:, reach:]
    dout = xp.zeros_like(out)
    dout[:, reach:] = 2 * error / error.size
    (slope,) = pullback(dout).dcaptured
    table -= slope * np.float32(2) / xp.sqrt((slope**2).mean(axis=1, keepdims=True) + 1e-30)
learned = np.array((reach - table.argmax(axis=1)).tolist())
off = float((error**2).mean())
print(f"learned to look {learned.tolist()} rows back, where {behind.tolist()} was wanted: {off:.1e} off")
assert (learned == behind).all()
