// Online softmax of a warp's rows in registers.
#pragma once

#include "attention/softmax.cuh"
#include "tile/fragment.cuh"

namespace cuflash {

// Multiplies this lane's part of its row number r.
template <int kRows, int kCols>
CF_DEVICE void scale_row(Fragment<kRows, kCols>& f, int r, float factor) {
#pragma unroll
  for (int n = 0; n < kCols / 8; ++n) {
    f.at(r, n, 0) *= factor;
    f.at(r, n, 1) *= factor;
  }
}

// Logits to probabilities relative to the running maximum; what was accumulated before shrinks to match.
// Each lane sums only its own columns into l; row_sum joins them once at the end.
template <int kRows, int kKeys, int kDim>
CF_DEVICE void softmax_tile(Fragment<kRows, kKeys>& s, RowState<float> (&rows)[kRows / 8], Fragment<kRows, kDim>& out,
                            float log2_unit) {
#pragma unroll
  for (int r = 0; r < kRows / 8; ++r) {
    float tile_max = -infinity<float>();
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) tile_max = max_of(tile_max, max_of(s.at(r, n, 0), s.at(r, n, 1)));
    const float rescale = rows[r].update(row_max(tile_max), log2_unit);
    float shift = rows[r].shift(log2_unit);
    if (RowState<float>::is_far(shift)) {
      subtract_from_row(s, r, rows[r].m);
      shift = 0.f;
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& p = s.at(r, n, i);
        p = exp2(fma(p, log2_unit, -shift));
        rows[r].l += p;
      }
    }
    scale_row(out, r, rescale);
  }
}

}  // namespace cuflash
