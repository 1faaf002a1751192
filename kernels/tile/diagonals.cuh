// Sums along the diagonals of a warp's fragment, for what is learned of distances between queries and keys.
//
//   row 0     a  b  c  d  e ...        0:        a  b  c  d  e ...      Skewed, diagonals are columns. A lane has two
//   row 1     f  g  h  i  j ...   ->   1:     f  g  h  i  j  ...        neighbours of every eight columns of its row;
//   row 2     k  l  m  n  o ...        2:  k  l  m  n  o  ...           skewed, it still has them of other blocks.
//
// Rows 8 apart are in the same lane. Rows 4, 2 and 1 apart are in other lanes, which exchange halves: each step leaves
// a lane half of the blocks, summed over twice as many rows.
#pragma once

#include "tile/fragment.cuh"

namespace cuflash {

// Two of every eight neighbouring diagonals: x[m][i] is on diagonal first[i] + 8 * m.
template <int kBlocks>
struct DiagonalBlocks {
  static constexpr int kCount = kBlocks, kHalf = (kBlocks + 1) / 2;

  float x[kBlocks][2];
  int first[2];

  CF_DEVICE float at(int m, int i) const { return m < kBlocks ? x[m][i] : 0.f; }

  // Adds the row kRows further or before, and keeps one half of the blocks; that row's lane keeps the other.
  template <int kRows>
  CF_DEVICE DiagonalBlocks<kHalf> fold(int lane) const {
    const bool further = (lane & 4 * kRows) != 0;
    // The same diagonal is kRows columns further in a row that is so much further: in the next lane, if not in this
    // one.
    const int step = (kRows + 1) / 2, around = (lane + (further ? -step : step)) & 3;
    const int across = ((lane & ~3) ^ 4 * kRows) | around, straight = kRows == 1 ? lane ^ 4 : across;
    DiagonalBlocks<kHalf> half;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Of rows next to each other, the first of two columns is beside the second of the lane below it.
      const int its = kRows == 1 ? 1 - i : i;
#pragma unroll
      for (int m = 0; m < kHalf; ++m) {
        const float kept = further ? at(kHalf + m, its) : at(m, i), sent = further ? at(m, its) : at(kHalf + m, i);
        half.x[m][i] = kept + ptx::shuffle(sent, i == 0 ? straight : across);
      }
      half.first[i] = further ? first[its] + 8 * kHalf : first[i];
    }
    return half;
  }
};

// f(column - row, sum) for the diagonals of 16 rows, each in one lane; those that there are not have sums of 0.
template <int kRows, int kCols, class F>
CF_DEVICE void for_each_diagonal(Fragment<kRows, kCols>& s, int sixteen, int lane, F&& f) {
  constexpr int kN = kCols / 8;
  const auto both_rows = [&](int m, int i) {  // of a block, and of the one after it eight rows below
    const float upper = 2 <= m && m < kN + 2 ? s.at(2 * sixteen, m - 2, i) : 0.f;
    return 1 <= m && m < kN + 1 ? upper + s.at(2 * sixteen + 1, m - 1, i) : upper;
  };
  DiagonalBlocks<kN + 2> whole;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int skew = lane / 4, col = col_of(lane, 0, i);
    whole.first[i] = (col - skew & 7) - 16;
#pragma unroll
    for (int m = 0; m < kN + 2; ++m) whole.x[m][i] = col < skew ? both_rows(m + 1, i) : both_rows(m, i);
  }
  const auto sums = whole.template fold<4>(lane).template fold<2>(lane).template fold<1>(lane);
#pragma unroll
  for (int m = 0; m < sums.kCount; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) f(sums.first[i] + 8 * m, sums.x[m][i]);
  }
}

}  // namespace cuflash
