// Copies between global memory and shared tiles, kBytes at a time, by all threads of a block or warp.
#pragma once

#include "ptx/cp_async.cuh"
#include "ptx/sync.cuh"
#include "tile/rows.cuh"
#include "tile/shared.cuh"

namespace cuflash {

template <int kBytes>
struct VectorOf;
template <>
struct VectorOf<2> { using Type = uint16; };
template <>
struct VectorOf<4> { using Type = uint32; };
template <>
struct VectorOf<8> { using Type = uint2; };
template <>
struct VectorOf<16> { using Type = uint4; };

// Starts the copy of the first rows' columns [0, kDim) into `tile`; everything else in the tile becomes zero, so that
// padding of any content (NaN included) never enters a product. Complete after cp_async_wait and a barrier.
template <int kDim, int kBytes, int kThreads, class Tile, class Element, template <class> class Rows>
CF_DEVICE void load_tile_async(Tile& tile, const Rows<const Element>& rows) {
  constexpr int kWidth = kBytes / sizeof(Element);  // elements of one access
  constexpr int kAcross = Tile::kCols / kWidth;
  constexpr int kThreadsAcross = min_of(kThreads, power_of_two_above(kAcross));
  constexpr int kRowsAtOnce = kThreads / kThreadsAcross;
  static_assert(kDim % kWidth == 0 && Tile::kCols % kWidth == 0);
  const int first_row = ptx::thread_index() / kThreadsAcross, first_col = ptx::thread_index() % kThreadsAcross;
#pragma unroll
  for (int across = 0; across < kAcross; across += kThreadsAcross) {
    const int col = (across + first_col) * kWidth;
    if (kAcross % kThreadsAcross != 0 && col >= Tile::kCols) break;
    // A running pointer: independent addresses would be kept in registers over the whole kernel.
    const Element* source = rows.at(first_row, 0, col);
#pragma unroll
    for (int down = 0; down < Tile::kRows;
         source = rows.below(source, down + first_row, col, kRowsAtOnce), down += kRowsAtOnce) {
      const int row = down + first_row;
      if (Tile::kRows % kRowsAtOnce != 0 && row >= Tile::kRows) break;
      const bool valid = row < rows.count && (kDim == Tile::kCols || col < kDim);
      if constexpr (kBytes >= 4) {
        ptx::cp_async<kBytes>(tile.address(row, col), source, valid);
      } else {
        using Vector = typename VectorOf<kBytes>::Type;
        *reinterpret_cast<Vector*>(tile.at(row, col)) = valid ? *reinterpret_cast<const Vector*>(source) : Vector{};
      }
    }
  }
}

// The same of `valid_rows` rows that lie `row_stride` apart.
template <int kDim, int kBytes, int kThreads, class Tile, class Element>
CF_DEVICE void load_tile_async(Tile& tile, const Element* global, int64 row_stride, int valid_rows) {
  load_tile_async<kDim, kBytes, kThreads>(tile, GlobalRows<const Element>{global, row_stride, valid_rows});
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

// The same to `valid_rows` rows that lie `row_stride` apart.
template <int kRows, int kCols, int kBytes, int kThreads, class Tile, class Element>
CF_DEVICE void store_tile(Element* global, int64 row_stride, int valid_rows, int valid_cols, Tile& tile, int first_row,
                          int thread) {
  const GlobalRows<Element> rows{global, row_stride, valid_rows};
  store_tile<kRows, kCols, kBytes, kThreads>(rows, valid_cols, tile, first_row, thread);
}

// Zeroes rows [0, rows) x [0, kDim) of one head: outputs that no key or query reaches are defined all the same.
template <int kDim, int kThreads, class Element>
CF_DEVICE void zero_rows(Element* global, int64 row_stride, int rows, int thread = ptx::thread_index()) {
  if (rows == 0) return;  // known of dense sequences
#pragma unroll 1
  for (int64 index = thread; index < int64(rows) * kDim; index += kThreads) {
    global[index / kDim * row_stride + index % kDim] = Element(0.f);
  }
}

template <int kThreads, class T>
CF_DEVICE void fill(T* global, int count, T value, int thread = ptx::thread_index()) {
  if (count == 0) return;
#pragma unroll 1
  for (int index = thread; index < count; index += kThreads) global[index] = value;
}

}  // namespace cuflash
