"""Pages of any size on the CPU: where the kernels look for keys, and what they make of them."""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import pytest
from host.build import build, why_not
from host.cases import CAUSAL, check_forward, paged
from hypothesis import given, settings
from hypothesis import strategies as st

from cuflash.arrays import View
from cuflash.jit import params
from cuflash.masks import Mask
from cuflash.ops import block

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

UNIT = r"""
#include "tile/rows.cuh"
using namespace cuflash;

extern "C" __attribute__((visibility("default")))
void places(const Pages* pages, const Strides* stride, const int* cu_seqlens_kv, const int* seqused_kv, int batch,
            int first, int rows, int step, int64* at, int64* below) {
  FwdParams p{};
  p.pages = *pages;
  const int cu_seqlens_q[3] = {};
  p.attention.cu_seqlens_q = cu_seqlens_q;
  p.attention.cu_seqlens_kv = cu_seqlens_kv;
  p.attention.seqused_kv = seqused_kv;
  p.attention.batch = 2;
  const char* base = reinterpret_cast<const char*>(1ll << 60);
  const PagedSequence sequence(p.attention, batch);
  const char* row0 = first_key<const char>(base - 3 * stride->head, *stride, sequence, 3);
  const auto keys = kv_rows(p, sequence, row0, *stride, first, 0);
  for (int row = 0; row < rows; ++row) {
    const char* place = keys.at(row, 3, 5);
    at[row] = place - base;
    below[row] = keys.below(place, row, 8, step) - base;
  }
}
"""


@cache
def places() -> ctypes.CDLL:
    return build(UNIT)


SIZES = st.one_of(st.integers(1, 70), st.integers(0, 30).map(lambda n: 2**n), st.integers(1, 2**30))


@settings(max_examples=300, deadline=None)
@given(size=SIZES, data=st.data())
def test_rows_are_where_the_table_says(size: int, data: st.DataObject) -> None:
    """Also that no number behind the last page is looked up: it would show in the place."""
    most = min(2**30 - 1, 40 * size)
    lengths = [data.draw(st.integers(1, most), f"length {b}") for b in range(2)]
    batch = data.draw(st.integers(0, 1), "batch")
    first = data.draw(st.integers(0, lengths[batch] - 1), "first")
    stride = np.array([data.draw(st.integers(-(2**33), 2**33)) for _ in range(3)], np.int64)
    counts = [-(-length // size) for length in lengths]
    step_b, step_page = data.draw(st.sampled_from([(0, 0), (1, 2), (50, 1), (-50, 1), (-1, -2)]), "table strides")
    memory = np.full(200, np.iinfo(np.int32).min, np.int32)
    table = np.lib.stride_tricks.as_strided(memory[100:], (2, max(counts)), (4 * step_b, 4 * step_page))
    if step_page:
        for b in range(2):
            table[b, : counts[b]] = data.draw(st.integers(0, 2**20)) + np.arange(counts[b])
    else:
        table[...] = 7
    view = View("table", table.shape, table.strides, "int32", 4, table.ctypes.data, "cpu")
    keys = View("k", (2**21, size, 1, 1), (1, 1, 1, 1), "int8", 1, 0, "cpu")
    pages = block.pages_of(keys, view)
    pages["table"] = table.ctypes.data
    assert pages.dtype == params.dtype("Pages")

    rows, step = 130, 16
    used = np.array(lengths, np.int32)
    # cu_seqlens leaves room behind what is used, and starts where no page is.
    starts = np.cumsum([0, *(np.minimum(used, 2**30 - 10) + 9)], dtype=np.int64).astype(np.int32)
    at, below = np.zeros((2, rows), np.int64)
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in (pages, stride, starts, used)]
    outputs = [ctypes.c_void_p(x.ctypes.data) for x in (at, below)]
    places().places(*pointers, batch, first, rows, step, *outputs)
    for offsets, ahead in ((at, 0), (below, step)):
        for row in range(rows):
            key = min(first + row + ahead, lengths[batch] - 1)
            page = int(table[batch, key // size])
            assert offsets[row] == page * int(stride[0]) + key % size * int(stride[1]) + 8


HOPPER = {
    16: {"mask": CAUSAL, "tail": 2},
    24: {"mask": Mask(left=60, right=3), "shared": True},
    64: {"mask": Mask(left=20, right=0), "seqused_kv": (90, 0, 333)},
    256: {"dropout": "byte"},
    384: {"mask_axes": "bhqk", "alibi_axes": "h", "softcap": 2.0, "sink": True},
}


@pytest.mark.parametrize("page_size", HOPPER)
@pytest.mark.parametrize("dims", [(64, 64), (128, 40), (256, 256)], ids=str)
def test_hoppers_boxes_of_pages(page_size: int, dims: tuple[int, int]) -> None:
    """Pages smaller than a tile, larger, and with a part in common; what no key is in is NaN."""
    lens = (200, 0, 70), (300, 40, 600)
    case = paged("bf16", page_size, (4, 2), *lens, dims, family="sm90", num_sms=3, **HOPPER[page_size])
    check_forward(case, seed=page_size)


WINDOWED: dict[str, tuple[str, tuple[int, int], tuple[int, int], int]] = {
    "few": ("sm80", (4, 1), (1, 2), 0),
    "whole": ("sm80", (2, 2), (70, 40), 1),
    "parts": ("sm80", (2, 2), (70, 40), 3),
    "simt": ("simt", (2, 1), (1, 20), 1),
    "boxes": ("sm90", (2, 2), (70, 40), 1),
    "boxes-few": ("sm90", (8, 1), (3, 8), 0),
}


@pytest.mark.parametrize("kernel", WINDOWED)
@pytest.mark.parametrize("page_size", [3, 16, 64])
def test_pages_before_a_window_are_not_looked_up(kernel: str, page_size: int) -> None:
    """They may have been given to other sequences: their numbers in the table are wild."""
    family, heads, lens_q, num_splits = WINDOWED[kernel]
    if family == "sm90" and page_size % 8:
        pytest.skip("no boxes of such pages")
    lens_kv, left = (900, 1200), 100
    case = paged(
        "bf16", page_size, heads, lens_q, lens_kv, (64, 64), family=family, mask=Mask(left=left, right=0),
        num_splits=num_splits,
    )  # fmt: skip
    check_forward(case, shown_from=[n - q - left for n, q in zip(lens_kv, lens_q, strict=True)])


LENGTHS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 150)), min_size=1, max_size=3)


@pytest.mark.parametrize(("family", "dtype"), [("sm80", "bf16"), ("simt", "fp64")])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_page_size_and_lengths(family: str, dtype: str, data: st.DataObject) -> None:
    lens_q, lens_kv = zip(*data.draw(LENGTHS, "lengths"), strict=True)
    page_size = data.draw(st.one_of(st.integers(1, 20), st.integers(1, 200)), "page size")
    more = {"shared": data.draw(st.booleans(), "shared"), "tail": data.draw(st.integers(0, 3), "tail")}
    if data.draw(st.booleans(), "seqused"):
        more["seqused_kv"] = tuple(data.draw(st.integers(0, length)) for length in lens_kv)
    case = paged(dtype, page_size, (2, 1), lens_q, lens_kv, (16, 16), family=family, mask=CAUSAL, **more)
    check_forward(case)
