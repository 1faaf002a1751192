// Forward attention on Hopper: wgmma, TMA and warpgroups with roles, after FlashAttention-3 (Shah et al. 2024,
// arXiv 2407.08608).
//
//   out = softmax(score(Q K^T)) V,   lse = log sum exp
//
//   producer warpgroup, one thread   TMA: Q, K, V ----> shared memory: q, ring of K tiles, ring of V tiles
//   consumer warpgroups              64 rows of the q tile each: S = Q K^T (wgmma from shared memory), softmax in
//                                    registers, out += P V (wgmma, P from registers), out -> shared memory -> TMA
//
// A bias is loaded beside K, where the copy engine can read it (tile/bias.cuh).
//
// A consumer issues the next tile's S = Q K^T before this tile's out += P V, so that its softmax runs under P V:
//
//   tensor cores   | Q K(0) |  Q K(1)  | P(0) V(0) |        |  Q K(2)  | P(1) V(1) |
//   one consumer            |softmax 0 |             softmax 1          |            softmax 2
//
// Consumers run independently, each visiting only its own rows' tiles, and fill each other's gaps; with kPingPong they
// take turns at issuing, so that the softmax of one always runs under the products of another. Tiles are visited from
// the last to the first, so that all but a left bound is masked at the beginning.
//
// A block goes from one work, a tile of queries, to another; rings and phases run on, so that the next work's loads run
// under the end of this one. Works of equal length are dealt out in turn, others are drawn by tickets, the longest of some
// heads first. The producer tells the consumers which it is.
#pragma once

#include "attention/split.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/bias.cuh"
#include "tile/copy.cuh"
#include "tile/copy_tma.cuh"
#include "tile/dropout.cuh"
#include "tile/gemm_sm90.cuh"
#include "tile/ring.cuh"
#include "tile/softmax_sm90.cuh"
#include "tile/tail.cuh"

namespace cuflash {

template <class Config>
struct ForwardSm90 {
  using Element = typename Config::Element;
  using Sequence = typename Config::Sequence;
  using Mask = typename Config::Mask;
  using Score = typename Config::Score;
  using Dropout = typename Config::Dropout;
  using Bias = typename Config::BiasCopies;
  static constexpr int kTileQ = Config::kTileQ, kTileKv = Config::kTileKv, kStages = Config::kStages;
  static constexpr int kRows = 64, kConsumers = kTileQ / kRows;  // rows of a consumer warpgroup
  static constexpr int kConsumerThreads = kConsumers * ptx::kWarpgroupThreads;
  static constexpr int kDimQk = round_up(Config::kDimQk, 16), kDimV = round_up(Config::kDimV, 16);
  static_assert(Config::kThreads == ptx::kWarpgroupThreads + kConsumerThreads);
  static_assert(Config::kPingPong || IsSame<Bias, NoBias>::value, "consumers that skip tiles give no bias back");

  using QTile = SwizzledTile<Element, kRows, kDimQk>;
  using KTile = SwizzledTile<Element, kTileKv, kDimQk>;
  using VTile = SwizzledTile<Element, kTileKv, kDimV>;
  using OutTile = SwizzledTile<Element, kRows, kDimV>;
  using KvRing = Ring<kStages>;
  using Cursor = typename KvRing::Cursor;
  using RowsRing = Ring<Config::kRowBuffers>;

  union Rows {
    QTile q;
    OutTile out;  // after the last Q K^T
  };
  struct SmemPlan {
    Rows rows[kConsumers][Config::kRowBuffers];
    KTile k[kStages];
    VTile v[kStages];
    RowsRing rows_rings[kConsumers];
    KvRing k_ring, v_ring;
    WorkRing works;
    typename Bias::template Buffers<kTileQ, kTileKv, kStages> bias;
  };

  // Named barriers, one for each consumer from these numbers on.
  static constexpr int kTurnToIssue = 1, kMyWarps = 1 + kConsumers;

  // Whether no tile but the first that is visited can need a test.
  static constexpr bool kAllFull = Mask::kFullFromStart && Mask::kFullToEnd;

  using Scores = Fragment<16, kTileKv>;
  using Weights = Operand<16, kTileKv>;
  using Output = Fragment<16, kDimV>;

  // One thread loads everything, in the order in which it is used.
  CF_DEVICE static void produce(const FwdParams& p, SmemPlan& smem) {
    const Attention& a = p.attention;
    const int blocks = ptx::num_blocks();
    typename RowsRing::Cursor rows_at;
    Cursor at;  // K and V are used in step
    WorkRing::Cursor work_at;
    Works<Sequence> works;
    for (int number = ptx::block_index();; number = p.tickets ? blocks + ptx::count(p.tickets) : number + blocks) {
      const Work work = works.find(a, number, kTileQ, p.heads_per_section);
      smem.works.put(work_at, work);
      work_at = work_at.next();
      if (work.tile < 0) break;
      const Sequence sequence(a, work.batch);
      const int q_first = work.tile * kTileQ, head_kv = work.head / (a.heads_q / a.heads_kv);
      if (q_first >= sequence.len_q) continue;
      const Tiles tiles = Mask(a, sequence, work.head).kv_tiles(q_first, kTileQ, kTileKv);
      const auto load_q = [&] {
#pragma unroll 1
        for (int w = 0; w < kConsumers; ++w) {  // rows that no query has begin with the last query's: see load_boxes
          const int row = min_of(q_first + w * kRows, sequence.len_q - 1);
          const uint32 barrier = smem.rows_rings[w].acquire(rows_at, sizeof(QTile));
          load_boxes(smem.rows[w][rows_at.stage].q, p.q_map, sequence.q_box(a, row, work.head), barrier);
        }
        rows_at = rows_at.next();
      };
      if (tiles.begin >= tiles.end) load_q();
#pragma unroll 1
      for (int tile = tiles.end - 1; tile >= tiles.begin; --tile) {
        const BoxOrigin origin = sequence.kv_box(a, tile * kTileKv, head_kv);
        load_boxes(smem.k[at.stage], p.k_map, origin, smem.k_ring.acquire(at, sizeof(KTile)));
        if (tile == tiles.end - 1) load_q();  // after K, which needs not wait for a work before
        smem.bias.load(p.bias_map, a, sequence, work.head, q_first, tile * kTileKv, at);
        load_boxes(smem.v[at.stage], p.v_map, origin, smem.v_ring.acquire(at, sizeof(VTile)));
        at = at.next();
      }
    }
    // The last of all blocks leaves the tickets as it found them.
    if (p.tickets && ptx::count_around(p.tickets + 1, blocks - 1) == blocks - 1) p.tickets[0] = 0;
  }

  CF_DEVICE static void rescale_output(Output& out, const float (&factor)[2]) {
#pragma unroll
    for (int n = 0; n < Output::kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out.x[0][n][i] *= factor[i / 2];
    }
  }

  CF_DEVICE static void consume(const FwdParams& p, SmemPlan& smem, int consumer) {
    const Attention& a = p.attention;
    const int thread = ptx::thread_index() % ptx::kWarpgroupThreads, lane = ptx::lane_index();
    const bool leader = thread == 0;
    const int warp_row = thread / 32 * 16, first_row = consumer * kRows + warp_row;
    RowsRing& rows_ring = smem.rows_rings[consumer];
    typename RowsRing::Cursor rows_at;
    Cursor at;
    WorkRing::Cursor work_at;
    bool stored = false;  // whether there was a work before
    if (Config::kPingPong && consumer == kConsumers - 1) ptx::arrive_named(kTurnToIssue, 2 * ptx::kWarpgroupThreads);

    for (;;) {
      const Work work = smem.works.take(work_at);
      work_at = work_at.next();
      if (work.tile < 0) break;
      const Sequence sequence(a, work.batch);
      if (work.tile == 0) {
        store_tail<Config, kConsumerThreads>(p, sequence, work.head, consumer * ptx::kWarpgroupThreads + thread);
      }
      const int q_first = work.tile * kTileQ;
      if (q_first >= sequence.len_q) continue;
      const Mask mask(a, sequence, work.head);
      const Score score(a, sequence, work.head);
      const Dropout dropout(a, sequence, work.head);
      const Tiles loaded = mask.kv_tiles(q_first, kTileQ, kTileKv);
      const Tiles tiles = Config::kPingPong ? loaded : own_tiles(mask, q_first + consumer * kRows, sequence, loaded);

      Scores s;
      Weights weights;
      Output out;
      out.clear();
      WarpSoftmax softmax;
      Rows& mine = smem.rows[consumer][rows_at.stage];

      const auto apply_score = [&](int tile, const Cursor& at) {
        s.for_each(lane, [&](float& x, int row, int col) {
          x = score.apply(x, q_first + first_row + row, tile * kTileKv + col);
        });
        smem.bias.add(s, first_row, lane, at);
      };
      const auto start_scores = [&](const Cursor& at) {
        ptx::wgmma_fence();
        issue_abt<Element>(s, mine.q, smem.k, at.stage);
        ptx::wgmma_commit();
      };
      const auto start_output = [&](const Cursor& at) {
        smem.v_ring.wait(at);
        ptx::wgmma_fence();
        issue_ab<Element>(out, weights, smem.v, at.stage);
        ptx::wgmma_commit();
      };
      // The store of the work before has long read its rows when this is called.
      const auto release_rows_before = [&] {
        if (Config::kRowBuffers == 2 && leader && stored) {
          ptx::tma_store_wait_read();
          rows_ring.release(rows_at.next());
        }
      };
      Cursor before;  // the tile that was visited before
      // A tile's products, which have come in, to P, while the product of the tile before is added to the output.
      const auto to_weights = [&](int tile, bool first, bool look_first) {
        const auto finish_before = [&] {
          ptx::wgmma_wait<0>();
          ptx::wgmma_hold(out.x[0]);
          if (leader && !first) smem.v_ring.release(before);
        };
        if (Config::kPingPong) finish_before();  // the softmax runs under the products of others
        apply_score(tile, at);
        bool grew;
        if (look_first || !softmax.look_after(s, grew)) {
          if (look_first) {
            s.for_each(lane, [&](float& x, int row, int col) {
              if (!mask.keep(q_first + first_row + row, tile * kTileKv + col)) x = -infinity<float>();
            });
          } else {
            s.clear();
            gemm_abt_warp<Element>(s, mine.q, warp_row, smem.k[at.stage]);
            apply_score(ptx::keep(tile), at);  // positions for this rare case alone, not held ready for it
          }
          grew = softmax.look_first(s, score.unit());
        }
        if (lane == 0) {  // no lane still reads: all have voted on what they read
          smem.k_ring.release(at);
          smem.bias.release(at);
        }
        drop(dropout, s, q_first + first_row, tile * kTileKv);
        if (!Config::kPingPong) finish_before();
        pack_operand<Element>(weights, s);
        if (grew && !first) rescale_output(out, softmax.rescale);
      };
      // The next tile's scores under way, and this one's product behind them.
      const auto start_both = [&] {
        before = at;
        at = at.next();
        smem.k_ring.wait(at);
        if (Config::kPingPong) ptx::sync_named(kTurnToIssue + consumer, 2 * ptx::kWarpgroupThreads);
        start_scores(at);
        start_output(before);
        if (Config::kPingPong) {
          ptx::arrive_named(kTurnToIssue + (consumer + 1) % kConsumers, 2 * ptx::kWarpgroupThreads);
        }
        ptx::wgmma_wait<1>();
        ptx::wgmma_hold(s.x[0]);
      };
      const auto meet = [&] { ptx::sync_named(kMyWarps + consumer, ptx::kWarpgroupThreads); };
      // Tiles that only other consumers need. Products keep a consumer's warps together; here they must meet, or one
      // would be left waiting for a phase that is over.
      const auto skip = [&](int count) {
        if (count <= 0) return;
        if (lane == 0) {
#pragma unroll 1
          for (int i = 0; i < count; ++i) {
            const Cursor unused = at.next(i);
            smem.k_ring.wait(unused);
            smem.k_ring.release(unused);
            if (leader) {
              smem.v_ring.wait(unused);
              smem.v_ring.release(unused);
            }
          }
        }
        at = at.next(count);
        meet();
      };

      rows_ring.wait(rows_at);
      skip(loaded.end - tiles.end);
      const bool some = tiles.begin < tiles.end;
      if (some) {
        smem.k_ring.wait(at);
        start_scores(at);
        ptx::wgmma_wait<0>();
        ptx::wgmma_hold(s.x[0]);
        release_rows_before();
        int tile = tiles.end - 1;
        if constexpr (kAllFull) {  // without a choice between two softmaxes, a round is one block of instructions
          to_weights(tile, true, true);
          while (--tile >= 0) {
            start_both();
            to_weights(tile, false, false);
          }
        } else {
          for (bool first = true;; first = false) {
            const bool full = tile < tiles.full_end && (Mask::kFullFromStart || tile >= tiles.full_begin);
            to_weights(tile, first, Mask::kNoneFull || first || !full);
            if (tile-- == tiles.begin) break;
            start_both();
          }
        }
        start_output(at);
        ptx::wgmma_wait<0>();
        ptx::wgmma_hold(out.x[0]);
        if (leader) smem.v_ring.release(at);
        at = at.next();
      } else {
        meet();
        release_rows_before();
      }
      if constexpr (!Mask::kFullFromStart) skip(tiles.begin - loaded.begin);

      const int64 number = WholeRows<Config>::number(p, sequence, work.head, 0);
      float factor[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        RowState<float> state = softmax.whole(r);
        const float shrink = Config::Sink::close(state, a, work.head, score.unit());
        factor[r] = shrink * state.inverse_sum() * static_cast<float>(Dropout::scale(a));
        const int row = q_first + first_row + r * 8 + lane / 4;
        if (lane % 4 == 0 && row < sequence.len_q) WholeRows<Config>::close(p, number + row, state, score.unit());
      }
      rescale_output(out, factor);

      store_fragment<Element>(mine.out, warp_row, lane, out);
      ptx::fence_proxy_async();
      meet();
      if (leader) {
        const int row = q_first + consumer * kRows;
        if (row < sequence.len_q) store_boxes(p.out_map, sequence.q_box(a, row, work.head), mine.out);
        ptx::tma_store_commit();
        if (Config::kRowBuffers == 1) {
          ptx::tma_store_wait_read();
          rows_ring.release(rows_at);
        }
      }
      rows_at = rows_at.next();
      stored = true;
    }
    if (leader) ptx::tma_store_wait_read();
  }

  // The tiles that 64 of the block's rows need, none for rows past the sequence, among those that are loaded.
  CF_DEVICE static Tiles own_tiles(const Mask& mask, int q, const Sequence& sequence, const Tiles& loaded) {
    const Tiles tiles = mask.kv_tiles(q, kRows, kTileKv);
    const int none = loaded.begin;
    return q < sequence.len_q && tiles.begin < tiles.end ? tiles : Tiles{none, none, none, none};
  }

  CF_DEVICE static void run(const FwdParams& p) {
    SmemPlan& smem = *reinterpret_cast<SmemPlan*>(ptx::dynamic_smem());
    if (ptx::thread_index() == 0) {
      for (RowsRing& ring : smem.rows_rings) ring.init(1);
      smem.k_ring.init(kConsumerThreads / 32);
      smem.v_ring.init(kConsumers);
      smem.bias.init(kConsumerThreads / 32);
      smem.works.ring.init(kConsumerThreads / 32);
      ptx::fence_mbarrier_init();
    }
    ptx::sync_threads();
    const int warpgroup = ptx::warpgroup_index();
    if (warpgroup == 0) {
      ptx::lower_registers<Config::kProducerRegisters>();
      if (ptx::warp_index() == 0 && ptx::elect()) produce(p, smem);
    } else {
      ptx::raise_registers<Config::kConsumerRegisters>();
      consume(p, smem, warpgroup - 1);
    }
  }
};

template <class Config>
CF_DEVICE void forward_sm90(const FwdParams& params) {
  SmemSizeCheck<sizeof(typename ForwardSm90<Config>::SmemPlan), Config::kSmemBytes>();
  ForwardSm90<Config>::run(params);
}

}  // namespace cuflash
