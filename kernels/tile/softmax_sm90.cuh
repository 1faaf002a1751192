// Online softmax of a warp's 16 rows in registers that takes exponentials first and looks afterwards.
//
// Algorithm 1 of Dao et al. 2022 looks for the largest score of a tile, then takes exponentials relative to it. Any
// reference serves as long as nothing overflows and the probabilities that matter do not round: a key that outweighs
// the rest of its row must have probability 1, which 16 bits hold exactly. So this takes exponentials relative to a
// reference from tiles before, and looks at their sums, which are needed anyway: in most tiles nothing else is to be
// done. A tile that outweighs what its row has so far makes its own largest score the reference. If probabilities are
// infinite, the tile's scores are computed again and looked at first.
#pragma once

#include "attention/softmax.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/fragment.cuh"

namespace cuflash {

// What a warp knows of a row as it hands it over to another of the same rows.
struct alignas(16) RowHandover {
  float m, l, rescale, log2_unit;
};

// A shift rounds, and in a far row (RowState::is_far) that would show: there the reference must be taken off the scores
// first. A warp with such a row has NaN for its unit, so that all its probabilities are NaN and it is looked at first.
struct WarpSoftmax {
  // A sum that asks for a look: kDominant times what the row has so far, or kMost, which leaves room in fp16 and in the
  // sums of the output.
  static constexpr float kDominant = 4.f, kMost = 256.f;

  RowState<float> rows[2];  // m is the reference; l is kDominant times the sum over this lane's columns
  float log2_unit;          // NaN: some row is far
  float rescale[2];         // what the output so far must shrink by, when an answer is true

  CF_DEVICE WarpSoftmax() {
    rows[0].init();
    rows[1].init();
  }

  // Scores to probabilities, for rows that may have no reference yet. Whether the output so far must be rescaled.
  template <int kCols>
  CF_DEVICE bool look_first(Fragment<16, kCols>& s, float unit) {
    log2_unit = unit * static_cast<float>(kLog2E);
    const float largest[2] = {largest_of(s, 0, -infinity<float>()), largest_of(s, 1, -infinity<float>())};
    const bool grew = ptx::any(largest[0] > rows[0].m || largest[1] > rows[1].m);
    if (grew) {
#pragma unroll
      for (int r = 0; r < 2; ++r) rescale[r] = rows[r].update(row_max(largest[r]), log2_unit);
    }
    float shift[2] = {rows[0].shift(log2_unit), rows[1].shift(log2_unit)};
    const bool far = ptx::any(RowState<float>::is_far(shift[0]) || RowState<float>::is_far(shift[1]));
    if (far) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        subtract_from_row(s, r, rows[r].m);
        shift[r] = 0.f;
      }
    }
    float sum[2];
    weigh(s, sum, shift);
    add(sum);
    if (grew) {  // shared out, or a lane that has little of it would ask for a look in vain
#pragma unroll
      for (int r = 0; r < 2; ++r) rows[r].l = .25f * row_sum(rows[r].l);
    }
    if (far) log2_unit = nan();
    return grew;
  }

  // The same for rows that have one, the answer in `grew`. False if probabilities overflowed, or rows are far: the
  // scores must be computed again and looked at first.
  template <int kCols>
  CF_DEVICE bool look_after(Fragment<16, kCols>& s, bool& grew) {
    float sum[2];
    weigh(s, sum, {rows[0].shift(log2_unit), rows[1].shift(log2_unit)});
    grew = ptx::any(!(sum[0] < min_of(rows[0].l, kMost) && sum[1] < min_of(rows[1].l, kMost)));
    if (grew) {
      constexpr float kOverflow = 0x1p120f;  // its inverse is still a float
      if (ptx::any(!(sum[0] < kOverflow && sum[1] < kOverflow))) return false;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float largest = row_max(largest_of(s, r, 1.f));
        rescale[r] = reciprocal(largest);
        rows[r].m += approximate_log2(largest) * reciprocal(log2_unit);
        rows[r].l *= rescale[r];
        sum[r] *= rescale[r];
#pragma unroll
        for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) s.at(r, n, i) *= rescale[r];
        }
      }
      // A reference that has crept far is looked at first from now on.
      if (RowState<float>::is_far(max_of(abs_of(rows[0].m), abs_of(rows[1].m)) * log2_unit)) log2_unit = nan();
    }
    add(sum);
    return true;
  }

  // Leaves the rows, the first 16 of `handed`, to another warp, which takes them; `grew` is the answer for the last
  // tile. Sums are shared out among the lanes of a row. Whether the output so far must be rescaled.
  CF_DEVICE void give(RowHandover* handed, int lane, bool grew) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rows[r].l = .25f * row_sum(rows[r].l);
      if (lane % 4 == 0) handed[row_of(lane, r)] = {rows[r].m, rows[r].l, grew ? rescale[r] : 1.f, log2_unit};
    }
  }
  CF_DEVICE bool take(const RowHandover* handed, int lane) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const RowHandover row = handed[row_of(lane, r)];
      rows[r].m = row.m;
      rows[r].l = row.l;
      rescale[r] = row.rescale;
      log2_unit = row.log2_unit;
    }
    return ptx::any(rescale[0] != 1.f || rescale[1] != 1.f);
  }

  // Row r as a whole.
  CF_DEVICE RowState<float> whole(int r) const { return {rows[r].m, row_sum(rows[r].l) / kDominant}; }

 private:
  CF_DEVICE static float nan() { return infinity<float>() - infinity<float>(); }

  CF_DEVICE void add(const float (&sum)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) rows[r].l = fma(kDominant, sum[r], rows[r].l);
  }

  template <int kCols>
  CF_DEVICE static float largest_of(Fragment<16, kCols>& s, int r, float least) {
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n) least = max_of(least, max_of(s.at(r, n, 0), s.at(r, n, 1)));
    return least;
  }

  // Probabilities relative to the references, and their sums over this lane's columns.
  template <int kCols>
  CF_DEVICE void weigh(Fragment<16, kCols>& s, float (&sum)[2], const float (&shift)[2]) const {
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
