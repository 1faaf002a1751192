// Gradient products: how a backward's warp multiplies tiles, by what their elements are. Scores are transposed there:
// rows are keys, kRows of them a warp's, and columns queries.
#pragma once

#include "tile/gemm_sm80.cuh"
#include "tile/operand_tiles.cuh"

namespace cuflash {

// Of 16-bit elements, as tensor cores take them.
template <class Element, int kRows, int kHalves = 2>
struct GradientProducts : OperandTiles<Element, kHalves> {
  // dS^T of all warps.
  template <int kTileKv, int kTileQ>
  using ScoreTile = SharedTile<Element, kTileKv, kTileQ>;

  // S^T = K Q^T, and dP^T = V dO^T.
  template <int kQueries, class TileK, class TileQ>
  CF_DEVICE static void multiply(Fragment<kRows, kQueries>& s, TileK& k, int warp_row, TileQ& q, int warp_col) {
    gemm_abt<Element, 16>(s, k, warp_row, q, warp_col);
  }

  // Leaves P^T or dS^T for all warps.
  template <int kQueries, class TileScores>
  CF_DEVICE static void share(TileScores& shared, int warp_row, int warp_col, const Fragment<kRows, kQueries>& x) {
    Operand<kRows, kQueries> weights;
    pack_operand<Element>(weights, x);
    store_operand(shared, warp_row, ptx::lane_index(), weights, warp_col);
  }

  // dV += P^T dO or dK += dS^T Q of what all warps have left.
  template <int kKeys, int kCols, class TileScores, class TileQ>
  CF_DEVICE static void add_shared(Fragment<kKeys, kCols>& grad, TileScores& shared, int first_row, TileQ& q,
                                   int first_col) {
    gemm_ab<Element>(grad, shared, first_row, q, first_col);
  }

  // dV += P^T dO
  template <int kQueries, int kCols, class TileDout>
  CF_DEVICE static void add_to_dv(Fragment<kRows, kCols>& dv, const Fragment<kRows, kQueries>& p, TileDout& dout,
                                  int first_col) {
    Operand<kRows, kQueries> weights;
    pack_operand<Element>(weights, p);
    gemm_ab<Element>(dv, weights, dout, first_col);
  }

  // dK += dS^T Q; leaves dS^T for all warps.
  template <int kQueries, int kCols, class TileScores, class TileK, class TileQ>
  CF_DEVICE static void add_to_dk(Fragment<kRows, kCols>& dk, const Fragment<kRows, kQueries>& ds, TileScores& shared,
                                  TileK& /*k*/, int warp_row, TileQ& q, int first_col) {
    Operand<kRows, kQueries> weights;
    pack_operand<Element>(weights, ds);
    store_operand(shared, warp_row, ptx::lane_index(), weights);
    gemm_ab<Element>(dk, weights, q, first_col);
  }

  // dQ = dS K of some queries and columns.
  template <int kQueries, int kCols, class TileScores, class TileK>
  CF_DEVICE static void multiply_dq(Fragment<kQueries, kCols>& dq, TileScores& shared, int first_row, TileK& k,
                                    int first_col) {
    dq.clear();
    gemm_atb<Element, 16>(dq, shared, first_row, k, first_col);
  }

  // What sums are in. It may be so small that nothing else can be multiplied by it first.
  CF_DEVICE static float dv_unit() { return 1.f; }
  CF_DEVICE static float dk_unit() { return 1.f; }
};

// Of floats, as halves.
template <int kRows, int kHalves>
struct GradientProducts<float, kRows, kHalves> : OperandTiles<float, kHalves> {
  // Each warp scales the queries of its own keys: what it adds to dQ is a sum of its own.
  template <int kTileKv, int kTileQ>
  struct ScoreTile {
    static constexpr int kBlocks = kTileKv / kRows, kPitch = SharedTile<fp16, kTileKv, 2 * kTileQ>::kPitch;
    static constexpr int kQueries = kTileQ, kLow = 2 * kTileQ;  // bytes from a high half to the low one
    SharedTile<fp16, kTileKv, 2 * kTileQ> halves;
    float scale[kBlocks][kTileQ];
  };

  HalvesSum dv_sum, dk_sum;
  float key_unit = 1.f;  // the largest scale of a key

  template <int kQueries, class TileK, class TileQ>
  CF_DEVICE static void multiply(Fragment<kRows, kQueries>& s, TileK& k, int warp_row, TileQ& q, int /*warp_col*/) {
    gemm_abt_halves<Role::kKeys>(s, k, warp_row, q);
  }

  template <int kQueries, int kCols, class TileDout>
  CF_DEVICE void add_to_dv(Fragment<kRows, kCols>& dv, Fragment<kRows, kQueries>& p, TileDout& dout, int first_col) {
    dv_sum.add(dv, p, dout, first_col);
  }

  template <int kQueries, int kCols, class TileScores, class TileK, class TileQ>
  CF_DEVICE void add_to_dk(Fragment<kRows, kCols>& dk, Fragment<kRows, kQueries>& ds, TileScores& shared, TileK& k,
                           int warp_row, TileQ& q, int first_col) {
    const int lane = ptx::lane_index();
    float largest = 0x1p-126f;
    for (int row = lane; row < TileK::kRows; row += 32) largest = max_of(largest, k.scale[row]);
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) largest = max_of(largest, ptx::shuffle_xor(largest, lanes));
    key_unit = largest;
    const float to_unit = inverse_power(key_unit);
    float scale[kRows / 8];
#pragma unroll
    for (int r = 0; r < kRows / 8; ++r) scale[r] = k.scale[warp_row + row_of(lane, r)] * to_unit;
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n) {
      float up[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float most = 0.f;
#pragma unroll
        for (int r = 0; r < kRows / 8; ++r) most = max_of(most, abs_of(ds.at(r, n, i) * scale[r]));
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) most = max_of(most, ptx::shuffle_xor(most, lanes));
        const PowerScale power = PowerScale::of(most);
        up[i] = power.up;
        if (lane < 4) shared.scale[warp_row / kRows][col_of(lane, n, i)] = power.down;
      }
#pragma unroll
      for (int r = 0; r < kRows / 8; ++r) {
        uint32 high, low;
        halve_pair<kHalves>(high, low, ds.at(r, n, 0) * scale[r] * up[0], ds.at(r, n, 1) * scale[r] * up[1]);
        fp16* const place = shared.halves.at(warp_row + row_of(lane, r), col_of(lane, n, 0));
        *reinterpret_cast<uint32*>(place) = high;
        if (kHalves == 2) *reinterpret_cast<uint32*>(place + kQueries) = low;
      }
    }
    dk_sum.add(dk, ds, q, first_col);
  }

  template <int kQueries, int kCols, class TileScores, class TileK>
  CF_DEVICE void multiply_dq(Fragment<kQueries, kCols>& dq, TileScores& shared, int first_row, TileK& k,
                             int first_col) {
    const uint32 a_address = shared.halves.address(across_first_row(), first_row + across_first_col());
    const uint32 b_address = k.halves.address(down_first_row(), first_col + down_first_col());
    dq.clear();
#pragma unroll 1
    for (int block = 0; block < TileScores::kBlocks; ++block) {
      uint32 a_high[kRows / 16][kQueries / 16][4], a_low[kRows / 16][kQueries / 16][4];
#pragma unroll
      for (int step = 0; step < kRows / 16; ++step) {
#pragma unroll
        for (int m = 0; m < kQueries / 16; ++m) {
          const uint32 address = a_address + ((block * kRows + step * 16) * TileScores::kPitch + m * 16) * 2;
          ptx::ldmatrix_x4_trans(a_high[step][m], address);
          if (kHalves == 2) ptx::ldmatrix_x4_trans(a_low[step][m], address + TileScores::kLow);
        }
      }
      float scale[kQueries / 8];
#pragma unroll
      for (int r = 0; r < kQueries / 8; ++r) {
        scale[r] = shared.scale[block][first_row + row_of(ptx::lane_index(), r)] * key_unit;
      }
#pragma unroll
      for (int n = 0; n < kCols; n += 16) {
        Fragment<kQueries, 16> large, small;
        large.clear();
        small.clear();
#pragma unroll
        for (int step = 0; step < kRows / 16; ++step) {
          const uint32 address = b_address + ((block * kRows + step * 16) * TileK::kPitch + n) * 2;
          uint32 b_high[4], b_low[4];
          ptx::ldmatrix_x4_trans(b_high, address);
          if constexpr (kHalves == 2) {
            ptx::ldmatrix_x4_trans(b_low, address + TileK::kLow);
            add_blocks<fp16>(small, 0, a_low[step], b_high);
          }
          add_blocks<fp16>(large, 0, a_high[step], b_high);
          if constexpr (kHalves == 2) add_blocks<fp16>(small, 0, a_high[step], b_low);
        }
        large.for_each_index([&](int r, int part, int i) {
          float& x = dq.at(r, n / 8 + part, i);
          x = fma(fma(small.at(r, part, i), 1 / kLowUnit, large.at(r, part, i)), scale[r], x);
        });
      }
    }
  }

  CF_DEVICE float dv_unit() const { return dv_sum.unit; }
  CF_DEVICE float dk_unit() const { return dk_sum.unit; }
};

// Of doubles, as tensor cores take them.
template <int kRows, int kHalves>
struct GradientProducts<double, kRows, kHalves> : OperandTiles<double, kHalves> {
  template <int kTileKv, int kTileQ>
  using ScoreTile = DoubleTile<kTileKv, kTileQ>;

  template <int kQueries, class TileK, class TileQ>
  CF_DEVICE static void multiply(Fragment<kRows, kQueries, double>& s, TileK& k, int warp_row, TileQ& q, int warp_col) {
    gemm_abt_doubles(s, k, warp_row, q, warp_col);
  }

  template <int kQueries, class TileScores>
  CF_DEVICE static void share(TileScores& shared, int warp_row, int warp_col, Fragment<kRows, kQueries, double>& x) {
    const int lane = ptx::lane_index();
#pragma unroll
    for (int r = 0; r < kRows / 8; ++r) {
#pragma unroll
      for (int n = 0; n < kQueries / 8; ++n) {
        shared.pair(warp_row + row_of(lane, r), warp_col + col_of(lane, n, 0)) = double2{x.at(r, n, 0), x.at(r, n, 1)};
      }
    }
  }

  template <int kKeys, int kCols, class TileScores, class TileQ>
  CF_DEVICE static void add_shared(Fragment<kKeys, kCols, double>& grad, TileScores& shared, int first_row, TileQ& q,
                                   int first_col) {
    add_shared_ab_doubles(grad, shared, first_row, q, first_col);
  }

  template <int kQueries, int kCols, class TileDout>
  CF_DEVICE static void add_to_dv(Fragment<kRows, kCols, double>& dv, Fragment<kRows, kQueries, double>& p,
                                  TileDout& dout, int first_col) {
    add_ab_doubles(dv, p, dout, first_col);
  }

  template <int kQueries, int kCols, class TileScores, class TileK, class TileQ>
  CF_DEVICE static void add_to_dk(Fragment<kRows, kCols, double>& dk, Fragment<kRows, kQueries, double>& ds,
                                  TileScores& shared, TileK& /*k*/, int warp_row, TileQ& q, int first_col) {
    share(shared, warp_row, 0, ds);
    add_ab_doubles(dk, ds, q, first_col);
  }

  template <int kQueries, int kCols, class TileScores, class TileK>
  CF_DEVICE static void multiply_dq(Fragment<kQueries, kCols, double>& dq, TileScores& shared, int first_row, TileK& k,
                                    int first_col) {
    gemm_atb_doubles(dq, shared, first_row, k, first_col);
  }

  CF_DEVICE static double dv_unit() { return 1.; }
  CF_DEVICE static double dk_unit() { return 1.; }
};

}  // namespace cuflash
