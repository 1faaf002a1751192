// Bias: an additive tensor as the copy engine reads it, in shared memory a tile of it for every tile of keys.
//
// Its keys must be neighbours, and rows start at multiples of 16 bytes. Any other is a term of the score
// (attention/score.cuh), and NoBias stands here.
#pragma once

#include "attention/sequence.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/tma.cuh"
#include "tile/fragment.cuh"
#include "tile/ring.cuh"
#include "tile/shared.cuh"

namespace cuflash {

struct NoBias {
  template <int kTileQ, int kTileKv, int kStages>
  struct Buffers {
    using Cursor = RingCursor<kStages>;

    CF_DEVICE void init(int) {}
    template <class Sequence>
    CF_DEVICE void load(const TensorMap&, const Attention&, const Sequence&, int, int, int, const Cursor&) {}
    CF_DEVICE void add(Fragment<16, kTileKv>&, int, int, const Cursor&) {}
    CF_DEVICE void release(const Cursor&) {}
  };
};

// Adds the tile's rows from `row` on, or that row alone to all, to a warp's; ldmatrix deals them out as registers lie.
template <bool kOneRow, class Element, int kRows, int kCols>
CF_DEVICE void add_tile(Fragment<16, kCols>& s, SwizzledTile<Element, kRows, kCols>& tile, int row, int lane) {
#pragma unroll
  for (int n = 0; n < kCols / 8; n += 2) {
    uint32 pairs[4];
    ptx::ldmatrix_x4(pairs, tile.address(row + (kOneRow ? 0 : lane % 16), n * 8 + lane / 16 * 8));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const Element* pair = reinterpret_cast<const Element*>(&pairs[i / 2]);
      s.at(i / 2 % 2, n + i / 4, i % 2) += to_accumulator(pair[i % 2]);
    }
  }
}

template <bool kOneRow, int kRows, int kCols>
CF_DEVICE void add_tile(Fragment<16, kCols>& s, SwizzledTile<float, kRows, kCols>& tile, int row, int lane) {
  struct alignas(8) Pair {
    float x[2];
  };
#pragma unroll
  for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int my_row = row + (kOneRow ? 0 : row_of(lane, r));
      const Pair pair = *reinterpret_cast<const Pair*>(tile.at(my_row, col_of(lane, n, 0)));
      s.at(r, n, 0) += pair.x[0];
      s.at(r, n, 1) += pair.x[1];
    }
  }
}

template <class Element, bool kOneRow>
struct LoadedBias {
  template <int kTileQ, int kTileKv, int kStages>
  struct Buffers {
    using Tile = SwizzledTile<Element, kOneRow ? 8 : kTileQ, kTileKv>;
    using Cursor = RingCursor<kStages>;
    static constexpr int kBytes = Tile::kChunks * (kOneRow ? 1 : kTileQ) * Tile::kRowBytes;

    Tile tiles[kStages];
    Ring<kStages> ring;  // the writer is one thread, the readers are warps

    CF_DEVICE void init(int warps) { ring.init(warps); }

    // Queries from q on and keys from kv on, which must be some of the sequence's. A chunk that holds none of them is a
    // copy of the first, as a box must not lie wholly outside: see load_boxes.
    template <class Sequence>
    CF_DEVICE void load(const TensorMap& map, const Attention& a, const Sequence& sequence, int head, int q, int kv,
                        const Cursor& at) {
      const uint32 barrier = ring.acquire(at, kBytes), tile = tiles[at.stage].base();
      const int row = kOneRow ? 0 : q, batch = a.bias_batch ? static_cast<int>(sequence.batch) : 0;
      if (!a.bias_head) head = 0;
#pragma unroll
      for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
        const int column = kv + chunk * Tile::kChunkCols;
        ptx::tma_load(tile + chunk * Tile::kChunkBytes, map, column < sequence.len_kv ? column : kv, row, head, batch,
                      barrier);
      }
    }

    // Adds to the natural logits of a warp, whose rows begin with the tile's row `row`.
    CF_DEVICE void add(Fragment<16, kTileKv>& s, int row, int lane, const Cursor& at) {
      ring.wait(at);
      add_tile<kOneRow>(s, tiles[at.stage], kOneRow ? 0 : row, lane);
    }

    // Gives the tile back, one lane of each warp.
    CF_DEVICE void release(const Cursor& at) { ring.release(at); }
  };
};

template <class Element>
using BiasTiles = LoadedBias<Element, false>;
template <class Element>
using BiasRow = LoadedBias<Element, true>;  // broadcast over queries

}  // namespace cuflash
