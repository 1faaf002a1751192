// One tile of dS on mma.sync tensor cores, for the gradient of the bias.
#pragma once

#include "backward/bias.cuh"
#include "tile/copy.cuh"
#include "tile/dropout.cuh"
#include "tile/gemm_sm80.cuh"

namespace cuflash {

template <class Config>
struct BiasTileSm80 {
  using Element = typename Config::Element;
  using Sequence = typename Config::Sequence;
  static constexpr int kThreads = Config::kThreads, kWarps = kThreads / 32;
  static constexpr int kTileQ = Config::kTileQ, kTileKv = Config::kTileKv, kWarpRows = kTileQ / kWarps;
  static constexpr int kDimQk = round_up(Config::kDimQk, 16), kDimV = round_up(Config::kDimV, 16);
  static constexpr int kBytes = Config::kCopyBytes;
  using Scores = Fragment<kWarpRows, kTileKv>;
  using Total = Scores;

  struct SmemPlan {
    SharedTile<Element, kTileQ, kDimQk> q;
    SharedTile<Element, kTileQ, kDimV> dout;
    SharedTile<Element, kTileKv, kDimQk> k;
    SharedTile<Element, kTileKv, kDimV> v;
  };

  // Adds dS of one tile of one head to `total`.
  CF_DEVICE static void add_tile(SmemPlan& smem, const BwdParams& p, const Sequence& sequence, int head, int q_first,
                                 int kv_first, Total& total) {
    const Attention& a = p.attention;
    const int lane = ptx::lane_index(), warp_row = ptx::warp_index() * kWarpRows;
    const int head_kv = head / (a.heads_q / a.heads_kv);
    ptx::sync_threads();  // every warp is done with the tiles before
    const auto q_rows = query_rows<const Element>(p.q, p.q_stride, sequence, head).from(q_first);
    const auto dout_rows = query_rows<const Element>(p.dout, p.dout_stride, sequence, head).from(q_first);
    const auto k_rows = key_rows<const Element>(p.k, p.k_stride, sequence, head_kv).from(kv_first);
    const auto v_rows = key_rows<const Element>(p.v, p.v_stride, sequence, head_kv).from(kv_first);
    load_tile_async<Config::kDimQk, kBytes, kThreads>(smem.q, q_rows);
    load_tile_async<Config::kDimV, kBytes, kThreads>(smem.dout, dout_rows);
    load_tile_async<Config::kDimQk, kBytes, kThreads>(smem.k, k_rows);
    load_tile_async<Config::kDimV, kBytes, kThreads>(smem.v, v_rows);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::sync_threads();

    Scores s, dp;
    s.clear();
    dp.clear();
    gemm_abt<Element>(s, smem.q, warp_row, smem.k);
    gemm_abt<Element>(dp, smem.dout, warp_row, smem.v);
    const ScoreGradient<Config> gradient(a, sequence, head);
    drop(gradient.dropout, dp, q_first + warp_row, kv_first);

    const auto* g_shift = first_query<const RowShift<float>>(p.shift, p.delta_stride, sequence, head);
    const float* g_delta = first_query<const float>(p.delta, p.delta_stride, sequence, head);
#pragma unroll
    for (int r = 0; r < Scores::kRowsPerLane; ++r) {
      const int q = q_first + warp_row + row_of(lane, r), row = min_of(q, sequence.len_q - 1);
      const RowShift<float> shift = g_shift[row];
      const float delta = g_delta[row];
#pragma unroll
      for (int n = 0; n < Scores::kN; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int kv = kv_first + col_of(lane, n, i);
          if (q >= sequence.len_q) continue;
          const float weight = gradient.probability(s.at(r, n, i), shift, q, kv, false);
          total.at(r, n, i) += gradient.of_logit(weight, dp.at(r, n, i), delta, true);
        }
      }
    }
  }

  // f(element, row, column) of the tile over this thread's elements.
  template <class F>
  CF_DEVICE static void for_each(Total& total, F&& f) {
    const int warp_row = ptx::warp_index() * kWarpRows;
    total.for_each(ptx::lane_index(), [&](float x, int row, int col) { f(x, warp_row + row, col); });
  }
};

}  // namespace cuflash
