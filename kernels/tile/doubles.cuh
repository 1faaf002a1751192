// fp64 on the tensor cores that have it, products and sums of one warp.
//
//   a lane c of four supplies columns k = c of a product; here those are 2c and 2c + 1 of eight, one after the other:
//
//     accumulator of S        columns 2c  2c+1      is at once an A operand:  k 0-3: columns 0 2 4 6, k 4-7: 1 3 5 7
//     rows of a tile          16 bytes a lane       hold what two products of four columns take
//
// So whatever is summed over is dealt out in this order, by A and B alike.
//
// Long sums round at every step: each tile's share of an output is a sum of its own, which is then added to it.
#pragma once

#include "ptx/mma.cuh"
#include "tile/fragment.cuh"
#include "tile/shared.cuh"

namespace cuflash {

// kRows rows of kCols doubles, in every row the 16-byte units of 128 bytes permuted by the row's number: two neighbours
// by four units, and four rows of one parity by two units, lie in different banks.
template <int kRows_, int kCols_>
struct alignas(128) DoubleTile {
  static_assert(kCols_ % 16 == 0);
  static constexpr int kRows = kRows_, kCols = kCols_;

  double data[kRows * kCols];

  CF_DEVICE double* at(int row, int col) { return data + row * kCols + (col ^ ((row / 2 % 4) ^ (row % 2 * 2)) * 4); }
  CF_DEVICE uint32 address(int row, int col) { return ptx::smem_u32(at(row, col)); }
  // A column and the next one, of which the first is even.
  CF_DEVICE double2& pair(int row, int col) { return *reinterpret_cast<double2*>(at(row, col)); }
};

// What kM rows of A from `row` on have for sixteen columns from `col` on, row-major in shared memory.
template <int kM, class TileA>
CF_DEVICE void load_a(double (&a_regs)[kM / 16][8], TileA& a, int row, int col) {
  const int lane = ptx::lane_index();
#pragma unroll
  for (int r = 0; r < kM / 8; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const double2 x = a.pair(row + r * 8 + row_of(lane, 0), col + half * 8 + col_of(lane, 0, 0));
      a_regs[r / 2][half * 4 + r % 2] = x.x;
      a_regs[r / 2][half * 4 + r % 2 + 2] = x.y;
    }
  }
}

// C = A B^T with A [M x K] and B [N x K], both row-major in shared memory, from rows `a_row` and `b_row` on.
template <int kM, int kN, class TileA, class TileB>
CF_DEVICE void gemm_abt_doubles(Fragment<kM, kN, double>& c, TileA& a, int a_row, TileB& b, int b_row = 0) {
  static_assert(TileA::kCols == TileB::kCols);
  const int lane = ptx::lane_index(), row = row_of(lane, 0), col = col_of(lane, 0, 0);
  c.clear();
#pragma unroll 1
  for (int k = 0; k < TileA::kCols; k += 16) {
    double a_regs[kM / 16][8];
    load_a<kM>(a_regs, a, a_row, k);
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
      const double2 left = b.pair(b_row + n * 8 + row, k + col), right = b.pair(b_row + n * 8 + row, k + 8 + col);
      const double b_regs[4] = {left.x, left.y, right.x, right.y};
#pragma unroll
      for (int m = 0; m < kM / 16; ++m) ptx::mma_m16n8k16(c.x[m][n], a_regs[m], b_regs);
    }
  }
}

// What four rows of B [K x N], from row `k` on, and eight columns from `col` on have for a product.
template <class TileB>
CF_DEVICE void load_b(double (&b_regs)[4], TileB& b, int k, int col) {
  const int lane = ptx::lane_index();
#pragma unroll
  for (int i = 0; i < 4; ++i) b_regs[i] = *b.at(k + col_of(lane, i / 2, i % 2), col + row_of(lane, 0));
}

// C += A B with sixteen columns of A and as many rows of B, from `k` on, of which it takes the columns from `b_col` on.
template <int kM, int kN, class TileB>
CF_DEVICE void add_product(Fragment<kM, kN, double>& c, const double (&a_regs)[kM / 16][8], TileB& b, int k,
                           int b_col) {
#pragma unroll
  for (int n = 0; n < kN / 8; ++n) {
    double b_regs[4];
    load_b(b_regs, b, k, b_col + n * 8);
#pragma unroll
    for (int m = 0; m < kM / 16; ++m) ptx::mma_m16n8k16(c.x[m][n], a_regs[m], b_regs);
  }
}

// sum = sum * rescale + A B, with A [M x K] in registers and B [K x N] row-major in shared memory from column `b_col`
// on.
template <int kM, int kN, int kK, class TileB>
CF_DEVICE void add_ab_doubles(Fragment<kM, kN, double>& sum, const double (&rescale)[kM / 8],
                              Fragment<kM, kK, double>& a, TileB& b, int b_col) {
#pragma unroll
  for (int n = 0; n < kN / 8; ++n) {
    double tile[kM / 16][4] = {};
#pragma unroll
    for (int k = 0; k < kK / 16; ++k) {
      double b_regs[4];
      load_b(b_regs, b, k * 16, b_col + n * 8);
#pragma unroll
      for (int m = 0; m < kM / 16; ++m) {
        double a_regs[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) a_regs[i] = a.at(m * 2 + i % 2, 2 * k + i / 4, i / 2 % 2);
        ptx::mma_m16n8k16(tile[m], a_regs, b_regs);
      }
    }
#pragma unroll
    for (int m = 0; m < kM / 16; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        double& x = sum.x[m][n][i];
        x = fma(x, rescale[m * 2 + i / 2], tile[m][i]);
      }
    }
  }
}

// sum += A B
template <int kM, int kN, int kK, class TileB>
CF_DEVICE void add_ab_doubles(Fragment<kM, kN, double>& sum, Fragment<kM, kK, double>& a, TileB& b, int b_col) {
  double one[kM / 8];
#pragma unroll
  for (double& factor : one) factor = 1.;
  add_ab_doubles(sum, one, a, b, b_col);
}

// sum += A B with A [M x K] from row `a_row` on and B [K x N] from column `b_col` on, row-major in shared memory.
template <int kM, int kN, class TileA, class TileB>
CF_DEVICE void add_shared_ab_doubles(Fragment<kM, kN, double>& sum, TileA& a, int a_row, TileB& b, int b_col) {
  static_assert(TileA::kCols == TileB::kRows);
  Fragment<kM, kN, double> tile;
  tile.clear();
#pragma unroll
  for (int k = 0; k < TileA::kCols; k += 16) {
    double a_regs[kM / 16][8];
    load_a<kM>(a_regs, a, a_row, k);
    add_product(tile, a_regs, b, k, b_col);
  }
  sum.for_each_index([&](int r, int n, int i) { sum.at(r, n, i) += tile.at(r, n, i); });
}

// C = A^T B with A [K x M] from column `a_col` on and B [K x N] from column `b_col` on, row-major in shared memory.
template <int kM, int kN, class TileA, class TileB>
CF_DEVICE void gemm_atb_doubles(Fragment<kM, kN, double>& c, TileA& a, int a_col, TileB& b, int b_col) {
  static_assert(TileA::kRows == TileB::kRows);
  const int lane = ptx::lane_index();
  c.clear();
#pragma unroll 1
  for (int k = 0; k < TileA::kRows; k += 16) {
    double a_regs[kM / 16][8];
#pragma unroll
    for (int r = 0; r < kM / 8; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a_regs[r / 2][i * 2 + r % 2] = *a.at(k + col_of(lane, i / 2, i % 2), a_col + row_of(lane, r));
      }
    }
    add_product(c, a_regs, b, k, b_col);
  }
}

}  // namespace cuflash
