// Merges results of the same queries over different keys, as attention over all of these keys gives them.
//
//   lse = log sum_i exp(lse_i),   out = sum_i exp(lse_i - lse) out_i
//
// A part whose lse is infinite saw no key, and its out is not read. kAcross neighbours of a warp share a row.
#pragma once

#include "attention/merge.cuh"
#include "ptx/sync.cuh"
#include "tile/copy.cuh"

namespace cuflash {

template <class Config>
struct MergeForward {
  using Element = typename Config::Element;
  using Result = typename Config::Result;
  using Real = Accumulator<Element>;
  using Vector = typename VectorOf<Config::kCopyBytes>::Type;
  static constexpr int kWidth = Config::kCopyBytes / sizeof(Element);
  static constexpr int kRowsAtOnce = Config::kThreads / Config::kAcross;

  CF_DEVICE static Real lse_of(const MergePart& part, const MergeRow& row) {
    return static_cast<const Real*>(part.lse)[row.offset(part.lse_stride)];
  }

  // Probability of a row relative to that of its largest part. Shares are made from these two: made from the row's lse,
  // whose rounding is that of a number far from 0, they would not add up to 1.
  struct Whole {
    Real largest = -infinity<Real>();
    Real sum = 0;

    CF_DEVICE Whole(const MergeParams& p, const MergeRow& row) {
      for (int i = 0; i < p.count; ++i) {
        const Real lse = lse_of(p.parts[i], row);
        if (lse != infinity<Real>()) largest = max_of(largest, lse);
      }
      if (largest == -infinity<Real>()) largest = Real(0);
      for (int i = 0; i < p.count; ++i) sum += merge_weight(lse_of(p.parts[i], row), largest);
    }
    CF_DEVICE Real lse() const { return sum == Real(0) ? -infinity<Real>() : largest + log(sum); }
    CF_DEVICE Real share(Real lse) const { return sum == Real(0) ? Real(0) : merge_weight(lse, largest) / sum; }
  };

  CF_DEVICE static void run(const MergeParams& p) {
    const int64 number = ptx::block_index() * kRowsAtOnce + ptx::thread_index() / Config::kAcross;
    if (number >= p.rows) return;
    const MergeRow row(p, number);
    const Whole whole(p, row);
    const int lane = ptx::thread_index() % Config::kAcross;
    if (lane == 0) static_cast<Real*>(p.lse)[row.number_of_lse(p)] = whole.lse();
    for (int first = lane * kWidth; first < p.dim; first += Config::kAcross * kWidth) {
      Real out[kWidth] = {};
      for (int i = 0; i < p.count; ++i) {
        const MergePart& part = p.parts[i];
        const Real weight = whole.share(lse_of(part, row));
        if (weight == Real(0)) continue;
        const Vector vector = *reinterpret_cast<const Vector*>(static_cast<const Element*>(part.out) +
                                                               row.offset(part.out_stride) + first);
        const Element* columns = reinterpret_cast<const Element*>(&vector);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) out[j] = fma(weight, to_accumulator(columns[j]), out[j]);
      }
      Result* to = static_cast<Result*>(p.out) + number * p.dim + first;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) to[j] = from_accumulator<Result>(out[j]);
    }
  }
};

template <class Config>
CF_DEVICE void forward_merge(const MergeParams& params) {
  MergeForward<Config>::run(params);
}

}  // namespace cuflash
