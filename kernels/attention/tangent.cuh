// Tangent: how the results of a row change as its logits s_j and values v_j do, by s'_j and v'_j (Lu and Song 2024,
// arXiv 2410.11081, in the appendix), beside the online softmax of its RowState.
//
//   mean = sum_j p_j s'_j / l = lse'          B = sum_j p_j (s'_j - mean) v_j + p_j v'_j          out' = B / l
//
// The mean is that of the keys so far. As it moves with a tile, B less the move times the sum of p_j v_j is what B
// would be about the new one. Taken off at the end it would come too late: weights are rounded, and where one key
// outweighs its row, p s' is large and p (s' - mean) small.
#pragma once

#include "attention/score.cuh"
#include "attention/softmax.cuh"

namespace cuflash {

template <class Real>
struct RowTangent {
  Real mean;

  CF_DEVICE void init() { mean = Real(0); }

  // Takes in more keys: `moved` is their sum of p * (s' - mean), l that of p over them and all before. Returns by how
  // much the mean moves.
  CF_DEVICE Real update(Real moved, Real l) {
    const Real move = l == Real(0) ? Real(0) : moved * reciprocal(l);
    mean += move;
    return move;
  }

  // Takes in a sink, which has brought the row's l up from that of the keys.
  CF_DEVICE Real add_sink(const JvpParams& p, int head, Real l_of_keys, Real l) {
    const Real share = l - l_of_keys, change = p.tangent_sink ? static_cast<Real>(p.tangent_sink[head]) : Real(0);
    return share == Real(0) ? Real(0) : update(share * (change - mean), l);
  }
};

// What the tangent of an additive bias adds to that of a logit.
struct NoBiasTangent {
  template <class Sequence>
  CF_DEVICE NoBiasTangent(const JvpParams&, const Sequence&, int /*head*/) {}
  template <class Real>
  CF_DEVICE Real add(Real ds, Real /*s*/, int /*q*/, int /*kv*/) const {
    return ds;
  }
};

template <class Element>
struct BiasTangent {
  Bias<Element> tangent;

  template <class Sequence>
  CF_DEVICE BiasTangent(const JvpParams& p, const Sequence& sequence, int head) : tangent(changes(p), sequence, head) {}

  // Nothing at pairs that are hidden, whatever the tangent has there.
  template <class Real>
  CF_DEVICE Real add(Real ds, Real s, int q, int kv) const {
    return s == -infinity<Real>() ? Real(0) : ds + tangent.template at<Real>(q, kv);
  }

 private:
  CF_DEVICE static Attention changes(const JvpParams& p) {
    Attention a = p.attention;
    a.bias = p.tangent_bias;
    a.bias_batch = p.tangent_bias_batch;
    a.bias_head = p.tangent_bias_head;
    a.bias_row = p.tangent_bias_row;
    a.bias_column = p.tangent_bias_column;
    return a;
  }
};

// Of one head: the logits of pairs, and how they change.
template <class Config>
struct ScoreTangent {
  using Real = Accumulator<typename Config::Element>;

  typename Config::Mask mask;
  typename Config::Score score;
  typename Config::TangentBias bias;
  Real softmax_scale;

  template <class Sequence>
  CF_DEVICE ScoreTangent(const JvpParams& p, const Sequence& sequence, int head)
      : mask(p.attention, sequence, head), score(p.attention, sequence, head), bias(p, sequence, head),
        softmax_scale(static_cast<Real>(p.attention.softmax_scale)) {}

  // From s = q.k and ds = q'.k + q.k' to the score and the change of the logit; -inf and 0 where masked. Tiles that are
  // visible whole (`full`) need no test.
  CF_DEVICE void apply(Real& s, Real& ds, int q, int kv, bool full) const {
    const Real slope = score.slope(s, q, kv);
    s = score.apply(s, q, kv);
    ds *= softmax_scale * slope;
    if (Config::Score::any_slope() && s == -infinity<Real>()) ds = Real(0);  // what hides has no slope of its own
    ds = bias.add(ds, s, q, kv);
    if (!full && !mask.keep(q, kv)) {
      s = -infinity<Real>();
      ds = Real(0);
    }
  }
};

}  // namespace cuflash
