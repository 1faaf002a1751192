"""Arrays for a case: random normal tensors of its shapes, lengths and alignment, on NumPy or CuPy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np

from cuflash.cases.table import Case
from cuflash.dtypes import DType
from cuflash.problem import Problem

Array = Any
"""A NumPy or CuPy array; CuPy is imported only where there is a GPU."""


@dataclass(slots=True)
class Inputs:
    """The arrays of one call; dense tensors are (b, s, h, d), packed ones (total, h, d), pages (page, row, h, d)."""

    q: Array
    k: Array
    v: Array
    dout: Array
    cu_seqlens_q: Array | None = None
    cu_seqlens_kv: Array | None = None
    seqused_q: Array | None = None
    seqused_kv: Array | None = None
    mask_tensor: Array | None = None
    """Boolean (b, 1, len_q, len_kv), True = take part."""
    alibi_slopes: Array | None = None
    """(heads_q,) fp32."""
    bias: Array | None = None
    """(b, heads_q, len_q, len_kv), of size 1 along the axes of ``Problem.bias_broadcast``."""
    sink: Array | None = None
    """(heads_q,) fp32."""
    rng_state: tuple[int, int] | None = None
    """Philox seed and offset of dropout."""
    block_table: Array | None = None
    """(b, max_pages) int32: the pages of each sequence, and behind them numbers of none."""
    k_new: Array | None = None
    """Appended to a cache, like `v_new`: (b, appended, heads_kv, dim_qk)."""
    v_new: Array | None = None
    rotary_cos: Array | None = None
    """(len_kv, rotary dim / 2), like `rotary_sin`."""
    rotary_sin: Array | None = None
    tangent_q: Array | None = None
    """How q changes, like the next two of k and v."""
    tangent_k: Array | None = None
    tangent_v: Array | None = None
    dlse: Array | None = None
    """Upstream gradient of the log-sum-exp, in its shape; None where it has none."""
    captured: tuple[Array, ...] = ()
    """What a written score reads, then a written mask."""


_DRAWN = 2**26 - 1
"""Numbers that are drawn at most: the gigabytes of a cache repeat them, which takes a second instead of a minute.

An odd count, so that rows repeat shifted: a key that is the very numbers of a query would take half of its weight, and
gradients, in which everything then cancels, would be all rounding.
"""


class Normals:
    """Standard normal numbers on a device, drawn once for each type and handed out as views of one buffer.

    Drawing on the host works with the lean CuPy install, which has no cuRAND, and reuse keeps it cheap.
    """

    def __init__(self, xp: Any, seed: int = 0) -> None:
        self.xp = xp
        self._seed = seed
        self._drawn: dict[tuple[DType, int], Array] = {}
        self._bias: Array | None = None
        self._bias_of: tuple[DType, tuple[int, ...], bool] | None = None

    def tensors(self, dtype: DType, shapes: list[tuple[int, ...]], align: int = 16) -> list[Array]:
        """Contiguous tensors that do not overlap, each base aligned to ``align`` bytes and, below 16, to no more."""
        step = 256 // dtype.itemsize
        starts = [0, *accumulate(-(-prod(shape) // step) * step + step for shape in shapes)]
        numbers = self._at_least(dtype, starts[-1])
        shift = align % 16 // dtype.itemsize
        return [
            numbers[start + shift : start + shift + prod(shape)].reshape(shape)
            for start, shape in zip(starts, shapes, strict=False)
        ]

    def bias(self, dtype: DType, shape: tuple[int, ...], apart: bool) -> Array:
        """An additive (b, heads_q, len_q, len_kv) tensor that hides half of a row, kept for the next that asks.

        Its rows start at multiples of 16 bytes, or else its keys lie apart.
        """
        if self._bias_of != (dtype, shape, apart):
            self._bias = None  # before there are two of them
            *outer, keys = shape
            pitch = keys if keys == 1 else keys + -keys % (16 // dtype.itemsize)
            words = _words(self._at_least(dtype, prod((*outer, pitch)), seed=2)[: prod((*outer, pitch))])
            words = words.reshape(*outer, pitch).copy()
            if shape[2] > 3:
                words[:, :, 3, keys // 2 :] = int(_words(np.full(1, -np.inf, dtype.numpy))[0])
            if apart:
                words = words.swapaxes(2, 3).copy().swapaxes(2, 3)
            self._bias, self._bias_of = words.view(dtype.numpy)[..., :keys], (dtype, shape, apart)
        return self._bias

    def _at_least(self, dtype: DType, count: int, seed: int | None = None) -> Array:
        seed = self._seed if seed is None else seed
        drawn = self._drawn.get((dtype, seed))
        if drawn is None or drawn.size < min(count, _DRAWN):
            real = np.float64 if dtype.accumulator == np.float64 else np.float32
            rng = np.random.default_rng(seed)
            drawn = self.xp.asarray(rng.standard_normal(min(count, _DRAWN), dtype=real).astype(dtype.numpy))
        if drawn.size < count:
            words = _words(drawn[:_DRAWN])
            drawn = self.xp.tile(words, -(-count // _DRAWN)).view(drawn.dtype)
        self._drawn[dtype, seed] = drawn
        return drawn


def _words(x: Array) -> Array:
    """The same memory as unsigned numbers, which CuPy copies and repeats whatever the element type."""
    return x.view(f"u{x.dtype.itemsize}")


def make(case: Case, normals: Normals) -> Inputs:
    """Make the arrays of a case, alike on every device for the same seed."""
    problem, xp = case.problem, normals.xp
    q, k, v, dout, *changes = _tensors(case, normals)
    inputs = Inputs(q, k, v, dout)
    if changes:
        inputs.tangent_q, inputs.tangent_k, inputs.tangent_v = changes
    if problem.layout == "cache":
        _set_appended(inputs, problem, xp)
    _set_lengths(inputs, case, xp)
    if problem.page_size:
        table = _table(case)
        inputs.k, inputs.v = (_paged(xp, case, table, x) for x in (k, v))
        inputs.block_table = xp.asarray(table)
    _set_scores(inputs, case, normals)
    if problem.dropout:
        inputs.rng_state = (0x123456789ABCDEF0, 2**33 + 4)
    return inputs


def _tensors(case: Case, normals: Normals) -> list[Array]:
    """q, k, v and dout, and where there are tangents those of q, k and v."""
    problem, xp = case.problem, normals.xp
    varlen = problem.layout == "varlen"
    rows_q = (problem.total_q,) if varlen else (problem.batch, problem.len_q)
    rows_kv = (sum(case.lens_kv),) if varlen else (problem.batch, problem.len_kv)
    shapes = [
        (*rows_q, problem.heads_q, problem.dim_qk),
        (*rows_kv, problem.heads_kv, problem.dim_qk),
        (*rows_kv, problem.heads_kv, problem.dim_v),
        (*rows_q, problem.heads_q, problem.dim_v),
    ]
    shapes += shapes[:3] if problem.tangents is not None else []
    q, k, v, *others = normals.tensors(problem.dtype, shapes, align=problem.copy_bytes)
    if problem.shared_kv:
        v = k[..., : problem.dim_v]
    if not problem.ascending:
        k, v = k[..., ::-1, :], v[..., ::-1, :]
    if case.qk_factor != 1:
        q, k = ((x.astype(problem.dtype.accumulator) * case.qk_factor).astype(problem.dtype.numpy) for x in (q, k))
    if case.key_ramp != 1:
        scale = np.linspace(case.key_ramp, 1, k.shape[-3], dtype=np.float32)[:, None, None]
        k = xp.asarray((host(k).astype(np.float32) * scale).astype(problem.dtype.numpy))
    return [q, k, v, *others]


def _set_lengths(inputs: Inputs, case: Case, xp: Any) -> None:
    """Set where sequences begin, and how much of each is in use."""
    if case.problem.layout == "varlen":
        inputs.cu_seqlens_q = xp.asarray(np.array([0, *accumulate(case.lens_q)], np.int32))
        inputs.cu_seqlens_kv = xp.asarray(np.array([0, *accumulate(case.lens_kv)], np.int32))
    if case.seqused_kv:
        inputs.seqused_kv = xp.asarray(np.array(case.seqused_kv, np.int32))
    if case.seqused_q:
        inputs.seqused_q = xp.asarray(np.array(case.seqused_q, np.int32))


def _set_appended(inputs: Inputs, problem: Problem, xp: Any) -> None:
    """Set how much of a cache is used before the call, what it appends, and by what that is turned."""
    inputs.seqused_kv = xp.full(problem.batch, problem.len_kv - problem.appended, np.int32)
    if problem.appended:
        last = slice(problem.len_kv - problem.appended, problem.len_kv)
        inputs.k_new, inputs.v_new = (xp.ascontiguousarray(x[:, last]) for x in (inputs.k, inputs.v))
    if problem.rotary is not None:
        steps = np.arange(0, problem.rotary.dim, 2) / problem.rotary.dim
        angles = np.arange(problem.len_kv)[:, None] * 10_000.0**-steps
        of_angles = (f(angles).astype(problem.rotary.dtype.numpy) for f in (np.cos, np.sin))
        inputs.rotary_cos, inputs.rotary_sin = map(xp.asarray, of_angles)


def _set_scores(inputs: Inputs, case: Case, normals: Normals) -> None:
    """Set what is read beside the products q.k: slopes, a bias, a sink, a boolean mask, and what functions captured."""
    problem, xp = case.problem, normals.xp
    if problem.alibi:  # as published: powers of 2 from 2 ** -1 down
        slopes = 2.0 ** -np.linspace(1, 8, problem.heads_q)
        inputs.alibi_slopes = xp.asarray(slopes.astype(np.float32))
    inputs.captured = tuple(map(xp.asarray, case.captured))
    if problem.bias is not None:
        pairs = (problem.batch, problem.heads_q, problem.len_q, problem.len_kv)
        shape = tuple(1 if one else n for n, one in zip(pairs, problem.bias_broadcast, strict=True))
        inputs.bias = normals.bias(problem.bias, shape, apart=not problem.bias_boxes)
    if problem.sink:
        inputs.sink = xp.asarray(np.random.default_rng(3).standard_normal(problem.heads_q, np.float32))
    if problem.mask.tensor:
        keep = np.random.default_rng(1).random((problem.batch, 1, problem.len_q, problem.len_kv)) < 0.5
        keep[:, :, 3] = False  # a row that sees nothing
        inputs.mask_tensor = xp.asarray(keep)


def _table(case: Case) -> np.ndarray:
    """Pages in an order of chance."""
    table = np.full((case.problem.batch, -(-max(case.lens_kv) // case.problem.page_size)), 2**31 - 1, np.int32)
    order = iter(np.random.default_rng(3).permutation(sum(case.pages) + 1))
    for b, count in enumerate(case.pages):
        table[b, :count] = [next(order) for _ in range(count)]
    return table


def places(case: Case, table: np.ndarray) -> Iterator[tuple[slice, tuple[np.ndarray, np.ndarray]]]:
    """Of every sequence, the packed rows of the keys in use, and the page and row of each."""
    for b, (start, (_, len_kv)) in enumerate(zip(accumulate(case.lens_kv, initial=0), case.sequences, strict=False)):
        page, row = np.divmod(np.arange(len_kv), case.problem.page_size)
        yield slice(start, start + len_kv), (table[b, page], row)


def taking_part(case: Case, side: str, table: np.ndarray | None) -> np.ndarray:
    """Which rows of "q" or "kv" belong to a sequence that uses them: (total,), or (page, row), booleans."""
    problem = case.problem
    if side == "kv" and table is not None:
        in_pages = np.zeros((problem.total_kv // problem.page_size, problem.page_size), bool)
        for _, at in places(case, table):
            in_pages[at] = True
        return in_pages
    lens, used, total = (
        (case.lens_q, case.seqused_q, problem.total_q)
        if side == "q"
        else (case.lens_kv, case.seqused_kv, problem.total_kv)
    )
    live = np.zeros(total, bool)
    for start, count in zip(accumulate(lens, initial=0), used or lens, strict=False):
        live[start : start + count] = True
    return live


def _paged(xp: Any, case: Case, table: np.ndarray, packed: Array) -> Array:
    """Packed keys or values in pages, with NaN in every row that holds none."""
    size = case.problem.page_size
    words = packed.view(f"u{packed.dtype.itemsize}")  # bits are moved by whatever knows no bfloat16
    pages = xp.full((case.problem.total_kv // size, size, *packed.shape[1:]), ~words.dtype.type(0), words.dtype)
    for rows, (page, row) in places(case, table):
        pages[xp.asarray(page), xp.asarray(row)] = words[rows]
    return pages.view(packed.dtype)


def host(x: Any) -> Any:
    """The same array in host memory; whatever is no array as it is."""
    return x.get() if hasattr(x, "get") else x
