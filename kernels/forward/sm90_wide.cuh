// Forward attention on Hopper for wide heads, up to 576 columns of q and k and 512 of v.
//
// The output of 64 rows has more columns than one warpgroup has registers for, so two share it: each has one half of the
// columns of out. The scores of a tile of keys belong to one of them, by turns: it makes P of them and hands that over
// through shared memory, with what the softmax knows of the rows. Both add P V to their halves (after FlashMLA,
// https://github.com/deepseek-ai/FlashMLA, whose blocks have two such warpgroups):
//
//   producer warpgroup, one thread   TMA: Q, K, V ----> shared memory: q, ring of K tiles, ring of V tiles
//   consumer 0                       S(0), softmax 0, P(0) V(0) left  | P(1) V(1) left            | S(2), softmax 2 ...
//   consumer 1                       P(0) V(0) right                  | S(1), softmax 1, P(1) V(1) right            ...
//
// Two blocks of a cluster may share the keys of a work: their parts stay in shared memory, and each merges half of the rows.
//
// V may be the first columns of K, as in multi-head latent attention: then one copy serves both products.
//
// Blocks, works, rings and roles are those of forward/sm90.cuh.
#pragma once

#include "attention/heads.cuh"
#include "attention/split.cuh"
#include "forward/visit_sm90.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/bias.cuh"
#include "tile/copy.cuh"
#include "tile/copy_tma.cuh"
#include "tile/dropout.cuh"
#include "tile/gemm_sm90.cuh"
#include "tile/half_rows.cuh"
#include "tile/parts.cuh"
#include "tile/ring.cuh"
#include "tile/softmax_sm90.cuh"
#include "tile/tail.cuh"

namespace cuflash {

template <class Config>
struct ForwardSm90Wide {
  using Element = typename Config::Element;
  using Sequence = typename Config::Sequence;
  using Heads = typename Config::Heads;
  using Mask = typename Config::Mask;
  using Score = typename Config::Score;
  using Dropout = typename Config::Dropout;
  static constexpr int kTileQ = Config::kTileQ, kTileKv = Config::kTileKv, kStages = Config::kStages;
  static constexpr int kConsumers = 2, kConsumerThreads = kConsumers * ptx::kWarpgroupThreads;
  static constexpr int kDimQk = round_up(Config::kDimQk, 16), kDimV = round_up(Config::kDimV, 16);
  static constexpr int kBoxRows = Config::kBoxRows, kBoxes = kTileKv / kBoxRows;  // of keys that lie together
  static constexpr bool kShared = Config::kSharedKv;                              // V is the first columns of K
  static constexpr bool kHalves = Config::Split::kHalves;                         // a block has one work then
  static_assert(kTileQ == 64 && Config::kThreads == ptx::kWarpgroupThreads + kConsumerThreads);

  using QTile = SwizzledTile<Element, kTileQ, kDimQk>;
  using KTile = SwizzledTile<Element, kTileKv, kDimQk>;
  using VTile = SwizzledTile<Element, kTileKv, kDimV>;
  using PTile = SwizzledTile<Element, kTileQ, kTileKv>;
  static constexpr int kHalf = cdiv(VTile::kChunks, kConsumers) * VTile::kChunkCols;  // columns of out of a consumer
  using VHalf = SwizzledTile<Element, kTileKv, kHalf>;
  using OutHalf = SwizzledTile<Element, kTileQ, kHalf>;
  using KvRing = Ring<kStages>;
  using Cursor = typename KvRing::Cursor;

  union Rows {
    QTile q;
    OutHalf out[kConsumers];  // after the last Q K^T
  };
  union Values {
    VTile whole;
    VHalf halves[kConsumers];
  };
  struct KeysAndValues {
    KTile k[kStages];
    Values v[kStages];
    CF_DEVICE VHalf* halves(int stage) { return v[stage].halves; }
  };
  struct KeysWithValues {
    KTile k[kStages];
    CF_DEVICE VHalf* halves(int stage) { return reinterpret_cast<VHalf*>(&k[stage]); }
  };
  static_assert(!kShared || 2 * kHalf <= KTile::kChunks * KTile::kChunkCols, "halves of V must lie in K");
  using Keys = typename If<kShared, KeysWithValues, KeysAndValues>::Type;
  using Found = HalfRows<Config, kTileQ, kDimV>;
  static_assert(!kHalves || sizeof(Found) <= sizeof(Keys), "parts take the place of the keys");
  struct SmemPlan {
    Rows rows;
    Keys kv;
    PTile p;
    RowHandover handed[kTileQ];
    Ring<1> rows_ring;
    KvRing k_ring, v_ring;
    WorkRing<Nothing> works;
  };

  // Named barriers, one of each kind a consumer: where the other one waits for its P, and where its four warps meet.
  using Handovers = NamedBarriers<1, kConsumerThreads>;
  using Meetings = NamedBarriers<1 + kConsumers, ptx::kWarpgroupThreads>;
  using Ends = NamedBarriers<1 + 2 * kConsumers, kConsumerThreads>;  // of the last product

  using Scores = Fragment<16, kTileKv>;
  using Weights = Operand<16, kTileKv>;
  using Output = Fragment<16, kHalf>;

  // One thread loads everything, in the order in which it is used.
  struct Producer {
    const FwdParams& p;
    SmemPlan& smem;
    Ring<1>::Cursor rows_at;
    Cursor at;  // K and V are used in step

    CF_DEVICE void run() {
      const int blocks = ptx::num_blocks();
      WorkRing<Nothing>::Cursor work_at;
      Works<Sequence, Heads> works;
      for (int number = ptx::block_index();; number = p.tickets ? blocks + ptx::count(p.tickets) : number + blocks) {
        const typename Config::Split split(p, number);
        Work work = works.find(p.attention, static_cast<int>(split.block), kTileQ, p.heads_per_section);
        work.split = split.index;
        smem.works.put(work_at, work);
        work_at = work_at.next();
        if (work.tile < 0) break;
        const Sequence sequence(p.attention, work.batch);
        if (work.tile * kTileQ < Heads::rows(p.attention, sequence.len_q)) load(work, sequence);
      }
      // The last of all blocks leaves the tickets as it found them.
      if (p.tickets && ptx::count_around(p.tickets + 1, blocks - 1) == blocks - 1) p.tickets[0] = 0;
    }

    CF_DEVICE void load(const Work& work, const Sequence& sequence) {
      const Attention& a = p.attention;
      const Heads heads(a, work.head);
      const int q_first = work.tile * kTileQ;
      const Tiles seen = heads.template bind<Mask>(a, sequence).kv_tiles(q_first, kTileQ, kTileKv);
      const Tiles tiles = Config::Split::part(p, work.split, seen);
      if (tiles.begin >= tiles.end) load_q(sequence, heads, q_first);
#pragma unroll 1
      for (int tile = tiles.end - 1; tile >= tiles.begin; --tile) {
        BoxOrigin boxes[kBoxes];  // found before the buffers are waited for
#pragma unroll
        for (int box = 0; box < kBoxes; ++box) {
          // Of boxes that no key begins there is none: a copy of the last stands in their place, which nobody sees.
          const int last = (sequence.len_kv - 1) / kBoxRows * kBoxRows;
          boxes[box] = key_box(p, sequence, min_of(tile * kTileKv + box * kBoxRows, last), heads.kv);
        }
        load_keys(smem.kv.k[at.stage], p.k_map, boxes, smem.k_ring.acquire(at, sizeof(KTile)));
        if (tile == tiles.end - 1) load_q(sequence, heads, q_first);  // after K, which needs not wait for a work before
        if constexpr (!kShared) {
          load_keys(smem.kv.v[at.stage].whole, p.v_map, boxes, smem.v_ring.acquire(at, sizeof(VTile)));
        }
        at = at.next();
      }
    }

    template <class Tile>
    CF_DEVICE static void load_keys(Tile& tile, const TensorMap& map, const BoxOrigin (&boxes)[kBoxes],
                                    uint32 barrier) {
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) {
        load_boxes<Config::kOnce>(tile, map, boxes[box], barrier, box * kBoxRows);
      }
    }

    CF_DEVICE void load_q(const Sequence& sequence, const Heads& heads, int q_first) {
      const uint32 barrier = smem.rows_ring.acquire(rows_at, sizeof(QTile));
      load_boxes(smem.rows.q, p.q_map, heads.box(p.attention, sequence, q_first), barrier);
      rows_at = rows_at.next();
    }
  };

  // A warpgroup, which has half of the columns of every tile's output, and the scores of every other tile of keys.
  struct Consumer {
    const FwdParams& p;
    SmemPlan& smem;
    const int number;        // among the block's consumers
    const int thread, lane;  // of the warpgroup, of the warp
    const bool leader;       // one thread of the warpgroup
    const int warp_row;      // the first of this warp's 16 rows
    Ring<1>::Cursor rows_at;
    Cursor at;  // the first tile of K and V of the work at hand

    CF_DEVICE Consumer(const FwdParams& params, SmemPlan& plan, int index)
        : p(params), smem(plan), number(ptx::uniform(index)), thread(ptx::thread_index() % ptx::kWarpgroupThreads),
          lane(ptx::lane_index()), leader(thread == 0), warp_row(ptx::warp_index() % 4 * 16) {}

    CF_DEVICE void run() {
      WorkRing<Nothing>::Cursor work_at;
      for (;;) {
        Nothing nothing;
        const Work work = smem.works.take(work_at, nothing);
        work_at = work_at.next();
        if (work.tile < 0) break;
        const Sequence sequence(p.attention, work.batch);
        if (work.tile == 0) {
          Heads(p.attention, work.head).for_each([&](int head) {
            store_tail<Config, kConsumerThreads>(p, sequence, head, number * ptx::kWarpgroupThreads + thread);
          });
        }
        if (work.tile * kTileQ < Heads::rows(p.attention, sequence.len_q)) Visit(*this, work, sequence).run();
      }
    }
  };

  // What a consumer does for one work: its scores, weights and output, in registers.
  struct Visit : VisitSm90<Config, Heads, kHalf> {
    using Base = VisitSm90<Config, Heads, kHalf>;
    using Results = typename Base::Results;
    using Base::dropout;
    using Base::heads;
    using Base::mask;
    using Base::out;
    using Base::p;
    using Base::q_first;
    using Base::q_warp;
    using Base::s;
    using Base::sequence;
    using Base::softmax;
    using Base::weights;
    using Base::work;

    Consumer& me;
    SmemPlan& smem;

    CF_DEVICE Visit(Consumer& consumer, const Work& its_work, const Sequence& its_sequence)
        : Base(consumer.p, its_work, its_sequence, its_work.tile * kTileQ, consumer.warp_row, consumer.lane),
          me(consumer), smem(me.smem) {
      out.clear();
    }

    CF_DEVICE void run() {
      const Tiles tiles = Config::Split::part(p, work.split, mask.kv_tiles(q_first, kTileQ, kTileKv));
      smem.rows_ring.wait(me.rows_at);
      walk(tiles);
      me.at = me.at.next(max_of(tiles.end - tiles.begin, 0));
      if constexpr (kHalves) {
        finish_half();
        return;
      }
      this->finish(me.number == 0);
      store();
      me.rows_at = me.rows_at.next();
    }

    // out += P V over all tiles, from the last to the first: of every two the other consumer's, then this one's. The
    // other's goes first, as it makes room for a tile that is to come.
    CF_DEVICE void walk(const Tiles& tiles) {
      Cursor at = me.at.next(me.number), before = me.at;
      NoBias::Buffers<kTileQ, kTileKv, kStages> no_bias;  // a bias is a term of the score
      int tile = tiles.end - 1 - me.number;
#pragma unroll 1
      for (bool others = me.number == 1; tile >= tiles.begin; tile -= 2, others = true) {
        if (others) start_others(before, tile + 1);
        start_scores(at);
        if (others) finish_output<1>(before);
        wait_for_scores();
        const bool first = tile == tiles.end - 1;
        const bool full = tile < tiles.full_end && (Mask::kFullFromStart || tile >= tiles.full_begin);
        const bool grew = this->weigh(tile, Mask::kNoneFull || first || !full, true, smem.rows.q, smem.kv.k[at.stage],
                                      no_bias, 0, at);
        if (!kShared && me.lane == 0) smem.k_ring.release(at);  // no lane still reads: all have voted on what they read
        drop(dropout, s, q_warp, tile * kTileKv);
        pack_operand<Element>(weights, s);
        give_weights(grew);
        if (grew) this->rescale_output(softmax.rescale);
        start_own(at, tile);
        finish_output<0>(at);
        before = at.next();
        at = before.next();
      }
      if (tile == tiles.begin - 1 && tile < tiles.end - 1) {  // the last is the other's
        start_others(before, tile + 1);
        finish_output<0>(before);
      }
    }

    CF_DEVICE void start_scores(const Cursor& at) {
      smem.k_ring.wait(at);
      ptx::wgmma_fence();
      issue_abt<Element>(s, smem.rows.q, smem.kv.k, at.stage);
      ptx::wgmma_commit();
    }
    CF_DEVICE void wait_for_scores() {
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(s.x[0]);
    }

    // The product of a tile whose weights are this consumer's, in registers; and of one whose the other has left.
    CF_DEVICE void start_own(const Cursor& at, int tile) {
      VHalf* half = wait_for_values(at, tile);
      ptx::wgmma_fence();
      issue_ab<Element>(out, weights, half, 0);
      ptx::wgmma_commit();
    }
    CF_DEVICE void start_others(const Cursor& at, int tile) {
      take_weights();
      VHalf* half = wait_for_values(at, tile);
      ptx::wgmma_fence();
      issue_ab<Element>(out, &smem.p, 0, 0, half, 0, true);
      ptx::wgmma_commit();
    }
    CF_DEVICE VHalf* wait_for_values(const Cursor& at, int tile) {
      value_ring().wait(at);
      VHalf* half = smem.kv.halves(at.stage) + me.number;
      if constexpr (!Sequence::kZerosBehind) {
        const int keys = sequence.len_kv - tile * kTileKv;
        if (keys < kTileKv) clear_rows(*half, keys);
      }
      return half;
    }
    // Rows behind the last key, which may hold anything: nothing times a NaN is no zero.
    CF_DEVICE void clear_rows(VHalf& half, int first) {
      for (int i = me.thread; i < (kTileKv - first) * VHalf::kCols; i += ptx::kWarpgroupThreads) {
        *half.at(first + i / VHalf::kCols, i % VHalf::kCols) = Element(0.f);
      }
      ptx::fence_proxy_async();
      Meetings::wait(me.number);
    }
    CF_DEVICE KvRing& value_ring() { return kShared ? smem.k_ring : smem.v_ring; }
    template <int kPending>
    CF_DEVICE void finish_output(const Cursor& at) {
      ptx::wgmma_wait<kPending>();
      ptx::wgmma_hold(out.x[0]);
      if (me.leader) value_ring().release(at);
    }

    // The other consumer has seen the last weights that were handed over, as this one made them: it has none to wait for.
    CF_DEVICE void give_weights(bool grew) {
      store_operand(smem.p, me.warp_row, 0, me.lane, weights);
      softmax.give(smem.handed + me.warp_row, me.lane, grew);
      ptx::fence_proxy_async();  // products read them
      Handovers::arrive(me.number);
    }
    CF_DEVICE void take_weights() {
      Handovers::wait(1 - me.number);
      if (softmax.take(smem.handed + me.warp_row, me.lane)) this->rescale_output(softmax.rescale);
    }

    // The same of half of the keys.
    CF_DEVICE void finish_half() {
      Ends::wait(0);  // nobody reads keys any more
      Found& found = reinterpret_cast<Found&>(smem.kv);
      const int num_rows = min_of(this->rows - q_first, kTileQ);
      float factor[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const RowState<float> state = softmax.whole(r);
        factor[r] = state.inverse_sum() * static_cast<float>(Dropout::scale(p.attention));
        if (me.number == 0) found.leave(me.warp_row, me.lane, r, state);
      }
      this->rescale_output(factor);
      found.leave(me.warp_row, me.number * kHalf, me.lane, out, num_rows);
      ptx::sync_cluster();
      found.merge(p, sequence, heads, this->score, work.split, q_first, num_rows,
                  me.number * ptx::kWarpgroupThreads + me.thread, kConsumerThreads);
      ptx::sync_cluster();  // nobody reads this block's shared memory any more
    }

    CF_DEVICE void store() {
      const int first_col = me.number * kHalf;
      if constexpr (Results::kWhole) {
        OutHalf& half = smem.rows.out[me.number];
        store_fragment<Element>(half, me.warp_row, 0, me.lane, out);
        ptx::fence_proxy_async();  // the copy engine reads the tile next, or writes it
        Meetings::wait(me.number);
        if (me.leader) {
          store_boxes(p.out_map, heads.box(p.attention, sequence, q_first), half, first_col, kDimV);
          ptx::tma_store_commit();
          ptx::tma_store_wait_read();
        }
      } else {
        this->store_part(first_col);
        Meetings::wait(me.number);  // no warp reads Q any more
      }
      if (me.leader) smem.rows_ring.release(me.rows_at);
    }
  };

  CF_DEVICE static void run(const FwdParams& p) {
    SmemPlan& smem = *reinterpret_cast<SmemPlan*>(ptx::dynamic_smem());
    if (ptx::thread_index() == 0) {
      smem.rows_ring.init(kConsumers);
      // Warps of the one whose scores they make, which may read K again alone.
      smem.k_ring.init(kShared ? kConsumers : 4);
      smem.v_ring.init(kConsumers);
      smem.works.ring.init(kConsumerThreads / 32);
      ptx::fence_mbarrier_init();
    }
    ptx::sync_threads();
    const int warpgroup = ptx::warpgroup_index();
    if (warpgroup == 0) {
      ptx::lower_registers<Config::kProducerRegisters>();
      if (ptx::warp_index() == 0 && ptx::elect()) Producer{p, smem}.run();
    } else {
      ptx::raise_registers<Config::kConsumerRegisters>();
      Consumer(p, smem, warpgroup - 1).run();
    }
  }
};

template <class Config>
CF_DEVICE void forward_sm90_wide(const FwdParams& params) {
  SmemSizeCheck<sizeof(typename ForwardSm90Wide<Config>::SmemPlan), Config::kSmemBytes>();
  ForwardSm90Wide<Config>::run(params);
}

}  // namespace cuflash
