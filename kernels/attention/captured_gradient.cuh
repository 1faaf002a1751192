// CapturedGradient: where a kernel that makes d(logit) adds up the gradients of the numbers that a written score reads.
#pragma once

#include "std.cuh"

namespace cuflash {

// Nowhere: not wanted.
struct NoCapturedGradient {
  template <class Score, class Real>
  CF_DEVICE static void add(const Score&, Real /*s*/, Real /*ds*/, int /*q*/, int /*kv*/) {}
};

// In the sums that `Captured` points to, in whatever order blocks come. Pairs without a gradient add nothing, as what they
// read may be no number.
struct AddedCapturedGradient {
  template <class Score, class Real>
  CF_DEVICE static void add(const Score& score, Real s, Real ds, int q, int kv) {
    if (ds != Real(0)) score.add_gradients(s, ds, q, kv);
  }
};

}  // namespace cuflash
