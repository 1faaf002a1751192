// Last step of the tensor-core backward: dq = scale * dq_accum, from fragment order to rows of elements.
#pragma once

#include "attention/schedule.cuh"
#include "tile/copy.cuh"
#include "tile/dq_accum.cuh"
#include "tile/tail.cuh"

namespace cuflash {

template <class Config>
struct BackwardConvert {
  using Element = typename Config::Element;
  using Accum = DqAccum<Config>;
  using Real = typename Accum::Real;

  struct SmemPlan {
    SharedTile<Element, Config::kTileQ, Accum::kDimQk> dq;
  };

  CF_DEVICE static void run(const BwdParams& p) {
    SmemPlan& smem = *reinterpret_cast<SmemPlan*>(ptx::dynamic_smem());
    const Attention& a = p.attention;
    const Work work = query_work(ptx::block_index(), num_tiles(a.len_q, Config::kTileQ), a.heads_q);
    const typename Config::Sequence sequence(a, work.batch);
    if (work.tile == 0) store_query_tail<Config, Config::kThreads>(p, sequence, work.head);
    const auto rows = query_rows<Element>(p.dq, p.dq_stride, sequence, work.head).from(work.tile * Config::kTileQ);
    if (rows.count <= 0) return;

    const Real scale = static_cast<Real>(a.softmax_scale);
    for (int split = 0; split < Config::kDimSplits; ++split) {
      Real* tile = Accum::tile(p, Accum::index(a, sequence, work.head, work.tile, split));
      typename Accum::Share share;
      Accum::read(share, tile);
      share.for_each(ptx::lane_index(), [&](Real x, int row, int col) {
        *smem.dq.at(Accum::warp_row() + row, split * Accum::kCols + Accum::warp_col() + col) =
            from_accumulator<Element>(x * scale);
      });
    }
    ptx::sync_threads();
    store_tile<Config::kTileQ, Accum::kDimQk, Config::kCopyBytes, Config::kThreads>(rows, Config::kDimQk, smem.dq, 0,
                                                                                    ptx::thread_index());
  }
};

template <class Config>
CF_DEVICE void backward_convert(const BwdParams& params) {
  SmemSizeCheck<sizeof(typename BackwardConvert<Config>::SmemPlan), Config::kSmemBytes>();
  BackwardConvert<Config>::run(params);
}

}  // namespace cuflash
