// HalfRows: rows whose keys two blocks of a cluster share (Halves, attention/split.cuh).
//
// What each has found of them stays in its shared memory, where no keys are needed any more; then each merges half of the
// rows' columns from both: whole rows, or a part of them in scratch memory.
#pragma once

#include "attention/softmax.cuh"
#include "ptx/cluster.cuh"
#include "tile/fragment.cuh"
#include "tile/parts.cuh"

namespace cuflash {

template <class Config, int kRows, int kCols>
struct HalfRows {
  static constexpr int kColsAtOnce = 8;   // of a thread that merges
  float out[kRows][kCols + kColsAtOnce];  // rows of which eight begin in different banks
  RowState<float> states[kRows];

  // Of a warp's 16 rows from `first_row` on; of their columns from `first_col` on, each divided by its row's own sum.
  CF_DEVICE void leave(int first_row, int lane, int r, const RowState<float>& state) {
    if (lane % 4 == 0) states[first_row + row_of(lane, r)] = state;
  }
  template <int kN>
  CF_DEVICE void leave(int first_row, int first_col, int lane, Fragment<16, kN>& found, int num_rows) {
    Fragment<16, kN>::for_each_index([&](int r, int n, int i) {
      const int row = first_row + row_of(lane, r), col = first_col + col_of(lane, n, 0);
      if (i != 0 || row >= num_rows || col >= kCols) return;
      *reinterpret_cast<Columns<float, 2>*>(&out[row][col]) = {{found.at(r, n, 0), found.at(r, n, 1)}};
    });
  }

  // The tile's rows begin at `q_first`; `thread` of as many `threads` of this block.
  template <class Sequence, class Heads, class Score>
  CF_DEVICE void merge(const FwdParams& p, const Sequence& sequence, const Heads& heads, const Score& score, int split,
                       int q_first, int num_rows, int thread, int threads) const {
    using Results = typename Config::Split::template Rows<Config>;
    using Real = typename If<Results::kWhole, typename Config::Element, float>::Type;
    constexpr int kAcross = cdiv(Config::kDimV, kColsAtOnce);
    static_assert(Config::kDimV % kColsAtOnce == 0);
    const int64 number = Results::number(p, sequence, heads.first, split);
#pragma unroll 1
    for (int index = ptx::rank_in_cluster() * threads + thread; index < num_rows * kAcross; index += 2 * threads) {
      const int place = index / kAcross, row = q_first + place, col = index % kAcross * kColsAtOnce;
      Columns<float, kColsAtOnce> sums;
      RowState<float> state = merge_parts<2>(sums, ClusterParts<kColsAtOnce>{&states[place], &out[place][col]}, 2,
                                             score.unit() * static_cast<float>(kLog2E));
      const float shrink = Config::Sink::close(state, p.attention, heads.head(row), score.unit());
      const float factor = shrink * state.inverse_sum();
      alignas(16) Real found[kColsAtOnce];
#pragma unroll
      for (int i = 0; i < kColsAtOnce; ++i) found[i] = from_accumulator<Real>(sums.x[i] * factor);
      Real* const place_of_row =
          Results::out(p, sequence, heads.first, split) + heads.offset(row, Results::out_stride(p)) + col;
#pragma unroll
      for (int i = 0; i < kColsAtOnce; i += 16 / sizeof(Real)) {
        *reinterpret_cast<uint4*>(place_of_row + i) = *reinterpret_cast<const uint4*>(found + i);
      }
      if (col == 0) Results::close(p, number + heads.offset(row, Results::lse_stride(p)), state, score.unit());
    }
  }
};

}  // namespace cuflash
