// Products of one warp on mma.sync. C is always a register Fragment [M x N], B always lies in shared memory.
#pragma once

#include "ptx/ldmatrix.cuh"
#include "ptx/sync.cuh"
#include "tile/fragment.cuh"
#include "tile/shared.cuh"

namespace cuflash {

// Row and column of the 8x8 block whose row address this lane supplies to ldmatrix, for the two orders in use: blocks
// (0,0) (8,0) (0,8) (8,8), and (0,0) (0,8) (8,0) (8,8).
CF_DEVICE int down_first_row() { return ptx::lane_index() % 16; }
CF_DEVICE int down_first_col() { return ptx::lane_index() / 16 * 8; }
CF_DEVICE int across_first_row() { return ptx::lane_index() / 16 * 8 + ptx::lane_index() % 8; }
CF_DEVICE int across_first_col() { return ptx::lane_index() / 8 % 2 * 8; }

// Four 8x8 blocks of a shared tile, or the transpose of each, where the second operand lies in columns.
template <bool kTransposed>
CF_DEVICE void load_block(uint32 (&regs)[4], uint32 address) {
  if constexpr (kTransposed) {
    ptx::ldmatrix_x4_trans(regs, address);
  } else {
    ptx::ldmatrix_x4(regs, address);
  }
}

// 16 columns of A, in blocks of 16 rows: the first is `first` elements behind the address, each `step` behind the one
// before.
template <bool kTransposed, int kM>
CF_DEVICE void load_a(uint32 (&a_regs)[kM][4], uint32 address, int first, int step) {
#pragma unroll
  for (int m = 0; m < kM; ++m) load_block<kTransposed>(a_regs[m], address + (first + m * step) * 2);
}

// C += A B for a 16 x 16 block of each: rows from 16 m on, columns from n on, in the registers that ldmatrix leaves.
template <class Element, int kM, int kN>
CF_DEVICE void add_block(Fragment<kM, kN>& c, int m, int n, const uint32 (&a_regs)[4], const uint32 (&b_regs)[4]) {
  ptx::mma_m16n8k16<Element>(c.x[m][n / 8], a_regs, b_regs[0], b_regs[1]);
  ptx::mma_m16n8k16<Element>(c.x[m][n / 8 + 1], a_regs, b_regs[2], b_regs[3]);
}

// The same of all rows.
template <class Element, int kBlocks, int kM, int kN>
CF_DEVICE void add_blocks(Fragment<kM, kN>& c, int n, const uint32 (&a_regs)[kBlocks][4], const uint32 (&b_regs)[4]) {
  static_assert(kBlocks * 16 == kM);
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) add_block<Element>(c, m, n, a_regs[m], b_regs);
}

// And of all columns, with blocks of B that lie likewise.
template <class Element, bool kTransposed, int kBlocks, int kM, int kN>
CF_DEVICE void add_product(Fragment<kM, kN>& c, const uint32 (&a_regs)[kBlocks][4], uint32 b_address, int first,
                           int step) {
#pragma unroll
  for (int n = 0; n < kN; n += 16) {
    uint32 b_regs[4];
    load_block<kTransposed>(b_regs, b_address + (first + n / 16 * step) * 2);
    add_blocks<Element>(c, n, a_regs, b_regs);
  }
}

// C += A B^T with A [M x K] and B [N x K], both row-major in shared memory; A starts at row `a_row`, B at row `b_row`.
// kSteps products of 16 columns are one piece of code: the more, the sooner their operands are read.
template <class Element, int kSteps = 2, int kM, int kN, class TileA, class TileB>
CF_DEVICE void gemm_abt(Fragment<kM, kN>& c, TileA& a, int a_row, TileB& b, int b_row = 0) {
  static_assert(TileA::kCols == TileB::kCols);
  const uint32 a_address = a.address(a_row + down_first_row(), down_first_col());
  const uint32 b_address = b.address(b_row + across_first_row(), across_first_col());
#pragma unroll kSteps
  for (int k = 0; k < TileA::kCols; k += 16) {
    uint32 a_regs[kM / 16][4];
    load_a<false>(a_regs, a_address, k, 16 * TileA::kPitch);
    add_product<Element, false>(c, a_regs, b_address, k, 16 * TileB::kPitch);
  }
}

// C += A B^T and D += E B^T at once: each fragment of B serves both.
template <class Element, int kM, int kN, class TileA, class TileB>
CF_DEVICE void gemm_abt_pair(Fragment<kM, kN>& c, TileA& a, Fragment<kM, kN>& d, TileA& e, int a_row, TileB& b) {
  static_assert(TileA::kCols == TileB::kCols);
  const uint32 a_address = a.address(a_row + down_first_row(), down_first_col());
  const uint32 e_address = e.address(a_row + down_first_row(), down_first_col());
  const uint32 b_address = b.address(across_first_row(), across_first_col());
#pragma unroll 2
  for (int k = 0; k < TileA::kCols; k += 16) {
    uint32 a_regs[kM / 16][4], e_regs[kM / 16][4];
    load_a<false>(a_regs, a_address, k, 16 * TileA::kPitch);
    load_a<false>(e_regs, e_address, k, 16 * TileA::kPitch);
#pragma unroll
    for (int n = 0; n < kN; n += 16) {
      uint32 b_regs[4];
      ptx::ldmatrix_x4(b_regs, b_address + (n * TileB::kPitch + k) * 2);
      add_blocks<Element>(c, n, a_regs, b_regs);
      add_blocks<Element>(d, n, e_regs, b_regs);
    }
  }
}

// C += A B with A [M x K] in registers and B [K x N] row-major in shared memory, from column `b_col` and row `b_row`
// on.
template <class Element, int kM, int kN, int kK, class TileB>
CF_DEVICE void gemm_ab(Fragment<kM, kN>& c, const Operand<kM, kK>& a, TileB& b, int b_col = 0, int b_row = 0) {
  const uint32 b_address = b.address(b_row + down_first_row(), b_col + down_first_col());
#pragma unroll
  for (int k = 0; k < kK; k += 16) {
#pragma unroll
    for (int n = 0; n < kN; n += 16) {
      uint32 b_regs[4];
      ptx::ldmatrix_x4_trans(b_regs, b_address + (k * TileB::kPitch + n) * 2);
#pragma unroll
      for (int m = 0; m < kM / 16; ++m) {
        add_block<Element>(c, m, n, a.x[m][k / 16], b_regs);
      }
    }
  }
}

// The same with A in shared memory, from row `a_row` on.
template <class Element, int kM, int kN, class TileA, class TileB>
CF_DEVICE void gemm_ab(Fragment<kM, kN>& c, TileA& a, int a_row, TileB& b, int b_col) {
  static_assert(TileA::kCols == TileB::kRows);
  const uint32 a_address = a.address(a_row + down_first_row(), down_first_col());
  const uint32 b_address = b.address(down_first_row(), b_col + down_first_col());
#pragma unroll
  for (int k = 0; k < TileA::kCols; k += 16) {
    uint32 a_regs[kM / 16][4];
    load_a<false>(a_regs, a_address, k, 16 * TileA::kPitch);
    add_product<Element, true>(c, a_regs, b_address, k * TileB::kPitch, 16);
  }
}

// C += A B and D += E B at once: each fragment of B serves both.
template <class Element, int kM, int kN, int kK, class TileB>
CF_DEVICE void gemm_ab_pair(Fragment<kM, kN>& c, const Operand<kM, kK>& a, Fragment<kM, kN>& d,
                            const Operand<kM, kK>& e, TileB& b, int b_col) {
  const uint32 b_address = b.address(down_first_row(), b_col + down_first_col());
#pragma unroll
  for (int k = 0; k < kK; k += 16) {
#pragma unroll
    for (int n = 0; n < kN; n += 16) {
      uint32 b_regs[4];
      ptx::ldmatrix_x4_trans(b_regs, b_address + (k * TileB::kPitch + n) * 2);
#pragma unroll
      for (int m = 0; m < kM / 16; ++m) {
        add_block<Element>(c, m, n, a.x[m][k / 16], b_regs);
        add_block<Element>(d, m, n, e.x[m][k / 16], b_regs);
      }
    }
  }
}

// Writes this lane's part of its row number r, times a factor, to row `row` of a shared tile.
template <class Element, class Tile, int kM, int kN>
CF_DEVICE void store_row(Tile& tile, int row, Fragment<kM, kN>& f, int r, float factor) {
#pragma unroll
  for (int n = 0; n < Fragment<kM, kN>::kN; ++n) {
    *reinterpret_cast<uint32*>(tile.at(row, col_of(ptx::lane_index(), n, 0))) =
        ptx::pack<Element>(f.at(r, n, 0) * factor, f.at(r, n, 1) * factor);
  }
}

// Writes an A operand to rows [first_row, first_row + kM) of a shared tile, from column `first_col` on.
template <class Tile, int kM, int kK>
CF_DEVICE void store_operand(Tile& tile, int first_row, int lane, const Operand<kM, kK>& operand, int first_col = 0) {
#pragma unroll
  for (int m = 0; m < kM / 16; ++m) {
#pragma unroll
    for (int k = 0; k < kK / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first_row + row_of(lane, m * 2 + i % 2), col = first_col + col_of(lane, k * 2 + i / 2, 0);
        *reinterpret_cast<uint32*>(tile.at(row, col)) = operand.x[m][k][i];
      }
    }
  }
}

// C += A^T B with A [K x M] from column `a_col` on and B [K x N] from column `b_col` on, row-major in shared memory.
template <class Element, int kSteps = 2, int kM, int kN, class TileA, class TileB>
CF_DEVICE void gemm_atb(Fragment<kM, kN>& c, TileA& a, int a_col, TileB& b, int b_col) {
  static_assert(TileA::kRows == TileB::kRows);
  const uint32 a_address = a.address(across_first_row(), a_col + across_first_col());
  const uint32 b_address = b.address(down_first_row(), b_col + down_first_col());
#pragma unroll kSteps
  for (int k = 0; k < TileA::kRows; k += 16) {
    uint32 a_regs[kM / 16][4];
    load_a<true>(a_regs, a_address, k * TileA::kPitch, 16);
    add_product<Element, true>(c, a_regs, b_address, k * TileB::kPitch, 16);
  }
}

}  // namespace cuflash
