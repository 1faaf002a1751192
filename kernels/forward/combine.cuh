// Last step of a forward whose keys are split: merges the parts of every row (attention/split.cuh) into out and lse.
//
//   lse = log sum_s exp(lse_s),   out = sum_s exp(lse_s - lse) out_s
//
// Splits are taken in their order whichever block came first, so results are bit-equal from run to run. A part whose
// lse is -inf saw no key, and its out is not read; a sink joins here, once a row.
#pragma once

#include "attention/schedule.cuh"
#include "attention/softmax.cuh"
#include "attention/split.cuh"
#include "ptx/sync.cuh"

namespace cuflash {

template <class Config>
CF_DEVICE void forward_combine(const FwdParams& p) {
  using Element = typename Config::Element;
  using Real = Accumulator<Element>;
  constexpr int kAcross = min_of(Config::kThreads, power_of_two_above(Config::kDimV));  // threads that share a row
  constexpr int kRowsAtOnce = Config::kThreads / kAcross;

  const Attention& a = p.attention;
  const Work work = query_work(ptx::block_index(), num_tiles(a.len_q, Config::kTileQ), a.heads_q);
  const typename Config::Sequence sequence(a, work.batch);
  using Whole = WholeRows<Config>;
  using Part = PartRows<Config>;

  const int first = work.tile * Config::kTileQ, end = min_of(first + Config::kTileQ, sequence.len_q);
  for (int row = first + ptx::thread_index() / kAcross; row < end; row += kRowsAtOnce) {
    for (int col = ptx::thread_index() % kAcross; col < Config::kDimV; col += kAcross) {
      RowState<Real> state;
      state.init();
      Real out = 0;  // weighted by exp(lse_s - largest lse so far)
      for (int split = 0; split < p.num_splits; ++split) {
        const Real lse = Part::lse(p, sequence, work.head, split)[row * Part::lse_stride(p).row];
        if (lse == -infinity<Real>()) continue;
        const Real part = Part::out(p, sequence, work.head, split)[row * Part::out_stride(p).row + col];
        Real weight;
        const Real rescale = state.merge(RowState<Real>{lse, Real(1)}, static_cast<Real>(kLog2E), weight);
        out = out * rescale + part * weight;
      }
      const Real rescale = Config::Sink::close(state, a, work.head, Real(1));
      Whole::out(p, sequence, work.head, 0)[row * p.out_stride.row + col] =
          from_accumulator<Element>(out * rescale * state.inverse_sum());
      if (col == 0) Whole::lse(p, sequence, work.head, 0)[row] = state.lse(Real(1));
    }
  }
}

}  // namespace cuflash
