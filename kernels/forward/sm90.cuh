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
// Whose rows a tile of queries holds is up to Heads, and how they leave it to Store. A lone consumer is for few queries
// over many keys, where memory decides.
//
// A block goes from one work, a tile of queries, to another; rings and phases run on, so that the next work's loads run
// under the end of this one. Works of equal length are dealt out in turn, others are drawn by tickets, the longest of
// some heads first. The producer tells the consumers which it is, or where tiles are listed a scheduler tells both.
#pragma once

#include "attention/heads.cuh"
#include "attention/ranges.cuh"
#include "attention/split.cuh"
#include "forward/producer_sm90.cuh"
#include "forward/visit_sm90.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/bias.cuh"
#include "tile/copy.cuh"
#include "tile/copy_tma.cuh"
#include "tile/dropout.cuh"
#include "tile/gemm_sm90.cuh"
#include "tile/half_rows.cuh"
#include "tile/key_boxes.cuh"
#include "tile/parts.cuh"
#include "tile/ring.cuh"
#include "tile/softmax_sm90.cuh"
#include "tile/store.cuh"
#include "tile/tail.cuh"

namespace cuflash {

template <class Config, class Heads = typename Config::Heads, class Store = BoxStore>
struct ForwardSm90 {
  using Element = typename Config::Element;
  using Sequence = typename Config::Sequence;
  using Mask = typename Config::Mask;
  using Score = typename Config::Score;
  using Dropout = typename Config::Dropout;
  using Bias = typename Config::BiasCopies;
  using Split = typename Config::Split;
  static constexpr int kTileQ = Config::kTileQ, kTileKv = Config::kTileKv, kStages = Config::kStages;
  static constexpr int kRows = 64, kConsumers = kTileQ / kRows;  // rows of a consumer warpgroup
  static constexpr int kConsumerThreads = kConsumers * ptx::kWarpgroupThreads;
  static constexpr int kDimQk = round_up(Config::kDimQk, 16), kDimV = round_up(Config::kDimV, 16);
  // A block may have several teams of consumers, with a thread of the producer each, that work like blocks of their own.
  static constexpr int kTeams = (Config::kThreads - ptx::kWarpgroupThreads) / kConsumerThreads;
  static_assert(Config::kThreads == ptx::kWarpgroupThreads + kTeams * kConsumerThreads);
  static_assert(kTeams <= (Mask::Walk::kListed ? 2 : 1), "a producing warpgroup has a warp or two for each");
  static_assert(!Mask::Walk::kListed || IsSame<typename Config::Split, NoSplit>::value, "lists are walked whole");
  static_assert(Config::kPingPong || IsSame<Bias, NoBias>::value, "consumers that skip tiles give no bias back");

  using QTile = SwizzledTile<Element, kRows, kDimQk>;
  using KTile = SwizzledTile<Element, kTileKv, kDimQk>;
  using VTile = SwizzledTile<Element, kTileKv, kDimV>;
  using OutTile = SwizzledTile<Element, kRows, kDimV>;
  using KvRing = Ring<kStages>;
  using Cursor = typename KvRing::Cursor;
  using RowsRing = Ring<Config::kRowBuffers>;
  using Keys = KeyBoxes<Sequence, kTileKv, Config::kBoxRows>;
  using Walk = typename Mask::Walk;
  // What the consumers are handed with a work: of a list, as they would else wait for memory to read it, and of a range.
  using WorkWalk = typename If<Walk::kListed || Split::kRanges, Walk, Nothing>::Type;

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
    WorkRing<WorkWalk> works;
    typename Bias::template Buffers<kTileQ, kTileKv, kStages> bias;
  };

  using WorkCursor = typename WorkRing<WorkWalk>::Cursor;

  // Named barriers, one of each kind a consumer: its turn, for which it waits and the one before it arrives, and
  // where its four warps meet, which all wait.
  using Turns = NamedBarriers<1, 2 * ptx::kWarpgroupThreads>;
  using Meetings = NamedBarriers<1 + kTeams * kConsumers, ptx::kWarpgroupThreads>;

  static constexpr bool kOnce = kConsumers == 1;  // whether nobody else reads the keys of a work

  // Whether no tile but the first that is visited can need a test.
  static constexpr bool kAllFull = Mask::kFullFromStart && Mask::kFullToEnd;

  using Scores = Fragment<16, kTileKv>;
  using Weights = Operand<16, kTileKv>;
  using Output = Fragment<16, kDimV>;

  using Producer = ProducerSm90<Config, Heads, ForwardSm90>;
  using Scheduler = SchedulerSm90<Config, Heads, ForwardSm90>;

  // A warpgroup, which has 64 rows of every q tile. What it keeps from work to work: who it is, and where rings are.
  struct Consumer {
    const FwdParams& p;
    SmemPlan& smem;
    const int number;        // among the team's consumers
    const int first;         // the number of the team's first consumer among the block's
    const int thread, lane;  // of the warpgroup, of the warp
    const bool leader;       // one thread of the warpgroup
    const int warp_row;      // the first of this warp's 16 rows among the warpgroup's 64
    typename RowsRing::Cursor rows_at;
    Cursor at;            // the tile of K and V at hand
    bool stored = false;  // whether there was a work before

    // Its number is kept in a uniform register, as descriptors of its rows follow from it in every round.
    CF_DEVICE Consumer(const FwdParams& params, SmemPlan& plan, int index, int team)
        : p(params), smem(plan), number(ptx::uniform(index)), first(team * kConsumers),
          thread(ptx::thread_index() % ptx::kWarpgroupThreads), lane(ptx::lane_index()), leader(thread == 0),
          warp_row(ptx::warp_index() % 4 * 16) {}

    CF_DEVICE void run() {
      WorkCursor work_at;
      if (number == kConsumers - 1) pass_turn();
      for (;;) {
        WorkWalk walk;
        const Work work = smem.works.take(work_at, walk);
        work_at = work_at.next();
        if (work.tile < 0) break;
        const Sequence sequence(p.attention, work.batch);
        if (work.tile == 0) {
          Heads(p.attention, work.head).for_each([&](int head) {
            store_tail<Config, kConsumerThreads>(p, sequence, head, number * ptx::kWarpgroupThreads + thread);
          });
        }
        if (work.tile * kTileQ < Heads::rows(p.attention, sequence.len_q)) Visit(*this, work, sequence).run(walk);
      }
      if (leader) Store::wait_read();
    }

    CF_DEVICE RowsRing& rows_ring() const { return smem.rows_rings[number]; }
    CF_DEVICE void meet() const { Meetings::wait(first + number); }

    // From its turn on until it passes it a consumer issues products, and no other does.
    CF_DEVICE void take_turn() const {
      if (Config::kPingPong) Turns::wait(first + number);
    }
    CF_DEVICE void pass_turn() const {
      if (Config::kPingPong) Turns::arrive(first + (number + 1) % kConsumers);
    }

    // The store of the work before has long read its rows when this is called.
    CF_DEVICE void release_rows_before() const {
      if (Config::kRowBuffers == 2 && leader && stored) {
        Store::wait_read();
        rows_ring().release(rows_at.next());
      }
    }

    // Gives back tiles that only other consumers need. Products keep a consumer's warps together; here they must meet,
    // or one would be left waiting for a phase that is over.
    CF_DEVICE void skip(int count) {
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
    }
  };

  // What a consumer does for one work: its scores, weights and output, in registers.
  struct Visit : VisitSm90<Config, Heads, kDimV> {
    using Base = VisitSm90<Config, Heads, kDimV>;
    using Results = typename Base::Results;
    using Base::dropout;
    using Base::heads;
    using Base::mask;
    using Base::out;
    using Base::p;
    using Base::q_first;
    using Base::q_warp;
    using Base::rows;
    using Base::s;
    using Base::sequence;
    using Base::softmax;
    using Base::weights;
    using Base::work;

    Consumer& me;
    SmemPlan& smem;
    Rows& mine;
    Cursor before;  // the tile that was visited before

    CF_DEVICE Visit(Consumer& consumer, const Work& its_work, const Sequence& its_sequence)
        : Base(consumer.p, its_work, its_sequence, its_work.tile * kTileQ + consumer.number * kRows, consumer.warp_row,
               consumer.lane),
          me(consumer), smem(me.smem), mine(smem.rows[me.number][me.rows_at.stage]) {
      out.clear();
    }

    CF_DEVICE void run(const Walk& listed) { run_over(listed); }
    CF_DEVICE void run(const Nothing&) {
      const Tiles seen = mask.kv_tiles(work.tile * kTileQ, kTileQ, kTileKv);
      run_over(Split::part(p, work.split, seen));
    }
    CF_DEVICE void run_over(const Walk& loaded) {
      const auto tiles = own_tiles(loaded);
      me.rows_ring().wait(me.rows_at);
      me.skip(loaded.end - tiles.end);
      if (tiles.begin < tiles.end) {
        walk(tiles);
      } else {
        me.meet();
        me.release_rows_before();
      }
      if constexpr (!Mask::kFullFromStart) me.skip(tiles.begin - loaded.begin);
      if constexpr (Split::kHalves) {
        finish_half();
        return;
      }
      this->finish(true);
      store();
      me.rows_at = me.rows_at.next();
      me.stored = true;
    }

    // All tiles that are loaded with turns, or where they are listed for all rows; without turns those that the consumer's
    // rows need, none for rows past the sequence.
    CF_DEVICE Walk own_tiles(const Walk& loaded) const {
      if constexpr (Config::kPingPong || Walk::kListed || kConsumers == 1) {
        return loaded;
      } else {
        const int none = loaded.begin;
        Tiles tiles = mask.kv_tiles(q_first, kRows, kTileKv);
        if constexpr (!Results::kWhole) {
          tiles.begin = max_of(tiles.begin, loaded.begin);
          tiles.end = min_of(tiles.end, loaded.end);
        }
        return q_first < rows && tiles.begin < tiles.end ? tiles : Tiles{none, none, none, none};
      }
    }

    // out += P V over all tiles, each tile's scores under way while the tile before is weighed.
    CF_DEVICE void walk(const Walk& tiles) {
      smem.k_ring.wait(me.at);
      start_scores(me.at);
      wait_for_scores<0>();
      me.release_rows_before();
      int place = tiles.end - 1;
      if constexpr (kAllFull) {  // without a choice between two softmaxes, a round is one block of instructions
        to_weights(place, true, true, true);
        while (--place >= tiles.begin) {
          start_both();
          to_weights(place, false, false, false);
        }
      } else {
        for (bool first = true;; first = false) {
          const bool full = Walk::kListed
                                ? tiles.is_full(place)
                                : place < tiles.full_end && (Mask::kFullFromStart || place >= tiles.full_begin);
          const bool look_first = Mask::kNoneFull || first || !full;
          to_weights(tiles.number(place), first, look_first, !Walk::kListed || !full);
          if (place-- == tiles.begin) break;
          start_both();
        }
      }
      start_output(me.at);
      finish_output(me.at, true);
      me.at = me.at.next();
    }

    // The next tile's scores under way, and this one's product behind them.
    CF_DEVICE void start_both() {
      before = me.at;
      me.at = me.at.next();
      smem.k_ring.wait(me.at);
      me.take_turn();
      start_scores(me.at);
      start_output(before);
      me.pass_turn();
      wait_for_scores<1>();
    }
    CF_DEVICE void start_scores(const Cursor& at) {
      ptx::wgmma_fence();
      issue_abt<Element>(s, mine.q, smem.k, at.stage);
      ptx::wgmma_commit();
    }
    CF_DEVICE void start_output(const Cursor& at) {
      smem.v_ring.wait(at);
      ptx::wgmma_fence();
      issue_ab<Element>(out, weights, smem.v, at.stage);
      ptx::wgmma_commit();
    }
    template <int kPending>
    CF_DEVICE void wait_for_scores() {
      ptx::wgmma_wait<kPending>();
      ptx::wgmma_hold(s.x[0]);
    }
    CF_DEVICE void finish_output(const Cursor& at, bool some) {
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(out.x[0]);
      if (me.leader && some) smem.v_ring.release(at);
    }

    // A tile's products, which have come in, to P, while the product of the tile before is added to the output.
    CF_DEVICE void to_weights(int tile, bool first, bool look_first, bool some_hidden) {
      if (Config::kPingPong) finish_output(before, !first);  // the softmax runs under the products of others
      const bool grew = this->weigh(tile, look_first, !Walk::kListed || some_hidden, mine.q, smem.k[me.at.stage],
                                    smem.bias, me.number * kRows + me.warp_row, me.at);
      if (me.lane == 0) {  // no lane still reads: all have voted on what they read
        smem.k_ring.release(me.at);
        smem.bias.release(me.at);
      }
      drop(dropout, s, q_warp, tile * kTileKv);
      if (!Config::kPingPong) finish_output(before, !first);
      pack_operand<Element>(weights, s);
      if (grew && !first) this->rescale_output(softmax.rescale);
    }

    // The same of half of the keys. A block has one work then.
    CF_DEVICE void finish_half() {
      using Found = HalfRows<Config, kRows, kDimV>;
      static_assert(kConsumers == 1 && sizeof(Found) <= kStages * (sizeof(KTile) + sizeof(VTile)));
      me.meet();  // no warp reads keys and values any more
      Found& found = reinterpret_cast<Found&>(smem.k);
      const int num_rows = min_of(rows - q_first, kRows);
      float factor[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const RowState<float> state = softmax.whole(r);
        factor[r] = state.inverse_sum();
        found.leave(me.warp_row, me.lane, r, state);
      }
      this->rescale_output(factor);
      found.leave(me.warp_row, 0, me.lane, out, num_rows);
      ptx::sync_cluster();
      found.merge(p, sequence, heads, this->score, work.split, q_first, num_rows, me.thread, ptx::kWarpgroupThreads);
      ptx::sync_cluster();  // nobody reads this block's shared memory any more
    }

    CF_DEVICE void store() {
      if constexpr (Results::kWhole) {
        store_fragment<Element>(mine.out, me.warp_row, 0, me.lane, out);
        ptx::fence_proxy_async();  // the copy engine reads the tile next, or writes it
        me.meet();
        Store::template store<Config>(p, sequence, heads, q_first, mine.out, me.thread);
        if (!Store::kByOneThread) me.meet();
      } else {
        this->store_part(0);
        me.meet();  // no warp reads Q any more
      }
      if (Config::kRowBuffers == 1 && me.leader) {
        Store::wait_read();
        me.rows_ring().release(me.rows_at);
      }
    }
  };

  CF_DEVICE static void init(SmemPlan& smem) {
    constexpr int kWarps = kConsumerThreads / 32;
    for (RowsRing& ring : smem.rows_rings) ring.init(1);  // its consumer
    smem.k_ring.init(kWarps);                             // which may read scores' K again alone
    smem.v_ring.init(kConsumers);
    smem.bias.init(kWarps);
    smem.works.ring.init(kWarps + Walk::kListed);
  }

  // The first warpgroup: where tiles are listed, a warp for each team's producer and one for its scheduler.
  CF_DEVICE static void produce(const FwdParams& p, SmemPlan* plans) {
    if constexpr (Walk::kListed) {
      static_assert(!Producer::kByWarp);
      const int warp = ptx::warp_index(), team = warp / 2;
      if (team < kTeams && ptx::elect()) {
        if (warp % 2 == 0) {
          Producer{p, plans[team]}.run_scheduled();
        } else {
          Scheduler{p, plans[team], team}.run();
        }
      }
    } else {
      if (ptx::warp_index() == 0 && (Producer::kByWarp || ptx::elect())) Producer{p, *plans}.run();
    }
  }

  CF_DEVICE static void run(const FwdParams& p) {
    SmemPlan* const plans = reinterpret_cast<SmemPlan*>(ptx::dynamic_smem());  // of each team
    if (ptx::thread_index() == 0) {
#pragma unroll
      for (int team = 0; team < kTeams; ++team) init(plans[team]);
      ptx::fence_mbarrier_init();
    }
    ptx::sync_threads();
    const int warpgroup = ptx::warpgroup_index();
    if (warpgroup == 0) {
      if constexpr (kConsumers > 1) ptx::lower_registers<Config::kProducerRegisters>();
      produce(p, plans);
    } else {
      if constexpr (kConsumers > 1) ptx::raise_registers<Config::kConsumerRegisters>();
      const int index = warpgroup - 1, team = kTeams == 1 ? 0 : index / kConsumers;
      Consumer(p, plans[team], index - team * kConsumers, team).run();
    }
  }
};

template <class Config>
CF_DEVICE void forward_sm90(const FwdParams& params) {
  using Kernel = ForwardSm90<Config>;
  SmemSizeCheck<Kernel::kTeams * sizeof(typename Kernel::SmemPlan), Config::kSmemBytes>();
  ForwardSm90<Config>::run(params);
}

}  // namespace cuflash
