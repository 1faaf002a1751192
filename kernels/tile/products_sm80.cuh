// Products: how a forward's warp multiplies tiles, by what their elements are.
#pragma once

#include "tile/operand_tiles.cuh"
#include "tile/softmax_sm80.cuh"

namespace cuflash {

// Of 16-bit elements, as tensor cores take them. kRows rows of a warp, and into how many halves floats are split.
template <class Element, int kRows, int kHalves = 2>
struct Products : OperandTiles<Element, kHalves> {
  static constexpr bool kStagesOut = true;  // results are packed, so they leave through shared memory

  template <int kTileRows, int kDim>
  using OutTile = SharedTile<Element, kTileRows, kDim>;

  // Of rows of a warp and all keys, or those from some on beside which much else is in registers.
  template <int kKeys, class TileQ, class TileK>
  CF_DEVICE static void multiply(Fragment<kRows, kKeys>& s, TileQ& q, int warp_row, TileK& k) {
    constexpr int kSteps = kRows * kKeys < 32 * 64 ? 16 : 4;  // all that scores leave the registers for
    s.clear();
    gemm_abt<Element, kSteps>(s, q, warp_row, k);
  }
  template <int kKeys, class TileQ, class TileK>
  CF_DEVICE static void multiply(Fragment<kRows, kKeys>& s, TileQ& q, int warp_row, TileK& k, int first_key) {
    s.clear();
    gemm_abt<Element>(s, q, warp_row, k, first_key);
  }

  template <int kKeys, int kDim>
  CF_DEVICE static void weigh(Fragment<kRows, kKeys>& s, RowState<float> (&rows)[kRows / 8], Fragment<kRows, kDim>& out,
                              float log2_unit) {
    softmax_tile(s, rows, out, log2_unit);
  }

  template <int kKeys, int kDim, class TileV>
  CF_DEVICE static void accumulate(Fragment<kRows, kDim>& out, const Fragment<kRows, kKeys>& p, TileV& v) {
    Operand<kRows, kKeys> weights;
    pack_operand<Element>(weights, p);
    gemm_ab<Element>(out, weights, v);
  }

  // What sums are in. It may be so small that nothing else can be multiplied by it first.
  CF_DEVICE static float unit() { return 1.f; }
};

// Of floats, as halves.
template <int kRows, int kHalves>
struct Products<float, kRows, kHalves> : OperandTiles<float, kHalves> {
  static constexpr bool kStagesOut = false;

  template <int kTileRows, int kDim>
  struct OutTile {};

  HalvesSum sum;
  float rescale[kRows / 8];  // of the output so far, by the softmax of the last tile

  template <int kKeys, class TileQ, class TileK>
  CF_DEVICE static void multiply(Fragment<kRows, kKeys>& s, TileQ& q, int warp_row, TileK& k, int first_key = 0) {
    gemm_abt_halves<Role::kQueries>(s, q, warp_row, k, first_key);
  }

  template <int kKeys, int kDim>
  CF_DEVICE void weigh(Fragment<kRows, kKeys>& s, RowState<float> (&rows)[kRows / 8], Fragment<kRows, kDim>& /*out*/,
                       float log2_unit) {
#pragma unroll
    for (int r = 0; r < kRows / 8; ++r) rescale[r] = softmax_row<true>(s, r, rows[r], log2_unit);
  }

  template <int kKeys, int kDim, class TileV>
  CF_DEVICE void accumulate(Fragment<kRows, kDim>& out, Fragment<kRows, kKeys>& p, TileV& v) {
    sum.add(out, rescale, p, v);
  }

  CF_DEVICE float unit() const { return sum.unit; }
};

// Of doubles, as tensor cores take them.
template <int kRows, int kHalves>
struct Products<double, kRows, kHalves> : OperandTiles<double, kHalves> {
  static constexpr bool kStagesOut = false;

  template <int kTileRows, int kDim>
  struct OutTile {};

  double rescale[kRows / 8];  // of the output so far, by the softmax of the last tile

  template <int kKeys, class TileQ, class TileK>
  CF_DEVICE static void multiply(Fragment<kRows, kKeys, double>& s, TileQ& q, int warp_row, TileK& k) {
    gemm_abt_doubles(s, q, warp_row, k);
  }

  template <int kKeys, int kDim>
  CF_DEVICE void weigh(Fragment<kRows, kKeys, double>& s, RowState<double> (&rows)[kRows / 8],
                       Fragment<kRows, kDim, double>& /*out*/, double log2_unit) {
#pragma unroll
    for (int r = 0; r < kRows / 8; ++r) rescale[r] = softmax_row<true>(s, r, rows[r], log2_unit);
  }

  template <int kKeys, int kDim, class TileV>
  CF_DEVICE void accumulate(Fragment<kRows, kDim, double>& out, Fragment<kRows, kKeys, double>& p, TileV& v) {
    add_ab_doubles(out, rescale, p, v, 0);
  }

  CF_DEVICE static double unit() { return 1.; }
};

}  // namespace cuflash
