// Merge: where the numbers of a row are in results that are merged, and what share of its probability each has.
#pragma once

#include "element.cuh"
#include "params.cuh"

namespace cuflash {

// Row `number` of (batch, len, heads), and where its numbers are.
struct MergeRow {
  int64 batch;
  int row;
  int head;

  CF_DEVICE MergeRow(const MergeParams& p, int64 number)
      : batch(number / (int64(p.len) * p.heads)), row(static_cast<int>(number / p.heads % p.len)),
        head(static_cast<int>(number % p.heads)) {}

  CF_DEVICE int64 offset(const Strides& stride) const {
    return batch * stride.batch + row * stride.row + head * stride.head;
  }
  // In contiguous (batch, heads, len).
  CF_DEVICE int64 number_of_lse(const MergeParams& p) const { return (batch * p.heads + head) * p.len + row; }
};

// What a part has of a row's probability; 0 of an empty one.
template <class Real>
CF_DEVICE Real merge_weight(Real lse, Real whole) {
  return abs_of(lse) == infinity<Real>() ? Real(0) : exp2((lse - whole) * static_cast<Real>(kLog2E));
}

}  // namespace cuflash
