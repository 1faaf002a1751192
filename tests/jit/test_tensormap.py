"""Tensor maps: what they make a copy engine read and write, played in NumPy, and how the driver is asked for them."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuflash import jit
from cuflash.dtypes import BF16, FP16
from cuflash.errors import UnsupportedProblem
from cuflash.jit import tensormap
from cuflash.jit.tensormap import TensorMap, dense, paged, ragged, ragged_group


class Memory:
    """A piece of memory of 16-bit elements, in which a tensor starts at some element."""

    def __init__(self, size: int, start: int) -> None:
        self.elements, self.start = np.arange(1, size + 1, dtype=np.int64), start

    def strided(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
        """The tensor with these strides, in elements."""
        steps = [8 * stride for stride in strides]
        return np.lib.stride_tricks.as_strided(self.elements[self.start :], shape, steps)

    def box(self, tensor: TensorMap, corner: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Where the elements of a box lie, and which are inside the map; both outermost dimension first."""
        offsets = np.indices(tensor.box[::-1])[::-1]
        places = [first + offset for first, offset in zip(corner, offsets, strict=True)]
        inside = np.logical_and.reduce([(x >= 0) & (x < n) for x, n in zip(places, tensor.dims, strict=True)])
        steps = (tensor.dtype.itemsize, *tensor.strides)
        moved = sum(x * step for x, step in zip(places, steps, strict=True)) - tensor.back
        assert (moved % tensor.dtype.itemsize == 0).all()
        where = self.start + moved // tensor.dtype.itemsize
        assert ((where >= 0) & (where < self.elements.size))[inside].all(), "reaches outside the memory"
        return where, inside

    def load(self, tensor: TensorMap, corner: tuple[int, ...]) -> np.ndarray:
        where, inside = self.box(tensor, corner)
        return np.where(inside, self.elements[np.where(inside, where, 0)], 0)

    def store(self, tensor: TensorMap, corner: tuple[int, ...], values: np.ndarray) -> None:
        where, inside = self.box(tensor, corner)
        self.elements[where[inside]] = values[inside]


@st.composite
def layouts(draw: st.DrawFn, rank: int) -> tuple[tuple[int, ...], tuple[int, ...], Memory]:
    """Shape and strides in elements of a tensor whose last axis is contiguous, and memory that just holds it.

    The other axes lie in any order with any padding that is a multiple of 16 bytes; strides along axes of one element
    are anything at all.
    """
    dim = draw(st.integers(1, 150))
    shape = (*(draw(st.integers(1, 7)) for _ in range(rank - 1)), dim)
    strides, reach = [0] * (rank - 1) + [1], -(-dim // 8) * 8
    for axis in draw(st.permutations(range(rank - 1))):
        strides[axis] = reach + 8 * draw(st.integers(0, 3))
        reach = strides[axis] * shape[axis]
    end = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    start = 8 * draw(st.integers(0, 4))
    junk = draw(st.integers(-9, 9))
    steps = [stride if n > 1 else junk for n, stride in zip(shape[:-1], strides[:-1], strict=True)]
    return shape, (*steps, 1), Memory(start + end, start)


def in_bytes(*strides: int) -> tuple[int, ...]:
    return tuple(2 * stride for stride in strides)


def padded(rows: np.ndarray, first: int, box_rows: int, column: int) -> np.ndarray:
    """A box of a (row, column) matrix, with zeros where there is nothing."""
    box = np.zeros((box_rows, 64), rows.dtype)
    part = rows[first : first + box_rows, column : column + 64]
    box[: part.shape[0], : part.shape[1]] = part
    return box


@given(layouts(4), st.data())
def test_dense_boxes(layout: tuple, data: st.DataObject) -> None:
    (batch, rows, heads, dim), strides, memory = layout
    box_rows = data.draw(st.integers(1, 9))
    steps = in_bytes(strides[1], strides[2], strides[0])
    tensor = dense(BF16, dim, rows, heads, batch, steps, box_rows)
    assert all(stride % 16 == 0 < stride for stride in tensor.strides)
    values = memory.strided((batch, rows, heads, dim), strides).copy()
    b, h = data.draw(st.integers(0, batch - 1)), data.draw(st.integers(0, heads - 1))
    row, column = data.draw(st.integers(0, rows + 3)), 64 * data.draw(st.integers(0, dim // 64 + 1))
    box = memory.load(tensor, (column, row, h, b))
    assert box.shape == (1, 1, box_rows, 64)
    np.testing.assert_array_equal(box[0, 0], padded(values[b, :, h], row, box_rows, column))

    before = memory.elements.copy()
    memory.store(tensor, (column, row, h, b), np.full(box.shape, -1))
    expected = values.copy()
    expected[b, row : row + box_rows, h, column : column + 64] = -1
    np.testing.assert_array_equal(memory.strided(values.shape, strides), expected)
    assert (memory.elements != before).sum() == (expected == -1).sum(), "nothing between the rows is written"


@given(layouts(3), st.data())
def test_ragged_boxes_end_with_their_sequence(layout: tuple, data: st.DataObject) -> None:
    (total, heads, dim), strides, memory = layout
    box_rows = data.draw(st.integers(1, 9))
    tensor = ragged(FP16, dim, total, heads, in_bytes(*strides[:2]), box_rows)
    assert all(stride % 16 == 0 < stride for stride in tensor.strides)
    values = memory.strided((total, heads, dim), strides).copy()
    start = data.draw(st.integers(0, total))
    length = data.draw(st.integers(0, total - start))
    row, column = data.draw(st.integers(0, length + 3)), 64 * data.draw(st.integers(0, dim // 64))
    h = data.draw(st.integers(0, heads - 1))
    corner = column, total - length + row, start + length, h
    box = memory.load(tensor, corner)
    assert box.shape == (1, 1, box_rows, 64)
    np.testing.assert_array_equal(box[0, 0], padded(values[start : start + length, h], row, box_rows, column))

    before = memory.elements.copy()
    memory.store(tensor, corner, np.full(box.shape, -1))
    expected = values.copy()
    expected[start + row : start + max(row, min(length, row + box_rows)), h, column : column + 64] = -1
    np.testing.assert_array_equal(memory.strided(values.shape, strides), expected)
    assert (memory.elements != before).sum() == (expected == -1).sum()


@given(layouts(3), st.data())
def test_ragged_boxes_of_a_group_of_heads(layout: tuple, data: st.DataObject) -> None:
    (total, heads, dim), strides, memory = layout
    group, box_rows = data.draw(st.integers(1, heads)), data.draw(st.integers(1, 9))
    tensor = ragged_group(FP16, dim, total, heads, in_bytes(*strides[:2]), (group, box_rows))
    assert all(stride % 16 == 0 < stride for stride in tensor.strides)
    values = memory.strided((total, heads, dim), strides).copy()
    start = data.draw(st.integers(0, total))
    length = data.draw(st.integers(0, total - start))
    row, first = data.draw(st.integers(0, length + 3)), data.draw(st.integers(0, heads - group))
    box = memory.load(tensor, (0, first, total - length + row, start + length))
    assert box.shape == (1, box_rows, group, 64)
    for h in range(group):
        expected = padded(values[start : start + length, first + h], row, box_rows, 0)
        np.testing.assert_array_equal(box[0, :, h], expected)


@given(layouts(4), st.data())
def test_paged_boxes_end_where_what_is_used_of_a_page_does(layout: tuple, data: st.DataObject) -> None:
    (pages, rows, heads, dim), strides, memory = layout
    box_rows = data.draw(st.integers(1, 9))
    tensor = paged(BF16, dim, rows, heads, pages, in_bytes(strides[1], strides[2], strides[0]), box_rows)
    assert all(stride % 16 == 0 < stride for stride in tensor.strides)
    values = memory.strided((pages, rows, heads, dim), strides).copy()
    page, h = data.draw(st.integers(0, pages - 1)), data.draw(st.integers(0, heads - 1))
    used = data.draw(st.integers(0, rows))
    row, column = data.draw(st.integers(0, used + 3)), 64 * data.draw(st.integers(0, dim // 64))
    box = memory.load(tensor, (column, rows - used + row, used, h, page))
    assert box.shape == (1, 1, 1, box_rows, 64)
    np.testing.assert_array_equal(box[0, 0, 0], padded(values[page, :used, h], row, box_rows, column))


def test_maps_in_numbers() -> None:
    strides = 16 * 128 * 2, 128 * 2, 4096 * 16 * 128 * 2
    tensor = dense(BF16, 128, 4096, 16, 2, strides, 80)
    assert tensor == TensorMap(BF16, (128, 4096, 16, 2), strides, (64, 80, 1, 1))
    tensor = ragged(FP16, 72, 1000, 3, (3 * 72 * 2, 72 * 2), 64)
    assert tensor == TensorMap(FP16, (72, 1000, 1001, 3), (432, 432, 144), (64, 64, 1, 1), back=432_000)
    tensor = paged(BF16, 128, 16, 8, 1000, (8 * 256, 256, 16 * 8 * 256), 16)
    dims, strides = (128, 16, 17, 8, 1000), (2048, 2048, 256, 32_768)
    assert tensor == TensorMap(BF16, dims, strides, (64, 16, 1, 1, 1), back=32_768)


# The driver

_PROTOTYPE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint64),
    ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(ctypes.c_uint32),
    ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int,
)  # fmt: skip


class Driver:
    """What a call of cuTensorMapEncodeTiled passes, by the C prototype of cuda.h; its maps hold 1 ... 16."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.status = 0
        self.contexts: dict[int, int] = {}
        """Of the threads that have entered one."""
        self.cuTensorMapEncodeTiled = _PROTOTYPE(self._encode)

    def _encode(self, tensor_map, data_type, rank, address, dims, strides, box, element_strides, *modes) -> int:
        assert tensor_map % 64 == 0
        if self.contexts.get(threading.get_ident(), 0) is None:
            return 201  # CUDA_ERROR_INVALID_CONTEXT
        ctypes.memmove(tensor_map, np.arange(1, 17, dtype=np.uint64).tobytes(), 128)
        sizes = dims[:rank], strides[: rank - 1], box[:rank], element_strides[:rank]
        self.calls.append((data_type, rank, address, *sizes, modes))
        return self.status

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = ordinal
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: ctypes.c_int) -> int:
        context._obj.value = 0xC0 + device.value
        return 0

    def cuCtxSetCurrent(self, context: ctypes.c_void_p) -> int:
        self.contexts[threading.get_ident()] = context.value
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    fake = Driver()
    jit.driver.library.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake if name == "libcuda.so.1" else None)
    yield fake
    jit.driver.library.cache_clear()


MAP = dense(BF16, 128, 4096, 16, 2, (4096, 256, 2**24), 80)


def test_the_driver_is_asked_for_a_swizzled_map_that_fills_with_zeros(driver: Driver) -> None:
    address = 0x7F00_0000_0010
    assert tensormap.encoder(MAP, 0)(address) == tuple(range(1, 17))
    swizzle_128b, promote_to_256b = 3, 3  # CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B
    sizes = [128, 4096, 16, 2], [4096, 256, 2**24], [64, 80, 1, 1], [1, 1, 1, 1]
    assert driver.calls == [(9, 4, address, *sizes, (0, swizzle_128b, promote_to_256b, 0))]
    tensormap.encoder(ragged(FP16, 64, 100, 2, (256, 128), 64), 0)(address)
    assert driver.calls[1][:3] == (6, 4, address - 100 * 256)
    tensormap.encoder(paged(FP16, 64, 16, 2, 9, (256, 128, 4096), 16), 0)(address)
    assert driver.calls[2][:3] == (6, 5, address - 4096)
    assert driver.calls[2][3:7] == ([64, 16, 17, 2, 9], [256, 256, 128, 4096], [64, 16, 1, 1, 1], [1] * 5)


def test_maps_of_the_last_addresses_are_kept(driver: Driver) -> None:
    encode = tensormap.encoder(MAP, 0)
    for address in (16, 32, 16, 32, 2**47):
        encode(address)
    assert [call[2] for call in driver.calls] == [16, 32, 2**47]
    for address in range(16, 16 * 200, 16):
        encode(address)
    assert encode.cache_info().currsize <= 64


def test_a_thread_without_a_context_enters_that_of_the_gpu(driver: Driver) -> None:
    encoded = []

    def work() -> None:
        driver.contexts[threading.get_ident()] = None
        encoded.append((tensormap.encoder(MAP, 3)(16), driver.contexts[threading.get_ident()]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert encoded == [(tuple(range(1, 17)), 0xC3)] and len(driver.calls) == 1


def test_a_map_that_the_driver_refuses(driver: Driver) -> None:
    driver.status = 1
    with pytest.raises(UnsupportedProblem) as caught:
        tensormap.encoder(MAP, 0)(0x20)
    message = str(caught.value)
    assert message.startswith("the CUDA driver refuses to describe a tensor at 0x20 to the copy engine ")
    assert "(cuTensorMapEncodeTiled returns 1): TensorMap(dtype=DType(name='bf16'" in message
    assert message.endswith("Pass contiguous copies of the arrays.")


@pytest.mark.parametrize("how", ["no library", "an old one"])
def test_a_driver_without_tensor_maps(driver: Driver, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing if how == "no library" else lambda name: SimpleNamespace())
    with pytest.raises(UnsupportedProblem) as caught:
        tensormap.encoder(MAP, 0)
    assert str(caught.value).startswith(
        "the kernels of sm_90 need cuTensorMapEncodeTiled of the CUDA driver, which is not there ("
    )
    assert str(caught.value).endswith("Install driver 525 or newer, which CUDA 12 asks for.")
