// Query tile: what one block of a forward works on, a tile of rows of one head or group, and a split of its keys.
#pragma once

#include "attention/heads.cuh"
#include "attention/schedule.cuh"
#include "attention/split.cuh"

namespace cuflash {

template <class Config>
struct QueryTile {
  using Heads = typename Config::Heads;

  const typename Config::Split split;
  const Work work;
  const typename Config::Sequence sequence;
  const Heads heads;
  const int first;  // number of its first row among the rows of the sequence
  const int rows;   // how many there are from that one on, in this tile and those after it; 0 or less: none

  CF_DEVICE QueryTile(const FwdParams& p, int64 block)
      : split(p, block), work(query_work(split.block, tiles(p.attention), Heads::count(p.attention))),
        sequence(p.attention, work.batch), heads(p.attention, work.head), first(work.tile * Config::kTileQ),
        rows(Heads::rows(p.attention, sequence.len_q) - first) {}

  // Whether this block, of all that work on the sequence's heads, fills their tails.
  CF_DEVICE bool has_tail() const { return work.tile == 0 && split.index == 0; }

  // A mask, score or dropout of the tile's rows.
  template <class Policy>
  CF_DEVICE auto bind(const Attention& a) const {
    return heads.template bind<Policy>(a, sequence);
  }

 private:
  CF_DEVICE static int tiles(const Attention& a) { return num_tiles(Heads::rows(a, a.len_q), Config::kTileQ); }
};

}  // namespace cuflash
