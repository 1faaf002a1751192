// Backward attention on Hopper by lists of tiles (attention/lists.cuh), as in backward/sm90.cuh, but a block goes from one
// key tile to another: K and V of the next, what it walks and its first queries are under way while one ends. What is
// visible of a key tile may be too little to begin and end each in a block of its own.
//
//   producer, one thread   K and V of a work, a key tile, into one of two places, then Q and dO as there
//   consumers              walk a work; its place is given back when dk and dv have left it
#pragma once

#include "backward/sm90.cuh"

namespace cuflash {

template <class Config>
struct BackwardListedSm90 {
  using Base = BackwardSm90<Config>;
  using Block = typename Base::Block;
  using Element = typename Config::Element;
  using Sequence = typename Config::Sequence;
  using Walk = typename Block::Walk;
  using Sums = typename Block::Sums;
  using Cursor = typename Block::Cursor;
  using WorkCursor = RingCursor<2>;
  static_assert(Walk::kListed && IsSame<Sequence, DenseSequence>::value && !Config::kCopiedSums);
  static_assert(!Config::Reduction::kOrdered && !Config::BiasCopies::kLoaded);

  struct SmemPlan {
    typename Block::Inputs inputs;  // its keys are those of every other work
    typename Block::DsTile ds[2];
    typename Block::Keys second;
    Ring<2> ds_ring, k_ring, v_ring;  // a key tile's are given back when its gradients have left
    WorkRing<Walk> works;
    typename Base::Adder adders[Block::kConsumerThreads / 32];

    CF_DEVICE void init() {
      inputs.init();
      ds_ring.init(Block::kConsumers, Block::kConsumerThreads / 32 * kWarpArrivals);
      k_ring.init(Block::kConsumers);
      v_ring.init(Block::kConsumers);
      works.ring.init(Block::kConsumerThreads / 32);
    }
    CF_DEVICE typename Block::Keys& keys(const WorkCursor& at) { return at.stage == 0 ? inputs : second; }
  };
  using Consumer = typename Base::template Consumer<SmemPlan>;

  const BwdParams& p;
  SmemPlan& smem;

  // What a block walks: found one work ahead.
  struct Found {
    Work work;
    Walk tiles;
  };
  CF_DEVICE Found find(int number) const {
    Found found;
    found.work = Block::find(p, number);
    const Sequence sequence(p.attention, found.work.batch);
    found.tiles =
        typename Config::Mask(p.attention, sequence, found.work.head * (p.attention.heads_q / p.attention.heads_kv))
            .q_tiles(found.work.tile * Config::kTileKv, Config::kTileKv, Config::kTileQ);
    return found;
  }

  CF_DEVICE void produce() const {
    const Attention& a = p.attention;
    const int works = a.batch * a.heads_kv * num_tiles(a.len_kv, Config::kTileKv), blocks = ptx::num_blocks();
    Cursor at;
    WorkCursor work_at;
    int number = static_cast<int>(ptx::block_index());
    Found next;
    if (number < works) next = find(number);
#pragma unroll 1
    for (; number < works; number += blocks, work_at = work_at.next()) {
      const Found now = next;
      smem.works.put(work_at, now.work, now.tiles);
      if (number + blocks < works) next = find(number + blocks);
      const Block block(p, now.work, now.tiles);
      typename Block::Keys& keys = smem.keys(work_at);
      block.load_keys(keys.k, p.k_map,
                      smem.k_ring.acquire(work_at, Block::template key_bytes<typename Block::KTile>(Config::kDimQk)),
                      Config::kDimQk);
      block.load_keys(keys.v, p.v_map,
                      smem.v_ring.acquire(work_at, Block::template key_bytes<typename Block::VTile>(Config::kDimV)),
                      Config::kDimV);
      if (!block.empty()) block.produce_queries(smem.inputs, at, [] {});
    }
    smem.works.put(work_at, kNoWork, {});
  }

  CF_DEVICE void consume(int consumer) const {
    Cursor at;
    WorkCursor work_at;
#pragma unroll 1
    for (;; work_at = work_at.next()) {
      Walk tiles;
      const Work work = smem.works.take(work_at, tiles);
      if (work.tile < 0) return;
      const Block block(p, work, tiles);
      Consumer each(block, smem, smem.keys(work_at), consumer);
      const auto wait_keys = [&] {
        smem.k_ring.wait(work_at);
        smem.v_ring.wait(work_at);
      };
      typename Block::Visit now = block.first_visit(), before = now;
      if (block.empty()) {
        wait_keys();
      } else {
        each.walk(now, before, at, wait_keys, [&] {
          smem.inputs.q_ring.wait(at);
          return smem.inputs.rows[at.stage].far != 0;
        });
      }
      each.leave(before, at, [&] {
        if (each.leader) smem.ds_ring.release(at.before());
      });
      if (each.leader) {
        smem.k_ring.release(work_at);
        smem.v_ring.release(work_at);
      }
    }
  }

  CF_DEVICE static void run(const BwdParams& params) {
    SmemPlan& smem = *reinterpret_cast<SmemPlan*>(ptx::dynamic_smem());
    const BackwardListedSm90 kernel{params, smem};
    if (ptx::thread_index() == 0) {
      smem.init();
      ptx::fence_mbarrier_init();
    }
    ptx::sync_threads();
    const int warpgroup = ptx::warpgroup_index();
    if (warpgroup == 0) {
      ptx::lower_registers<Config::kProducerRegisters>();
      if (ptx::warp_index() == 0 && ptx::elect()) kernel.produce();
    } else {
      ptx::raise_registers<Config::kConsumerRegisters>();
      kernel.consume(warpgroup - 1);
    }
  }
};

template <class Config>
CF_DEVICE void backward_listed_sm90(const BwdParams& params) {
  SmemSizeCheck<sizeof(typename BackwardListedSm90<Config>::SmemPlan), Config::kSmemBytes>();
  BackwardListedSm90<Config>::run(params);
}

}  // namespace cuflash
