"""Where calls are answered: by NumPy, and by each family of kernels on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flash_words
import numpy as np
import oracle
import pytest
from doubles.launch import needs_compiler

from cuflash import ops


class Backend:
    """Arrays go to one place, and are computed by one family."""

    def __init__(
        self, family: str | tuple[str, ...] | None, put: Callable[[np.ndarray], Any], get: Callable[[Any], np.ndarray]
    ) -> None:
        self.family, self.put, self.get = family, put, get

    def __call__(
        self, q: Any, k: Any, v: Any, dout: Any = None, generator: tuple[int, int] | None = None, **given: Any
    ) -> list[np.ndarray]:
        """(out, lse), and (dq, dk, dv) with `dout`, for NumPy arrays in the words of the flash functions."""
        options = flash_words.options(given, family=self.family)
        out, lse, pullback = ops.vjp(options, flash_words.arrays(given, self.put, q=q, k=k, v=v), generator)
        results = (out, lse) if dout is None else (out, lse, *pullback(self.put(dout))[:3])
        return [self.get(x) for x in results]


FAMILIES = {"sm90": ("sm90", "sm80"), "sm80": "sm80", "simt": "simt"}
"""What answers in a place: of a family without gradients another takes its results."""
PLACES = [
    "numpy",
    *(pytest.param(f"{family}-on-the-cpu", marks=needs_compiler) for family in FAMILIES),
    *(pytest.param(f"{family}-on-the-gpu", marks=pytest.mark.gpu) for family in FAMILIES),
]


LEFT_BY_HOPPER = [place for place in PLACES if "sm90" not in str(place)]
"""Who serves what cannot be copied in bulk, rows off multiples of 16 bytes or expanded, and heads that share a tile."""


def on_gpu(x: np.ndarray) -> Any:
    """The same view of memory on the GPU, strides of 0 and the place between two vectors included."""
    import cupy

    first, end = np.lib.array_utils.byte_bounds(x)
    memory = cupy.zeros(end - first + 256, np.uint8)
    start = memory.data + first % 256 + (x.__array_interface__["data"][0] - first)
    view = cupy.ndarray(x.shape, x.dtype, start, x.strides)
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.strides)
    view[once] = cupy.asarray(x[once])
    return view


def assert_right(results: list[np.ndarray], arrays: list[np.ndarray], **options: Any) -> None:
    """Compare (out, lse), or all five, with the oracle."""
    exact, naive = oracle.attention(*arrays, **options), oracle.naive_in_dtype(*arrays, **options)
    oracle.assert_all_close(oracle.Attention(*results, *[None] * (5 - len(results))), exact, naive)
