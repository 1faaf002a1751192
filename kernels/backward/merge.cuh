// Gradients of merged results (forward/merge.cuh), with w_i = exp(lse_i - lse):
//
//   dout_i = w_i dout,   dlse_i = w_i (dout . (out_i - out) + dlse)
//
// Where a part, or a whole row, saw no key they are 0. kAcross neighbours of a warp share a row.
#pragma once

#include "attention/merge.cuh"
#include "ptx/sync.cuh"

namespace cuflash {

template <class Config>
struct MergeBackward {
  using Element = typename Config::Element;
  using Real = Accumulator<Element>;
  static constexpr int kRowsAtOnce = Config::kThreads / Config::kAcross;

  CF_DEVICE static Real row_sum(Real x) {
#pragma unroll
    for (int mask = Config::kAcross / 2; mask > 0; mask /= 2) x += ptx::shuffle_xor(x, mask);
    return x;
  }

  CF_DEVICE static void run(const MergeParams& p) {
    const int64 own = ptx::block_index() * kRowsAtOnce + ptx::thread_index() / Config::kAcross;
    const bool exists = own < p.rows;  // shuffles need every lane of a warp
    const int64 number = min_of(own, p.rows - 1);
    const MergeRow row(p, number);
    const int lane = ptx::thread_index() % Config::kAcross;
    const Real lse = static_cast<const Real*>(p.lse)[row.number_of_lse(p)];
    const Real* out = static_cast<const Real*>(p.out) + number * p.dim;
    const Element* dout = static_cast<const Element*>(p.dout) + row.offset(p.dout_stride);
    const Real dlse = p.dlse ? static_cast<const Real*>(p.dlse)[row.offset(p.dlse_stride)] : Real(0);
    for (int i = 0; i < p.count; ++i) {
      const MergePart& part = p.parts[i];
      const Real weight = merge_weight(static_cast<const Real*>(part.lse)[row.offset(part.lse_stride)], lse);
      const Element* part_out = static_cast<const Element*>(part.out) + row.offset(part.out_stride);
      Element* part_dout = static_cast<Element*>(part.dout) + number * p.dim;
      Real dot = 0;
      for (int col = lane; col < p.dim; col += Config::kAcross) {
        const Real upstream = to_accumulator(dout[col]);
        if (weight != Real(0)) dot = fma(upstream, to_accumulator(part_out[col]) - out[col], dot);
        if (exists) part_dout[col] = from_accumulator<Element>(weight == Real(0) ? Real(0) : weight * upstream);
      }
      dot = row_sum(dot);
      if (exists && lane == 0) {
        static_cast<Real*>(part.dlse)[row.number_of_lse(p)] = weight == Real(0) ? Real(0) : weight * (dot + dlse);
      }
    }
  }
};

template <class Config>
CF_DEVICE void backward_merge(const MergeParams& params) {
  MergeBackward<Config>::run(params);
}

}  // namespace cuflash
