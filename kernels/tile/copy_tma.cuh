// Copies of whole tiles by TMA, one box for every chunk of columns. Called by one thread.
//
// Part of a box may lie outside its tensor, but not all of it: for such a box an H200 touches the first element of the map,
// which for a ragged map is nobody's memory, and faults.
#pragma once

#include "attention/sequence.cuh"
#include "ptx/stmatrix.cuh"
#include "ptx/tma.cuh"
#include "tile/fragment.cuh"
#include "tile/shared.cuh"

namespace cuflash {

template <class Tile>
CF_DEVICE void load_boxes(Tile& tile, const TensorMap& map, const BoxOrigin& at, uint32 barrier) {
#pragma unroll
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
    ptx::tma_load(tile.base() + chunk * Tile::kChunkBytes, map, chunk * Tile::kChunkCols, at.x1, at.x2, at.x3, barrier);
  }
}

template <class Tile>
CF_DEVICE void store_boxes(const TensorMap& map, const BoxOrigin& at, Tile& tile) {
#pragma unroll
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
    ptx::tma_store(map, chunk * Tile::kChunkCols, at.x1, at.x2, at.x3, tile.base() + chunk * Tile::kChunkBytes);
  }
}

// Writes this warp's 16 rows, from `first_row` on, of an accumulator to a tile.
template <class Element, int kN, class Tile>
CF_DEVICE void store_fragment(Tile& tile, int first_row, int lane, const Fragment<16, kN>& f) {
#pragma unroll
  for (int n = 0; n < kN / 8; n += 2) {
    const float (&left)[4] = f.x[0][n];
    const float (&right)[4] = f.x[0][n + 1];
    const uint32 packed[4] = {ptx::pack<Element>(left[0], left[1]), ptx::pack<Element>(left[2], left[3]),
                              ptx::pack<Element>(right[0], right[1]), ptx::pack<Element>(right[2], right[3])};
    ptx::stmatrix_x4(tile.address(first_row + lane % 16, n * 8 + lane / 16 * 8), packed);
  }
}

}  // namespace cuflash
