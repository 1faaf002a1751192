// CapturedGradient: where a kernel that makes d(logit) adds up the gradients of the numbers that a written score reads.
#pragma once

#include "tile/diagonals.cuh"

namespace cuflash {

// Nowhere: not wanted.
struct NoCapturedGradient {
  template <class Score, class Real>
  CF_DEVICE static void add(const Score&, Real /*s*/, Real /*ds*/, int /*q*/, int /*kv*/) {}
  template <class Score, class Fragment>
  CF_DEVICE static void add_all(const Score&, Fragment& /*ds*/, int /*q*/, int /*kv*/) {}
};

// In the sums that `Captured` points to, in whatever order blocks come. Pairs without a gradient add nothing, as what
// they read may be no number.
struct AddedCapturedGradient {
  template <class Score, class Real>
  CF_DEVICE static void add(const Score& score, Real s, Real ds, int q, int kv) {
    if (ds != Real(0)) score.add_gradients(s, ds, q, kv);
  }
  template <class Score, class Fragment>
  CF_DEVICE static void add_all(const Score&, Fragment& /*ds*/, int /*q*/, int /*kv*/) {}
};

// The same of a score to which numbers are added that are read by the distance alone: first a warp's sums of each
// distance.
struct DistanceCapturedGradient {
  template <class Score, class Real>
  CF_DEVICE static void add(const Score&, Real /*s*/, Real /*ds*/, int /*q*/, int /*kv*/) {}
  // Of transposed fragments: rows are keys from kv on, columns queries from q on.
  template <class Score, int kRows, int kCols>
  CF_DEVICE static void add_all(const Score& score, Fragment<kRows, kCols>& ds, int q, int kv) {
#pragma unroll
    for (int sixteen = 0; sixteen < kRows / 16; ++sixteen) {
      for_each_diagonal(ds, sixteen, ptx::lane_index(), [&](int diagonal, float sum) {
        if (sum != 0.f) score.add_at_distance(sum, q - kv - sixteen * 16 + diagonal);
      });
    }
  }
};

}  // namespace cuflash
