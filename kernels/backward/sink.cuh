// Gradient of the sink logits: dsink = -sum over rows of p * delta, p = exp(sink - lse). A block sums one head in a
// fixed order.
#pragma once

#include "attention/sequence.cuh"
#include "attention/softmax.cuh"
#include "element.cuh"
#include "ptx/memory.cuh"
#include "ptx/sync.cuh"

namespace cuflash {

template <class Config>
struct BackwardSink {
  using Real = Accumulator<typename Config::Element>;

  struct SmemPlan {
    Real partial[Config::kThreads];
  };

  CF_DEVICE static void run(const BwdParams& p) {
    SmemPlan& smem = *reinterpret_cast<SmemPlan*>(ptx::dynamic_smem());
    const Attention& a = p.attention;
    const int head = ptx::block_index(), thread = ptx::thread_index();
    Real sum = 0;
    for (int batch = 0; batch < a.batch; ++batch) {
      const typename Config::Sequence sequence(a, batch);
      const Real* delta = first_query<const Real>(p.delta, p.delta_stride, sequence, head);
      const auto* shift = first_query<const RowShift<Real>>(p.shift, p.delta_stride, sequence, head);
      const Real unit = typename Config::Score(a, sequence, head).unit();
      const Real log2_unit = unit * static_cast<Real>(kLog2E);
      const Real x = RowState<Real>::score_of(static_cast<Real>(a.sink[head]), unit);
      for (int row = thread; row < sequence.len_q; row += Config::kThreads) {
        sum -= shift[row].probability(x, log2_unit) * delta[row];
      }
    }
    smem.partial[thread] = sum;
    ptx::sync_threads();
    for (int half = Config::kThreads / 2; half > 0; half /= 2) {
      if (thread < half) smem.partial[thread] += smem.partial[thread + half];
      ptx::sync_threads();
    }
    if (thread == 0) p.dsink[head] = static_cast<float>(smem.partial[0]);
  }
};

template <class Config>
CF_DEVICE void backward_sink(const BwdParams& params) {
  SmemSizeCheck<sizeof(typename BackwardSink<Config>::SmemPlan), Config::kSmemBytes>();
  BackwardSink<Config>::run(params);
}

}  // namespace cuflash
