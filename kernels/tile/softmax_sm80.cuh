// Online softmax of a warp's rows in registers.
#pragma once

#include "attention/softmax.cuh"
#include "tile/fragment.cuh"

namespace cuflash {

// Logits of this lane's row number r to probabilities relative to the running maximum; returns the factor by which what
// was accumulated before shrinks. Each lane sums only its own columns into l; row_sum joins them. kExact: the largest score has
// probability 1 to the last bit, at the price of a subtraction a score, and a tile's probabilities are summed apart.
template <bool kExact = false, int kRows, int kKeys, class Real>
CF_DEVICE Real softmax_row(Fragment<kRows, kKeys, Real>& s, int r, RowState<Real>& row, Real log2_unit) {
  Real tile_max = -infinity<Real>();
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) tile_max = max_of(tile_max, max_of(s.at(r, n, 0), s.at(r, n, 1)));
  const Real rescale = row.update(row_max(tile_max), log2_unit);
  Real shift = row.shift(log2_unit);
  if (kExact || RowState<Real>::is_far(shift)) {
    subtract_from_row(s, r, row.m);
    shift = Real(0);
  }
  Real sum = kExact ? Real(0) : row.l;
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Real& p = s.at(r, n, i);
      p = exp2(fma(p, log2_unit, -shift));
      sum += p;
    }
  }
  row.l = kExact ? row.l + sum : sum;
  return rescale;
}

// The same of all rows, and of what was accumulated before.
template <int kRows, int kKeys, int kDim>
CF_DEVICE void softmax_tile(Fragment<kRows, kKeys>& s, RowState<float> (&rows)[kRows / 8], Fragment<kRows, kDim>& out,
                            float log2_unit) {
#pragma unroll
  for (int r = 0; r < kRows / 8; ++r) scale_row(out, r, softmax_row(s, r, rows[r], log2_unit));
}

}  // namespace cuflash
