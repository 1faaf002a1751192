// Gradient of a bias that is broadcast along batch or heads, on Hopper: what backward/bias.cuh does, by wgmma and TMA.
//
//   producer warpgroup, one thread   TMA: Q, K, V and dO of a visit, some visits ahead
//   consumer warpgroups              64 queries each: S = Q K^T, dP = dO V^T, 64 keys at a time; dS is added up in registers
//
// All visits of a block read the same tile of the bias, which stays in shared memory. While a consumer makes dS of some
// keys, the products with the others are under way.
#pragma once

#include "attention/gradient.cuh"
#include "backward/bias.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/copy_tma.cuh"
#include "tile/dropout.cuh"
#include "tile/gemm_sm90.cuh"
#include "tile/held_bias.cuh"
#include "tile/ring.cuh"

namespace cuflash {

template <class Config>
struct BackwardBiasSm90 {
  using Element = typename Config::Element;
  using Sequence = typename Config::Sequence;
  using Gradient = ScoreGradient<Config>;
  using Visit = BiasVisit<Config>;
  static constexpr int kTile = Config::kTileQ, kRows = 64, kHalves = kTile / kRows, kStages = Config::kStages;
  static constexpr int kDimQk = round_up(Config::kDimQk, 16), kDimV = round_up(Config::kDimV, 16);
  static constexpr int kConsumerThreads = 2 * ptx::kWarpgroupThreads, kBiasHere = 1;  // a named barrier of theirs
  static constexpr float kLog2 = static_cast<float>(kLog2E);
  static_assert(kTile == Config::kTileKv && kHalves == 2 && kDimQk <= 64 && kDimV <= 64);

  // One chunk of columns, so that two tiles of 64 rows, one below the other, are a tile of 128.
  using QkTile = SwizzledTile<Element, kRows, kDimQk>;
  using VTile = SwizzledTile<Element, kRows, kDimV>;
  using Scores = Fragment<16, kRows>;
  using Cursor = RingCursor<kStages>;

  struct Stage {
    QkTile q[kHalves], k[kHalves];
    VTile dout[kHalves], v[kHalves];
  };
  using Bias = typename HeldBias<typename Config::Bias>::template Tile<kTile, kTile>;
  struct SmemPlan {
    Stage stage[kStages];
    Ring<kStages> ring;
    Bias bias;
  };

  // A box that would lie behind the last row begins with it: see load_boxes. Nobody sees what it holds.
  CF_DEVICE static void load(Stage& stage, const BwdParams& p, const Visit& visit, uint32 barrier) {
    const Attention& a = p.attention;
    const Sequence sequence(a, visit.batch);
    const int head_kv = visit.head / (a.heads_q / a.heads_kv);
    const BoxOrigin queries = sequence.q_box(a, visit.q_tile * kTile, visit.head);  // all of the tile's
    load_boxes(stage.q[0], p.q_map, queries, barrier);
    load_boxes(stage.dout[0], p.dout_map, queries, barrier);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int key = min_of(visit.kv_tile * kTile + half * kRows, sequence.len_kv - 1);
      load_boxes(stage.k[half], p.k_map, sequence.kv_box(a, key, head_kv), barrier);
      load_boxes(stage.v[half], p.v_map, sequence.kv_box(a, key, head_kv), barrier);
    }
  }

  // What is taken off a lane's two rows.
  struct Numbers {
    RowShift<float> shift[2];
    float delta[2];
  };

  struct Consumer {
    const BwdParams& p;
    SmemPlan& smem;
    const int number, row;  // the warp's first row in the tile
    const bool leader;
    Scores total[kHalves];

    CF_DEVICE Consumer(const BwdParams& params, SmemPlan& shared, int consumer)
        : p(params), smem(shared), number(consumer),
          row(consumer * kRows + ptx::thread_index() % ptx::kWarpgroupThreads / 32 * 16),
          leader(ptx::thread_index() % ptx::kWarpgroupThreads == 0) {
#pragma unroll
      for (Scores& each : total) each.clear();
    }

    CF_DEVICE Numbers numbers(const Visit& visit) const {
      Numbers of;
      const Sequence sequence(p.attention, visit.batch);
      const auto* g_shift = first_query<const RowShift<float>>(p.shift, p.delta_stride, sequence, visit.head);
      const auto* g_delta = first_query<const float>(p.delta, p.delta_stride, sequence, visit.head);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int q = min_of(visit.q_tile * kTile + row + row_of(ptx::lane_index(), r), sequence.len_q - 1);
        of.shift[r] = g_shift[q];
        of.delta[r] = g_delta[q];
      }
      return of;
    }

    CF_DEVICE void issue(Stage& stage, int half, Scores& s, Scores& dp) const {
      ptx::wgmma_fence();
      issue_abt<Element>(s, stage.q[number], stage.k, half);
      issue_abt<Element>(dp, stage.dout[number], stage.v, half);
      ptx::wgmma_commit();
    }

    CF_DEVICE void visit(const Visit& which, const Cursor& at, const Numbers& of) {
      const Sequence sequence(p.attention, which.batch);
      const Gradient gradient(p.attention, sequence, which.head);
      Stage& stage = smem.stage[at.stage];
      Scores s[kHalves], dp[kHalves];
      smem.ring.wait(at);
      issue(stage, 0, s[0], dp[0]);
      issue(stage, 1, s[1], dp[1]);
      ptx::wgmma_wait<1>();
      ptx::wgmma_hold(s[0].x[0]);
      ptx::wgmma_hold(dp[0].x[0]);
      const bool careful = !which.full || ptx::any(of.shift[0].is_far(kLog2) || of.shift[1].is_far(kLog2));
      add(careful, which, sequence, gradient, of, 0, s[0], dp[0]);
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(s[1].x[0]);
      ptx::wgmma_hold(dp[1].x[0]);
      if (leader) smem.ring.release(at);
      add(careful, which, sequence, gradient, of, 1, s[1], dp[1]);
    }
    CF_DEVICE void add(bool careful, const Visit& which, const Sequence& sequence, const Gradient& gradient,
                       const Numbers& of, int half, Scores& s, Scores& dp) {
      if (careful) {
        add<true>(which, sequence, gradient, of, half, s, dp);
      } else {
        add<false>(which, sequence, gradient, of, half, s, dp);
      }
    }

    // Adds dS of 64 keys; `kCareful` where some element may be hidden or some row is far.
    template <bool kCareful>
    CF_DEVICE void add(const Visit& which, const Sequence& sequence, const Gradient& gradient, const Numbers& of,
                       int half, Scores& s, Scores& dp) {
      const int lane = ptx::lane_index(), q_first = which.q_tile * kTile + row;
      const int kv_first = which.kv_tile * kTile + half * kRows;
      drop(gradient.dropout, dp, q_first, kv_first);
      RowShift<float> shift[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) shift[r] = kCareful ? of.shift[r] : of.shift[r].folded(kLog2);
#pragma unroll
      for (int n = 0; n < Scores::kN; n += 2) {
        const auto block = smem.bias.block(row, half * kRows + n * 8, lane);
        Fragment<16, 16>::for_each_index([&](int r, int across, int i) {
          const int q = q_first + row_of(lane, r), kv = kv_first + col_of(lane, n + across, i);
          // A row past the end has a bias of its own perhaps, which may be infinite; but it has no dS.
          const bool some = !kCareful || q < sequence.len_q;
          const float bias = some ? block.at(r, across, i) : 0.f;
          const float weight = gradient.probability(s.at(r, n + across, i), bias, shift[r], q, kv, !kCareful);
          total[half].at(r, n + across, i) +=
              some ? gradient.of_logit(weight, dp.at(r, n + across, i), of.delta[r], true) : 0.f;
        });
      }
    }

    CF_DEVICE void store(const BiasTile& own) {
      const Attention& a = p.attention;
      const BiasSums layout(p);
      float* sums = layout.of_part<float>(p, own.part) + own.batch * layout.batch + own.head * layout.head;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        total[half].for_each(ptx::lane_index(), [&](float x, int down, int col) {
          const int q = own.q_tile * kTile + row + down, kv = own.kv_tile * kTile + half * kRows + col;
          if (q < a.len_q && kv < a.len_kv) sums[q * layout.row + kv] = x;
        });
      }
    }
  };

  CF_DEVICE static void run(const BwdParams& p) {
    SmemPlan& smem = *reinterpret_cast<SmemPlan*>(ptx::dynamic_smem());
    const Attention& a = p.attention;
    const int tiles_q = cdiv(a.len_q, kTile), tiles_kv = cdiv(a.len_kv, kTile);
    const BiasTile own(a, ptx::block_index(), tiles_q, tiles_kv);
    if (ptx::thread_index() == 0) {
      smem.ring.init(kHalves);
      ptx::fence_mbarrier_init();
    }
    ptx::sync_threads();
    const int warpgroup = ptx::warpgroup_index();
    Visit visit = Visit::first_of(p, own, tiles_q, tiles_kv);
    Cursor at;
    if (warpgroup == 0) {
      ptx::lower_registers<Config::kProducerRegisters>();
      if (ptx::warp_index() == 0 && ptx::elect()) {
#pragma unroll 1
        for (; visit.left > 0; visit = visit.next(a, own, tiles_q, tiles_kv), at = at.next()) {
          load(smem.stage[at.stage], p, visit, smem.ring.acquire(at, sizeof(Stage)));
        }
      }
    } else {
      ptx::raise_registers<Config::kConsumerRegisters>();
      smem.bias.template load<kConsumerThreads>(a, own.batch, own.head, own.q_tile * kTile, own.kv_tile * kTile,
                                                ptx::thread_index() - ptx::kWarpgroupThreads);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      ptx::sync_named(kBiasHere, kConsumerThreads);
      Consumer consumer(p, smem, warpgroup - 1);
      if (visit.left > 0) {
        Numbers of = consumer.numbers(visit);
#pragma unroll 1
        while (visit.left > 0) {
          const Visit next = visit.next(a, own, tiles_q, tiles_kv);
          const Numbers of_next = next.left > 0 ? consumer.numbers(next) : of;
          consumer.visit(visit, at, of);
          visit = next;
          of = of_next;
          at = at.next();
        }
      }
      consumer.store(own);
    }
  }
};

template <class Config>
CF_DEVICE void backward_bias_sm90(const BwdParams& params) {
  SmemSizeCheck<sizeof(typename BackwardBiasSm90<Config>::SmemPlan), Config::kSmemBytes>();
  BackwardBiasSm90<Config>::run(params);
}

}  // namespace cuflash
