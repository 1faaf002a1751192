// Forward attention on mma.sync tensor cores (sm_80 and later) of many short sequences: all queries and keys of one are
// one tile, so that a row's softmax sees all of its scores at once.
//
//   out = softmax(score(Q K^T)) V,   lse = log sum exp
//
//              batch elements ->
//            +----+----+----+----+     One block owns one head and some batch elements. While it works on one, the next
//   head     |    |####|    |    |     one's rows are under way. A bias that the batch shares stays in shared memory.
//            +----+----+----+----+
//
//   load(first)
//   for each batch element:   load(next) | S = Q K^T | mask, softmax, dropout | out = P V | store_out, store_lse
//
// Each warp owns whole query rows. With one stage the blocks that share a multiprocessor hide each other's loads.
#pragma once

#include "attention/batch_share.cuh"
#include "attention/dropout.cuh"
#include "attention/split.cuh"
#include "tile/copy.cuh"
#include "tile/dropout.cuh"
#include "tile/gemm_sm80.cuh"
#include "tile/held_bias.cuh"
#include "tile/softmax_sm80.cuh"
#include "tile/tail.cuh"

namespace cuflash {

template <class Config>
struct ForwardSm80Short {
  using Element = typename Config::Element;
  using Sequence = typename Config::Sequence;
  using Dropout = typename Config::Dropout;
  using Results = WholeRows<Config>;
  static constexpr int kThreads = Config::kThreads, kTile = Config::kTileQ, kWarpRows = kTile / (kThreads / 32);
  static_assert(Config::kTileKv == kTile);
  static constexpr int kDimQk = round_up(Config::kDimQk, 16), kDimV = round_up(Config::kDimV, 16);
  static constexpr int kBytes = Config::kCopyBytes, kStages = Config::kStages;

  struct Stage {
    union {
      SharedTile<Element, kTile, kDimQk> q;
      SharedTile<Element, kTile, kDimV> out;  // after Q K^T
    };
    SharedTile<Element, kTile, kDimQk> k;
    SharedTile<Element, kTile, kDimV> v;
  };
  using Bias = typename Config::BiasHeld::template Tile<kTile, kTile>;
  struct SmemPlan : Bias {
    Stage stage[kStages];
  };

  using Scores = Fragment<kWarpRows, kTile>;
  using Output = Fragment<kWarpRows, kDimV>;

  // Starts the copy of one batch element's rows.
  CF_DEVICE static void load(Stage& stage, const FwdParams& p, const Sequence& sequence, int head) {
    const int head_kv = head / (p.attention.heads_q / p.attention.heads_kv);
    load_tile_async<Config::kDimQk, kBytes, kThreads>(stage.q,
                                                      query_rows<const Element>(p.q, p.q_stride, sequence, head));
    load_tile_async<Config::kDimQk, kBytes, kThreads>(stage.k,
                                                      key_rows<const Element>(p.k, p.k_stride, sequence, head_kv));
    load_tile_async<Config::kDimV, kBytes, kThreads>(stage.v,
                                                     key_rows<const Element>(p.v, p.v_stride, sequence, head_kv));
    ptx::cp_async_commit();
  }

  CF_DEVICE static void visit(SmemPlan& smem, Stage& stage, const FwdParams& p, const Sequence& sequence, int head) {
    const Attention& a = p.attention;
    const int warp_row = ptx::warp_index() * kWarpRows, lane = ptx::lane_index();
    const typename Config::Mask mask(a, sequence, head);
    const typename Config::Score score(a, sequence, head);
    const Dropout dropout(a, sequence, head);
    const float log2_unit = score.unit() * static_cast<float>(kLog2E);
    const Tiles tiles = mask.kv_tiles(0, kTile, kTile);

    Scores s;
    s.clear();
    gemm_abt<Element>(s, stage.q, warp_row, stage.k);
#pragma unroll
    for (int m = 0; m < Scores::kM; ++m) {
#pragma unroll
      for (int n = 0; n < Scores::kN; n += 2) {
        const auto beside = smem.Bias::block(warp_row + m * 16, n * 8, lane);
        Fragment<16, 16>::for_each_index([&](int r, int across, int i) {
          float& x = s.at(m * 2 + r, n + across, i);
          const int q = warp_row + row_of(lane, m * 2 + r), kv = col_of(lane, n + across, i);
          x = beside.plus(score.apply(x, q, kv), r, across, i);
        });
      }
    }
    if (!tiles.is_full(0)) {
      s.for_each(lane, [&](float& x, int row, int col) {
        if (!mask.keep(warp_row + row, col)) x = -infinity<float>();
      });
    }
    RowState<float> rows[Scores::kRowsPerLane];
#pragma unroll
    for (RowState<float>& row : rows) row.init();
    Output out;
    out.clear();
    softmax_tile(s, rows, out, log2_unit);
    drop(dropout, s, warp_row, 0);
    Operand<kWarpRows, kTile> weights;
    pack_operand<Element>(weights, s);
    gemm_ab<Element>(out, weights, stage.v);

    const int64 number = Results::number(p, sequence, head, 0);
    if (kDimQk == kDimV) {
      ptx::sync_warp();  // the warp is done with its rows of Q
    } else {
      ptx::sync_threads();  // rows of another length begin in those of other warps
    }
#pragma unroll
    for (int r = 0; r < Scores::kRowsPerLane; ++r) {
      rows[r].l = row_sum(rows[r].l);
      const float rescale = Config::Sink::close(rows[r], a, head, score.unit());
      scale_row(out, r, rescale * rows[r].inverse_sum() * static_cast<float>(Dropout::scale(a)));
      const int row = warp_row + row_of(lane, r);
      if (lane % 4 == 0 && row < sequence.len_q) Results::close(p, number + row, rows[r], score.unit());
    }
    Operand<kWarpRows, kDimV> packed;
    pack_operand<Element>(packed, out);
    store_operand(stage.out, warp_row, lane, packed);
    ptx::sync_warp();
    const auto rows_out = query_rows<Element>(p.out, p.out_stride, sequence, head).from(warp_row);
    store_tile<kWarpRows, kDimV, kBytes, 32>(rows_out, Config::kDimV, stage.out, warp_row, lane);
  }

  CF_DEVICE static void run(const FwdParams& p) {
    SmemPlan& smem = *reinterpret_cast<SmemPlan*>(ptx::dynamic_smem());
    const Attention& a = p.attention;
    const BatchShare share(a);
    const int head = share.head, first = share.first, end = share.end;
    if (first >= end) return;

    smem.Bias::template load<kThreads>(a, 0, a.bias_head ? head : 0, 0, 0);
    load(smem.stage[0], p, Sequence(a, first), head);
#pragma unroll 1
    for (int batch = first; batch < end; ++batch) {
      const Sequence sequence(a, batch);
      ptx::cp_async_wait<0>();
      ptx::sync_threads();  // this batch element is here, and every warp is done with the one before
      const auto load_next = [&] {
        if (batch + 1 < end) load(smem.stage[(batch + 1 - first) % kStages], p, Sequence(a, batch + 1), head);
      };
      if (kStages > 1) load_next();
      store_tail<Config, kThreads>(p, sequence, head);
      visit(smem, smem.stage[(batch - first) % kStages], p, sequence, head);
      if (kStages > 1) continue;
      ptx::sync_threads();  // every warp is done with this one
      load_next();
    }
  }
};

template <class Config>
CF_DEVICE void forward_sm80_short(const FwdParams& params) {
  SmemSizeCheck<sizeof(typename ForwardSm80Short<Config>::SmemPlan), Config::kSmemBytes>();
  ForwardSm80Short<Config>::run(params);
}

}  // namespace cuflash
