"""Rows of one number each, in the layouts of PyTorch's versions: packed, padded to the longest sequence, or spaced.

Everything here runs where the arrays are, as whole-array operations that NumPy, CuPy and torch share; nothing waits for
a GPU but `longest`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import numpy as np

from cuflash.arrays import CuPy, Guest, NumPy, Torch, View, framework_of
from cuflash.errors import InvalidArgument

GAP = 128
"""Rows between two sequences in the spaced layout: the longest tile of PyTorch's kernels."""


class Place:
    """Where new arrays go: the library and the device of an array."""

    def __init__(self, name: str, x: Any) -> None:
        if x is None:
            raise InvalidArgument(f"{name} is None; expected an array.")
        framework = framework_of([name], [x])
        if isinstance(framework, Guest):
            raise InvalidArgument(
                f"{name} is a {framework.name} array; this function takes NumPy, CuPy and torch arrays. "
                "Pass cupy.from_dlpack of it, or call flash_attn_func."
            )
        self._framework: NumPy | CuPy | Torch = framework
        self.xp: Any = np if isinstance(x, np.ndarray) else sys.modules[framework.name.lower()]
        self._device = {"device": x.device} if framework.name == "torch" else {}
        self._x = x

    @property
    def here(self) -> AbstractContextManager[Any]:
        """Where arrays of the place are computed with: its device, or without NumPy's warnings of numbers' ranges."""
        if isinstance(self._framework, NumPy):
            return np.errstate(all="ignore")
        return self._x.device if isinstance(self._framework, CuPy) else nullcontext()

    def view(self, name: str, x: Any) -> View:
        """An array of the same library, spelled out."""
        return self._framework.view(name, x)

    def dtype(self, name: str) -> Any:
        """The library's own name of a dtype."""
        return getattr(self.xp, name)

    def full(self, shape: Sequence[int], value: float, dtype: Any) -> Any:
        """A new array; `dtype` is a name, or what an array of the library has."""
        dtype = self.dtype(dtype) if isinstance(dtype, str) else dtype
        return self.xp.full(tuple(shape), value, dtype=dtype, **self._device)

    def count(self, n: int) -> Any:
        """0 to n - 1 in int64."""
        return self.xp.arange(n, dtype=self.dtype("int64"), **self._device)

    def cast(self, x: Any, dtype: Any) -> Any:
        """The array in another dtype of the library, by name or as another array has it."""
        dtype = self.dtype(dtype) if isinstance(dtype, str) else dtype
        return x.astype(dtype, copy=False) if hasattr(x, "astype") else x.to(dtype)

    def pair(self, seed: int, offset: int) -> Any:
        """Philox seed and offset, (2,) int64 of the same bits."""
        bits = np.array([seed % 2**64, offset % 2**64], np.uint64).view(np.int64)
        return self.xp.asarray(bits, **self._device)

    def extended(self, x: Any, value: float) -> Any:
        """One more column of this value."""
        return self.xp.concatenate([x, self.full((*x.shape[:-1], 1), value, x.dtype)], axis=-1)

    def filled(self, x: Any, length: int, value: float) -> Any:
        """The last axis made this long by a value."""
        more = self.full((*x.shape[:-1], length - x.shape[-1]), value, x.dtype)
        return self.xp.concatenate([x, more], axis=-1)

    def rounded(self, x: Any, multiple: int, axis: int = -1) -> Any:
        """Zeros behind an axis, up to a multiple of this length."""
        shape = list(x.shape)
        shape[axis] = -shape[axis] % multiple
        return self.xp.concatenate([x, self.full(shape, 0, x.dtype)], axis=axis) if shape[axis] else x

    def starts(self, cu_seqlens: Any) -> Any:
        """Where sequences start and the last one ends, in int64."""
        return self.cast(cu_seqlens, "int64")

    def _sequence_of(self, rows: Any, ends: Any) -> Any:
        """How many sequences end at or before each row."""
        return self.xp.searchsorted(ends, rows, side="right")

    def locals(self, cu_seqlens: Any, total: int) -> Any:
        """The place of each packed row in its sequence; -1 behind the last one."""
        starts, rows = self.starts(cu_seqlens), self.count(total)
        at = self._sequence_of(rows, starts[1:])
        return self.xp.where(rows < starts[-1:], rows - starts[at], -1)

    def padded_index(self, cu_seqlens: Any, length: int, total: int) -> Any:
        """(b, length) packed rows of each sequence, `total` behind its end."""
        starts = self.starts(cu_seqlens)
        rows = starts[:-1, None] + self.count(length)
        return self.xp.where(rows < starts[1:, None], rows, total)

    def padded(self, x: Any, cu_seqlens: Any, length: int, value: float) -> Any:
        """(h, total) to (b, h, length)."""
        heads, total = x.shape
        index = self.padded_index(cu_seqlens, length, total)
        return self.extended(x, value)[self.count(heads)[:, None], index[:, None]]

    def packed(self, x: Any, cu_seqlens: Any, total: int, value: float) -> Any:
        """(b, h, length) to (h, total); the transpose of `padded`."""
        batch, heads, length = x.shape
        if not batch * length:
            return self.full((heads, total), value, x.dtype)
        starts, rows = self.starts(cu_seqlens), self.count(total)
        at = self._sequence_of(rows, starts[1:])
        inside = (at < batch) & (rows - starts[at] < length)
        index = self.xp.where(inside, rows - starts[at], 0)
        found = x[self.xp.where(inside, at, 0), self.count(heads)[:, None], index]
        return self.xp.where(inside, found, value)

    def spaced(self, x: Any, cu_seqlens: Any) -> Any:
        """(h, total) to (h, total + GAP * b), sequence e starting at column cu_seqlens[e] + GAP * e."""
        total, batch = x.shape[1], len(cu_seqlens) - 1
        starts, columns = self.starts(cu_seqlens), self.count(total + GAP * batch)
        at = self._sequence_of(columns, starts[1:] + GAP * (self.count(batch) + 1))
        rows = columns - GAP * at
        ends = self.xp.concatenate([starts[1:], starts[:1]])
        return self.extended(x, 0.0)[:, self.xp.where(rows < ends[at], rows, total)]


def longest(cu_seqlens: Any, max_seqlen: int | None) -> int:
    """The length of the longest sequence, unless it is given; reading it waits for a GPU."""
    if max_seqlen is not None:
        return int(max_seqlen)
    starts = cu_seqlens.tolist()
    return max((end - start for start, end in pairwise(starts)), default=0)


def unexpanded(x: Any) -> Any:
    """The part of an array that is there once: size 1 along axes of stride 0."""
    strides = x.stride() if callable(getattr(x, "stride", None)) else x.strides
    sizes = zip(x.shape, strides, strict=True)
    return x[tuple(slice(0, 1) if n > 1 and step == 0 else slice(None) for n, step in sizes)]
