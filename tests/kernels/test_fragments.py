"""Who holds which element: fragment maps, the products built on them, and shared-memory banks, on one emulated warp."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_void_p
from functools import cache

import ml_dtypes
import numpy as np
import pytest
from host.build import build, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

COLUMNS = tuple(range(16, 257, 16))

UNIT = r"""
#include "tile/diagonals.cuh"
#include "tile/gemm_sm80.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))
using namespace cuflash;

// Of element i of a lane's registers.
EXPORT int row(int lane, int i) { return row_of(lane, i / 2); }
EXPORT int col(int lane, int i) { return col_of(lane, 0, i % 2); }

enum Product { kAbt, kAb, kAtb, kAbtUnpadded };

// SharedTile without its padding.
template <int kRows_, int kCols_>
struct PlainTile {
  static constexpr int kRows = kRows_, kCols = kCols_, kPitch = kCols_;
  fp16 data[kRows * kPitch];
  fp16* at(int row, int col) { return data + row * kPitch + col; }
  uint32 address(int row, int col) { return ptx::smem_u32(at(row, col)); }
};

struct Arguments { const fp16* a; const fp16* b; float* c; };

template <class Tile>
void load(Tile& tile, const fp16* global) {
  for (int i = ptx::lane_index(); i < Tile::kRows * Tile::kCols; i += 32) {
    *tile.at(i / Tile::kCols, i % Tile::kCols) = global[i];
  }
}

// One warp: C [32 x 32] = A B^T, A B or A^T B, the operands' shared tiles being kCols wide.
template <int kProduct, int kCols>
void product(const void* params) {
  const Arguments& arguments = *static_cast<const Arguments*>(params);
  constexpr int kRows = 48;
  using Tile = SharedTile<fp16, kRows, kCols>;
  char* smem = ptx::dynamic_smem();
  Fragment<32, 32> c;
  c.clear();
  if constexpr (kProduct == kAbtUnpadded) {
    PlainTile<kRows, kCols>& a = *reinterpret_cast<PlainTile<kRows, kCols>*>(smem);
    load(a, arguments.a);
    ptx::sync_warp();
    gemm_abt<fp16>(c, a, 0, a, 0);
  } else {
    Tile& a = *reinterpret_cast<Tile*>(smem);
    Tile& b = *reinterpret_cast<Tile*>(smem + sizeof(Tile));
    load(a, arguments.a);
    load(b, arguments.b);
    ptx::sync_warp();
    if constexpr (kProduct == kAbt) {
      gemm_abt<fp16>(c, a, 16, b, 16);
    } else if constexpr (kProduct == kAb) {
      Fragment<32, kRows> values;
      values.for_each(ptx::lane_index(), [&](float& x, int row, int col) { x = row * 0.25f - col * 0.125f; });
      Operand<32, kRows> operand;
      pack_operand<fp16>(operand, values);
      gemm_ab<fp16>(c, operand, b, kCols - 32);
    } else {
      gemm_atb<fp16>(c, a, kCols - 32, b, 0);
    }
  }
  c.for_each(ptx::lane_index(), [&](float x, int row, int col) { arguments.c[row * 32 + col] = x; });
}

template <int kProduct>
void (*product_of(int cols))(const void*) {
  switch (cols / 16) {
#define CASE(n) case n: return product<kProduct, (n < 2 && kProduct != kAbt ? 32 : n * 16)>;
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
    CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14) CASE(15) CASE(16)
  }
  return nullptr;
}

EXPORT const char* multiply(int kind, int cols, const fp16* a, const fp16* b, float* c, int* conflicts) {
  const auto kernel = kind == kAbt ? product_of<kAbt>(cols) : kind == kAb ? product_of<kAb>(cols)
                      : kind == kAtb ? product_of<kAtb>(cols) : product_of<kAbtUnpadded>(cols);
  const Arguments arguments{a, b, c};
  const char* error = host::launch(kernel, &arguments, 1, 32, 2 * 48 * (cols + 8) * 2, 0);
  *conflicts = static_cast<int>(host::block.bank_conflicts);
  return error;
}

// A fragment's values by `at`, by for_each after store_operand, and where both say they are.
struct RoundTrip { float* by_at; fp16* stored; };

void round_trip(const void* params) {
  const RoundTrip& out = *static_cast<const RoundTrip*>(params);
  using Tile = SharedTile<fp16, 48, 64>;
  Tile& tile = *reinterpret_cast<Tile*>(ptx::dynamic_smem());
  const int lane = ptx::lane_index();
  Fragment<32, 64> f;
  f.for_each(lane, [](float& x, int row, int col) { x = row * 64 + col; });
  for (int r = 0; r < f.kRowsPerLane; ++r) {
    for (int n = 0; n < f.kN; ++n) {
      for (int i = 0; i < 2; ++i) out.by_at[(r * 8 + lane / 4) * 64 + n * 8 + lane % 4 * 2 + i] = f.at(r, n, i);
    }
  }
  Operand<32, 64> operand;
  pack_operand<fp16>(operand, f);
  store_operand(tile, 16, lane, operand);
  ptx::sync_warp();
  for (int i = lane; i < 32 * 64; i += 32) out.stored[i] = *tile.at(16 + i / 64, i % 64);
}

// Of lane 0's elements in order: (r, n, i), where `at` has them among the registers, their numbers, r and n of those.
// Returns how often a set of elements is wrong about one.
EXPORT int element_numbers(int* out) {
  using F = Fragment<32, 48>;
  F f;
  int wrong = 0;
  F::for_each_index([&](int r, int n, int i) {
    const int number = F::number_of(r, n, i);
    const int values[] = {r, n, i, static_cast<int>(&f.at(r, n, i) - f.x[0][0]), number, F::row_number(number),
                          F::block_number(number)};
    for (int value : values) *out++ = value;
    ElementSet<F> others;
    others.remove(r, n, i);
    F::for_each_index([&](int r2, int n2, int i2) {
      wrong += others.has(r2, n2, i2) == (r2 == r && n2 == n && i2 == i);
    });
  });
  return wrong;
}

EXPORT const char* fragment_round_trip(float* by_at, fp16* stored) {
  const RoundTrip arguments{by_at, stored};
  return host::launch(round_trip, &arguments, 1, 32, 48 * 72 * 2, 0);
}

// One warp: sums along the diagonals of the rows from 16 on, by column - row + 15, and how many lanes gave each.
struct Diagonals { const float* from; double* sums; int* lanes; };

template <int kCols>
void diagonals(const void* params) {
  const Diagonals& arguments = *static_cast<const Diagonals*>(params);
  Fragment<32, kCols> f;
  f.for_each(ptx::lane_index(), [&](float& x, int row, int col) { x = arguments.from[row * kCols + col]; });
  for_each_diagonal(f, 1, ptx::lane_index(), [&](int diagonal, float sum) {
    if (sum == 0.f) return;
    arguments.sums[diagonal + 15] += sum;
    arguments.lanes[diagonal + 15] += 1;
  });
}

EXPORT const char* sum_diagonals(int cols, const float* from, double* sums, int* lanes) {
  const Diagonals arguments{from, sums, lanes};
  const auto kernel = cols == 16 ? diagonals<16> : cols == 32 ? diagonals<32> : cols == 48 ? diagonals<48>
                      : cols == 64 ? diagonals<64> : diagonals<128>;
  return host::launch(kernel, &arguments, 1, 32, 0, 0);
}

EXPORT void round_to_fp16(const float* x, fp16* y, int n) { while (n--) *y++ = from_accumulator<fp16>(*x++); }
EXPORT void round_to_bf16(const float* x, bf16* y, int n) { while (n--) *y++ = from_accumulator<bf16>(*x++); }
EXPORT void widen_fp16(const fp16* x, float* y, int n) { while (n--) *y++ = to_accumulator(*x++); }
EXPORT void widen_bf16(const bf16* x, float* y, int n) { while (n--) *y++ = to_accumulator(*x++); }
"""


@cache
def unit() -> ctypes.CDLL:
    library = build(UNIT)
    library.multiply.restype = library.fragment_round_trip.restype = ctypes.c_char_p
    library.sum_diagonals.restype = ctypes.c_char_p
    return library


def pointer(array: np.ndarray) -> c_void_p:
    return c_void_p(array.ctypes.data)


def test_accumulator_map_is_the_manuals() -> None:
    """The PTX manual's figure of the m16n8k16 accumulator, row by row: lane and register of each element."""
    for row, col in np.ndindex(16, 8):
        lane, register = row % 8 * 4 + col // 2, row // 8 * 2 + col % 2
        assert (unit().row(lane, register), unit().col(lane, register)) == (row, col)


def test_fragment_views_agree() -> None:
    by_at, stored = np.full((32, 64), np.nan, np.float32), np.full((32, 64), np.nan, np.float16)
    assert unit().fragment_round_trip(pointer(by_at), pointer(stored)) is None
    expected = np.arange(32 * 64).reshape(32, 64)
    np.testing.assert_array_equal(by_at, expected)
    np.testing.assert_array_equal(stored, expected)


def test_elements_are_numbered_as_registers_are() -> None:
    numbers = np.full((48, 7), -1, np.int32)
    assert unit().element_numbers(pointer(numbers)) == 0
    r, n, i, register, number, row_number, block_number = numbers.T
    assert set(zip(r.tolist(), n.tolist(), i.tolist(), strict=True)) == set(np.ndindex(4, 6, 2))
    for same in (register, number):
        np.testing.assert_array_equal(same, np.arange(48))
    np.testing.assert_array_equal(row_number, r)
    np.testing.assert_array_equal(block_number, n)


@pytest.mark.parametrize("cols", [16, 32, 48, 64, 128])
def test_sums_along_diagonals(cols: int) -> None:
    numbers = np.random.default_rng(cols).integers(1, 99, (32, cols)).astype(np.float32)  # sums are exact, and not 0
    sums, lanes = np.zeros(cols + 15), np.zeros(cols + 15, np.int32)
    assert unit().sum_diagonals(cols, pointer(numbers), pointer(sums), pointer(lanes)) is None
    np.testing.assert_array_equal(sums, [np.trace(numbers[16:], n) for n in range(-15, cols)])
    np.testing.assert_array_equal(lanes, 1)


def multiply(kind: int, cols: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    rng = np.random.default_rng(cols)
    a, b = (rng.integers(-8, 8, (48, cols)).astype(np.float16) for _ in range(2))  # every sum is exact in fp32
    c, conflicts = np.full((32, 32), np.nan, np.float32), c_int()
    error = unit().multiply(kind, cols, pointer(a), pointer(b), pointer(c), ctypes.byref(conflicts))
    assert error is None, error
    return a.astype(np.float64), b.astype(np.float64), c, conflicts.value


@pytest.mark.parametrize("cols", COLUMNS)
def test_products_are_right_and_free_of_bank_conflicts(cols: int) -> None:
    a, b, c, conflicts = multiply(0, cols)
    np.testing.assert_array_equal(c, a[16:] @ b[16:].T)
    assert conflicts == 0
    if cols == 16:
        return  # the other two products take 32 columns of their operands
    a, b, c, conflicts = multiply(1, cols)
    in_registers = np.arange(32)[:, None] * 0.25 - np.arange(48) * 0.125
    np.testing.assert_array_equal(c, in_registers @ b[:, -32:])
    assert conflicts == 0
    a, b, c, conflicts = multiply(2, cols)
    np.testing.assert_array_equal(c, a[:, -32:].T @ b[:, :32])
    assert conflicts == 0


def test_conflicts_are_counted() -> None:
    """Without the padding, rows of 128 bytes or more all start in the same bank: seven of eight reads have to wait."""
    a, _, c, conflicts = multiply(3, 64)
    np.testing.assert_array_equal(c, a[:32] @ a[:32].T)
    loads = 64 // 16 * (2 + 2)  # ldmatrix_x4 of both operands
    assert conflicts == loads * 4 * 7


@pytest.mark.parametrize(("name", "dtype"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_twin_conversions_are_numpys(name: str, dtype: type) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    widened = np.empty(every.shape, np.float32)
    getattr(unit(), f"widen_{name}")(pointer(every), pointer(widened), every.size)
    with np.errstate(all="ignore"):  # NaN and infinity are among them
        np.testing.assert_array_equal(widened, every.astype(np.float32))
        x = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
        middle = (widened[:-1] + widened[1:]) / 2  # ties
        near = [np.nextafter(middle, np.float32(end)) for end in (-np.inf, np.inf)]
        x = np.concatenate([x, widened, middle, *near])
        expected = x.astype(dtype)
        rounded = np.empty(x.shape, dtype)
        getattr(unit(), f"round_to_{name}")(pointer(x), pointer(rounded), x.size)
        number = ~np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(rounded), ~number)
        np.testing.assert_array_equal(rounded[number].view(np.uint16), expected[number].view(np.uint16))
