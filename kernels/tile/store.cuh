// Store: how rows of an output that a warpgroup has put into a tile of shared memory get to where they belong.
#pragma once

#include "tile/copy.cuh"
#include "tile/copy_tma.cuh"
#include "tile/rows.cuh"

namespace cuflash {

// By the copy engine, as a box: queries that are neighbours, of one head or of a group. One thread starts it and goes
// on.
struct BoxStore {
  static constexpr bool kByOneThread = true;

  // Row 0 of the tile is row number `first` of the heads' in the sequence. Called by the warpgroup's threads.
  template <class Config, class Tile, class Sequence, class Heads>
  CF_DEVICE static void store(const FwdParams& p, const Sequence& sequence, const Heads& heads, int first, Tile& tile,
                              int thread) {
    if (thread != 0) return;
    if (first < Heads::rows(p.attention, sequence.len_q)) {
      store_boxes(p.out_map, heads.box(p.attention, sequence, first), tile);
    }
    ptx::tma_store_commit();
  }

  // Until the tile may be written again; called by that thread.
  CF_DEVICE static void wait_read() { ptx::tma_store_wait_read(); }
};

// By all threads of the warpgroup, kBytes at a time, wherever rows are. They must meet before others write the tile.
template <int kBytes>
struct RowStore {
  static constexpr bool kByOneThread = false;

  template <class Config, class Tile, class Sequence, class Heads>
  CF_DEVICE static void store(const FwdParams& p, const Sequence& sequence, const Heads& heads, int first, Tile& tile,
                              int thread) {
    auto* out = first_query<typename Config::Element>(p.out, p.out_stride, sequence, heads.first);
    const auto rows = rows_of(heads, out, p.out_stride, first, Heads::rows(p.attention, sequence.len_q) - first);
    store_tile<Tile::kRows, Config::kDimV, kBytes, ptx::kWarpgroupThreads>(rows, Config::kDimV, tile, 0, thread);
  }

  CF_DEVICE static void wait_read() {}
};

}  // namespace cuflash
