// Gradient of one score: its probability once more, and what of dP reaches the logit and the product q.k.
//
//   P = exp(logit - lse),   d(logit) = P * (dP - delta),   d(q.k) = softmax_scale * slope * d(logit)
//
// The constant factor is left to the end of the products with dS.
#pragma once

#include "attention/dropout.cuh"
#include "attention/place.cuh"
#include "attention/softmax.cuh"
#include "element.cuh"

namespace cuflash {

// Of one head. kNoneBeyond: rows past the last query have an empty shift, which hides every logit that is finite.
template <class Config, bool kNoneBeyond = false>
struct ScoreGradient {
  using Real = Accumulator<typename Config::Element>;

  typename Config::Mask mask;
  typename Config::Score score;
  typename Config::Dropout dropout;
  Real log2_unit, keep_scale;

  template <class Sequence>
  CF_DEVICE ScoreGradient(const Attention& a, const Sequence& sequence, int head)
      : mask(a, sequence, head), score(a, sequence, head), dropout(a, sequence, head),
        log2_unit(score.unit() * static_cast<Real>(kLog2E)), keep_scale(static_cast<Real>(Config::Dropout::scale(a))) {}

  // P, from s = q.k; exactly 0 where masked. Tiles that are visible whole (`full`) need no test.
  CF_DEVICE Real probability(Real s, const RowShift<Real>& shift, Place q, Place kv, bool full) const {
    return full || mask.keep(q, kv) ? shift.probability(logit(s, q, kv), log2_unit) : Real(0);
  }

  // The same of a tile that is visible whole and has no far row (RowShift::is_far), from a folded shift.
  CF_DEVICE Real visible_probability(Real s, Real folded, Place q, Place kv) const {
    return exp2(fma(logit(s, q, kv), log2_unit, -folded));
  }

  // The same where a bias in natural logits comes beside the score. Of tiles that are visible whole the shift is
  // folded, which makes two multiply-adds.
  CF_DEVICE Real probability(Real s, Real bias, const RowShift<Real>& shift, Place q, Place kv, bool full) const {
    constexpr Real kLog2 = static_cast<Real>(kLog2E);
    const Real sum = fma(logit(s, q, kv), score.unit(), bias);
    if (full) return exp2(fma(sum, kLog2, -shift.log2_l));
    return mask.keep(q, kv) ? shift.probability(sum, kLog2) : Real(0);
  }

  // The same from a shift as it is, which is as exact for far rows.
  CF_DEVICE Real probability_beside(Real s, Real bias, const RowShift<Real>& shift, Place q, Place kv,
                                    bool full) const {
    const Real sum = fma(logit(s, q, kv), score.unit(), bias);
    return full || mask.keep(q, kv) ? shift.probability(sum, static_cast<Real>(kLog2E)) : Real(0);
  }

  // From s = q.k, but for its unit; finite past the last query.
  CF_DEVICE Real logit(Real s, Place q, Place kv) const {
    const Real x = score.apply(s, q, kv);
    return kNoneBeyond && Config::Score::finite_beyond() ? x : score.within(x, q);
  }

  // d(logit), from dp = dout.v, which does not reach what dropout dropped; a bias has this gradient.
  CF_DEVICE Real of_logit(Real p, Real dp, Real delta, bool kept) const {
    return p * ((kept ? dp * keep_scale : Real(0)) - delta);
  }

  // d(q.k) but for softmax_scale: dS of dQ = scale * dS K and dK = scale * dS^T Q.
  CF_DEVICE Real of_product(Real s, Real p, Real dp, Real delta, bool kept, Place q, Place kv) const {
    return times_slope(of_logit(p, dp, delta, kept), s, q, kv);
  }

  // What is 0 stays so, as it is of hidden pairs.
  CF_DEVICE Real times_slope(Real x, Real s, Place q, Place kv) const {
    const Real product = x * score.slope(s, q, kv);
    return Config::Score::any_slope() && x == Real(0) ? Real(0) : product;
  }
};

}  // namespace cuflash
