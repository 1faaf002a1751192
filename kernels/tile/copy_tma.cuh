// Copies of whole tiles by TMA, one box for every chunk of columns. Called by one thread.
//
// Part of a box may lie outside its tensor, but not all of it: for such a box an H200 touches the first element of the map,
// which for a ragged map is nobody's memory, and faults.
#pragma once

#include "attention/sequence.cuh"
#include "ptx/memory.cuh"
#include "ptx/stmatrix.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"
#include "tile/fragment.cuh"
#include "tile/shared.cuh"

namespace cuflash {

// One box; kOnce: nobody else reads it, and L2 need not keep it.
template <bool kOnce>
CF_DEVICE void load_box(uint32 place, const TensorMap& map, int col, const BoxOrigin& at, uint32 barrier) {
  if constexpr (kOnce) {
    ptx::tma_load_by(ptx::evict_first(), place, map, col, at.x1, at.x2, at.x3, barrier);
  } else {
    ptx::tma_load(place, map, col, at.x1, at.x2, at.x3, barrier);
  }
}
template <bool kOnce>
CF_DEVICE void load_box(uint32 place, const TensorMap& map, int col, const CacheBoxOrigin& at, uint32 barrier) {
  if constexpr (kOnce) {
    ptx::tma_load_by(ptx::evict_first(), place, map, col, at.x1, at.x2, at.x3, at.x4, barrier);
  } else {
    ptx::tma_load(place, map, col, at.x1, at.x2, at.x3, at.x4, barrier);
  }
}

// Those of a tile, or of its rows from `row` on, which begins a group of eight; of the columns from `first_col` on, but for
// chunks from `end_col` on.
template <bool kOnce = false, class Tile, class Origin>
CF_DEVICE void load_boxes(Tile& tile, const TensorMap& map, const Origin& at, uint32 barrier, int row = 0,
                          int first_col = 0, int end_col = Tile::kCols) {
#pragma unroll
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
    const uint32 place = tile.base() + Tile::bytes_to_row(row) + chunk * Tile::kChunkBytes;
    const int col = first_col + chunk * Tile::kChunkCols;
    if (col < end_col) load_box<kOnce>(place, map, col, at, barrier);
  }
}

// To the columns from `first_col` on, but for chunks from `end_col` on.
template <class Tile>
CF_DEVICE void store_boxes(const TensorMap& map, const BoxOrigin& at, Tile& tile, int first_col = 0,
                           int end_col = Tile::kCols) {
#pragma unroll
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
    const int col = first_col + chunk * Tile::kChunkCols;
    if (col < end_col) ptx::tma_store(map, col, at.x1, at.x2, at.x3, tile.base() + chunk * Tile::kChunkBytes);
  }
}

// Zeros in the bytes of a tile from `first` on, for products behind a barrier. Called by kThreads threads.
template <int kThreads, class Tile>
CF_DEVICE void clear_bytes(Tile& tile, int first) {
  constexpr int kWord = sizeof(uint32);
  uint32* const words = reinterpret_cast<uint32*>(tile.data);
  for (int i = first / kWord + ptx::thread_index(); i < int(sizeof(tile.data)) / kWord; i += kThreads) words[i] = 0;
  ptx::fence_proxy_async();
}

// Writes a warp's A operand to the 16 rows of a tile from `first_row` on, and its columns from `first_col` on.
template <int kN, class Tile>
CF_DEVICE void store_operand(Tile& tile, int first_row, int first_col, int lane, const Operand<16, kN>& operand) {
#pragma unroll
  for (int k = 0; k < kN / 16; ++k) {
    ptx::stmatrix_x4(tile.address(first_row + lane % 16, first_col + k * 16 + lane / 16 * 8), operand.x[0][k]);
  }
}

// The same of an accumulator.
template <class Element, int kN, class Tile>
CF_DEVICE void store_fragment(Tile& tile, int first_row, int first_col, int lane, const Fragment<16, kN>& f) {
  Operand<16, kN> packed;
  pack_operand<Element>(packed, f);
  store_operand(tile, first_row, first_col, lane, packed);
}

// Writes the transpose of a warp's 16 rows to the 16 columns of a tile from `first_col` on, from row `first_row` on.
template <int kN, class Tile>
CF_DEVICE void store_transposed(Tile& tile, int first_col, int lane, const Operand<16, kN>& operand,
                                int first_row = 0) {
  const int matrix = lane / 8, col = first_col + matrix % 2 * 8;
#pragma unroll
  for (int k = 0; k < kN / 16; ++k) {
    ptx::stmatrix_x4_trans(tile.address(first_row + k * 16 + matrix / 2 * 8 + lane % 8, col), operand.x[0][k]);
  }
}

}  // namespace cuflash
