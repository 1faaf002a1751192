"""Tensor maps: tensors described to the copy engine of sm_90, box by box.

A kernel copies one box at a time, at coordinates in elements, innermost dimension first. What a box holds outside the
tensor is zeros when it is loaded and left alone when it is stored.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cuflash.dtypes import DType
from cuflash.errors import UnsupportedProblem
from cuflash.jit.driver import library

# Enumerations of cuda.h.
_INVALID_CONTEXT = 201
_DATA_TYPES = {"fp16": 6, "fp32": 7, "bf16": 9}
_NO_INTERLEAVE, _SWIZZLE_128B, _FILL_WITH_ZEROS = 0, 3, 0
_PROMOTIONS = {128: 2, 256: 3}

_BOX_BYTES = 128
"""Of a row of a box: as many columns as the swizzle spans."""


@dataclass(frozen=True, slots=True)
class TensorMap:
    """All of a map but its address."""

    dtype: DType
    dims: tuple[int, ...]
    """Elements along each of four or five dimensions, innermost first."""
    strides: tuple[int, ...]
    """Bytes between neighbours along every dimension but the first, whose elements are contiguous."""
    box: tuple[int, ...]
    """Elements of one copy along each dimension."""
    back: int = 0
    """Bytes from the map's first element to the tensor's."""
    promotion: int = 256
    """Bytes that L2 reads together. H200: keys that are read once are read 5 % faster by 128."""


def dense(
    dtype: DType, dim: int, rows: int, heads: int, batch: int, strides: tuple[int, int, int], box_rows: int
) -> TensorMap:
    """A (batch, row, head, dim) tensor with coordinates (column, row, head, batch).

    Strides are bytes between rows, heads and batches, all positive multiples of 16 where there is more than one.
    """
    row, head, whole = _legal((rows, heads, batch), strides)
    return TensorMap(
        dtype, (dim, rows, heads, batch), (row, head, whole), (_BOX_BYTES // dtype.itemsize, box_rows, 1, 1)
    )


def grouped(
    dtype: DType,
    dim: int,
    sizes: tuple[int, int, int],
    strides: tuple[int, int, int],
    box: tuple[int, int],
) -> TensorMap:
    """A (batch, row, head, dim) tensor with coordinates (column, head, row, batch), whose boxes hold several heads.

    ``sizes``, ``strides`` in bytes and ``box`` are of heads, rows and (but for the box) batches.
    """
    head, row, whole = _legal(sizes, strides)
    return TensorMap(dtype, (dim, *sizes), (head, row, whole), (_BOX_BYTES // dtype.itemsize, *box, 1))


def ragged(dtype: DType, dim: int, total_rows: int, heads: int, strides: tuple[int, int], box_rows: int) -> TensorMap:
    """A packed (row, head, dim) tensor whose boxes end where their sequence does.

    Row r of a sequence of L rows that starts at packed row s is at (column, Y - L + r, s + L, head), where Y is
    ``total_rows``. Both middle dimensions step from row to row, and the map starts Y rows before the tensor, so that
    this is packed row s + r; rows from L on are at coordinates from Y on, which is outside.
    """
    row, head = _legal((total_rows, heads), strides)
    dims, box = (dim, total_rows, total_rows + 1, heads), (_BOX_BYTES // dtype.itemsize, box_rows, 1, 1)
    return TensorMap(dtype, dims, (row, row, head), box, back=total_rows * row)


def ragged_group(
    dtype: DType, dim: int, total_rows: int, heads: int, strides: tuple[int, int], box: tuple[int, int]
) -> TensorMap:
    """The same with coordinates (column, head, Y - L + r, s + L); ``box`` is of heads and rows."""
    row, head = _legal((total_rows, heads), strides)
    dims, steps = (dim, heads, total_rows, total_rows + 1), (head, row, row)
    return TensorMap(dtype, dims, steps, (_BOX_BYTES // dtype.itemsize, *box, 1), back=total_rows * row)


def paged(
    dtype: DType, dim: int, rows: int, heads: int, pages: int, strides: tuple[int, int, int], box_rows: int
) -> TensorMap:
    """A (page, row, head, dim) tensor whose boxes end where what is used of a page does.

    Row r of a page of which L rows are used is at (column, Y - L + r, L, head, page), where Y is ``rows``. Both middle
    dimensions step from row to row as in :func:`ragged`.
    """
    row, head, page = _legal((rows, heads, pages), strides)
    dims, box = (dim, rows, rows + 1, heads, pages), (_BOX_BYTES // dtype.itemsize, box_rows, 1, 1, 1)
    return TensorMap(dtype, dims, (row, row, head, page), box, back=rows * row)


def _legal(sizes: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, where those along a dimension of one element, which may be anything, are ones that the driver takes."""
    return tuple(stride if n > 1 else 16 for n, stride in zip(sizes, strides, strict=True))


def encoder(tensor: TensorMap, device: int) -> Callable[[int], tuple[int, ...]]:
    """The function from a tensor's address on a GPU to the 16 words of its map: ``TensorMap`` of ``params.cuh``.

    The other arguments of the driver's function are made once, half of what a call costs, and the words of the last
    addresses are kept.

    Raises
    ------
    UnsupportedProblem
        If the driver is too old to know tensor maps, or (by the function) refuses this one.
    """
    driver = library("cuTensorMapEncodeTiled")
    rank = len(tensor.dims)
    dims, strides = (ctypes.c_uint64 * rank)(*tensor.dims), (ctypes.c_uint64 * (rank - 1))(*tensor.strides)
    box, element_strides = (ctypes.c_uint32 * rank)(*tensor.box), (ctypes.c_uint32 * rank)(*[1] * rank)
    data_type, words = _DATA_TYPES[tensor.dtype.name], ctypes.c_uint64 * 24

    # https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__TENSOR__MEMORY.html
    @lru_cache(maxsize=64)
    def encode(address: int) -> tuple[int, ...]:
        memory = words()
        first = -(ctypes.addressof(memory) // 8) % 8  # the driver wants the map aligned to 64 bytes
        arguments = (
            ctypes.byref(memory, 8 * first), data_type, rank, ctypes.c_void_p(address - tensor.back), dims, strides,
            box, element_strides, _NO_INTERLEAVE, _SWIZZLE_128B, _PROMOTIONS[tensor.promotion], _FILL_WITH_ZEROS,
        )  # fmt: skip
        status = driver.cuTensorMapEncodeTiled(*arguments)
        if status == _INVALID_CONTEXT:  # a thread on which nothing of CUDA has run yet
            _enter(driver, device)
            status = driver.cuTensorMapEncodeTiled(*arguments)
        if status:
            raise UnsupportedProblem(
                f"the CUDA driver refuses to describe a tensor at {address:#x} to the copy engine "
                f"(cuTensorMapEncodeTiled returns {status}): {tensor}. Pass contiguous copies of the arrays."
            )
        return tuple(memory[first : first + 16])

    return encode


def _enter(driver: Any, device: int) -> None:
    """Make the context in which the CUDA runtime works on a GPU this thread's own, as its next call would."""
    ordinal, context = ctypes.c_int(), ctypes.c_void_p()
    (
        driver.cuDeviceGet(ctypes.byref(ordinal), device)
        or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), ordinal)
        or driver.cuCtxSetCurrent(context)
    )
