"""Sums in whole numbers (kernels/attention/exact_sum.cuh), by the host's compiler."""

from __future__ import annotations

import ctypes
from fractions import Fraction
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from host.build import build, why_not

from cuflash.dtypes import DTYPES
from cuflash.plan.steps import exact_sums

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

UNIT = """
#include "block.hpp"
#include "attention/exact_sum.cuh"

template <class Real>
Real sum(void* words, const Real* x, int count) {
  for (int i = 0; i < count; ++i) cuflash::ExactSum<Real>::add(words, 1, x[i]);
  return cuflash::ExactSum<Real>::rounded(words, 1);
}
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int words4() { return cuflash::ExactSum<float>::kWords; }
EXPORT int words8() { return cuflash::ExactSum<double>::kWords; }
EXPORT float sum4(void* words, const float* x, int count) { return sum(words, x, count); }
EXPORT double sum8(void* words, const double* x, int count) { return sum(words, x, count); }
"""


@cache
def library() -> ctypes.CDLL:
    loaded = build(UNIT)
    loaded.sum4.restype, loaded.sum8.restype = ctypes.c_float, ctypes.c_double
    return loaded


def summed(x: np.ndarray) -> tuple[Any, bytes]:
    """The sum, and the words that are left of it; nothing beside them is written."""
    size = x.dtype.itemsize
    words = np.zeros((3, getattr(library(), f"words{size}")()), np.int64)
    total = getattr(library(), f"sum{size}")(ctypes.c_void_p(words.ctypes.data), ctypes.c_void_p(x.ctypes.data), len(x))
    assert not words[[0, 2]].any()
    return x.dtype.type(total), words[1].tobytes()


def exactly(x: np.ndarray) -> Any:
    """The sum rounded once, to even; both neighbours of what double makes of it are tried."""
    total = sum(map(Fraction, x.tolist()), Fraction(0))
    near = x.dtype.type(float(total))
    with np.errstate(over="ignore", under="ignore"):
        tried = [y for y in (np.nextafter(near, -np.inf), near, np.nextafter(near, np.inf)) if np.isfinite(y)]
    return min(tried, key=lambda y: (abs(Fraction(float(y)) - total), int(y.view(f"u{y.itemsize}")) & 1))


@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize(("count", "spread"), [(1, 276), (2, 30), (7, 120), (200, 1), (200, 276)])
def test_a_sum_is_exact_in_every_order(real: Any, spread: int, count: int) -> None:
    rng = np.random.default_rng(count + spread)
    lowest = -149 if real == np.float32 else -900
    for trial in range(6):
        powers = rng.integers(max(lowest, -spread), spread // 3 + 1, count)
        x = np.ldexp(rng.standard_normal(count), powers).astype(real)
        if trial % 2 and count > 1:  # most of it cancels
            x[count // 2 :] = -x[: count - count // 2][::-1]
        total, words = summed(x)
        assert total == exactly(x)
        again, same = summed(x[rng.permutation(count)])
        assert (again, words) == (total, same)


@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_ties_go_to_even(real: Any) -> None:
    ulp = real(np.finfo(real).eps)
    for odd in (0, 1):
        one = real(1) + odd * ulp
        for sign in (1, -1):
            for least in (0, np.finfo(real).smallest_subnormal, -np.finfo(real).smallest_subnormal):
                x = sign * np.array([ulp / 2, least, one], real)
                assert summed(x)[0] == exactly(x)


@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_ends_of_the_range(real: Any) -> None:
    info = np.finfo(real)
    for x in ([], [0.0, -0.0], [info.max], [info.max, info.max, -info.max], [info.smallest_subnormal] * 3):
        array = np.array(x, real)
        assert summed(array)[0] == exactly(array)
    assert summed(np.array([info.max, info.max], real))[0] == np.inf
    assert summed(np.array([-info.max, -info.max], real))[0] == -np.inf
    for x, expected in (([1, np.inf], np.inf), ([-np.inf, 2, -np.inf], -np.inf)):
        assert summed(np.array(x, real))[0] == expected
    for x in ([np.nan, 1], [np.inf, -np.inf], [np.inf, np.nan]):
        assert np.isnan(summed(np.array(x, real))[0])


def test_digits_hold_many_addends() -> None:
    """Whole digits, of one sign, as many as fit in a test."""
    x = np.full(2**20, np.float32(2.0**24 - 1))
    assert summed(x)[0] == np.float32((2**24 - 1) * 2.0**20)


def test_memory_is_what_the_planner_allocates() -> None:
    for name, size in (("bf16", 4), ("fp64", 8)):
        problem: Any = SimpleNamespace(dtype=DTYPES[name])
        workspace = exact_sums("dcaptured0", problem, 5)
        assert workspace.nbytes == 5 * 8 * getattr(library(), f"words{size}")() and workspace.zeroed
