// Score: from the raw product q.k to the logit, and back for the gradient.
//
// apply(s) is in units in which p = exp2(log2_unit * (x - max)); slope(x) * scale() turns d(loss)/d(logit) into
// d(loss)/d(q.k), the constant scale() being left to the end of the gradient products.
#pragma once

#include "params.cuh"

namespace cuflash {

// x = s, with the scale folded into the exponent: one multiply-add a score. Needs softmax_scale > 0, so that the
// largest score is the largest logit.
template <class Real>
struct ScaledScore {
  Real softmax_scale;

  CF_DEVICE explicit ScaledScore(const Attention& a) : softmax_scale(static_cast<Real>(a.softmax_scale)) {}
  CF_DEVICE Real unit() const { return softmax_scale; }
  CF_DEVICE Real scale() const { return softmax_scale; }
  CF_DEVICE Real apply(Real s) const { return s; }
  CF_DEVICE Real slope(Real) const { return Real(1); }
};

// x = softmax_scale * s for a scale of any sign, zero included.
template <class Real>
struct SignedScore {
  Real softmax_scale;

  CF_DEVICE explicit SignedScore(const Attention& a) : softmax_scale(static_cast<Real>(a.softmax_scale)) {}
  CF_DEVICE Real unit() const { return Real(1); }
  CF_DEVICE Real scale() const { return softmax_scale; }
  CF_DEVICE Real apply(Real s) const { return softmax_scale * s; }
  CF_DEVICE Real slope(Real) const { return Real(1); }
};

// x = softcap * tanh(softmax_scale * s / softcap), in units of softcap; slope = 1 - tanh^2.
template <class Real>
struct SoftCapScore {
  Real softmax_scale;
  Real softcap;
  Real exponent;  // 2 log2(e) softmax_scale / softcap

  CF_DEVICE explicit SoftCapScore(const Attention& a)
      : softmax_scale(static_cast<Real>(a.softmax_scale)), softcap(static_cast<Real>(a.softcap)),
        exponent(static_cast<Real>(2 * kLog2E * a.softmax_scale / a.softcap)) {}
  CF_DEVICE Real unit() const { return softcap; }
  CF_DEVICE Real scale() const { return softmax_scale; }
  // tanh(y) = 1 - 2 / (exp(2y) + 1): exact at both ends, and far closer than the hardware's tanh.approx.
  CF_DEVICE Real apply(Real s) const { return Real(1) - Real(2) / (exp2(s * exponent) + Real(1)); }
  CF_DEVICE Real slope(Real x) const { return Real(1) - x * x; }
};

}  // namespace cuflash
