// Fragments: which register of which lane holds which element of a warp's 16-row, 8-column tile.
//
//   accumulator of mma.m16n8k16, lane = 4 * r + c             A operand (16x16): four such 8x8 blocks, two elements
//               columns 2c  2c+1                              packed in each register
//     row r        x[0]  x[1]                                        k 0-7   k 8-15
//     row r + 8    x[2]  x[3]                                 rows 0-7   [0]     [2]
//                                                             rows 8-15  [1]     [3]
//
// Two accumulators side by side are one A operand after packing: probabilities never leave the registers.
#pragma once

#include "ptx/mma.cuh"
#include "ptx/sync.cuh"

namespace cuflash {

CF_DEVICE constexpr int row_of(int lane, int i) { return lane / 4 + i / 2 * 8; }
CF_DEVICE constexpr int col_of(int lane, int i) { return lane % 4 * 2 + i % 2; }

// kRows x kCols floats of one warp.
template <int kRows, int kCols>
struct Fragment {
  static_assert(kRows % 16 == 0 && kCols % 16 == 0);
  static constexpr int kM = kRows / 16, kN = kCols / 8;
  float x[kM][kN][4];

  // Element i of {0, 1} in column block n of this lane's row number r; rows r lie 8 apart, each spread over 4 lanes.
  CF_DEVICE float& at(int r, int n, int i) { return x[r / 2][n][r % 2 * 2 + i]; }
  static constexpr int kRowsPerLane = kRows / 8;

  CF_DEVICE void clear() {
    for_each(0, [](float& value, int, int) { value = 0.f; });
  }

  // f(element, row, column) over this lane's elements.
  template <class F>
  CF_DEVICE void for_each(int lane, F&& f) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) f(x[m][n][i], m * 16 + row_of(lane, i), n * 8 + col_of(lane, i));
      }
    }
  }
};

// Takes a number off this lane's part of its row number r.
template <int kRows, int kCols>
CF_DEVICE void subtract_from_row(Fragment<kRows, kCols>& f, int r, float x) {
#pragma unroll
  for (int n = 0; n < kCols / 8; ++n) {
    f.at(r, n, 0) -= x;
    f.at(r, n, 1) -= x;
  }
}

// Largest value over the four lanes that share a row, and their sum.
CF_DEVICE float row_max(float x) {
  x = max_of(x, ptx::shuffle_xor(x, 1));
  return max_of(x, ptx::shuffle_xor(x, 2));
}
CF_DEVICE float row_sum(float x) {
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
      const float(&left)[4] = f.x[m][2 * k];
      const float(&right)[4] = f.x[m][2 * k + 1];
      operand.x[m][k][0] = ptx::pack<Element>(left[0], left[1]);
      operand.x[m][k][1] = ptx::pack<Element>(left[2], left[3]);
      operand.x[m][k][2] = ptx::pack<Element>(right[0], right[1]);
      operand.x[m][k][3] = ptx::pack<Element>(right[2], right[3]);
    }
  }
}

// One bit for each of a lane's elements, all set at first; indices are compile-time constants after unrolling.
template <int kBits>
struct BitSet {
  uint32 words[(kBits + 31) / 32];

  CF_DEVICE BitSet() {
#pragma unroll
    for (uint32& word : words) word = ~0u;
  }
  CF_DEVICE void clear(int bit) { words[bit / 32] &= ~(1u << bit % 32); }
  CF_DEVICE bool has(int bit) const { return words[bit / 32] >> bit % 32 & 1u; }
};

}  // namespace cuflash
