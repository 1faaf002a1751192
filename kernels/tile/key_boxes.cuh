// Boxes of keys and values: which ones make up a tile, and who starts their copies.
//
//   rows that are neighbours     one box for every chunk of columns, by one thread
//   keys in pages                the same for every part of the tile, kRows keys that lie in one page; lanes of a warp
//                                each look up the page of a part, a tile ahead, and start its copies
#pragma once

#include "ptx/sync.cuh"
#include "tile/copy_tma.cuh"
#include "tile/rows.cuh"

namespace cuflash {

// kRows are those of a box.
template <class Sequence, int kTileKv, int kRows>
struct KeyBoxes {
  static_assert(kRows == kTileKv);
  static constexpr bool kByWarp = false;

  const Attention& a;
  const Sequence& sequence;
  const int head;

  // Tiles will be asked for from the last of some down; no query sees a key before number `first_visible`.
  template <class Walk>
  CF_DEVICE KeyBoxes(const FwdParams& p, const Sequence& its_sequence, int its_head, int /*first_visible*/, const Walk&)
      : a(p.attention), sequence(its_sequence), head(its_head) {}

  CF_DEVICE auto find(int tile) { return sequence.kv_box(a, tile * kTileKv, head); }
};

// What one lane of a warp copies of a tile: one part of kRows rows, some of its chunks.
template <int kParts, int kRows>
struct LaneBoxes {
  CacheBoxOrigin origin;

  CF_DEVICE static int part() { return ptx::lane_index() % kParts; }
};

template <bool kOnce, class Tile, int kParts, int kRows>
CF_DEVICE void load_boxes(Tile& tile, const TensorMap& map, const LaneBoxes<kParts, kRows>& boxes, uint32 barrier) {
#pragma unroll
  for (int first = 0; first < Tile::kChunks; first += 32 / kParts) {
    const int chunk = first + ptx::lane_index() / kParts;
    if (chunk >= Tile::kChunks) break;
    load_box<kOnce>(tile.base() + chunk * Tile::kChunkBytes + boxes.part() * (kRows * Tile::kRowBytes), map,
                    chunk * Tile::kChunkCols, boxes.origin, barrier);
  }
}

// A part that nobody sees is a copy of the nearest that somebody does: its page may be nobody's, and a box that lies
// wholly outside must not be copied.
template <int kTileKv, int kRows>
struct PageBoxes {
  static_assert(kTileKv % kRows == 0 && kRows % 8 == 0 && kTileKv / kRows <= 32);
  static constexpr bool kByWarp = true;
  using Boxes = LaneBoxes<kTileKv / kRows, kRows>;

  const Pages& pages;
  const int* const table;
  const int head, length;
  const int first, last;  // keys that the parts at either end of those that are seen begin with
  int key;                // that the lane's part of the next tile begins with
  PagedKey place;

  template <class Sequence>
  CF_DEVICE PageBoxes(const FwdParams& p, const Sequence& sequence, int its_head, int first_visible, const Tiles& tiles)
      : pages(p.pages), table(p.pages.table + sequence.batch * p.pages.table_batch), head(its_head),
        length(sequence.len_kv), first(first_visible / kRows * kRows), last((length - 1) / kRows * kRows) {
    if (tiles.begin < tiles.end) look_up(tiles.end - 1);
  }

  CF_DEVICE Boxes find(int tile) {
    const int used = min_of(pages.size, length - key + place.row);
    const Boxes boxes{CacheBoxOrigin::of(pages.size, place.row, used, head, place.page)};
    look_up(tile - 1);
    return boxes;
  }

 private:
  CF_DEVICE void look_up(int tile) {
    key = clamp_to(tile * kTileKv + Boxes::part() * kRows, first, last);
    place = cuflash::look_up(pages, table, key);
  }
};

template <int kTileKv, int kRows>
struct KeyBoxes<CacheSequence, kTileKv, kRows> {
  static_assert(kRows == kTileKv);
  static constexpr bool kByWarp = false;

  const Attention& a;
  const CacheSequence& sequence;
  const int head;

  template <class Walk>
  CF_DEVICE KeyBoxes(const FwdParams& p, const CacheSequence& its_sequence, int its_head, int, const Walk&)
      : a(p.attention), sequence(its_sequence), head(its_head) {}

  CF_DEVICE auto find(int tile) { return sequence.cache_box(a, tile * kTileKv, head); }
};

template <int kTileKv, int kRows>
struct KeyBoxes<PagedSequence, kTileKv, kRows> : PageBoxes<kTileKv, kRows> {
  using PageBoxes<kTileKv, kRows>::PageBoxes;
};
template <int kTileKv, int kRows>
struct KeyBoxes<PagedCacheSequence, kTileKv, kRows> : PageBoxes<kTileKv, kRows> {  // without left padding
  using PageBoxes<kTileKv, kRows>::PageBoxes;
};

}  // namespace cuflash
