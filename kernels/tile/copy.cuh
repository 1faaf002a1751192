// Copies between global memory and shared tiles, kBytes at a time, by all threads of a block or warp.
#pragma once

#include "ptx/cp_async.cuh"
#include "ptx/memory.cuh"
#include "ptx/sync.cuh"
#include "tile/rows.cuh"
#include "tile/shared.cuh"

namespace cuflash {

template <int kBytes>
struct VectorOf;
template <>
struct VectorOf<2> {
  using Type = uint16;
};
template <>
struct VectorOf<4> {
  using Type = uint32;
};
template <>
struct VectorOf<8> {
  using Type = uint2;
};
template <>
struct VectorOf<16> {
  using Type = uint4;
};

// Starts the copy of the columns [0, kDim) of the rows that there are into `tile`; everything else in the tile becomes
// zero, so that padding of any content (NaN included) never enters a product. By kThreads threads of which this is
// number `thread`, at most kMostAcross to a row; complete after cp_async_wait and a barrier among them. kOnce: nobody
// else reads the rows, and L2 need not keep them.
template <int kDim, int kBytes, int kThreads, int kMostAcross = kThreads, bool kOnce = false, class Tile, class Rows>
CF_DEVICE void load_tile_async(Tile& tile, const Rows& rows, int thread = ptx::thread_index()) {
  constexpr int kWidth = kBytes / sizeof(*rows.data);  // elements of one access
  constexpr int kAcross = Tile::kCols / kWidth;
  constexpr int kThreadsAcross = min_of(kMostAcross, power_of_two_above(kAcross));
  constexpr int kRowsAtOnce = kThreads / kThreadsAcross;
  static_assert(kDim % kWidth == 0 && Tile::kCols % kWidth == 0);
  const int first_row = thread / kThreadsAcross, first_col = thread % kThreadsAcross;
#pragma unroll
  for (int across = 0; across < kAcross; across += kThreadsAcross) {
    const int col = (across + first_col) * kWidth;
    if (kAcross % kThreadsAcross != 0 && col >= Tile::kCols) break;
    // A running pointer: independent addresses would be kept in registers over the whole kernel.
    const auto* source = rows.at(first_row, 0, col);
#pragma unroll
    for (int down = 0; down < Tile::kRows;
         source = rows.below(source, down + first_row, col, kRowsAtOnce), down += kRowsAtOnce) {
      const int row = down + first_row;
      if (Tile::kRows % kRowsAtOnce != 0 && row >= Tile::kRows) break;
      const bool valid = rows.has(row) && (kDim == Tile::kCols || col < kDim);
      if constexpr (kBytes == 16 && kOnce) {
        ptx::cp_async_by(ptx::evict_first(), tile.address(row, col), source, valid);
      } else if constexpr (kBytes >= 4) {
        ptx::cp_async<kBytes>(tile.address(row, col), source, valid);
      } else {
        using Vector = typename VectorOf<kBytes>::Type;
        *reinterpret_cast<Vector*>(tile.at(row, col)) = valid ? *reinterpret_cast<const Vector*>(source) : Vector{};
      }
    }
  }
}

// Writes a kRows x kCols region of `tile`, from `first_row` on, to the rows' first valid_cols columns, by kThreads
// threads of which this is number `thread`.
template <int kRows, int kCols, int kBytes, int kThreads, class Tile, class Rows>
CF_DEVICE void store_tile(const Rows& rows, int valid_cols, Tile& tile, int first_row, int thread) {
  using Vector = typename VectorOf<kBytes>::Type;
  constexpr int kWidth = kBytes / sizeof(*rows.data);
  constexpr int kAcross = kCols / kWidth;
#pragma unroll 2
  for (int index = thread; index < kRows * kAcross; index += kThreads) {
    const int row = index / kAcross, col = index % kAcross * kWidth;
    if (row < rows.count && col < valid_cols) {
      *reinterpret_cast<Vector*>(rows.at(row, 0, col)) =
          *reinterpret_cast<const Vector*>(tile.at(first_row + row, col));
    }
  }
}

}  // namespace cuflash
