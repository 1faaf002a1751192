// Stretch: what a block walks at a time, key tiles of one query tile: all that it sees, or a part of them.
//
//   OneStretch   a block has one query tile, whole or a part of as many as there are splits (NoSplit, KeySplits).
//
//   KeyRanges    the key tiles of all query tiles in a row, dealt out to the blocks in equal ranges:
//
//                  query tiles   |0 0 0 0 0|1 1|2 2 2 2 2 2 2 2|3|4 4 4 4 4|
//                  blocks        |a a a a a a a|b b b b b b b|c c c c c c c|      b has parts of 2 alone, c of 2, 3, 4
//
//                Lengths are read where they lie, on the device: one launch serves sequences of any length, and no
//                block has more to do than another.
//
// Parts of a row are left in slots of scratch memory: its out divided by its own sum, and its RowState to merge by.
// Whoever leaves the last part of a query tile merges all of them, in the order of keys.
#pragma once

#include "attention/heads.cuh"
#include "attention/schedule.cuh"
#include "attention/split.cuh"
#include "ptx/sync.cuh"

namespace cuflash {

struct Stretch {
  Work work;
  int64 query_tile;  // its number among all
  int part;          // of the query tile's keys, and in how many they are found
  int parts;
  int64 first_slot;   // where part 0 goes
  int64 other_slots;  // where the part after part n - 1 goes, less n

  CF_DEVICE int64 slot(int number) const { return number == 0 ? first_slot : other_slots + number; }
};

template <class Config>
struct OneStretch {
  using Heads = typename Config::Heads;

  const typename Config::Split split;
  const int tiles;
  bool done = false;

  CF_DEVICE explicit OneStretch(const FwdParams& p)
      : split(p, ptx::block_index()), tiles(num_tiles(Heads::rows(p.attention, p.attention.len_q), Config::kTileQ)) {}

  CF_DEVICE bool next(const FwdParams& p, Stretch& stretch) {
    if (done) return false;
    done = true;
    const int64 first = split.block * split.parts();
    stretch = {query_work(split.block, tiles, Heads::count(p.attention)),
               split.block,
               split.index,
               split.parts(),
               first,
               first};
    return true;
  }

  CF_DEVICE Tiles part(const Tiles& tiles) const { return split.part(tiles); }
};

// Numbers of query tiles that have a key tile to walk: those of one sequence, where all are alike, or of all.
template <class Sequence>
struct Period {
  CF_DEVICE static int sequences(const Attention& a) { return a.batch; }
};
template <>
struct Period<DenseSequence> {
  CF_DEVICE static int sequences(const Attention&) { return 1; }
};

// All lanes of a warp make one and call it together; all warps come to the same. There are fewer than 2^31 key tiles.
template <class Config>
struct RangeStretches {
  using Sequence = typename Config::Sequence;
  using Heads = typename Config::Heads;

  const Attention& a;
  const int heads;      // blocks of rows along the heads
  const int tiles;      // query tiles of the longest sequence
  int per_period;       // key tiles of a period
  int blocks;           // that have a range
  int least, longer;    // key tiles of a range, and how many ranges have one more, the first
  int at = 0, end = 0;  // number of the key tile that is next, and after this block's last
  int begin;            // number of the first key tile of the first head's query tile at hand
  int place;            // number of that query tile among all, heads left aside
  int count;            // key tiles of each of its heads
  int skip, take;       // of the key tiles of the stretch at hand: how many come before it, how many are its

  CF_DEVICE explicit RangeStretches(const FwdParams& p)
      : a(p.attention), heads(Heads::count(a)), tiles(num_tiles(Heads::rows(a, a.len_q), Config::kTileQ)) {
    const int sequences = Period<Sequence>::sequences(a), places = sequences * tiles;
    const int mine = count_of(0, places);
    int all = mine;
#pragma unroll 1
    for (int first = 32; first < places; first += 32) all += count_of(first, places);
    per_period = sum_over_lanes(all) * heads;
    const int total = per_period * (a.batch / sequences), block = static_cast<int>(ptx::block_index());
    blocks = min_of(ptx::num_blocks(), total);
    if (block >= blocks) return;
    least = total / blocks;
    longer = total - least * blocks;
    at = first_of(block);
    end = first_of(block + 1);
    find(places, mine);
  }

  CF_DEVICE bool next(const FwdParams&, Stretch& stretch) {
    if (at >= end) return false;
    while (at >= begin + heads * count) {
      begin += heads * count;
      count = key_tiles(++place);
    }
    const int head = (at - begin) / count, first = begin + head * count, first_block = block_of(first);
    skip = at - first;
    take = min_of(end, first + count) - at;
    at += take;
    const int batch = place / tiles;
    stretch.work = {place - batch * tiles, head, batch};
    stretch.query_tile = static_cast<int64>(place) * heads + head;
    stretch.part = static_cast<int>(ptx::block_index()) - first_block;
    stretch.parts = block_of(first + count - 1) - first_block + 1;
    // A block has at most one part that is a query tile's first, its last, and one that is not, its first.
    stretch.first_slot = ptx::num_blocks() + first_block;
    stretch.other_slots = first_block;
    return true;
  }

  CF_DEVICE Tiles part(Tiles tiles) const {
    tiles.begin += skip;
    tiles.end = min_of(tiles.end, tiles.begin + take);
    return tiles;
  }

 private:
  CF_DEVICE int first_of(int block) const { return least * block + min_of(block, longer); }
  // The block whose range has a key tile.
  CF_DEVICE int block_of(int number) const {
    const int of_longer = longer * (least + 1);
    return number < of_longer ? number / (least + 1) : longer + (number - of_longer) / least;
  }

  // Key tiles that a query tile counts for: one if it sees none, as somebody must write its rows, or what is behind
  // those of a sequence.
  CF_DEVICE int key_tiles(int number) const {
    const int batch = number / tiles, tile = number - batch * tiles, first = tile * Config::kTileQ;
    const Sequence sequence(a, batch);
    if (first >= Heads::rows(a, sequence.len_q)) return tile == 0;
    const auto mask = Heads(a, 0).template bind<typename Config::Mask>(a, sequence);
    const Tiles seen = mask.kv_tiles(first, Config::kTileQ, Config::kTileKv);
    return max_of(1, seen.end - seen.begin);
  }
  // Those of this lane's of 32 neighbours.
  CF_DEVICE int count_of(int first, int places) const {
    const int mine = first + ptx::lane_index();
    return mine < places ? key_tiles(mine) : 0;
  }

  // Where the key tile number `at` is; `mine` are those of this lane's of the first 32 query tiles.
  CF_DEVICE void find(int places, int mine) {
    const int period = at / per_period;
    begin = period * per_period;
#pragma unroll 1
    for (int first = 0; first < places; first += 32, mine = count_of(first, places)) {
      int up_to = mine;  // those of this lane's query tile and the ones before
      for (int distance = 1; distance < 32; distance *= 2) {
        const int before = ptx::shuffle(up_to, max_of(0, ptx::lane_index() - distance));
        if (ptx::lane_index() >= distance) up_to += before;
      }
      const int all = ptx::shuffle(up_to, 31) * heads;
      if (at >= begin + all) {
        begin += all;
        continue;
      }
      const int lane = sum_over_lanes(begin + up_to * heads <= at);
      count = ptx::shuffle(mine, lane);
      begin += (ptx::shuffle(up_to, lane) - count) * heads;
      place = period * places + first + lane;
      return;
    }
  }

  CF_DEVICE static int sum_over_lanes(int x) {
    for (int distance = 16; distance > 0; distance /= 2) x += ptx::shuffle_xor(x, distance);
    return x;
  }
};

struct KeyRanges {
  template <class Config>
  using Stretches = RangeStretches<Config>;
};

}  // namespace cuflash
