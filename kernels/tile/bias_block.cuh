// BiasBlock: a lane's part of 16 x 16 elements of a bias in shared memory, as registers of a fragment lie.
#pragma once

#include "element.cuh"
#include "ptx/ldmatrix.cuh"
#include "tile/fragment.cuh"

namespace cuflash {

// Where there is no bias in shared memory.
struct NoBiasBlock {
  static constexpr bool kSome = false;

  CF_DEVICE float at(int /*r*/, int /*n*/, int /*i*/) const { return 0.f; }
  CF_DEVICE float plus(float logit, int /*r*/, int /*n*/, int /*i*/) const { return logit; }
};

// `kOneRow`: the tile's row `row` stands for all.
template <class Element>
struct BiasBlock {
  static constexpr bool kSome = true;
  uint32 pairs[4];  // [n][r]

  template <bool kOneRow = false, class Tile>
  CF_DEVICE static BiasBlock of(Tile& tile, int row, int col, int lane) {
    BiasBlock block;
    ptx::ldmatrix_x4(block.pairs, tile.address(row + (kOneRow ? 0 : lane % 16), col + lane / 16 * 8));
    return block;
  }
  // Of a fragment whose rows are the tile's columns.
  template <bool kOneRow = false, class Tile>
  CF_DEVICE static BiasBlock of_transposed(Tile& tile, int row, int col, int lane) {
    BiasBlock block;
    const int matrix = lane / 8, down = kOneRow ? 0 : matrix / 2 * 8 + lane % 8;
    ptx::ldmatrix_x4_trans(block.pairs, tile.address(row + down, col + matrix % 2 * 8));
    return block;
  }

  // Element (r, n, i), and a logit plus it.
  CF_DEVICE float at(int r, int n, int i) const {
    const Element* pair = reinterpret_cast<const Element*>(&pairs[n * 2 + r]);
    return to_accumulator(pair[i]);
  }
  CF_DEVICE float plus(float logit, int r, int n, int i) const { return logit + at(r, n, i); }
};

template <>
struct BiasBlock<float> {
  struct alignas(8) Pair {
    float x[2];
  };
  static constexpr bool kSome = true;
  Pair pairs[4];  // [n][r]

  template <bool kOneRow = false, class Tile>
  CF_DEVICE static BiasBlock of(Tile& tile, int row, int col, int lane) {
    BiasBlock block;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float* pair = tile.at(row + (kOneRow ? 0 : row_of(lane, r)), col + col_of(lane, n, 0));
        block.pairs[n * 2 + r] = *reinterpret_cast<const Pair*>(pair);
      }
    }
    return block;
  }
  template <bool kOneRow = false, class Tile>
  CF_DEVICE static BiasBlock of_transposed(Tile& tile, int row, int col, int lane) {
    BiasBlock block;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          block.pairs[n * 2 + r].x[i] = *tile.at(row + (kOneRow ? 0 : col_of(lane, n, i)), col + row_of(lane, r));
        }
      }
    }
    return block;
  }

  CF_DEVICE float at(int r, int n, int i) const { return pairs[n * 2 + r].x[i]; }
  CF_DEVICE float plus(float logit, int r, int n, int i) const { return logit + at(r, n, i); }
};

}  // namespace cuflash
