// Online softmax of a warp's rows in registers beside its tangent (attention/tangent.cuh).
#pragma once

#include "attention/tangent.cuh"
#include "tile/softmax_sm80.cuh"

namespace cuflash {

// dout less a multiple of out, in this lane's part of its row number r.
template <int kRows, int kDim>
CF_DEVICE void subtract_multiple(Fragment<kRows, kDim>& dout, Fragment<kRows, kDim>& out, int r, float multiple) {
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) dout.at(r, n, i) = fma(-multiple, out.at(r, n, i), dout.at(r, n, i));
  }
}

// What the warp's rows have of the keys so far: out and its tangent as sums, which the keys of a tile are weighed for.
template <int kRows, int kDim>
struct TangentRows {
  static constexpr int kRowsPerLane = kRows / 8;

  Fragment<kRows, kDim> out, dout;
  RowState<float> states[kRowsPerLane];
  RowTangent<float> tangents[kRowsPerLane];

  CF_DEVICE void init() {
    out.clear();
    dout.clear();
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) {
      states[r].init();
      tangents[r].init();
    }
  }

  // Scores to probabilities relative to the running maximum, changes of logits to how far they are from their mean over
  // the keys so far; what was summed before shrinks and moves to match. Each lane sums only its own columns into l.
  template <int kKeys>
  CF_DEVICE void softmax_tile(Fragment<kRows, kKeys>& s, Fragment<kRows, kKeys>& ds, float log2_unit) {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) {
      const float rescale = softmax_row(s, r, states[r], log2_unit);
      subtract_from_row(ds, r, tangents[r].mean);
      float moved = 0.f;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) moved = fma(s.at(r, n, i), ds.at(r, n, i), moved);
      }
      const float move = tangents[r].update(row_sum(moved), row_sum(states[r].l));
      subtract_from_row(ds, r, move);
      scale_row(out, r, rescale);
      scale_row(dout, r, rescale);
      subtract_multiple(dout, out, r, move);
    }
  }

  // Closes the softmax of row number r, a row of this head; returns the factor from the sums to out and its tangent.
  template <class Config>
  CF_DEVICE float close(const JvpParams& p, int head, float unit, int r) {
    const float l_of_keys = row_sum(states[r].l);
    states[r].l = l_of_keys;
    const float rescale = Config::Sink::close(states[r], p.attention, head, unit);
    const float move = tangents[r].add_sink(p, head, l_of_keys * rescale, states[r].l);
    subtract_multiple(dout, out, r, move);
    return rescale * states[r].inverse_sum() * static_cast<float>(Config::Dropout::scale(p.attention));
  }
};

// Products of a tile of pairs to scores and to the changes of logits, of queries from q and keys from kv on.
template <class Config, int kRows, int kKeys>
CF_DEVICE void apply_tile(const ScoreTangent<Config>& pairs, Fragment<kRows, kKeys>& s, Fragment<kRows, kKeys>& ds,
                          int q, int kv, bool full) {
  const int lane = ptx::lane_index();
  const auto apply = [&](bool no_test) {
    s.for_each_index([&](int r, int n, int i) {
      pairs.apply(s.at(r, n, i), ds.at(r, n, i), q + row_of(lane, r), kv + col_of(lane, n, i), no_test);
    });
  };
  if (full) {
    apply(true);
  } else {
    apply(false);
  }
}

// Changes of logits, of probabilities that dropout has been through, to weights of values.
template <int kRows, int kKeys>
CF_DEVICE void weigh(Fragment<kRows, kKeys>& ds, Fragment<kRows, kKeys>& s) {
  s.for_each_index([&](int r, int n, int i) { ds.at(r, n, i) *= s.at(r, n, i); });
}

}  // namespace cuflash
