// Score: from the raw product q.k to the logit, and back for the gradient.
//
// apply(s, q, kv) is in units in which p = exp2(log2_unit * (x - max)), log2_unit = log2(e) * unit(). softmax_scale *
// slope(s, q, kv) is d(logit)/d(q.k); the constant factor is left to the end of the gradient products. any_slope: it
// may be infinite or no number, as of a written score (attention/mods.cuh), which has add_gradients, too, and whose
// scores past the last query may be anything: within() makes them finite, for probabilities that are multiplied by 0.
#pragma once

#include "attention/place.cuh"
#include "element.cuh"
#include "params.cuh"
#include "ptx/keep.cuh"

namespace cuflash {

// What scores have in common that no caller has written: slopes are bounded, and scores finite past the last query.
template <class Real>
struct BoundedScore {
  using Number = Real;

  CF_DEVICE static constexpr bool any_slope() { return false; }
  CF_DEVICE static constexpr bool finite_beyond() { return true; }
  CF_DEVICE Real within(Real x, int /*q*/) const { return x; }
};

// x = s, with the scale folded into the exponent: one multiply-add a score. Needs softmax_scale > 0, so that the
// largest score is the largest logit.
template <class Real>
struct ScaledScore : BoundedScore<Real> {
  Real softmax_scale;

  template <class Sequence>
  CF_DEVICE ScaledScore(const Attention& a, const Sequence&, int /*head*/)
      : softmax_scale(ptx::keep(static_cast<Real>(a.softmax_scale))) {}
  CF_DEVICE Real unit() const { return softmax_scale; }
  CF_DEVICE Real apply(Real s, int /*q*/, int /*kv*/) const { return s; }
  CF_DEVICE Real slope(Real /*s*/, int /*q*/, int /*kv*/) const { return Real(1); }
};

// x = softmax_scale * s for a scale of any sign, zero included.
template <class Real>
struct SignedScore : BoundedScore<Real> {
  Real softmax_scale;

  template <class Sequence>
  CF_DEVICE SignedScore(const Attention& a, const Sequence&, int /*head*/)
      : softmax_scale(ptx::keep(static_cast<Real>(a.softmax_scale))) {}
  CF_DEVICE Real unit() const { return Real(1); }
  CF_DEVICE Real apply(Real s, int /*q*/, int /*kv*/) const { return softmax_scale * s; }
  CF_DEVICE Real slope(Real /*s*/, int /*q*/, int /*kv*/) const { return Real(1); }
};

// The unit of a written score that is a multiple of a constant, a double of these bits, for kernels that need no more.
template <class Real, uint64 kBits>
struct ScoreOfUnit {
  template <class Sequence>
  CF_DEVICE ScoreOfUnit(const Attention&, const Sequence&, int /*head*/) {}
  CF_DEVICE Real unit() const { return static_cast<Real>(ptx::double_of(kBits)); }
};

// x = softcap * tanh(softmax_scale * s / softcap), in units of softcap; slope = 1 - tanh^2.
template <class Real>
struct SoftCapScore : BoundedScore<Real> {
  Real softmax_scale;
  Real softcap;
  Real exponent;  // 2 log2(e) softmax_scale / softcap

  template <class Sequence>
  CF_DEVICE SoftCapScore(const Attention& a, const Sequence&, int /*head*/)
      : softmax_scale(ptx::keep(static_cast<Real>(a.softmax_scale))), softcap(ptx::keep(static_cast<Real>(a.softcap))),
        exponent(ptx::keep(static_cast<Real>(2 * kLog2E * a.softmax_scale / a.softcap))) {}
  CF_DEVICE Real unit() const { return softcap; }
  // tanh(y) = 1 - 2 / (exp(2y) + 1): exact at both ends, and far closer than the hardware's tanh.approx.
  CF_DEVICE Real tanh(Real s) const { return fma(Real(-2), reciprocal(exp2(s * exponent) + Real(1)), Real(1)); }
  CF_DEVICE Real apply(Real s, int /*q*/, int /*kv*/) const { return tanh(s); }
  CF_DEVICE Real slope(Real s, int /*q*/, int /*kv*/) const { return Real(1) - tanh(s) * tanh(s); }
};

// The same in natural logits, exact for caps and scores of every size. SoftCapScore errs by 2^-23 of the cap: too much
// where results are fp32 or fp64, and beside scores far below a large cap.
template <class Real>
struct ExactSoftCapScore : BoundedScore<Real> {
  static constexpr Real kLinear = static_cast<Real>(sizeof(Real) == 4 ? 0x1p-12 : 0x1p-27);  // tanh(y) = y below

  Real softmax_scale;
  Real softcap;
  Real inverse;

  template <class Sequence>
  CF_DEVICE ExactSoftCapScore(const Attention& a, const Sequence&, int /*head*/)
      : softmax_scale(ptx::keep(static_cast<Real>(a.softmax_scale))), softcap(ptx::keep(static_cast<Real>(a.softcap))),
        inverse(ptx::keep(static_cast<Real>(1 / a.softcap))) {}
  CF_DEVICE Real unit() const { return Real(1); }
  CF_DEVICE Real apply(Real s, int /*q*/, int /*kv*/) const {
    const Real x = softmax_scale * s, y = x * inverse;
    return abs_of(y) < kLinear ? x : softcap * tanh(y);
  }
  CF_DEVICE Real slope(Real s, int /*q*/, int /*kv*/) const {
    const Real t = tanh(softmax_scale * s * inverse);
    return Real(1) - t * t;
  }
};

// The score of another policy in natural logits, for a kernel that adds to them.
template <class Inner>
struct NaturalScore {
  using Number = typename Inner::Number;
  Inner inner;

  template <class Sequence>
  CF_DEVICE NaturalScore(const Attention& a, const Sequence& sequence, int head) : inner(a, sequence, head) {}
  CF_DEVICE Number unit() const { return Number(1); }
  CF_DEVICE Number apply(Number s, Place q, Place kv) const { return inner.unit() * inner.apply(s, q, kv); }
  CF_DEVICE Number slope(Number s, Place q, Place kv) const { return inner.slope(s, q, kv); }
  CF_DEVICE static constexpr bool any_slope() { return Inner::any_slope(); }
  CF_DEVICE static constexpr bool finite_beyond() { return Inner::finite_beyond(); }
  CF_DEVICE Number within(Number x, int q) const { return inner.within(x, q); }
  CF_DEVICE void add_gradients(Number s, Number ds, Place q, Place kv) const { inner.add_gradients(s, ds, q, kv); }
  CF_DEVICE void add_at_distance(Number ds, int distance) const { inner.add_at_distance(ds, distance); }
};

// The same plus a term that depends on the position only.
template <class Inner, class Term>
struct Plus : NaturalScore<Inner> {
  using Number = typename Inner::Number;
  Term term;

  template <class Sequence>
  CF_DEVICE Plus(const Attention& a, const Sequence& sequence, int head)
      : NaturalScore<Inner>(a, sequence, head), term(a, sequence, head) {}
  CF_DEVICE Number apply(Number s, Place q, Place kv) const {
    return NaturalScore<Inner>::apply(s, q, kv) + term.template at<Number>(q, kv);
  }
};

// Attention with linear biases (Press et al. 2021, arXiv 2108.12409): -slope * distance from the diagonal. 0 for rows
// past the end, whose probabilities must stay finite whatever the sign of the slope.
struct Alibi {
  int len_q;
  float slope;
  int off;  // the key on query 0's diagonal

  template <class Sequence>
  CF_DEVICE Alibi(const Attention& a, const Sequence& sequence, int head)
      : len_q(sequence.len_q), slope(a.alibi[sequence.batch * a.alibi_batch + head]),
        off(a.top_left ? 0 : sequence.len_kv - sequence.len_q) {}
  template <class Real>
  CF_DEVICE Real at(Place q, Place kv) const {
    const Real row_slope = static_cast<Real>(q < len_q ? slope : 0.f);  // one number a row, not a choice an element
    const int known = q.known - kv.known;                               // taken off a number of a row
    return -row_slope * abs_of(static_cast<Real>(q + off - kv - known) - static_cast<Real>(-known));
  }
};

// An additive tensor, broadcast over any axis by strides of 0; tile/bias.cuh has those that the copy engine reads.
// Where keys are known to be neighbours, those of a row have one address.
template <class Element, bool kNeighbours = false>
struct Bias {
  int len_q, len_kv;
  const Element* bias;  // (len_q, len_kv) by strides, of this batch element and head
  int64 row, column;

  template <class Sequence>
  CF_DEVICE Bias(const Attention& a, const Sequence& sequence, int head)
      : len_q(sequence.len_q), len_kv(sequence.len_kv),
        bias(static_cast<const Element*>(a.bias) + sequence.batch * a.bias_batch + head * a.bias_head), row(a.bias_row),
        column(a.bias_column) {}
  // 0 beyond the sequence, where the tensor may end.
  template <class Real>
  CF_DEVICE Real at(int q, int kv) const {
    const int64 place = kNeighbours ? q * row + kv : q * row + kv * column;
    return q < len_q && kv < len_kv ? static_cast<Real>(to_accumulator(bias[place])) : Real(0);
  }
};

}  // namespace cuflash
