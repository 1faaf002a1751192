"""Packed rows padded to the longest sequence and back, by NumPy and by torch on the CPU, against loops."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuflash.adapters.torch.tensors import Torch
from cuflash.api import padding
from cuflash.api.pytorch import explicit
from cuflash.arrays import Library, numpy_arrays


def library_and_put(name: str) -> tuple[Library, Callable[[np.ndarray], Any]]:
    if name == "numpy":
        return numpy_arrays, lambda x: x
    torch = pytest.importorskip("torch", reason="torch is not installed")
    return Torch(), torch.asarray


LIBRARIES = pytest.mark.parametrize("name", ["numpy", "torch"])


@LIBRARIES
@given(
    lengths=st.lists(st.integers(0, 5), max_size=4), tail=st.integers(0, 3), more=st.integers(0, 4),
    value=st.sampled_from([0.0, np.inf, -np.inf]),
)  # fmt: skip
def test_rows_are_padded_spaced_and_packed_again(
    name: str, lengths: list[int], tail: int, more: int, value: float
) -> None:
    library, put = library_and_put(name)
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    total, length, heads = int(starts[-1]) + tail, max(lengths, default=0) + more, 2
    x = np.arange(heads * total, dtype=np.float32).reshape(heads, total) + 1
    padded = np.full((len(lengths), heads, length), value, np.float32)
    spaced = np.zeros((heads, total + explicit.GAP * len(lengths)), np.float32)
    for e, (start, end) in enumerate(pairwise(starts)):
        padded[e, :, : end - start] = x[:, start:end]
        spaced[:, start + explicit.GAP * e : end + explicit.GAP * e] = x[:, start:end]
    assert padding.longest(put(starts), None) == max(lengths, default=0) and padding.longest(None, 7) == 7
    actual = padding.padded(library, put(x), put(starts), length, value)
    np.testing.assert_array_equal(np.asarray(actual), padded)
    assert np.asarray(actual).flags.c_contiguous and np.asarray(actual).dtype == np.float32
    again = np.asarray(padding.unpadded(library, put(padded), put(starts), total))
    assert again.shape == (heads, total) and again.dtype == np.float32
    np.testing.assert_array_equal(again[:, : starts[-1]], x[:, : starts[-1]])
    x[:, starts[-1] :] = 0
    np.testing.assert_array_equal(np.asarray(explicit._spaced(library, put(x), put(starts))), spaced)

    sequences, rows = (np.asarray(y) for y in padding.sequences_and_rows(library, put(starts), total))
    expected = [(e, i) for e, n in enumerate(lengths) for i in range(n)]
    assert list(zip(sequences.tolist(), rows.tolist(), strict=True))[: len(expected)] == expected


@LIBRARIES
@pytest.mark.parametrize("lengths", [[3, 0, 2], [], [0, 0]])
def test_tensors_are_padded_with_zeros_of_their_type(name: str, lengths: list[int]) -> None:
    library, put = library_and_put(name)
    starts, length = np.cumsum([0, *lengths]).astype(np.int32), 4
    for dtype in (np.float16, np.float64) if name == "torch" else (np.float16, ml_dtypes.bfloat16, np.float64):
        x = np.arange(1, 1 + 6 * starts[-1]).reshape(-1, 2, 3).astype(dtype)
        expected = np.zeros((len(lengths), length, 2, 3), dtype)
        for e, (start, end) in enumerate(pairwise(starts)):
            expected[e, : end - start] = x[start:end]
        padded = np.asarray(padding.padded_tensors(library, put(x), put(starts), length))
        assert padded.dtype == dtype
        np.testing.assert_array_equal(padded, expected)


@LIBRARIES
def test_an_axis_is_extended_where_it_is_short(name: str) -> None:
    library, put = library_and_put(name)
    x = put(np.ones((2, 3), np.float32))
    assert padding.extended(library, x, 3, 7.0) is x
    np.testing.assert_array_equal(np.asarray(padding.extended(library, x, 5, 7.0)), [[1, 1, 1, 7, 7]] * 2)
