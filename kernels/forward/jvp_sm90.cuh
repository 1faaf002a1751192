// Forward attention with its tangent on Hopper: how out and lse change as q, k and v change, in the pass that computes
// them. attention/tangent.cuh has the formulas, forward/sm90.cuh the roles.
//
//   producer warpgroup, one thread   TMA: Q with Q', rings of K with K' and of V with V'
//   consumer warpgroups              64 rows of the q tile each, with six products a tile:
//                                    S = Q K^T, S' = Q' K^T + Q K'^T | softmax_tile | out += P V, out' += W V + P V'
//
// The sums of two outputs leave no registers for the next tile's scores beside this one's weights. So consumers take
// turns, and the softmax of one runs under the products of the other, those of a tile's values and of the next scores:
//
//   tensor cores   | S(0) of A | S(0) of B | out(0), S(1) of A | out(0), S(1) of B |
//   A                          | softmax 0 |                   |     softmax 1     |
#pragma once

#include "attention/query_tile.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/copy.cuh"
#include "tile/copy_tma.cuh"
#include "tile/dropout.cuh"
#include "tile/gemm_sm90.cuh"
#include "tile/ring.cuh"
#include "tile/tail.cuh"
#include "tile/tangent.cuh"

namespace cuflash {

template <class Config>
struct JvpSm90 {
  using Element = typename Config::Element;
  using Sequence = typename Config::Sequence;
  using Results = WholeRows<Config>;
  static constexpr int kTileQ = Config::kTileQ, kTileKv = Config::kTileKv, kStages = Config::kStages;
  static constexpr int kRows = 64, kConsumers = kTileQ / kRows;  // rows of a consumer warpgroup
  static constexpr int kDimQk = round_up(Config::kDimQk, 16), kDimV = round_up(Config::kDimV, 16);
  static_assert(Config::kThreads == (1 + kConsumers) * ptx::kWarpgroupThreads);

  using QTile = SwizzledTile<Element, kRows, kDimQk>;
  using KTile = SwizzledTile<Element, kTileKv, kDimQk>;
  using VTile = SwizzledTile<Element, kTileKv, kDimV>;
  using OutTile = SwizzledTile<Element, kRows, kDimV>;
  using KvRing = Ring<kStages>;
  using Cursor = typename KvRing::Cursor;

  union Rows {
    QTile q;
    OutTile out;  // after the last Q K^T
  };
  struct SmemPlan {
    Rows rows[kConsumers], tangent_rows[kConsumers];
    KTile k[kStages], tangent_k[kStages];
    VTile v[kStages], tangent_v[kStages];
    Ring<1> rows_ring;
    KvRing k_ring, v_ring;
  };

  // Named barriers, one of each kind a consumer: its turn, for which it waits and the one before it arrives, and where
  // its four warps meet, which all wait.
  using Turns = NamedBarriers<1, 2 * ptx::kWarpgroupThreads>;
  using Meetings = NamedBarriers<1 + kConsumers, ptx::kWarpgroupThreads>;

  using Scores = Fragment<16, kTileKv>;
  using Weights = Operand<16, kTileKv>;

  // One thread loads everything, in the order in which it is used.
  CF_DEVICE static void produce(const JvpParams& p, SmemPlan& smem, const QueryTile<Config>& own, const Tiles& tiles) {
    const Attention& a = p.attention;
    Cursor at;
#pragma unroll 1
    for (int tile = tiles.begin; tile < tiles.end; ++tile, at = at.next()) {
      const BoxOrigin origin = own.sequence.kv_box(a, tile * kTileKv, own.heads.kv);
      const uint32 k_barrier = smem.k_ring.acquire(at, 2 * sizeof(KTile));
      load_boxes(smem.k[at.stage], p.k_map, origin, k_barrier);
      load_boxes(smem.tangent_k[at.stage], p.tangent_k_map, origin, k_barrier);
      if (tile == tiles.begin) load_q(p, smem, own);
      const uint32 v_barrier = smem.v_ring.acquire(at, 2 * sizeof(VTile));
      load_boxes(smem.v[at.stage], p.v_map, origin, v_barrier);
      load_boxes(smem.tangent_v[at.stage], p.tangent_v_map, origin, v_barrier);
    }
  }
  CF_DEVICE static void load_q(const JvpParams& p, SmemPlan& smem, const QueryTile<Config>& own) {
    const uint32 barrier = smem.rows_ring.acquire({}, 2 * kConsumers * sizeof(QTile));
#pragma unroll 1
    for (int w = 0; w < kConsumers; ++w) {  // rows that no query has begin with the last query's: see load_boxes
      const int row = min_of(own.first + w * kRows, own.sequence.len_q - 1);
      const BoxOrigin origin = own.sequence.q_box(p.attention, row, own.heads.first);
      load_boxes(smem.rows[w].q, p.q_map, origin, barrier);
      load_boxes(smem.tangent_rows[w].q, p.tangent_q_map, origin, barrier);
    }
  }

  // A warpgroup, which has 64 rows of the q tile.
  struct Consumer {
    const JvpParams& p;
    SmemPlan& smem;
    const QueryTile<Config>& own;
    const int number;    // among the block's consumers
    const int lane;      // of the warp
    const bool leader;   // one thread of the warpgroup
    const int warp_row;  // the first of this warp's 16 rows among the warpgroup's 64
    const int q_warp;    // and among the sequence's
    const ScoreTangent<Config> pairs;
    const typename Config::Dropout dropout;
    Scores s, ds;
    TangentRows<16, kDimV> rows;
    Cursor at;  // the tile of K and V at hand

    CF_DEVICE Consumer(const JvpParams& params, SmemPlan& plan, const QueryTile<Config>& tile, int index)
        : p(params), smem(plan), own(tile), number(ptx::uniform(index)), lane(ptx::lane_index()),
          leader(ptx::thread_index() % ptx::kWarpgroupThreads == 0), warp_row(ptx::warp_index() % 4 * 16),
          q_warp(own.first + number * kRows + warp_row), pairs(p, own.sequence, own.heads.first),
          dropout(p.attention, own.sequence, own.heads.first) {}

    // From its turn on until it passes it a consumer issues products, and no other does.
    CF_DEVICE void take_turn() const { Turns::wait(number); }
    CF_DEVICE void pass_turn() const { Turns::arrive((number + 1) % kConsumers); }

    CF_DEVICE void run(const Tiles& tiles) {
      rows.init();
      if (tiles.begin < tiles.end) walk(tiles);
      Meetings::wait(number);  // all are done with Q
      finish();
    }

    CF_DEVICE void walk(const Tiles& tiles) {
      const float log2_unit = pairs.score.unit() * static_cast<float>(kLog2E);
      if (number == kConsumers - 1) pass_turn();
      smem.rows_ring.wait({});
      smem.k_ring.wait(at);
      take_turn();
      start_scores();
      pass_turn();
      finish_scores();
#pragma unroll 1
      for (int tile = tiles.begin;; ++tile) {
        apply_tile(pairs, s, ds, q_warp, tile * kTileKv, tiles.is_full(tile));
        rows.softmax_tile(s, ds, log2_unit);
        drop(dropout, s, q_warp, tile * kTileKv);
        weigh(ds, s);
        Weights weights, changes;
        pack_operand<Element>(weights, s);
        pack_operand<Element>(changes, ds);

        const bool last = tile == tiles.end - 1;
        smem.v_ring.wait(at);
        if (!last) smem.k_ring.wait(at.next());
        take_turn();
        add_values(weights, changes);
        at = at.next();
        if (last) break;
        start_scores();
        pass_turn();
        finish_scores();
      }
      pass_turn();
    }

    CF_DEVICE void start_scores() {
      Rows& mine = smem.rows[number];
      ptx::wgmma_fence();
      issue_abt<Element>(s, mine.q, smem.k, at.stage);
      issue_abt<Element>(ds, smem.tangent_rows[number].q, smem.k, at.stage);
      issue_abt<Element>(ds, mine.q, smem.tangent_k, at.stage, true);
      ptx::wgmma_commit();
    }
    CF_DEVICE void finish_scores() {
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(s.x[0]);
      ptx::wgmma_hold(ds.x[0]);
      if (leader) smem.k_ring.release(at);
    }
    CF_DEVICE void add_values(const Weights& weights, const Weights& changes) {
      ptx::wgmma_fence();
      issue_ab<Element>(rows.out, weights, smem.v, at.stage);
      issue_ab<Element>(rows.dout, changes, smem.v, at.stage);
      issue_ab<Element>(rows.dout, weights, smem.tangent_v, at.stage);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(rows.out.x[0]);
      ptx::wgmma_hold(rows.dout.x[0]);
      if (leader) smem.v_ring.release(at);
    }

    // Both sums divided by that of the weights, and lse; rows leave through Q's memory.
    CF_DEVICE void finish() {
      const float unit = pairs.score.unit();
      const Sequence& sequence = own.sequence;
      const int head = own.heads.first;
      const int64 first_number = Results::number(p, sequence, head, 0);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float factor = rows.template close<Config>(p, head, unit, r);
        scale_row(rows.out, r, factor);
        scale_row(rows.dout, r, factor);
        const int row = q_warp + row_of(lane, r);
        if (lane % 4 == 0 && row < sequence.len_q) {
          if (p.lse) Results::close(p, first_number + row, rows.states[r], unit);
          first_query<float>(p.tangent_lse, p.tangent_lse_stride, sequence, head)[row] = rows.tangents[r].mean;
        }
      }
      store_fragment<Element>(smem.rows[number].out, warp_row, 0, lane, rows.out);
      store_fragment<Element>(smem.tangent_rows[number].out, warp_row, 0, lane, rows.dout);
      ptx::sync_warp();
      if (p.out) store(p.out, p.out_stride, smem.rows[number].out);
      store(p.tangent_out, p.tangent_out_stride, smem.tangent_rows[number].out);
    }
    CF_DEVICE void store(void* tensor, const Strides& stride, OutTile& tile) const {
      const auto to = query_rows<Element>(tensor, stride, own.sequence, own.heads.first).from(q_warp);
      store_tile<16, kDimV, Config::kCopyBytes, 32>(to, Config::kDimV, tile, warp_row, lane);
    }
  };

  CF_DEVICE static void run(const JvpParams& p) {
    SmemPlan& smem = *reinterpret_cast<SmemPlan*>(ptx::dynamic_smem());
    const QueryTile<Config> own(p, ptx::block_index());
    if (own.has_tail()) store_tails<Config, Config::kThreads>(p, own.sequence, own.heads.first);
    if (own.rows <= 0) return;
    if (ptx::thread_index() == 0) {
      smem.rows_ring.init(kConsumers);
      smem.k_ring.init(kConsumers);
      smem.v_ring.init(kConsumers);
      ptx::fence_mbarrier_init();
    }
    ptx::sync_threads();
    const typename Config::Mask mask(p.attention, own.sequence, own.heads.first);
    const Tiles tiles = mask.kv_tiles(own.first, kTileQ, kTileKv);
    const int warpgroup = ptx::warpgroup_index();
    if (warpgroup == 0) {
      ptx::lower_registers<Config::kProducerRegisters>();
      if (ptx::warp_index() == 0 && ptx::elect()) produce(p, smem, own, tiles);
    } else {
      ptx::raise_registers<Config::kConsumerRegisters>();
      Consumer(p, smem, own, warpgroup - 1).run(tiles);
    }
  }
};

template <class Config>
CF_DEVICE void jvp_sm90(const JvpParams& params) {
  SmemSizeCheck<sizeof(typename JvpSm90<Config>::SmemPlan), Config::kSmemBytes>();
  JvpSm90<Config>::run(params);
}

}  // namespace cuflash
