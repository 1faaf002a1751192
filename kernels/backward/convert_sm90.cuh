// Last step of the Hopper backward: dq = scale * sums, from fp32 fragment order to rows of 16-bit elements.
#pragma once

#include "attention/schedule.cuh"
#include "tile/copy.cuh"
#include "tile/query_tiles.cuh"
#include "tile/tail.cuh"

namespace cuflash {

template <class Config>
struct BackwardConvertSm90 {
  using Element = typename Config::Element;
  using Sums = QueryTiles<Config>;
  static constexpr int kTileQ = Config::kTileQ;

  struct alignas(16) Four {
    float x[4];
  };
  struct SmemPlan {
    SwizzledTile<Element, kTileQ, Sums::kColumns> dq;
  };

  CF_DEVICE static void run(const BwdParams& p) {
    SmemPlan& smem = *reinterpret_cast<SmemPlan*>(ptx::dynamic_smem());
    const Attention& a = p.attention;
    const Work work = query_work(ptx::block_index(), num_tiles(a.len_q, kTileQ), a.heads_q);
    const typename Config::Sequence sequence(a, work.batch);
    if (work.tile == 0) store_query_tail<Config, Config::kThreads>(p, sequence, work.head);
    const auto rows = query_rows<Element>(p.dq, p.dq_stride, sequence, work.head).from(work.tile * kTileQ);
    if (rows.count <= 0) return;

    const float scale = static_cast<float>(a.softmax_scale);
    const int64 index = Sums::index(a, sequence, work.head, work.tile);
    const int warp = ptx::warp_index() % 4;
#pragma unroll
    for (int each = 0; each < Sums::kShares; each += Config::kThreads / ptx::kWarpgroupThreads) {
      const int share = each + ptx::warp_index() / 4;
      if (share >= Sums::kShares) continue;
      const float* sums = static_cast<const float*>(p.dq_accum) +
                          Sums::part(index, share, ptx::thread_index() % ptx::kWarpgroupThreads);
      typename Sums::Share dq;
#pragma unroll
      for (int n = 0; n < Sums::Share::kN; ++n) {
        const Four four = *reinterpret_cast<const Four*>(sums + n * Sums::kGroupFloats);
#pragma unroll
        for (int i = 0; i < 4; ++i) dq.x[0][n][i] = four.x[i] * scale;
      }
      Sums::template store<Element>(smem.dq, dq, share, warp, ptx::lane_index());
    }
    ptx::sync_threads();
    store_tile<kTileQ, Sums::kColumns, Config::kCopyBytes, Config::kThreads>(rows, Config::kDimQk, smem.dq, 0,
                                                                             ptx::thread_index());
  }
};

template <class Config>
CF_DEVICE void backward_convert_sm90(const BwdParams& params) {
  SmemSizeCheck<sizeof(typename BackwardConvertSm90<Config>::SmemPlan), Config::kSmemBytes>();
  BackwardConvertSm90<Config>::run(params);
}

}  // namespace cuflash
