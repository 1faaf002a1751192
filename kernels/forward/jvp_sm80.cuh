// Forward attention with its tangent on mma.sync tensor cores (sm_80 and later): how out and lse change as q, k, v, a
// bias and a sink change, in the pass that computes them.
//
//   s' = softmax_scale * slope * (q'.k + q.k') + bias'    lse' = sum p s' / l    out' = sum p (v' + (s' - lse') v) / l
//
// The walk is that of forward/sm80.cuh, with twice the operands and six products a tile:
//
//   load_q, load_k(first)                                    Q with Q', K with K', V with V'
//   for each kv tile:   load_v | S = Q K^T, S' = Q' K^T + Q K'^T | mask_tile | softmax_tile, dropout | load_k(next)
//                       | out += P V, out' += W V + P V'                  W = P (S' - mean), attention/tangent.cuh
//   store_out, store_lse
//
// Blocks of wide heads share the columns of out and out', of which a warp's registers hold 128.
#pragma once

#include "attention/query_tile.cuh"
#include "tile/copy.cuh"
#include "tile/dropout.cuh"
#include "tile/gemm_sm80.cuh"
#include "tile/tail.cuh"
#include "tile/tangent.cuh"

namespace cuflash {

template <class Config>
struct JvpSm80 {
  using Element = typename Config::Element;
  using Sequence = typename Config::Sequence;
  using Dropout = typename Config::Dropout;
  using Results = WholeRows<Config>;
  static constexpr int kThreads = Config::kThreads, kWarps = kThreads / 32, kSplits = Config::kDimSplits;
  static constexpr int kTileQ = Config::kTileQ, kTileKv = Config::kTileKv, kWarpRows = kTileQ / kWarps;
  static constexpr int kDimQk = round_up(Config::kDimQk, 16), kDimV = round_up(Config::kDimV, 16 * kSplits);
  static constexpr int kColsV = kDimV / kSplits;  // of one block
  static constexpr int kBytes = Config::kCopyBytes;

  struct SmemPlan {
    union {
      SharedTile<Element, kTileQ, kDimQk> q;
      SharedTile<Element, kTileQ, kColsV> out;  // after the last Q K^T
    };
    union {
      SharedTile<Element, kTileQ, kDimQk> tangent_q;
      SharedTile<Element, kTileQ, kColsV> tangent_out;
    };
    SharedTile<Element, kTileKv, kDimQk> k, tangent_k;
    SharedTile<Element, kTileKv, kDimV> v, tangent_v;
  };

  using Scores = Fragment<kWarpRows, kTileKv>;
  using Rows = TangentRows<kWarpRows, kColsV>;

  // Starts the copy of a tile of keys, or of values, with that of its tangent, if there is one.
  CF_DEVICE static void load_k(SmemPlan& smem, const JvpParams& p, const Sequence& sequence, int head, int tile) {
    load_keys<Config::kDimQk>(smem.k, p.k, p.k_stride, sequence, head, tile);
    if (p.tangent_k) {
      load_keys<Config::kDimQk>(smem.tangent_k, p.tangent_k, p.tangent_k_stride, sequence, head, tile);
    }
    ptx::cp_async_commit();
  }
  CF_DEVICE static void load_v(SmemPlan& smem, const JvpParams& p, const Sequence& sequence, int head, int tile) {
    load_keys<Config::kDimV>(smem.v, p.v, p.v_stride, sequence, head, tile);
    if (p.tangent_v) {
      load_keys<Config::kDimV>(smem.tangent_v, p.tangent_v, p.tangent_v_stride, sequence, head, tile);
    }
    ptx::cp_async_commit();
  }
  template <int kDim, class Tile>
  CF_DEVICE static void load_keys(Tile& to, const void* tensor, const Strides& stride, const Sequence& sequence,
                                  int head, int tile) {
    const auto rows = key_rows<const Element>(tensor, stride, sequence, head);
    load_tile_async<kDim, kBytes, kThreads>(to, rows.from(tile * kTileKv));
  }

  template <class Tile>
  CF_DEVICE static void store_staged(void* tensor, const Strides& stride, const Sequence& sequence, int head, int row,
                                     int first_col, Tile& tile, int warp_row) {
    auto rows = query_rows<Element>(tensor, stride, sequence, head).from(row);
    rows.data += first_col;
    store_tile<kWarpRows, kColsV, kBytes, 32>(rows, Config::kDimV - first_col, tile, warp_row, ptx::lane_index());
  }

  // Divides this warp's sums by that of the weights, and writes out, lse and their tangents.
  CF_DEVICE static void finish(SmemPlan& smem, const JvpParams& p, const QueryTile<Config>& own, float unit, Rows& rows,
                               int split, int warp_row, int lane) {
    const Sequence& sequence = own.sequence;
    const int head = own.heads.first, q_first = own.first, first_col = split * kColsV;
    const int64 first_number = Results::number(p, sequence, head, 0);
#pragma unroll
    for (int r = 0; r < Rows::kRowsPerLane; ++r) {
      const float factor = rows.template close<Config>(p, head, unit, r);
      const int row = warp_row + row_of(lane, r);
      store_row<Element>(smem.out, row, rows.out, r, factor);
      store_row<Element>(smem.tangent_out, row, rows.dout, r, factor);
      if (lane % 4 == 0 && row < own.rows && split == 0) {
        if (p.lse) Results::close(p, first_number + q_first + row, rows.states[r], unit);
        first_query<float>(p.tangent_lse, p.tangent_lse_stride, sequence, head)[q_first + row] = rows.tangents[r].mean;
      }
    }
    ptx::sync_warp();
    const int row = q_first + warp_row;
    if (p.out) store_staged(p.out, p.out_stride, sequence, head, row, first_col, smem.out, warp_row);
    store_staged(p.tangent_out, p.tangent_out_stride, sequence, head, row, first_col, smem.tangent_out, warp_row);
  }

  CF_DEVICE static void run(const JvpParams& p) {
    SmemPlan& smem = *reinterpret_cast<SmemPlan*>(ptx::dynamic_smem());
    const Attention& a = p.attention;
    const int lane = ptx::lane_index(), warp_row = ptx::warp_index() * kWarpRows;

    const int split = static_cast<int>(ptx::block_index() % kSplits), first_col = split * kColsV;
    const QueryTile<Config> own(p, ptx::block_index() / kSplits);
    const Sequence& sequence = own.sequence;
    const int head = own.heads.first, head_kv = own.heads.kv;
    if (own.has_tail() && split == 0) store_tails<Config, kThreads>(p, sequence, head);
    const int q_first = own.first;
    if (own.rows <= 0) return;

    const ScoreTangent<Config> pairs(p, sequence, head);
    const Dropout dropout(a, sequence, head);
    const float unit = pairs.score.unit(), log2_unit = unit * static_cast<float>(kLog2E);
    const Tiles tiles = pairs.mask.kv_tiles(q_first, kTileQ, kTileKv);

    Rows rows;
    rows.init();

    if (tiles.begin < tiles.end) {
      const auto q = query_rows<const Element>(p.q, p.q_stride, sequence, head).from(q_first);
      auto tangent = query_rows<const Element>(p.tangent_q, p.tangent_q_stride, sequence, head).from(q_first);
      if (!p.tangent_q) tangent.count = 0;  // zeros
      load_tile_async<Config::kDimQk, kBytes, kThreads>(smem.q, q);
      load_tile_async<Config::kDimQk, kBytes, kThreads>(smem.tangent_q, tangent);
      load_k(smem, p, sequence, head_kv, tiles.begin);
    }
    for (int tile = tiles.begin; tile < tiles.end; ++tile) {
      const int kv_first = tile * kTileKv;
      ptx::cp_async_wait<0>();
      ptx::sync_threads();  // K is here, and every warp is done with the V before
      load_v(smem, p, sequence, head_kv, tile);

      Scores s, ds;
      s.clear();
      ds.clear();
      gemm_abt_pair<Element>(s, smem.q, ds, smem.tangent_q, warp_row, smem.k);
      if (p.tangent_k) gemm_abt<Element>(ds, smem.q, warp_row, smem.tangent_k);
      apply_tile(pairs, s, ds, q_first + warp_row, kv_first, tiles.is_full(tile));
      rows.softmax_tile(s, ds, log2_unit);
      drop(dropout, s, q_first + warp_row, kv_first);
      weigh(ds, s);

      ptx::cp_async_wait<0>();
      ptx::sync_threads();  // V is here, and every warp is done with K
      if (tile + 1 < tiles.end) load_k(smem, p, sequence, head_kv, tile + 1);

      Operand<kWarpRows, kTileKv> weights, changes;
      pack_operand<Element>(weights, s);
      pack_operand<Element>(changes, ds);
      gemm_ab_pair<Element>(rows.out, weights, rows.dout, changes, smem.v, first_col);
      if (p.tangent_v) gemm_ab<Element>(rows.dout, weights, smem.tangent_v, first_col);
    }
    finish(smem, p, own, unit, rows, split, warp_row, lane);
  }
};

template <class Config>
CF_DEVICE void jvp_sm80(const JvpParams& params) {
  SmemSizeCheck<sizeof(typename JvpSm80<Config>::SmemPlan), Config::kSmemBytes>();
  JvpSm80<Config>::run(params);
}

}  // namespace cuflash
