// One tile of dS on plain multiply-adds, for the gradient of the bias.
#pragma once

#include "backward/bias.cuh"
#include "tile/gemm_simt.cuh"

namespace cuflash {

template <class Config>
struct BiasTileSimt {
  using Element = typename Config::Element;
  using Real = Accumulator<Element>;
  using Sequence = typename Config::Sequence;
  using Block = SimtBlock<Config, Config::kTileQ, Config::kTileKv>;
  using Rows = typename Block::Rows;
  using Total = typename Block::Scores;

  struct SmemPlan {
    typename Block::Operands operands;
  };

  CF_DEVICE static Rows rows_of(const void* pointer, const Strides& stride, int64 offset, int head, int first,
                                int count) {
    return Rows{static_cast<const Element*>(pointer) + offset + head * stride.head, stride.row, count}.from(first);
  }

  // Adds dS of one tile of one head to `total`.
  CF_DEVICE static void add_tile(SmemPlan& smem, const BwdParams& p, const Sequence& sequence, int head, int q_first,
                                 int kv_first, Total& total) {
    const Attention& a = p.attention;
    const int head_kv = head / (a.heads_q / a.heads_kv);
    const Rows q = rows_of(p.q, p.q_stride, sequence.q_offset(p.q_stride), head, q_first, sequence.len_q);
    const Rows dout = rows_of(p.dout, p.dout_stride, sequence.q_offset(p.dout_stride), head, q_first, sequence.len_q);
    const Rows k = rows_of(p.k, p.k_stride, sequence.kv_offset(p.k_stride), head_kv, kv_first, sequence.len_kv);
    const Rows v = rows_of(p.v, p.v_stride, sequence.kv_offset(p.v_stride), head_kv, kv_first, sequence.len_kv);
    Total s, dp;
    s.clear();
    dp.clear();
    Block::template multiply<Config::kDimQk>(s, smem.operands, q, k);
    Block::template multiply<Config::kDimV>(dp, smem.operands, dout, v);

    const ScoreGradient<Config> gradient(a, sequence, head);
    const int64 row_offset = sequence.q_offset(p.delta_stride) + head * p.delta_stride.head;
    const RowShift<Real>* g_shift = static_cast<const RowShift<Real>*>(p.shift) + row_offset;
    const Real* g_delta = static_cast<const Real*>(p.delta) + row_offset;
#pragma unroll
    for (int m = 0; m < Total::kM; ++m) {
      const int q_index = q_first + Total::row_of(m), row = min_of(q_index, sequence.len_q - 1);
      const RowShift<Real> shift = g_shift[row];
      const Real delta = g_delta[row];
#pragma unroll
      for (int n = 0; n < Total::kN; ++n) {
        const int kv = kv_first + Total::col_of(n);
        if (q_index >= sequence.len_q) continue;
        const Real weight = gradient.probability(s.x[m][n], shift, q_index, kv, false);
        total.x[m][n] += gradient.of_logit(weight, dp.x[m][n], delta, gradient.dropout.keep(q_index, kv));
      }
    }
  }

  // f(element, row, column) of the tile over this thread's elements.
  template <class F>
  CF_DEVICE static void for_each(Total& total, F&& f) {
    total.for_each([&](Real x, int row, int col) { f(x, row, col); });
  }
};

}  // namespace cuflash
