// Who loads for the consumers of forward/sm90.cuh: the producer, and where tiles are listed a scheduler, which finds
// out ahead of it what there is to load. Kernel is what they are part of.
#pragma once

#include "attention/heads.cuh"
#include "attention/ranges.cuh"
#include "attention/schedule.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/copy_tma.cuh"
#include "tile/key_boxes.cuh"
#include "tile/ring.cuh"

namespace cuflash {

// One thread loads everything, in the order in which it is used; or a warp, where its lanes share out the boxes of
// keys, or find out together which are this block's.
template <class Config, class Heads, class Kernel>
struct ProducerSm90 {
  using Sequence = typename Config::Sequence;
  using Mask = typename Config::Mask;
  using Split = typename Config::Split;
  using Walk = typename Kernel::Walk;
  using WorkWalk = typename Kernel::WorkWalk;
  using WorkCursor = typename Kernel::WorkCursor;
  using Cursor = typename Kernel::Cursor;
  using RowsRing = typename Kernel::RowsRing;
  using SmemPlan = typename Kernel::SmemPlan;
  using Keys = typename Kernel::Keys;
  using QTile = typename Kernel::QTile;
  using KTile = typename Kernel::KTile;
  using VTile = typename Kernel::VTile;
  static constexpr int kTileQ = Config::kTileQ, kTileKv = Config::kTileKv;
  static constexpr int kRows = Kernel::kRows, kConsumers = Kernel::kConsumers;

  static constexpr bool kByWarp = Keys::kByWarp || Split::kRanges;

  const FwdParams& p;
  SmemPlan& smem;
  typename RowsRing::Cursor rows_at;
  Cursor at;  // K and V are used in step

  CF_DEVICE void run() {
    if constexpr (Split::kRanges) {
      run_ranges();
    } else {
      run_works();
    }
  }

  CF_DEVICE void run_works() {
    const int blocks = ptx::num_blocks();
    WorkCursor work_at;
    Works<Sequence, Heads> works;
    for (int number = ptx::block_index();; number = p.tickets ? blocks + draw() : number + blocks) {
      const Split split(p, number);
      Work work = works.find(p.attention, static_cast<int>(split.block), kTileQ, p.heads_per_section);
      work.split = split.index;
      if (leads()) smem.works.put(work_at, work);
      work_at = work_at.next();
      if (work.tile < 0) break;
      const Sequence sequence(p.attention, work.batch);
      if (work.tile * kTileQ < Heads::rows(p.attention, sequence.len_q)) load(work, sequence);
    }
    // The last of all blocks leaves the tickets as it found them.
    if (p.tickets && leads() && ptx::count_around(p.tickets + 1, blocks - 1) == blocks - 1) p.tickets[0] = 0;
  }

  CF_DEVICE void run_ranges() {
    WorkCursor work_at;
    RangeStretches<Config> stretches(p);
    for (Stretch stretch; stretches.next(p, stretch); work_at = work_at.next()) {
      Work work = stretch.work;
      work.split = stretches.slot_of(stretch);
      const Sequence sequence(p.attention, work.batch);
      const Heads heads(p.attention, work.head);
      const Walk tiles = stretches.part(tiles_of(work, sequence, heads));
      if (leads()) {
        smem.works.put(work_at, work, tiles);
        if (stretch.part == 0) {
          p.part_slots[2 * stretch.query_tile] = work.split;
          p.part_slots[2 * stretch.query_tile + 1] = stretch.parts;
        }
      }
      if (work.tile * kTileQ < Heads::rows(p.attention, sequence.len_q)) load(work, sequence, heads, tiles);
    }
    if (leads()) smem.works.put(work_at, kNoWork, WorkWalk());
  }

  CF_DEVICE static bool leads() {
    if constexpr (kByWarp) {
      return ptx::lane_index() == 0;
    } else {
      return true;
    }
  }
  CF_DEVICE int draw() const {
    if constexpr (kByWarp) {
      return ptx::shuffle(leads() ? ptx::count(p.tickets) : 0, 0);
    } else {
      return ptx::count(p.tickets);
    }
  }
  template <class AnyRing, class At>
  CF_DEVICE static uint32 acquire(AnyRing& ring, const At& at, int bytes) {
    if constexpr (kByWarp) {
      return ring.acquire_by_warp(at, bytes);
    } else {
      return ring.acquire(at, bytes);
    }
  }

  // Loads what works read that a scheduler finds.
  CF_DEVICE void run_scheduled() {
    WorkCursor work_at;
    for (;;) {
      smem.works.ring.wait(work_at);
      const Work work = smem.works.works[work_at.stage];
      const WorkWalk& tiles = smem.works.more[work_at.stage];  // read there, as registers are few
      if (work.tile < 0) break;
      const Sequence sequence(p.attention, work.batch);
      if (work.tile * kTileQ < Heads::rows(p.attention, sequence.len_q)) {
        load(work, sequence, Heads(p.attention, work.head), tiles);
      }
      smem.works.ring.release(work_at);
      work_at = work_at.next();
    }
  }

  CF_DEVICE Walk tiles_of(const Work& work, const Sequence& sequence, const Heads& heads) const {
    const Walk seen = heads.template bind<Mask>(p.attention, sequence).kv_tiles(work.tile * kTileQ, kTileQ, kTileKv);
    if constexpr (Split::kRanges) {
      return seen;
    } else {
      return Split::part(p, work.split, seen);
    }
  }
  CF_DEVICE void load(const Work& work, const Sequence& sequence) {
    const Heads heads(p.attention, work.head);
    load(work, sequence, heads, tiles_of(work, sequence, heads));
  }
  CF_DEVICE void load(const Work& work, const Sequence& sequence, const Heads& heads, const Walk& tiles) {
    const Attention& a = p.attention;
    const int q_first = work.tile * kTileQ;
    if (tiles.begin >= tiles.end) load_q(work, sequence, heads);
    Keys keys(p, sequence, heads.kv, first_visible(heads, sequence, q_first), tiles);
    int upcoming = 0;  // of a list: what is looked up while the tile before is loaded
    if constexpr (Walk::kListed) upcoming = tiles.begin < tiles.end ? tiles.number(tiles.end - 1) : 0;
#pragma unroll 1
    for (int place = tiles.end - 1; place >= tiles.begin; --place) {
      const int tile = Walk::kListed ? ptx::keep(upcoming) : place;
      if constexpr (Walk::kListed) upcoming = tiles.number(max_of(place - 1, tiles.begin));
      const auto boxes = keys.find(tile);
      load_keys(smem.k[at.stage], p.k_map, boxes, acquire(smem.k_ring, at, sizeof(KTile)));
      if (place == tiles.end - 1) load_q(work, sequence, heads);  // after K, which needs not wait for a work before
      if (leads()) smem.bias.load(p.bias_map, a, sequence, work.head, q_first, tile * kTileKv, at);
      load_keys(smem.v[at.stage], p.v_map, boxes, acquire(smem.v_ring, at, sizeof(VTile)));
      at = at.next();
    }
  }

  // The first key that a query of the tile sees.
  CF_DEVICE int first_visible(const Heads& heads, const Sequence& sequence, int q_first) const {
    if constexpr (Keys::kByWarp && !Mask::kFullFromStart) {
      return heads.template bind<Mask>(p.attention, sequence).kv_tiles(q_first, kTileQ, 1).begin;
    } else {
      return 0;
    }
  }

  template <class Tile, class Boxes>
  CF_DEVICE static void load_keys(Tile& tile, const TensorMap& map, const Boxes& boxes, uint32 barrier) {
    if (Keys::kByWarp || leads()) load_boxes<Kernel::kOnce>(tile, map, boxes, barrier);
  }

  CF_DEVICE void load_q(const Work& work, const Sequence& sequence, const Heads& heads) {
#pragma unroll 1
    for (int w = 0; w < kConsumers; ++w) {  // rows that no query has begin with the last query's: see load_boxes
      const int row = min_of(work.tile * kTileQ + w * kRows, Heads::rows(p.attention, sequence.len_q) - 1);
      const uint32 barrier = acquire(smem.rows_rings[w], rows_at, sizeof(QTile));
      if (leads()) load_boxes(smem.rows[w][rows_at.stage].q, p.q_map, heads.box(p.attention, sequence, row), barrier);
    }
    rows_at = rows_at.next();
  }
};

// Finds works and what they walk of a list, for a team, ahead of its producer, which would else wait for memory before
// every work.
template <class Config, class Heads, class Kernel>
struct SchedulerSm90 {
  using Sequence = typename Config::Sequence;
  using Mask = typename Config::Mask;
  using WorkWalk = typename Kernel::WorkWalk;
  using WorkCursor = typename Kernel::WorkCursor;
  using SmemPlan = typename Kernel::SmemPlan;
  static constexpr int kTileQ = Config::kTileQ, kTileKv = Config::kTileKv, kTeams = Kernel::kTeams;

  const FwdParams& p;
  SmemPlan& smem;
  const int team;

  CF_DEVICE void run() {
    const int blocks = ptx::num_blocks() * kTeams;
    WorkCursor work_at;
    Works<Sequence, Heads> works;
    for (int number = ptx::block_index() * kTeams + team;;
         number = p.tickets ? blocks + ptx::count(p.tickets) : number + blocks) {
      Work work = works.find(p.attention, number, kTileQ, p.heads_per_section);
      WorkWalk tiles;
      if (work.tile >= 0) tiles = walk_of(work);
      smem.works.put(work_at, work, tiles);
      work_at = work_at.next();
      if (work.tile < 0) break;
    }
    // The last of all teams leaves the tickets as it found them.
    if (p.tickets && ptx::count_around(p.tickets + 1, blocks - 1) == blocks - 1) p.tickets[0] = 0;
  }

  // What a work walks, whose tile becomes the one that is as long for its head as its number says: see ListedMask.
  CF_DEVICE WorkWalk walk_of(Work& work) const {
    const Sequence sequence(p.attention, work.batch);
    const auto mask = Heads(p.attention, work.head).template bind<Mask>(p.attention, sequence);
    if constexpr (IsSame<Sequence, DenseSequence>::value) {
      work.tile = mask.ranked_query(num_tiles(sequence.len_q, kTileQ) - 1 - work.tile, kTileQ);  // the longest first
    }
    return mask.kv_tiles(work.tile * kTileQ, kTileQ, kTileKv);
  }
};

}  // namespace cuflash
