// Products of one warpgroup on wgmma. C is four warps' register Fragments, 64 rows in all; B is one of an array of tiles
// in shared memory. Both only issue: fence before, commit and wait after (ptx/wgmma.cuh).
#pragma once

#include "ptx/wgmma.cuh"
#include "tile/fragment.cuh"
#include "tile/gemm_sm80.cuh"
#include "tile/shared.cuh"

namespace cuflash {

template <class Tile>
CF_DEVICE uint64 tile_descriptor(Tile* tiles, int number, int chunk_bytes) {
  return ptx::advance_descriptor(ptx::wgmma_descriptor(tiles->base(), chunk_bytes), number * int(sizeof(Tile)));
}

// C = A B^T, or C += A B^T, with A [64 x K] and B = tiles[number] [kN x K], both row-major.
template <class Element, int kN, class TileA, class TileB>
CF_DEVICE void issue_abt(Fragment<16, kN>& c, TileA& a, TileB* tiles, int number, bool accumulate = false) {
  static_assert(TileA::kRows == 64 && TileB::kRows == kN && TileA::kCols == TileB::kCols);
  const uint64 a_descriptor = ptx::wgmma_descriptor(a.base(), 0), b_descriptor = tile_descriptor(tiles, number, 0);
#pragma unroll
  for (int k = 0; k < TileA::kCols; k += ptx::kWgmmaDepth<Element>) {
    ptx::wgmma_abt<Element>(c.x[0], ptx::advance_descriptor(a_descriptor, TileA::bytes_to_col(k)),
                            ptx::advance_descriptor(b_descriptor, TileB::bytes_to_col(k)), accumulate || k > 0);
  }
}

// C += A B with A [64 x kK] in registers and B = tiles[number] [kK x kN] row-major.
template <class Element, int kN, int kK, class TileB>
CF_DEVICE void issue_ab(Fragment<16, kN>& c, const Operand<16, kK>& a, TileB* tiles, int number) {
  static_assert(TileB::kRows == kK && TileB::kCols == kN);
  constexpr int kDepth = ptx::kWgmmaDepth<Element>;
  const uint64 b_descriptor = tile_descriptor(tiles, number, TileB::kChunkBytes);
#pragma unroll
  for (int k = 0; k < kK; k += kDepth) {
    ptx::wgmma_ab<Element>(c.x[0], a.x[0][k / kDepth], ptx::advance_descriptor(b_descriptor, TileB::bytes_to_row(k)),
                           true);
  }
}

// C = A B, or C += A B, with A = a[number], 64 rows from `a_row` on, and B the kN columns from `b_col` on of the tiles b,
// one below the other; both row-major. b_col begins a chunk.
template <class Element, int kN, class TileA, class TileB>
CF_DEVICE void issue_ab(Fragment<16, kN>& c, TileA* a, int number, int a_row, TileB* b, int b_col,
                        bool accumulate = false) {
  const uint64 a_descriptor = ptx::advance_descriptor(tile_descriptor(a, number, 0), TileA::bytes_to_row(a_row));
  const uint64 b_descriptor =
      ptx::advance_descriptor(tile_descriptor(b, 0, TileB::kChunkBytes), TileB::bytes_to_col(b_col));
#pragma unroll
  for (int k = 0; k < TileA::kCols; k += ptx::kWgmmaDepth<Element>) {
    const int b_bytes = k / TileB::kRows * int(sizeof(TileB)) + TileB::bytes_to_row(k % TileB::kRows);
    ptx::wgmma_ab<Element>(c.x[0], ptx::advance_descriptor(a_descriptor, TileA::bytes_to_col(k)),
                           ptx::advance_descriptor(b_descriptor, b_bytes), accumulate || k > 0);
  }
}

// C += A B^T of one warp alone, by mma.sync: 16 rows of A [M x K] from `a_row` on, and B [kN x K].
template <class Element, int kN, class TileA, class TileB>
CF_DEVICE void gemm_abt_warp(Fragment<16, kN>& c, TileA& a, int a_row, TileB& b) {
  static_assert(TileB::kRows == kN && TileA::kCols == TileB::kCols);
#pragma unroll 1
  for (int k = 0; k < TileA::kCols; k += 16) {
    uint32 a_regs[4];
    ptx::ldmatrix_x4(a_regs, a.address(a_row + down_first_row(), k + down_first_col()));
#pragma unroll
    for (int n = 0; n < kN; n += 16) {
      uint32 b_regs[4];
      ptx::ldmatrix_x4(b_regs, b.address(n + across_first_row(), k + across_first_col()));
      add_block<Element>(c, 0, n, a_regs, b_regs);
    }
  }
}

}  // namespace cuflash
