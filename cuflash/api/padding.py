"""Rows of packed sequences, padded to the longest and back.

Everything here runs where the arrays are; nothing waits for a GPU but `longest`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from cuflash.arrays import Library


def longest(cu_seqlens: Any, max_seqlen: int | None) -> int:
    """The length of the longest sequence, unless it is given; reading it waits for a GPU."""
    if max_seqlen is not None:
        return int(max_seqlen)
    starts = cu_seqlens.tolist()
    return max((end - start for start, end in pairwise(starts)), default=0)


def extended(library: Library, x: Any, length: int, value: float) -> Any:
    """The array with its last axis made this long by a value; itself where it is."""
    if x.shape[-1] == length:
        return x
    longer = library.full((*x.shape[:-1], length), value, x.dtype, x)
    longer[..., : x.shape[-1]] = x
    return longer


def padded(library: Library, x: Any, cu_seqlens: Any, length: int, value: float) -> Any:
    """(h, total) numbers of packed rows to (b, h, length), with a value behind the end of each sequence."""
    shape = len(cu_seqlens) - 1, x.shape[0], length
    if not x.shape[1]:
        return library.full(shape, value, x.dtype, x)
    rows, inside = _padded_rows(library, cu_seqlens, length)
    numbers = x[library.arange(x.shape[0], x)[:, None], rows[:, None]]
    return library.xp.where(inside[:, None], numbers, library.full((1, 1, 1), value, x.dtype, x))


def padded_tensors(library: Library, x: Any, cu_seqlens: Any, length: int) -> Any:
    """(total, h, d) packed rows to (b, length, h, d), with zeros behind the end of each sequence."""
    if not x.shape[0]:
        return library.full((len(cu_seqlens) - 1, length, *x.shape[1:]), 0, x.dtype, x)
    rows, inside = _padded_rows(library, cu_seqlens, length)
    return library.xp.where(inside[:, :, None, None], x[rows], library.full((1, 1, 1, 1), 0, x.dtype, x))


def unpadded(library: Library, x: Any, cu_seqlens: Any, total: int) -> Any:
    """(b, h, length) numbers to (h, total), those of packed rows; any where a row is of no sequence."""
    batch, heads, length = x.shape
    if not batch * length:
        return library.full((heads, total), 0, x.dtype, x)
    sequences, rows = sequences_and_rows(library, cu_seqlens, total)
    return x[sequences, library.arange(heads, x)[:, None], library.xp.clip(rows, 0, length - 1)]


def sequences_and_rows(library: Library, cu_seqlens: Any, total: int) -> tuple[Any, Any]:
    """The sequence of each packed row and its number there, as if rows of no sequence were the last one's."""
    rows = library.arange(total, cu_seqlens)
    sequences = sequences_of(library, cu_seqlens, rows)
    return sequences, rows - cu_seqlens[sequences]


def sequences_of(library: Library, cu_seqlens: Any, rows: Any) -> Any:
    """The sequence of each of these packed rows, as if rows of no sequence were the last one's."""
    return library.xp.searchsorted(library.cast(cu_seqlens[1:-1], library.xp.int64), rows, side="right")


def _padded_rows(library: Library, cu_seqlens: Any, length: int) -> tuple[Any, Any]:
    """(b, length) numbers of packed rows, and whether they are the sequence's; 0 where not."""
    rows = library.arange(length, cu_seqlens) + cu_seqlens[:-1, None]
    inside = rows < cu_seqlens[1:, None]
    return library.xp.where(inside, rows, 0), inside
