// Bias: an additive tensor as the copy engine reads it, in shared memory a tile of it for every tile of keys.
//
// Its keys must be neighbours, and rows start at multiples of 16 bytes. Any other is a term of the score
// (attention/score.cuh), and NoBias stands here.
#pragma once

#include "attention/sequence.cuh"
#include "ptx/tma.cuh"
#include "tile/bias_block.cuh"
#include "tile/ring.cuh"
#include "tile/shared.cuh"

namespace cuflash {

struct NoBias {
  static constexpr bool kLoaded = false;

  template <int kTileQ, int kTileKv, int kStages>
  struct Buffers {
    using Cursor = RingCursor<kStages>;

    CF_DEVICE void init(int) {}
    template <class Sequence>
    CF_DEVICE void load(const TensorMap&, const Attention&, const Sequence&, int, int, int, const Cursor&) {}
    CF_DEVICE void add(Fragment<16, kTileKv>&, int, int, const Cursor&) {}
    CF_DEVICE void wait(const Cursor&) {}
    CF_DEVICE NoBiasBlock transposed(int, int, int, const Cursor&) { return {}; }
    CF_DEVICE void release(const Cursor&) {}
  };
};

// Adds the tile's rows from `row` on, or that row alone to all, to a warp's.
template <bool kOneRow, class Element, int kRows, int kCols>
CF_DEVICE void add_tile(Fragment<16, kCols>& s, SwizzledTile<Element, kRows, kCols>& tile, int row, int lane) {
#pragma unroll
  for (int n = 0; n < kCols / 8; n += 2) {
    const auto block = BiasBlock<Element>::template of<kOneRow>(tile, row, n * 8, lane);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& x = s.at(i / 2 % 2, n + i / 4, i % 2);
      x = block.plus(x, i / 2 % 2, i / 4, i % 2);
    }
  }
}

template <class Element, bool kOneRow>
struct LoadedBias {
  static constexpr bool kLoaded = true;

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

    // What the transposed logits of a warp get: queries from the tile's row `row` on and keys from its column `col` on.
    CF_DEVICE void wait(const Cursor& at) { ring.wait(at); }
    CF_DEVICE BiasBlock<Element> transposed(int row, int col, int lane, const Cursor& at) {
      return BiasBlock<Element>::template of_transposed<kOneRow>(tiles[at.stage], kOneRow ? 0 : row, col, lane);
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
