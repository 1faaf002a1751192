"""Sequences of different lengths in one call: packed back to back, no padding, no leaks between them."""

from itertools import pairwise

import numpy as np

import cuflash

try:
    import cupy as xp

    xp.cuda.runtime.getDeviceCount()
except Exception:  # no CuPy, no driver or no GPU: NumPy runs the same calls on the CPU
    xp = np

lengths = [7, 300, 1, 92]
heads, dim = 4, 64
cuts = np.cumsum([0, *lengths])  # sequence i is rows cuts[i]:cuts[i + 1]
rng = np.random.default_rng(0)
q, k, v = (xp.asarray(rng.standard_normal((cuts[-1], heads, dim), dtype=np.float32)) for _ in range(3))
cu_seqlens = xp.asarray(cuts, dtype=np.int32)


def attend(q: xp.ndarray, k: xp.ndarray, v: xp.ndarray) -> xp.ndarray:
    """Causal attention of all sequences at once."""
    return cuflash.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max(lengths), max(lengths), causal=True)


out = attend(q, k, v)
padded_rows = len(lengths) * max(lengths)
print(f"{len(lengths)} sequences of {lengths} tokens: {cuts[-1]} rows, where padding would need {padded_rows}")

# One call per sequence gives the same numbers.
error = 0.0
for begin, end in pairwise(cuts.tolist()):
    alone = cuflash.flash_attn_func(q[None, begin:end], k[None, begin:end], v[None, begin:end], causal=True)[0]
    error = max(error, float(xp.abs(out[begin:end] - alone).max()))
print(f"largest difference from one call per sequence: {error:.1e}")
assert error < 1e-5

# Whatever the second sequence holds, the others do not notice, to the last bit.
begin, end = cuts[1:3].tolist()
v[begin:end] = np.nan
disturbed = attend(q, k, v)
others = np.r_[0:begin, end : cuts[-1]]
print(f"rows of the second sequence that became NaN with its values: {int(xp.isnan(disturbed[begin:end, 0, 0]).sum())}")
same = bool((disturbed[xp.asarray(others)] == out[xp.asarray(others)]).all())
print(f"other sequences unchanged to the bit: {same}")
assert same
