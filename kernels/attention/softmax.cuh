// Online softmax of one row (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1). Every case of "nothing
// visible" is decided here: such a row has m = kLowest, l = 0, and becomes output 0 with the lse that the caller wants.
// Only -inf hides: a score of kLowest is a score, and a row of them has l = their number.
#pragma once

#include "params.cuh"

namespace cuflash {

// Scores x come in the score policy's units; p = exp2(log2_unit * (x - m)), log2_unit = log2(e) * unit.
template <class Real>
struct alignas(2 * sizeof(Real)) RowState {
  Real m;  // largest score so far
  Real l;  // sum of p so far

  // The lowest finite number: a hidden score, -inf, stays -inf less m, and m less m is 0.
  static constexpr Real kLowest = static_cast<Real>(sizeof(Real) == 4 ? -0x1.fffffep127 : -0x1.fffffffffffffp1023);

  CF_DEVICE void init() {
    m = kLowest;
    l = Real(0);
  }

  // p of a score, exact for the largest whatever its size.
  CF_DEVICE Real weight(Real x, Real log2_unit) const { return exp2((x - m) * log2_unit); }

  // The same in one multiply-add a score, exp2(x * log2_unit - shift), errs by what rounding the shift does. Of a far
  // row m must be taken off the scores first, and the shift is 0: there that would show, or the shift is no float.
  CF_DEVICE Real shift(Real log2_unit) const { return m * log2_unit; }
  CF_DEVICE static bool is_far(Real shift) { return !(abs_of(shift) <= Real(1024)); }

  // Takes in the largest score of a tile; returns the factor by which l and the output so far shrink.
  CF_DEVICE Real update(Real tile_max, Real log2_unit) {
    const Real before = m;
    m = max_of(m, tile_max);
    const Real rescale = exp2((before - m) * log2_unit);
    l *= rescale;
    return rescale;
  }

  // Takes in other scores of the row; returns the factor by which the output so far shrinks, and that of the other's.
  CF_DEVICE Real merge(const RowState& other, Real log2_unit, Real& other_rescale) {
    const Real rescale = update(other.m, log2_unit);
    other_rescale = weight(other.m, log2_unit);
    l += other.l * other_rescale;
    return rescale;
  }

  // A logit in the score policy's units; one too large for them counts as the largest score, or m would be infinite.
  CF_DEVICE static Real score_of(Real logit, Real unit) { return min_of(-kLowest, logit / unit); }

  // Takes in one more logit that has no value; returns the factor by which the output so far shrinks.
  CF_DEVICE Real add_sink(Real logit, Real unit) {
    const Real log2_unit = unit * static_cast<Real>(kLog2E), x = score_of(logit, unit);
    const Real rescale = update(x, log2_unit);
    l += weight(x, log2_unit);
    return rescale;
  }

  CF_DEVICE Real inverse_sum() const { return l == Real(0) ? Real(0) : Real(1) / l; }

  // Natural logarithm of sum(exp(logit)); `empty` where there is no logit.
  CF_DEVICE Real lse(Real unit, Real empty) const { return l == Real(0) ? empty : m * unit + log(l); }
};

// Whether a learnable logit per head takes its share of every row's probability.
struct NoSink {
  template <class Real>
  CF_DEVICE static Real close(RowState<Real>&, const Attention&, int /*head*/, Real /*unit*/) {
    return Real(1);
  }
};

struct LearnableSink {
  template <class Real>
  CF_DEVICE static Real close(RowState<Real>& row, const Attention& a, int head, Real unit) {
    return row.add_sink(static_cast<Real>(a.sink[head]), unit);
  }
};

// What the backward takes off a row's scores, so that rows of P sum to 1: p = exp2((x - m) * log2_unit - log2_l). Two
// numbers, as one would round log2_l away where m is large.
template <class Real>
struct alignas(2 * sizeof(Real)) RowShift {
  Real m;
  Real log2_l;

  // p = exp2(-inf) = 0
  CF_DEVICE static RowShift empty() { return {Real(0), infinity<Real>()}; }
  CF_DEVICE static RowShift of(const RowState<Real>& row) {
    return row.l == Real(0) ? empty() : RowShift{row.m, log2(row.l)};
  }
  // All that lse says; empty rows have -inf, or +inf as PyTorch writes it.
  CF_DEVICE static RowShift of_lse(Real lse) {
    return abs_of(lse) == infinity<Real>() ? empty() : RowShift{Real(0), lse * static_cast<Real>(kLog2E)};
  }

  // With m folded into log2(l) and 0 itself: exact enough but of far rows.
  CF_DEVICE RowShift folded(Real log2_unit) const { return {Real(0), fma(m, log2_unit, log2_l)}; }
  CF_DEVICE bool is_far(Real log2_unit) const { return RowState<Real>::is_far(m * log2_unit); }

  CF_DEVICE bool is_empty() const { return log2_l == infinity<Real>(); }
  CF_DEVICE Real probability(Real x, Real log2_unit) const { return exp2(fma(x - m, log2_unit, -log2_l)); }
};

}  // namespace cuflash
