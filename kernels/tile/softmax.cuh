// Online softmax of a warp's 16 rows in registers that takes exponentials first and looks afterwards.
//
// Algorithm 1 of Dao et al. 2022 looks for the largest score of a tile, then takes exponentials relative to it. Any
// reference serves as long as nothing overflows. So this takes them relative to one from tiles before, and looks at their
// sums, which are needed anyway: in most tiles nothing else is to be done. Probabilities that grew too large are scaled
// down by what they grew; if some are infinite, or a row is far (RowState), the tile's scores are computed again and
// looked at first.
#pragma once

#include "attention/softmax.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/fragment.cuh"

namespace cuflash {

template <class Element>
struct WarpSoftmax {
  // A reference is the largest score that was looked at first, lies 2^kHeadroom above it in rows that outgrew one, and is
  // taken anew when probabilities pass 2^kSlack: so far inside the element's range that no product overflows float, or is
  // lost in it unless the value is below 2^-62. fp16 has no room below 1.
  static constexpr bool kWide = IsSame<Element, bf16>::value;
  static constexpr float kHeadroom = kWide ? 64.f : 0.f;
  static constexpr int kSlack = kWide ? 32 : 8;

  RowState<float> rows[2];  // m is the reference; l is the sum over this lane's columns
  float log2_unit;
  float rescale[2];  // what the output so far must shrink by, when an answer is true

  CF_DEVICE explicit WarpSoftmax(float unit) : log2_unit(unit * static_cast<float>(kLog2E)) {
    rows[0].init();
    rows[1].init();
  }

  // Scores to probabilities, for rows that may have no reference yet, or `outgrew` one. Whether the output so far must be
  // rescaled.
  template <int kCols>
  CF_DEVICE bool look_first(Fragment<16, kCols>& s, bool outgrew) {
    float largest[2] = {-infinity<float>(), -infinity<float>()};
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) largest[r] = max_of(largest[r], max_of(s.at(r, n, 0), s.at(r, n, 1)));
    }
    const bool outgrown = ptx::any(rows[0].outgrown(largest[0], log2_unit, kSlack) ||
                                   rows[1].outgrown(largest[1], log2_unit, kSlack));
    if (outgrown) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        rescale[r] = rows[r].update(row_max(largest[r]) + (outgrew ? kHeadroom / log2_unit : 0.f), log2_unit);
      }
    }
    float shift[2], sum[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      shift[r] = rows[r].shift(log2_unit);
      if (RowState<float>::is_far(shift[r])) {
        subtract_from_row(s, r, rows[r].m);
        shift[r] = 0.f;
      }
    }
    weigh(s, shift, sum);
    rows[0].l += sum[0];
    rows[1].l += sum[1];
    return outgrown;
  }

  // The same for rows that have one, the answer in `outgrown`. False if probabilities overflowed or a row is far: the
  // scores must be computed again and looked at first.
  template <int kCols>
  CF_DEVICE bool look_after(Fragment<16, kCols>& s, bool& outgrown) {
    const float shift[2] = {rows[0].shift(log2_unit), rows[1].shift(log2_unit)};
    const bool far = RowState<float>::is_far(shift[0]) || RowState<float>::is_far(shift[1]);
    float sum[2];
    weigh(s, shift, sum);
    constexpr float kMost = static_cast<float>(uint64(1) << kSlack);
    outgrown = ptx::any(far || !(sum[0] < kMost && sum[1] < kMost));
    if (outgrown) {
      const float total[2] = {row_sum(sum[0]), row_sum(sum[1])};
      if (ptx::any(far || !(total[0] < infinity<float>() && total[1] < infinity<float>()))) return false;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float log2_total = approximate_log2(total[r]);
        constexpr float kMostGrowth = 120;  // 2^-kMostGrowth is still a float
        rescale[r] = rows[r].update(rows[r].m + min_of(log2_total + kHeadroom, kMostGrowth) / log2_unit, log2_unit);
        sum[r] *= rescale[r];
#pragma unroll
        for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) s.at(r, n, i) *= rescale[r];
        }
      }
    }
    rows[0].l += sum[0];
    rows[1].l += sum[1];
    return true;
  }

 private:
  // Probabilities relative to the references, and their sums over this lane's columns.
  template <int kCols>
  CF_DEVICE void weigh(Fragment<16, kCols>& s, const float (&shift)[2], float (&sum)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = 0.f;
#pragma unroll
      for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& p = s.at(r, n, i);
          p = exp2(fma(p, log2_unit, -shift[r]));
          sum[r] += p;
        }
      }
    }
  }
};

}  // namespace cuflash
