// One tile of dS on plain multiply-adds, for the gradient of a broadcast bias.
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
  using Scores = typename Block::Scores;
  static constexpr int kStages = 1;

  struct SmemPlan {
    typename Block::Operands operands;
  };

  // Rows are copied where they are multiplied.
  CF_DEVICE static void begin(SmemPlan&, const Attention&, int, int, int, int) {}
  CF_DEVICE static void load(SmemPlan&, int, const BwdParams&, const Sequence&, int, int, int) {}
  CF_DEVICE static void prepare(SmemPlan&, int) {}

  struct State {
    Scores total;

    CF_DEVICE void clear() { total.clear(); }

    // Adds dS of one tile of one head; `full` where nothing of it is hidden or past the end.
    CF_DEVICE void add(SmemPlan& smem, int, const BwdParams& p, const Sequence& sequence, int head, int q_first,
                       int kv_first, bool full) {
      const Attention& a = p.attention;
      const int head_kv = head / (a.heads_q / a.heads_kv);
      const Rows q = query_rows<const Element>(p.q, p.q_stride, sequence, head).from(q_first);
      const Rows dout = query_rows<const Element>(p.dout, p.dout_stride, sequence, head).from(q_first);
      const Rows k = key_rows<const Element>(p.k, p.k_stride, sequence, head_kv).from(kv_first);
      const Rows v = key_rows<const Element>(p.v, p.v_stride, sequence, head_kv).from(kv_first);
      Scores s, dp;
      s.clear();
      dp.clear();
      Block::template multiply<Config::kDimQk>(s, smem.operands, q, k);
      Block::template multiply<Config::kDimV>(dp, smem.operands, dout, v);

      const ScoreGradient<Config> gradient(a, sequence, head);
      const auto* g_shift = first_query<const RowShift<Real>>(p.shift, p.delta_stride, sequence, head);
      const Real* g_delta = first_query<const Real>(p.delta, p.delta_stride, sequence, head);
#pragma unroll
      for (int m = 0; m < Scores::kM; ++m) {
        const int q_index = q_first + Scores::row_of(m), row = min_of(q_index, sequence.len_q - 1);
        const RowShift<Real> shift = g_shift[row];
        const Real delta = g_delta[row];
#pragma unroll
        for (int n = 0; n < Scores::kN; ++n) {
          const int kv = kv_first + Scores::col_of(n);
          if (q_index >= sequence.len_q) continue;
          const Real weight = gradient.probability(s.x[m][n], shift, q_index, kv, full);
          total.x[m][n] += gradient.of_logit(weight, dp.x[m][n], delta, gradient.dropout.keep(q_index, kv));
        }
      }
    }

    // f(element, row, column) of the tile over this thread's elements.
    template <class F>
    CF_DEVICE void for_each(F&& f) {
      total.for_each([&](Real x, int row, int col) { f(x, row, col); });
    }
  };
};

}  // namespace cuflash
