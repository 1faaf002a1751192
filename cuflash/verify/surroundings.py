"""Arrays of a draw in nasty surroundings: strided views into one buffer full of NaN that is looked through afterwards.

Everything a call reads or writes lies in the :class:`Arena`, what cuflash allocates on a GPU included, with at least
256 bytes of 0xFF (NaN, -1) around it. So a stray read poisons a result, and a stray write shows as a change.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

from cuflash.cases.inputs import Array, Inputs
from cuflash.verify.draws import Draw, shapes

_GAP = 256
"""Bytes between any two arrays, and what every allocation is aligned to."""

_BEHIND = 2**16
"""Bytes behind the last array that are looked through, too."""


class Arena:
    """One buffer from which arrays are cut, on NumPy or CuPy."""

    def __init__(self, xp: Any, nbytes: int) -> None:
        self._xp = xp
        whole = xp.full(nbytes + _GAP, 0xFF, np.uint8)
        self._bytes = whole[-_address(whole) % _GAP :][:nbytes]
        self._end = _GAP
        self._places: list[tuple[int, str]] = []
        self._allocated: list[slice] = []

    def clear(self) -> None:
        """Take everything back."""
        self._bytes[: self._end] = 0xFF
        self._end = _GAP
        self._places.clear()
        self._allocated.clear()

    def cut(
        self,
        name: str,
        shape: Sequence[int],
        dtype: np.dtype,
        unit: int,
        layout: np.random.Generator | int | None = None,
    ) -> Array:
        """An array of NaN whose last axis is contiguous and whose rows start at multiples of `unit` bytes.

        With random numbers the other axes come in any order in memory, with gaps in between, and a unit below 16 is all
        that the first byte is aligned to. With a number they are rotated so many places, each with a gap, and no row is
        aligned to more than the unit. Without, everything is contiguous.
        """
        *outer, last = shape
        first, extent, order = 0, max(last, 1) * dtype.itemsize, np.arange(len(outer))[::-1]
        gaps = np.zeros(len(outer), int)
        if isinstance(layout, int):
            first, extent = unit, -(-extent // unit) * unit
            extent += unit * (1 + extent // unit % 2)  # an odd multiple
            order, gaps = np.roll(np.arange(len(outer)), layout)[::-1], np.ones(len(outer), int)
        elif layout is not None:
            rng = layout
            first = unit * int(rng.choice([1, 3, 5])) if unit < 16 else unit * int(rng.integers(4))
            extent = -(-extent // unit) * unit + unit * int(rng.choice([0, 0, 1, 2, 5]))
            order, gaps = rng.permutation(len(outer)), rng.choice([0, 0, 1], len(outer))
        strides = [0] * len(outer)
        for axis in order:
            strides[axis] = extent
            extent *= max(outer[axis] + int(gaps[axis]), 1)
        start = self._reserve(name, first + extent) + first
        strides.append(dtype.itemsize)
        if self._xp is np:
            return np.ndarray(shape, dtype, self._bytes, start, strides)
        return self._xp.ndarray(tuple(shape), dtype, self._bytes.data + start, strides)

    def allocations(self) -> AbstractContextManager[None]:
        """Where CuPy's allocations are cut from the arena, too, until :meth:`change` takes them back."""
        return nullcontext() if self._xp is np else self._xp.cuda.using_allocator(self._allocate)

    def snapshot(self) -> Array:
        """The bytes of everything that has been cut."""
        return self._bytes[: self._end].copy()

    def change(self, before: Array, written: Sequence[Array]) -> str:
        """Which byte differs from those before, other than of arrays that were to be written; empty if none does.

        Those arrays, and allocations, are made NaN again.
        """
        for array in written:
            array.view(f"i{array.itemsize}")[...] = -1
        for span in self._allocated:
            self._bytes[span] = 0xFF
        self._allocated.clear()
        changed = self._bytes[: self._end + _BEHIND] != 0xFF
        changed[: len(before)] = self._bytes[: len(before)] != before
        place = ""
        if changed.any():
            at = int(changed.argmax())
            start, name = self._places[max(bisect_right([start for start, _ in self._places], at) - 1, 0)]
            place = f"byte {at - start} from the start of {name}"
            self._bytes[len(before) : self._end + _BEHIND] = 0xFF
        self._end = len(before)
        while self._places and self._places[-1][0] >= self._end:
            self._places.pop()
        return place

    def _reserve(self, name: str, nbytes: int) -> int:
        start, self._end = self._end, self._end + -(-nbytes // _GAP) * _GAP + _GAP
        if self._end + _BEHIND > len(self._bytes):
            raise MemoryError(f"the arrays of one draw need more than the {len(self._bytes)} bytes of the arena")
        self._places.append((start, name))
        return start

    def _allocate(self, nbytes: int) -> Any:
        """CuPy's allocator."""
        start = self._reserve("an allocation", nbytes)
        self._allocated.append(slice(start, start + nbytes))
        return self._bytes.data + start


def _address(x: Array) -> int:
    return x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr


class Numbers:
    """Standard normal numbers on a device, drawn once for each type and handed out in turn."""

    def __init__(self, xp: Any, count: int) -> None:
        self._xp, self._count, self._next = xp, count, 0
        self._drawn: dict[np.dtype, Array] = {}

    def start(self, rng: np.random.Generator) -> None:
        """Go on somewhere."""
        self._next = int(rng.integers(self._count))

    def take(self, shape: Sequence[int], real: np.dtype) -> Array:
        """The next ones, in this shape; from the start again where too few are left."""
        count = int(np.prod(shape))
        if real not in self._drawn or self._drawn[real].size < count:  # a page may be larger than any other array
            drawn = np.random.default_rng(0).standard_normal(max(self._count, count), real.type)
            self._drawn[real] = self._xp.asarray(drawn)
        first = self._next if self._next + count <= self._drawn[real].size else 0
        self._next = first + count
        return self._drawn[real][first : self._next].reshape(shape)


@dataclass(slots=True)
class Surrounded:
    """The arrays of a draw."""

    inputs: Inputs
    outputs: dict[str, Array] = field(default_factory=dict)
    """By argument: out, and of a backward dq, dk and dv."""
    lse: Array = None
    """Backward: room for the forward's, in other strides."""


def surround(draw: Draw, arena: Arena, numbers: Numbers, xp: Any) -> Surrounded:
    """Make the arrays of a draw in an empty arena; rows that take no part, and outputs, are NaN."""
    return _Surroundings(draw, arena, numbers, xp).made()


class _Surroundings:
    def __init__(self, draw: Draw, arena: Arena, numbers: Numbers, xp: Any) -> None:
        self._draw, self._problem = draw, draw.case.problem
        self._arena, self._numbers, self._xp, self._rng = arena, numbers, xp, draw.generator()
        self._real = self._problem.dtype.accumulator
        numbers.start(self._rng)

    def made(self) -> Surrounded:
        case, problem = self._draw.case, self._problem
        varlen, backward = problem.layout == "varlen", problem.direction == "backward"
        read = self._tensors("q", "k", "v")
        if backward:
            read |= self._tensors("dout")
        for name, x in read.items():
            read[name] = self._filled(name, x)
        if problem.shared_kv:
            read["v"] = read["k"][..., : problem.dim_v]
        inputs = Inputs(read["q"], read["k"], read["v"], read.get("dout"))
        if varlen:
            inputs.cu_seqlens_q = self._flat("cu_seqlens_q", [0, *accumulate(case.lens_q)])
            inputs.cu_seqlens_kv = self._flat("cu_seqlens_kv", [0, *accumulate(case.lens_kv)])
            inputs.seqused_q = self._flat("seqused_q", case.seqused_q) if case.seqused_q else None
            inputs.seqused_kv = self._flat("seqused_kv", case.seqused_kv) if case.seqused_kv else None
        if problem.page_size:
            inputs.block_table = self._table()
        if problem.alibi:
            inputs.alibi_slopes = self._slopes()
        if problem.sink:
            inputs.sink = self._arena.cut("sink", (problem.heads_q,), np.dtype(np.float32), 4)
            inputs.sink[...] = self._numbers.take((problem.heads_q,), self._real) + 1
        if problem.bias is not None:
            inputs.bias = self._bias(problem.bias.numpy)
            inputs.bias[...] = self._numbers.take(inputs.bias.shape, self._real)
            self._hide(inputs.bias, -np.inf)
        if problem.mask.tensor:
            inputs.mask_tensor = self._mask()
            threshold = float(self._rng.choice([-1.5, 0.0, 1.5]))
            inputs.mask_tensor[...] = self._numbers.take(inputs.mask_tensor.shape, self._real) > threshold
            self._hide(inputs.mask_tensor, False)
        inputs.rng_state = self._draw.rng_state
        written = self._tensors("out")
        if backward:
            written |= self._tensors("dq", "dk", "dv")
        made = Surrounded(inputs, {name: self._turned(name, x) for name, x in written.items()})
        if backward:
            rows = (problem.total_q,) if varlen else (problem.len_q,)
            rows = (*(() if varlen else (problem.batch,)), problem.heads_q, *rows)
            made.lse = self._any_order("lse", rows, self._real)
            if self._draw.dlse:
                inputs.dlse = self._any_order("dlse", rows, self._real)
                inputs.dlse[...] = self._numbers.take(rows, self._real)
        return made

    def _tensors(self, *names: str) -> dict[str, Array]:
        """Tensors of NaN, some of them parts of one: heads of a packed qkv, or columns of rows that hold k and v."""
        problem, rng, shape_of = self._problem, self._rng, shapes(self._problem)
        unit, dtype = max(problem.copy_bytes, problem.dtype.itemsize), problem.dtype.numpy
        joined = rng.random()
        several = names if joined < 0.1 else names[1:] if joined < 0.3 else []
        axis = -2 if rng.random() < 0.5 else -1
        others = {tuple(n for i, n in enumerate(shape_of[name]) if i - len(shape_of[name]) != axis) for name in several}
        if len(several) < 2 or len(others) > 1:
            return {name: self._arena.cut(name, shape_of[name], dtype, unit, rng) for name in names}
        sizes = [shape_of[name][axis] for name in several]
        shape = list(shape_of[several[0]])
        shape[axis] = sum(sizes)
        whole = self._arena.cut(" and ".join(several), shape, dtype, unit, rng)
        tensors = {
            name: self._arena.cut(name, shape_of[name], dtype, unit, rng) for name in names if name not in several
        }
        for name, end, size in zip(several, accumulate(sizes), sizes, strict=True):
            part = slice(end - size, end)
            tensors[name] = whole[..., part, :] if axis == -2 else whole[..., part]
        return tensors

    def _filled(self, name: str, x: Array) -> Array:
        """Values in the rows that take part, NaN in the others."""
        problem, rng, shape = self._problem, self._rng, x.shape
        x = self._turned(name, x)
        values = self._numbers.take(x.shape, self._real)
        if name == "k" and rng.random() < 0.15 and x.shape[-3]:  # row maxima grow or shrink along the sequence
            steep = rng.choice([1 / 8, 8]) if problem.dtype.itemsize == 2 else rng.choice([1 / 3, 3])
            ramp = np.geomspace(1, steep, x.shape[-3]).astype(self._real)
            values = values * self._xp.asarray(ramp[:, None, None])
        if problem.layout == "varlen":
            live = self._xp.asarray(self._draw.taking_part("q" if name in ("q", "dout") else "kv"))
            values = self._xp.where(live[..., None, None], values, np.nan)
        x[...] = values
        return x if x.shape == shape else self._xp.broadcast_to(x, shape)

    def _turned(self, name: str, x: Array) -> Array:
        """With one axis the other way round, or only the first along one that is to be expanded."""
        if name not in self._draw.turns:
            return x
        axis, expanded = self._draw.turns[name]
        part = slice(1) if expanded else slice(None, None, -1)
        return x[(..., part, *[slice(None)] * (-axis - 1))]

    def _table(self) -> Array:
        """The pages of each sequence, in any strides."""
        numbers = self._draw.block_table()
        table = self._any_order("block_table", numbers.shape, numbers.dtype)
        steps = (int(step) for step in self._rng.choice([1, 1, 1, -1], 2))
        table = table[tuple(slice(None, None, step) for step in steps)]
        table[...] = self._xp.asarray(numbers)
        return table

    def _flat(self, name: str, values: Sequence[int]) -> Array:
        """Lengths or first rows, with -1 on either side."""
        x = self._arena.cut(name, (len(values),), np.dtype(np.int32), 4)
        x[...] = self._xp.asarray(np.array(values, np.int32))
        return x

    def _slopes(self) -> Array:
        """Falling and rising ones that keep logits within what the element type resolves."""
        problem = self._problem
        shape = (problem.batch, problem.heads_q) if self._draw.alibi_batched else (problem.heads_q,)
        slopes = self._arena.cut("alibi_slopes", shape, np.dtype(np.float32), 4, self._rng)
        most = (16 if problem.dtype.itemsize == 2 else 4) / max(problem.len_q, problem.len_kv, 32)
        slopes[...] = self._numbers.take(shape, self._real) * most
        return slopes

    def _bias(self, dtype: np.dtype) -> Array:
        """In strides for the copy engine, or in any, from where it cannot start."""
        shape = self._pairs(self._problem.bias_broadcast)
        if self._problem.bias_boxes:
            return self._arena.cut("bias", shape, dtype, 16, self._rng)
        return self._any_order("bias", shape, dtype)

    def _mask(self) -> Array:
        """In any strides."""
        shape, dtype = self._pairs(self._draw.mask_broadcast), np.dtype(bool)
        if self._rng.random() < 0.5:
            return self._arena.cut("attn_mask", shape, dtype, int(self._rng.choice([1, 16])), self._rng)
        return self._any_order("attn_mask", shape, dtype)

    def _pairs(self, broadcast: tuple[bool, ...]) -> tuple[int, ...]:
        """(1 or batch, 1 or heads_q, 1 or len_q, 1 or len_kv)."""
        problem = self._problem
        sizes = zip((problem.batch, problem.heads_q, problem.len_q, problem.len_kv), broadcast, strict=True)
        return tuple(1 if one else n for n, one in sizes)

    def _any_order(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """An array whose last axis need not be contiguous."""
        return self._arena.cut(name, (*shape, 1), dtype, dtype.itemsize, self._rng)[..., 0]

    def _hide(self, pairs: Array, value: float) -> None:
        """Hide a block of pairs, which may hold whole tiles, and everything from one row."""
        if max(pairs.shape[-2:]) > 1 and self._rng.random() < 0.5:
            ends = [sorted(self._rng.integers(n + 1, size=2).tolist()) if n > 1 else (0, n) for n in pairs.shape[-2:]]
            pairs[(..., *(slice(*pair) for pair in ends))] = value
        if pairs.shape[-2] > 1 and self._rng.random() < 0.3:
            pairs[..., int(self._rng.integers(pairs.shape[-2])), :] = value
