// Schedule: which tile a block of the linear grid works on.
#pragma once

#include "attention/sequence.cuh"

namespace cuflash {

struct Work {
  int tile;
  int head;
  int batch;
  int split = 0;
};

// Tiles of the longest sequence; never 0, so that outputs of empty sequences are still written.
CF_DEVICE int num_tiles(int longest, int tile) { return max_of(1, cdiv(longest, tile)); }

// Tiles of one head are neighbours, in rising order, so that the blocks in flight share its rows in L2.
CF_DEVICE Work key_work(int64 block, int tiles, int heads) {
  const int64 head_index = block / tiles;
  return Work{static_cast<int>(block % tiles), static_cast<int>(head_index % heads),
              static_cast<int>(head_index / heads)};
}

// The last query tile comes first: under a causal mask it is the longest, and short ones fill the end of the grid.
CF_DEVICE Work query_work(int64 block, int tiles, int heads) {
  Work work = key_work(block, tiles, heads);
  work.tile = tiles - 1 - work.tile;
  return work;
}

// Heads in sections whose keys stay in L2 together; inside a section the longest tiles of all its heads come first.
CF_DEVICE Work section_work(int index, int tiles, int heads, int num_heads, int heads_per_section) {
  const int section = index / (heads_per_section * tiles), first_head = section * heads_per_section;
  const int here = min_of(heads_per_section, num_heads - first_head), rest = index - first_head * tiles;
  const int head_index = first_head + rest % here;
  return Work{tiles - 1 - rest / here, head_index % heads, head_index / heads};
}

constexpr Work kNoWork{-1, 0, 0};

// The work with a number, which must not fall from call to call: packed sequences come one after the other, each with
// as many tiles as it is long.
template <class Sequence, class Heads>
struct Works {
  int batch = 0;
  int first = 0;  // number of this sequence's first work

  CF_DEVICE Work find(const Attention& a, int number, int tile, int heads_per_section) {
    for (; batch < a.batch; ++batch) {
      const int tiles = num_tiles(Heads::rows(a, Sequence(a, batch).len_q), tile), heads = Heads::count(a);
      const int here = tiles * heads;
      if (number - first < here) {
        Work work = section_work(number - first, tiles, heads, heads, heads_per_section);
        work.batch = batch;
        return work;
      }
      first += here;
    }
    return kNoWork;
  }
};

template <class Heads>
struct Works<DenseSequence, Heads> {
  CF_DEVICE Work find(const Attention& a, int number, int tile, int heads_per_section) {
    const int tiles = num_tiles(Heads::rows(a, a.len_q), tile), heads = Heads::count(a), all = heads * a.batch;
    return number < tiles * all ? section_work(number, tiles, heads, all, heads_per_section) : kNoWork;
  }
};

// Queries of a cache are dense, whatever its lengths are.
template <class Heads>
struct Works<CacheSequence, Heads> : Works<DenseSequence, Heads> {};
template <class Heads>
struct Works<PagedCacheSequence, Heads> : Works<DenseSequence, Heads> {};

}  // namespace cuflash
