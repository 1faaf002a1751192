// Fragments: which register of which lane holds which element of a warp's 16-row, 8-column tile.
//
//   accumulator of mma.m16n8k16, lane = 4 * g + c             A operand (16x16): four such 8x8 blocks, two elements
//               columns 2c  2c+1                              packed in each register
//     row g        x[0]  x[1]                                        k 0-7   k 8-15
//     row g + 8    x[2]  x[3]                                 rows 0-7   [0]     [2]
//                                                             rows 8-15  [1]     [3]
//
// An element is number (r, n, i) of its lane: the lane's row number r, every eighth row of the fragment; block n of
// eight columns; and i of the two neighbours in it. Only products and what feeds them see the registers themselves.
//
// Two accumulators side by side are one A operand after packing: probabilities never leave the registers.
#pragma once

#include "ptx/mma.cuh"
#include "ptx/sync.cuh"

namespace cuflash {

CF_DEVICE constexpr int row_of(int lane, int r) { return r * 8 + lane / 4; }
CF_DEVICE constexpr int col_of(int lane, int n, int i) { return n * 8 + lane % 4 * 2 + i; }

// kRows x kCols numbers of one warp.
template <int kRows, int kCols, class Real = float>
struct Fragment {
  static_assert(kRows % 16 == 0 && kCols % 16 == 0);
  static constexpr int kM = kRows / 16, kN = kCols / 8, kRowsPerLane = kRows / 8;
  static constexpr int kElements = kM * kN * 4;  // of a lane
  Real x[kM][kN][4];

  CF_DEVICE Real& at(int r, int n, int i) { return x[r / 2][n][r % 2 * 2 + i]; }

  // f(r, n, i) over this lane's elements, register by register.
  template <class F>
  CF_DEVICE static void for_each_index(F&& f) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) f(m * 2 + i / 2, n, i % 2);
      }
    }
  }
  // Number of an element in that order, and r and n of a number; i is whether it is odd.
  CF_DEVICE static constexpr int number_of(int r, int n, int i) { return (r / 2 * kN + n) * 4 + r % 2 * 2 + i; }
  CF_DEVICE static constexpr int row_number(int number) { return number / 4 / kN * 2 + number % 4 / 2; }
  CF_DEVICE static constexpr int block_number(int number) { return number / 4 % kN; }

  // f(element) over this lane's elements, and f(element, row, column).
  template <class F>
  CF_DEVICE void for_each(F&& f) {
    for_each_index([&](int r, int n, int i) { f(at(r, n, i)); });
  }
  template <class F>
  CF_DEVICE void for_each(int lane, F&& f) {
    for_each_index([&](int r, int n, int i) { f(at(r, n, i), row_of(lane, r), col_of(lane, n, i)); });
  }

  CF_DEVICE void clear() {
    for_each([](Real& x) { x = Real(0); });
  }
};

// Multiplies this lane's part of its row number r.
template <int kRows, int kCols, class Real>
CF_DEVICE void scale_row(Fragment<kRows, kCols, Real>& f, int r, Real factor) {
#pragma unroll
  for (int n = 0; n < kCols / 8; ++n) {
    f.at(r, n, 0) *= factor;
    f.at(r, n, 1) *= factor;
  }
}

// Takes a number off this lane's part of its row number r.
template <int kRows, int kCols, class Real>
CF_DEVICE void subtract_from_row(Fragment<kRows, kCols, Real>& f, int r, Real x) {
#pragma unroll
  for (int n = 0; n < kCols / 8; ++n) {
    f.at(r, n, 0) -= x;
    f.at(r, n, 1) -= x;
  }
}

// Largest value over the four lanes that share a row, and their sum.
template <class Real>
CF_DEVICE Real row_max(Real x) {
  x = max_of(x, ptx::shuffle_xor(x, 1));
  return max_of(x, ptx::shuffle_xor(x, 2));
}
template <class Real>
CF_DEVICE Real row_sum(Real x) {
  x += ptx::shuffle_xor(x, 1);
  return x + ptx::shuffle_xor(x, 2);
}

// A kRows x kCols A operand in 16-bit elements, packed in pairs.
template <int kRows, int kCols>
struct Operand {
  uint32 x[kRows / 16][kCols / 16][4];
};

template <class Element, int kRows, int kCols>
CF_DEVICE void pack_operand(Operand<kRows, kCols>& operand, const Fragment<kRows, kCols>& f) {
#pragma unroll
  for (int m = 0; m < kRows / 16; ++m) {
#pragma unroll
    for (int k = 0; k < kCols / 16; ++k) {
      const float (&left)[4] = f.x[m][2 * k];
      const float (&right)[4] = f.x[m][2 * k + 1];
      operand.x[m][k][0] = ptx::pack<Element>(left[0], left[1]);
      operand.x[m][k][1] = ptx::pack<Element>(left[2], left[3]);
      operand.x[m][k][2] = ptx::pack<Element>(right[0], right[1]);
      operand.x[m][k][3] = ptx::pack<Element>(right[2], right[3]);
    }
  }
}

// One bit for each of a lane's elements, all set at first; indices are compile-time constants after unrolling.
template <class Fragment>
struct ElementSet {
  uint32 words[(Fragment::kElements + 31) / 32];

  CF_DEVICE ElementSet() {
#pragma unroll
    for (uint32& word : words) word = ~0u;
  }
  CF_DEVICE void remove(int r, int n, int i) {
    const int bit = Fragment::number_of(r, n, i);
    words[bit / 32] &= ~(1u << bit % 32);
  }
  CF_DEVICE bool has(int r, int n, int i) const {
    const int bit = Fragment::number_of(r, n, i);
    return words[bit / 32] >> bit % 32 & 1u;
  }
};

}  // namespace cuflash
