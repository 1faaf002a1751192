// Online softmax of a warp's rows in registers.
#pragma once

#include "attention/softmax.cuh"
#include "tile/fragment.cuh"

namespace cuflash {

// Largest of this lane's part of its row number r.
template <int kRows, int kKeys, class Real>
CF_DEVICE Real lane_max(Fragment<kRows, kKeys, Real>& s, int r) {
  Real largest = -infinity<Real>();
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) largest = max_of(largest, max_of(s.at(r, n, 0), s.at(r, n, 1)));
  return largest;
}

// Logits of this lane's row number r to probabilities; returns their sum and `sum`.
template <int kRows, int kKeys, class Real>
CF_DEVICE Real weigh_row(Fragment<kRows, kKeys, Real>& s, int r, Real shift, Real log2_unit, Real sum) {
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Real& p = s.at(r, n, i);
      p = exp2(fma(p, log2_unit, -shift));
      sum += p;
    }
  }
  return sum;
}

// Logits of this lane's row number r to probabilities relative to the running maximum; returns the factor by which what
// was accumulated before shrinks. Each lane sums only its own columns into l; row_sum joins them. kExact: the largest score has
// probability 1 to the last bit, at the price of a subtraction a score, and a tile's probabilities are summed apart.
template <bool kExact = false, int kRows, int kKeys, class Real>
CF_DEVICE Real softmax_row(Fragment<kRows, kKeys, Real>& s, int r, RowState<Real>& row, Real log2_unit) {
  const Real rescale = row.update(row_max(lane_max(s, r)), log2_unit);
  Real shift = row.shift(log2_unit);
  if (kExact || RowState<Real>::is_far(shift)) {
    subtract_from_row(s, r, row.m);
    shift = Real(0);
  }
  row.l = kExact ? row.l + weigh_row(s, r, shift, log2_unit, Real(0)) : weigh_row(s, r, shift, log2_unit, row.l);
  return rescale;
}

// The same of all rows, and of what was accumulated before. Whether rows are far is asked once for all of them: a branch for
// each would keep their exponentials apart.
template <int kRows, int kKeys, int kDim>
CF_DEVICE void softmax_tile(Fragment<kRows, kKeys>& s, RowState<float> (&rows)[kRows / 8], Fragment<kRows, kDim>& out,
                            float log2_unit) {
  float shift[kRows / 8];
  bool far = false;
#pragma unroll
  for (int r = 0; r < kRows / 8; ++r) {
    scale_row(out, r, rows[r].update(row_max(lane_max(s, r)), log2_unit));
    shift[r] = rows[r].shift(log2_unit);
    far |= RowState<float>::is_far(shift[r]);
  }
  if (far) {
#pragma unroll
    for (int r = 0; r < kRows / 8; ++r) {
      if (!RowState<float>::is_far(shift[r])) continue;
      subtract_from_row(s, r, rows[r].m);
      shift[r] = 0.f;
    }
  }
#pragma unroll
  for (int r = 0; r < kRows / 8; ++r) rows[r].l = weigh_row(s, r, shift[r], log2_unit, rows[r].l);
}

}  // namespace cuflash
