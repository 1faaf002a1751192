// Stretch: what a block walks at a time, key tiles of one query tile: all that it sees, or a part of them.
//
//   OneStretch   a block has one query tile, whole or a part of as many as there are splits (NoSplit, KeySplits).
//
//   KeyRanges    the key tiles of all query tiles in a row, dealt out in equal ranges to teams of blocks:
//
//                  query tiles   |0 0 0 0 0|1 1|2 2 2 2 2 2 2 2|3|4 4 4 4 4|
//                  teams         |a a a a a a a|b b b b b b b|c c c c c c c|      b has parts of 2 alone, c of 2, 3, 4
//
//                Lengths are read where they lie, on the device: one launch serves sequences of any length, and no
//                block has more to do than another. A team has a block for each of some heads, whose keys are
//                neighbours in memory and are read at the same time.
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
  int64 other_slots;  // where part n goes, less n times slot_step
  int slot_step;

  CF_DEVICE int64 slot(int number) const { return number == 0 ? first_slot : other_slots + int64(number) * slot_step; }
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
               first,
               1};
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
  const int team;      // blocks of one, and the heads that they have
  const int sections;  // of so many heads
  const int tiles;     // query tiles of the longest sequence
  const int range;     // number of this block's, and of its head in a section
  const int member;
  int per_period;       // key tiles of a period
  int ranges;           // that are not empty
  int least, longer;    // key tiles of a range, and how many ranges have one more, the first
  int at = 0, end = 0;  // number of the key tile that is next, and after this block's last
  int begin;            // number of the first key tile of the first section's query tile at hand
  int place;            // number of that query tile among all, heads left aside
  int count;            // key tiles of each of its sections
  int skip, take;       // of the key tiles of the stretch at hand: how many come before it, how many are its

  CF_DEVICE explicit RangeStretches(const FwdParams& p)
      : a(p.attention), team(p.heads_in_step), sections(Heads::count(a) / team),
        tiles(num_tiles(Heads::rows(a, a.len_q), Config::kTileQ)), range(static_cast<int>(ptx::block_index()) / team),
        member(static_cast<int>(ptx::block_index()) - range * team) {
    const int sequences = Period<Sequence>::sequences(a), places = sequences * tiles;
    const int mine = count_of(0, places);
    int all = mine;
#pragma unroll 1
    for (int first = 32; first < places; first += 32) all += count_of(first, places);
    per_period = sum_over_lanes(all) * sections;
    const int total = per_period * (a.batch / sequences);
    ranges = min_of(ptx::num_blocks() / team, total);
    if (range >= ranges) return;
    least = total / ranges;
    longer = total - least * ranges;
    at = first_of(range);
    end = first_of(range + 1);
    find(places, mine);
  }

  CF_DEVICE bool next(const FwdParams&, Stretch& stretch) {
    if (at >= end) return false;
    while (at >= begin + sections * count) {
      begin += sections * count;
      count = key_tiles(++place);
    }
    const int section = (at - begin) / count, first = begin + section * count, first_range = range_of(first);
    skip = at - first;
    take = min_of(end, first + count) - at;
    at += take;
    const int batch = place / tiles, head = section * team + member;
    stretch.work = {place - batch * tiles, head, batch};
    stretch.query_tile = static_cast<int64>(place) * (sections * team) + head;
    stretch.part = range - first_range;
    stretch.parts = range_of(first + count - 1) - first_range + 1;
    // A block has at most one part that is a query tile's first, its last, and one that is not, its first.
    stretch.other_slots = first_range * team + member;
    stretch.first_slot = ptx::num_blocks() + stretch.other_slots;
    stretch.slot_step = team;
    return true;
  }

  CF_DEVICE Tiles part(Tiles tiles) const {
    tiles.begin += skip;
    tiles.end = min_of(tiles.end, tiles.begin + take);
    return tiles;
  }

  // Of this block's part, where all parts of a stretch have neighbouring slots, a team apart.
  CF_DEVICE int slot_of(const Stretch& stretch) const { return static_cast<int>(stretch.query_tile) + range * team; }

 private:
  CF_DEVICE int first_of(int number) const { return least * number + min_of(number, longer); }
  // The range that has a key tile.
  CF_DEVICE int range_of(int number) const {
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
      const int all = ptx::shuffle(up_to, 31) * sections;
      if (at >= begin + all) {
        begin += all;
        continue;
      }
      const int lane = sum_over_lanes(begin + up_to * sections <= at);
      count = ptx::shuffle(mine, lane);
      begin += (ptx::shuffle(up_to, lane) - count) * sections;
      place = period * places + first + lane;
      return;
    }
  }

  CF_DEVICE static int sum_over_lanes(int x) {
    for (int distance = 16; distance > 0; distance /= 2) x += ptx::shuffle_xor(x, distance);
    return x;
  }
};

// Where parts of rows go in a kernel whose query tiles have all rows of a group: [slots, rows] of dim_v numbers and a
// RowState. Along the key tiles of all query tiles in a row, a stretch ends where a query tile does, or a team's range:
// its slot is the number of the query tile, and a team's blocks for every range before. `part_slots` has the first of a
// query tile, and how many there are.
template <class Config>
struct RangeRows {
  static constexpr bool kWhole = false;
  using Real = Accumulator<typename Config::Element>;
  using Sequence = typename Config::Sequence;

  CF_DEVICE static int rows(const FwdParams& p) { return HeadGroup::rows(p.attention, p.attention.len_q); }
  CF_DEVICE static int64 number(const FwdParams& p, const Sequence&, int /*head*/, int slot) {
    return static_cast<int64>(slot) * rows(p);
  }
  CF_DEVICE static Real* out(const FwdParams& p, const Sequence& sequence, int head, int slot) {
    return static_cast<Real*>(p.partial_out) + number(p, sequence, head, slot) * Config::kDimV;
  }
  CF_DEVICE static void close(const FwdParams& p, int64 number, const RowState<Real>& row, Real /*unit*/) {
    static_cast<RowState<Real>*>(p.partial_state)[number] = row;
  }
  CF_DEVICE static Strides out_stride(const FwdParams& p) {
    return {0, static_cast<int64>(HeadGroup::rows(p.attention, 1)) * Config::kDimV, Config::kDimV};
  }
  CF_DEVICE static Strides lse_stride(const FwdParams& p) { return {0, HeadGroup::rows(p.attention, 1), 1}; }
  CF_DEVICE static int64 first(const FwdParams& p, const Sequence& sequence, int head, int row) {
    const int group = HeadGroup::rows(p.attention, 1);
    return number(p, sequence, head, part_slots(p, sequence, head)[0]) + row * group + head % group;
  }
  CF_DEVICE static int64 step(const FwdParams& p, const Sequence&, int /*head*/) {
    return static_cast<int64>(rows(p)) * p.heads_in_step;
  }
  CF_DEVICE static int count(const FwdParams& p, const Sequence& sequence, int head) {
    return part_slots(p, sequence, head)[1];
  }

 private:
  CF_DEVICE static const int* part_slots(const FwdParams& p, const Sequence& sequence, int head) {
    return p.part_slots + 2 * (sequence.batch * p.attention.heads_kv + head / HeadGroup::rows(p.attention, 1));
  }
};

struct KeyRanges {
  template <class Config>
  using Stretches = RangeStretches<Config>;
  template <class Config>
  using Rows = RangeRows<Config>;
  static constexpr bool kRanges = true, kHalves = false;
};

}  // namespace cuflash
