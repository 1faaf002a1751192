"""Dropout's random numbers: Philox, and the two ways of making keep masks from it, for any tile of any heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuflash.dropout import Dropout

_LOW = 0xFFFFFFFF


def philox(counter: tuple[np.ndarray | int, ...], seed: int, rounds: int) -> np.ndarray:
    """Philox4x32 (Salmon et al. 2011): four words of 32 random bits for each counter.

    Parameters
    ----------
    counter : tuple of four
        Words of the counter, integers or arrays that broadcast together, each below 2**32.
    seed : int
        The key, 64 bits.
    rounds : int
        7 or 10, as the schemes say.

    Returns
    -------
    ndarray of uint32
        (*counter.shape, 4)
    """
    words = philox_words(np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter)), seed, rounds)
    return np.stack(words, axis=-1).astype(np.uint32)


def philox_words(counter: Sequence[Any], seed: int, rounds: int) -> tuple[Any, ...]:
    """The same of integers, or of uint64 arrays of any library, whose words then hold 32 bits each.

    With 64 bits the product of two words is exact.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW, seed >> 32
    for _ in range(rounds):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _LOW, (a >> 32) ^ c3 ^ k1, a & _LOW
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return c0, c1, c2, c3


def random_bytes(seed: int, offset: int, heads: np.ndarray, rows: slice, keys: slice) -> np.ndarray:
    """The random byte of every pair, by the ``byte`` scheme.

    16 rows x 32 keys share 32 calls of Philox-7 with 16 bytes each. Call 4 * (row % 8) + key % 8 // 2 has the bytes
    8 * (key % 32 // 16) + 4 * (key % 16 // 8) + 2 * (row % 16 // 8) + key % 2, the layout of a tensor-core accumulator.

    Parameters
    ----------
    heads : ndarray of uint64
        Any shape, batch * heads_q + head of each plane.
    rows, keys : slice
        Start and stop of the tile, local to the sequence.

    Returns
    -------
    ndarray of uint8
        (*heads.shape, rows, keys)
    """
    blocks_q, blocks_kv = (
        np.arange(span.start // size, -(-span.stop // size)) for span, size in ((rows, 16), (keys, 32))
    )
    calls = heads[..., None, None, None] * 32 + np.arange(32, dtype=np.uint64) + offset
    words = philox((calls & _LOW, calls >> 32, blocks_q[:, None, None], blocks_kv[:, None]), seed, rounds=7)
    # The axes behind the blocks: row % 8, key // 2 % 4, key // 16 % 2, key // 8 % 2, row // 8 % 2, key % 2.
    cells = words.astype("<u4", copy=False).view(np.uint8).reshape(*words.shape[:-2], 8, 4, 2, 2, 2, 2)
    n = heads.ndim
    cells = cells.transpose(*range(n), n, n + 6, n + 2, n + 1, n + 4, n + 5, n + 3, n + 7)
    cells = cells.reshape(*heads.shape, 16 * len(blocks_q), 32 * len(blocks_kv))
    row, key = rows.start % 16, keys.start % 32
    return cells[..., row : row + rows.stop - rows.start, key : key + keys.stop - keys.start]


def uniforms(
    seed: int, offset: int, heads: np.ndarray, rows: slice, keys: slice, *, len_kv: int, plane: int
) -> np.ndarray:
    """The random number in (0, 1] of every pair, by the ``word`` scheme.

    Pairs are numbered in row-major order from `offset`; four neighbours share a call of Philox-10. `len_kv` counts the
    numbers of a row, `plane` those of a head. Otherwise like `random_bytes`; returns fp32.
    """
    row_numbers = np.arange(rows.start, rows.stop, dtype=np.uint64) * len_kv
    first = heads[..., None] * plane + row_numbers + offset + keys.start
    width = keys.stop - keys.start
    calls = first[..., None] // 4 + np.arange((width + 6) // 4, dtype=np.uint64)  # up to three words come before
    words = philox((calls & _LOW, calls >> 32, 0, 0), seed, rounds=10).reshape(*first.shape, -1)
    at = (first % 4).astype(np.intp)[..., None] + np.arange(width)
    return np.take_along_axis(words, at, axis=-1).astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)


@dataclass(frozen=True, slots=True)
class KeepMask:
    """Which pairs of one call survive; a function of (seed, offset, batch, head, row, key) alone."""

    dropout: Dropout
    seed: int
    offset: int
    heads: np.ndarray  # uint64, any shape: batch * heads_q + head
    len_kv: int  # keys of the sequence
    plane: int  # queries x keys of the longest sequence

    def tile(self, at: tuple[slice, ...], rows: slice, keys: slice) -> np.ndarray:
        """Booleans (*heads[at].shape, rows, keys), True = keep."""
        heads = self.heads[at]
        if self.dropout.scheme == "byte":
            return random_bytes(self.seed, self.offset, heads, rows, keys) <= self.dropout.threshold
        numbers = uniforms(self.seed, self.offset, heads, rows, keys, len_kv=self.len_kv, plane=self.plane)
        return numbers > np.float32(self.dropout.p)
