// Online softmax of one row (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1). Every case of "nothing
// visible" is decided here: such a row has m = kLowest, l = 0, and becomes output 0 with lse -inf.
#pragma once

#include "params.cuh"

namespace cuflash {

// Scores x come in the score policy's units; p = exp2(log2_unit * (x - m)), log2_unit = log2(e) * unit.
template <class Real>
struct RowState {
  Real m;  // largest score so far
  Real l;  // sum of p so far

  // Below every score but finite: a hidden score, -inf, stays -inf less m, and m less m is 0.
  static constexpr Real kLowest = static_cast<Real>(sizeof(Real) == 4 ? -1e30 : -1e300);

  CF_DEVICE void init() { m = kLowest; l = Real(0); }

  // The maximum as an exponent.
  CF_DEVICE Real shift(Real log2_unit) const { return m * log2_unit; }

  // Takes in the largest score of a tile; returns the factor by which l and the output so far shrink.
  CF_DEVICE Real update(Real tile_max, Real log2_unit) {
    const Real before = m;
    m = max_of(m, tile_max);
    const Real rescale = exp2((before - m) * log2_unit);
    l *= rescale;
    return rescale;
  }

  // Whether probabilities would pass 2^slack without an update; until then the maximum so far serves as well.
  CF_DEVICE bool outgrown(Real tile_max, Real log2_unit, Real slack) const {
    return (tile_max - m) * log2_unit > slack;
  }

  // Takes in other scores of the row; returns the factor by which the output so far shrinks, and that of the other's.
  CF_DEVICE Real merge(const RowState& other, Real log2_unit, Real& other_rescale) {
    const Real rescale = update(other.m, log2_unit);
    other_rescale = exp2(other.m * log2_unit - shift(log2_unit));
    l += other.l * other_rescale;
    return rescale;
  }

  // Takes in one more logit that has no value; returns the factor by which the output so far shrinks.
  CF_DEVICE Real add_sink(Real logit, Real unit) {
    const Real log2_unit = unit * static_cast<Real>(kLog2E);
    const Real rescale = update(logit / unit, log2_unit);
    l += exp2(logit * static_cast<Real>(kLog2E) - shift(log2_unit));
    return rescale;
  }

  CF_DEVICE Real inverse_sum() const { return l == Real(0) ? Real(0) : Real(1) / l; }

  // Natural logarithm of sum(exp(logit)).
  CF_DEVICE Real lse(Real unit) const { return l == Real(0) ? -infinity<Real>() : m * unit + log(l); }
};

// Whether a learnable logit per head takes its share of every row's probability.
struct NoSink {
  template <class Real>
  CF_DEVICE static Real close(RowState<Real>&, const Attention&, int /*head*/, Real /*unit*/) { return Real(1); }
};

struct LearnableSink {
  template <class Real>
  CF_DEVICE static Real close(RowState<Real>& row, const Attention& a, int head, Real unit) {
    return row.add_sink(static_cast<Real>(a.sink[head]), unit);
  }
};

// lse in base 2 as the backward subtracts it: empty rows (-inf, or +inf as PyTorch writes it) give p = exp2(-inf) = 0.
template <class Real>
CF_DEVICE Real backward_lse2(Real lse) {
  return lse == -infinity<Real>() ? infinity<Real>() : lse * static_cast<Real>(kLog2E);
}

}  // namespace cuflash
