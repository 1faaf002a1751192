// Backward attention on Hopper of many sequences that are one tile of 128 rows: wgmma, TMA and warpgroups with roles, and
// all gradients in one launch.
//
//   P = exp(score(Q K^T) - lse),  dP = dO V^T,  dS = P * (dP - delta) * slope
//   dV = P^T dO,   dK = scale * dS^T Q,   dQ = scale * dS K
//
//   producer warpgroup     one thread by TMA: Q, K, V and dO of a batch element; then all, what must be known of its rows
//   consumer warpgroups    64 keys each, and in the end as many queries
//
// One block owns one head and some batch elements, as in backward/sm80_short.cuh: a bias that they share stays in shared
// memory, and its gradient is summed in registers. Scores are computed transposed, as in backward/sm90.cuh, some queries at
// a time. As all keys of a query meet in the block, dQ is whole, and leaves it as dK and dV do.
//
//   for each batch element:   for some queries: S^T = K Q^T | P | dV += P^T dO, dP^T = V dO^T | dS | dK += dS^T Q
//                             dQ = dS K | dv, dk, dq -> shared memory, in the places of V, K and Q -> TMA store
#pragma once

#include "attention/batch_share.cuh"
#include "backward/block_sm90.cuh"
#include "backward/delta.cuh"
#include "tile/held_bias.cuh"

namespace cuflash {

template <class Config>
struct BackwardSm90Short {
  using Block = BackwardBlock<Config>;  // its types, and P and dS
  using Element = typename Config::Element;
  using Sequence = typename Config::Sequence;
  using Gradient = typename Block::Gradient;
  using Scores = typename Block::Scores;
  using Weights = typename Block::Weights;
  using Rows = typename Block::Rows;
  static constexpr int kTile = Config::kTileKv, kRows = Block::kRows, kConsumers = Block::kConsumers, kStages = 2;
  static constexpr int kTileQ = Config::kTileQ, kSteps = kTile / kTileQ;
  static constexpr int kConsumerThreads = Block::kConsumerThreads;
  static_assert(kTile == kConsumers * kRows && Config::kStages == kStages);
  using Tensors = Ring<kStages>;
  using Cursor = RingCursor<kStages>;

  struct Stage {
    typename Block::KTile k[kConsumers];  // dk on the way out
    typename Block::VTile v[kConsumers];  // dv on the way out
    typename Block::QTile q[kSteps];      // dq on the way out
    typename Block::DoutTile dout[kSteps];
  };
  using Bias = typename Config::BiasHeld::template Tile<kTile, kTile>;
  struct SmemPlan {
    Stage stage[kStages];
    SwizzledTile<Element, kTile, kTile> ds;
    Rows rows[kStages][kSteps];
    Tensors tensors, numbers;  // of a stage, and of its rows
    Bias bias;
  };

  // Named barriers: of all consumers' threads, dS is whole and every operand is read; of a warpgroup's own, one for each.
  static constexpr int kDsWhole = 1, kAllRead = 2, kMyWarps = 3;

  using Share = BatchShare;

  CF_DEVICE static void produce(SmemPlan& smem, const BwdParams& p, const Share& share) {
    const Attention& a = p.attention;
    const int thread = ptx::thread_index();
    Cursor at;
#pragma unroll 1
    for (int batch = share.first; batch < share.end; ++batch) {
      const Sequence sequence(a, batch);
      Stage& stage = smem.stage[at.stage];
      if (thread == 0) {
        const uint32 barrier = smem.tensors.acquire(at, sizeof(Stage));
#pragma unroll
        for (int number = 0; number < kConsumers; ++number) {
          const BoxOrigin keys = sequence.kv_box(a, number * kRows, share.head);
          load_boxes(stage.k[number], p.k_map, keys, barrier);
          load_boxes(stage.v[number], p.v_map, keys, barrier);
        }
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const BoxOrigin queries = sequence.q_box(a, step * kTileQ, share.head);
          load_boxes(stage.q[step], p.q_map, queries, barrier);
          load_boxes(stage.dout[step], p.dout_map, queries, barrier);
        }
      }
      ptx::sync_warp();
      smem.numbers.wait_empty(at);
      Rows(&rows)[kSteps] = smem.rows[at.stage];
      if (thread < kSteps) rows[thread].far = 0;
      ptx::sync_named(kMyWarps + kConsumers, ptx::kWarpgroupThreads);
      prepare(smem, at, p, sequence, share.head, thread);
      ptx::sync_named(kMyWarps + kConsumers, ptx::kWarpgroupThreads);
      if (thread == 0) smem.numbers.publish(at);
      at = at.next();
    }
  }

  // Makes what must be known of a batch element's rows, which others read too: as backward/delta.cuh does, but dout is in
  // shared memory, and some rows are under way at once, as all of this waits for memory.
  CF_DEVICE static void prepare(SmemPlan& smem, const Cursor& at, const BwdParams& p, const Sequence& sequence,
                                int head, int thread) {
    struct alignas(16) Eight {
      Element x[8];
    };
    constexpr int kVectors = Config::kDimV / 8, kLanes = power_of_two_above(kVectors);  // that share a row
    constexpr int kRowsAtOnce = ptx::kWarpgroupThreads / kLanes, kUnderWay = 4;
    static_assert(Config::kDimV % 8 == 0 && kTile % (kRowsAtOnce * kUnderWay) == 0);
    const auto* g_out = first_query<const Element>(p.out, p.out_stride, sequence, head);
    const auto* g_state = first_query<const RowState<float>>(p.row_state, p.delta_stride, sequence, head);
    const auto* g_lse = first_query<const float>(p.lse, p.lse_stride, sequence, head);
    const auto* g_dlse = first_query<const float>(p.dlse, p.dlse_stride, sequence, head);
    const typename Config::Score score(p.attention, sequence, head);
    const float log2_unit = (Config::BiasHeld::kHeld ? 1.f : score.unit()) * static_cast<float>(kLog2E);
    const int lane = thread % kLanes, col = min_of(lane, kVectors - 1) * 8;
#pragma unroll 1
    for (int first = thread / kLanes; first < kTile; first += kRowsAtOnce * kUnderWay) {
      Eight out[kUnderWay];
      RowState<float> state[kUnderWay];
#pragma unroll
      for (int i = 0; i < kUnderWay; ++i) {
        const int q = min_of(first + i * kRowsAtOnce, sequence.len_q - 1);
        out[i] = *reinterpret_cast<const Eight*>(g_out + q * p.out_stride.row + col);
        state[i] = p.row_state ? g_state[q] : RowState<float>{g_lse[q * p.lse_stride.row], 0.f};
      }
      smem.tensors.wait(at);
#pragma unroll
      for (int i = 0; i < kUnderWay; ++i) {
        const int q = first + i * kRowsAtOnce;
        const Eight dout = *reinterpret_cast<const Eight*>(smem.stage[at.stage].dout[q / kTileQ].at(q % kTileQ, col));
        float sum = 0.f;
#pragma unroll
        for (int k = 0; k < 8; ++k) sum += to_accumulator(out[i].x[k]) * to_accumulator(dout.x[k]);
        if (lane >= kVectors) sum = 0.f;
#pragma unroll
        for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
        if (lane != 0) continue;
        RowShift<float> shift = RowShift<float>::empty();
        if (q < sequence.len_q) {
          shift = p.row_state ? RowShift<float>::of(state[i]) : RowShift<float>::of_lse(state[i].m);
          if (p.dlse) sum -= g_dlse[q * p.dlse_stride.row];
        }
        if (shift.is_empty()) sum = 0.f;  // dlse of an empty row may be anything
        smem.rows[at.stage][q / kTileQ].put(q % kTileQ, shift, sum, log2_unit);
        if (q < sequence.len_q) keep_wanted_delta(p, sequence, head, q, shift, sum);
      }
    }
  }

  struct Consumer {
    const BwdParams& p;
    SmemPlan& smem;
    const Share& share;
    const int number, warp_row;
    const int kv_first;  // this warp's first key
    const bool leader;
    Scores dbias[kSteps];  // transposed, summed over the block's batch elements

    CF_DEVICE Consumer(const BwdParams& params, SmemPlan& shared, const Share& its_share, int consumer)
        : p(params), smem(shared), share(its_share), number(consumer),
          warp_row(ptx::thread_index() % ptx::kWarpgroupThreads / 32 * 16), kv_first(consumer * kRows + warp_row),
          leader(ptx::thread_index() % ptx::kWarpgroupThreads == 0) {
#pragma unroll
      for (Scores& each : dbias) each.clear();
    }

    CF_DEVICE void run() {
      Cursor at, before;
#pragma unroll 1
      for (int batch = share.first; batch < share.end; ++batch) {
        visit(Sequence(p.attention, batch), at, [&] {
          // The copy engine is done with the gradients of the batch element before, in whose stage they lie.
          if (!leader || batch == share.first) return;
          ptx::tma_store_wait_read();
          smem.tensors.release(before);
        });
        before = at;
        at = at.next();
      }
      if (leader) ptx::tma_store_wait_read();
      if (Config::kSumBias) store_bias();
    }

    // `release_before` is called once the first products are under way.
    template <class ReleaseBefore>
    CF_DEVICE void visit(const Sequence& sequence, const Cursor& at, const ReleaseBefore& release_before) {
      const Gradient gradient(p.attention, sequence, share.head);
      Stage& stage = smem.stage[at.stage];
      const Tiles tiles = gradient.mask.q_tiles(0, kTile, kTileQ);
      Fragment<16, Block::kDimQk> dk;
      Fragment<16, Block::kDimV> dv;
      dk.clear();
      dv.clear();
      Weights ds;  // is read until the next wait
      smem.tensors.wait(at);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        Scores s;
        ptx::wgmma_fence();
        issue_abt<Element>(s, stage.k[number], stage.q, step);
        ptx::wgmma_commit();
        if (step == 0) {
          release_before();
          smem.numbers.wait(at);
        }
        ptx::wgmma_wait<0>();
        ptx::wgmma_hold(s.x[0]);
        ptx::wgmma_hold(dk.x[0]);
        const Rows& rows = smem.rows[at.stage][step];
        add_step(sequence, gradient, stage, rows, step, tiles.is_full(step), s, ds, dk, dv);
      }
      ptx::fence_proxy_async();
      ptx::sync_named(kDsWhole, kConsumerThreads);
      if (leader) smem.numbers.release(at);
      Fragment<16, Block::kDimQk> dq;
      ptx::wgmma_fence();
      issue_ab<Element>(dq, &smem.ds, 0, number * kRows, stage.k, 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(dv.x[0]);
      ptx::wgmma_hold(dk.x[0]);
      ptx::wgmma_hold(dq.x[0]);
      ptx::sync_named(kAllRead, kConsumerThreads);
      store(sequence, stage, dq, dk, dv);
    }

    CF_DEVICE void add_step(const Sequence& sequence, const Gradient& gradient, Stage& stage, const Rows& rows,
                            int step, bool full, Scores& s, Weights& ds, Fragment<16, Block::kDimQk>& dk,
                            Fragment<16, Block::kDimV>& dv) {
      const int q_first = step * kTileQ, lane = ptx::lane_index();
      const auto kept = kept_transposed<Scores>(gradient.dropout, q_first, kv_first);
      const auto bias_of = [&](int k) { return smem.bias.transposed(q_first + k * 16, kv_first, lane); };
      Weights weights;
      if (full && !rows.far) {
        Block::template weigh<false>(s, weights, gradient, rows, q_first, kv_first, sequence.len_q, kept, bias_of);
      } else {
        Block::template weigh<true>(s, weights, gradient, rows, q_first, kv_first, sequence.len_q, kept, bias_of);
      }
      Scores dp;
      ptx::wgmma_fence();
      issue_abt<Element>(dp, stage.v[number], stage.dout, step);
      issue_ab<Element>(dv, weights, stage.dout, step);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(dp.x[0]);
      ptx::wgmma_hold(dv.x[0]);
      Block::differentiate(s, dp, gradient, rows, kept);
      if (Config::kSumBias) {
        Scores::for_each_index([&](int r, int n, int i) { dbias[step].at(r, n, i) += dp.at(r, n, i); });
      }
      pack_operand<Element>(ds, dp);
      store_transposed(smem.ds, kv_first, lane, ds, q_first);
      ptx::wgmma_fence();
      issue_ab<Element>(dk, ds, stage.q, step);
      ptx::wgmma_commit();
    }

    // Puts the gradients into the places of V, K and Q, and has them copied.
    CF_DEVICE void store(const Sequence& sequence, Stage& stage, Fragment<16, Block::kDimQk>& dq,
                         Fragment<16, Block::kDimQk>& dk, Fragment<16, Block::kDimV>& dv) {
      const Attention& a = p.attention;
      const int lane = ptx::lane_index();
      const float scale = static_cast<float>(a.softmax_scale), scale_v = static_cast<float>(Config::Dropout::scale(a));
      dq.for_each([&](float& x) { x *= scale; });
      dk.for_each([&](float& x) { x *= scale; });
      dv.for_each([&](float& x) { x *= scale_v; });
      store_fragment<Element>(stage.v[number], warp_row, 0, lane, dv);
      store_fragment<Element>(stage.k[number], warp_row, 0, lane, dk);
      store_fragment<Element>(stage.q[kv_first / kTileQ], kv_first % kTileQ, 0, lane, dq);
      ptx::fence_proxy_async();
      ptx::sync_named(kMyWarps + number, ptx::kWarpgroupThreads);
      if (!leader) return;
      const BoxOrigin keys = sequence.kv_box(a, number * kRows, share.head);
      store_boxes(p.dv_map, keys, stage.v[number]);
      store_boxes(p.dk_map, keys, stage.k[number]);
#pragma unroll
      for (int step = number * kRows / kTileQ; step < (number + 1) * kRows / kTileQ; ++step) {
        if (step * kTileQ < sequence.len_q) {
          store_boxes(p.dq_map, sequence.q_box(a, step * kTileQ, share.head), stage.q[step]);
        }
      }
      ptx::tma_store_commit();
    }

    CF_DEVICE void store_bias() {
      const BiasSums layout(p);
      float* sums = layout.of_part<float>(p, share.part) + share.head * layout.head;
      const int len_q = p.attention.len_q, len_kv = p.attention.len_kv;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        dbias[step].for_each(ptx::lane_index(), [&](float x, int row, int col) {
          const int q = step * kTileQ + col, kv = kv_first + row;
          if (q < len_q && kv < len_kv) sums[q * layout.row + kv] = x;
        });
      }
    }
  };

  CF_DEVICE static void run(const BwdParams& p) {
    SmemPlan& smem = *reinterpret_cast<SmemPlan*>(ptx::dynamic_smem());
    const Share share(p.attention);
    if (ptx::thread_index() == 0) {
      smem.tensors.init(kConsumers);
      smem.numbers.init(kConsumers);
      ptx::fence_mbarrier_init();
    }
    smem.bias.template load<Config::kThreads>(p.attention, 0, p.attention.bias_head ? share.head : 0, 0, 0);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::sync_threads();
    const int warpgroup = ptx::warpgroup_index();
    if (warpgroup == 0) {
      ptx::lower_registers<Config::kProducerRegisters>();
      produce(smem, p, share);
    } else {
      ptx::raise_registers<Config::kConsumerRegisters>();
      Consumer(p, smem, share, warpgroup - 1).run();
    }
  }
};

template <class Config>
CF_DEVICE void backward_sm90_short(const BwdParams& params) {
  SmemSizeCheck<sizeof(typename BackwardSm90Short<Config>::SmemPlan), Config::kSmemBytes>();
  BackwardSm90Short<Config>::run(params);
}

}  // namespace cuflash
