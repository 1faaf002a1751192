// fp32 on 16-bit tensor cores: a number is the sum of two halves in fp16, of 11 bits each and a sign of its own.
//
//   x * up = high + low / 2^11 + rest,   |rest| <= 2^-23 |high| or so
//   a b    = a.high b.high + (a.high b.low + a.low b.high) / 2^11     a.low b.low is below what fp32 keeps
//
//     a row as it is copied                         the same bytes after halve_rows
//     | float | float | float | ... | float |       | high | high | ... | high | low | low | ... | low |   scale
//
// Powers of two take a row of a tile to where fp16 has its digits: `up` brings the largest number of the row to
// [2^14, 2^15), and its inverse, `scale`, is what products are multiplied by. Numbers down to 2^-28 of the row's largest
// keep 22 bits or more, smaller ones are off by 2^-51 of the largest. A row with an infinity is NaN.
//
// Tensor cores cut off what they add beyond a sum's last bits (Fasi, Higham, Mikaitis and Pranesh 2021, "Numerical
// behavior of NVIDIA tensor cores"). So small products, which would drop the most, are summed apart from large ones, and
// what a tile adds to an output is a sum of its own, which is added in fp32.
//
// With the high half alone products are those of numbers rounded to 11 bits, which is what TF32 keeps, in one instruction
// instead of three (kHalves = 1).
//
// The scheme is that of Ootomo and Yokota 2022, "Recovering single precision accuracy from tensor cores while
// surpassing the FP32 theoretical peak performance" (arXiv 2203.03341), with scales for whole rows, as fp16 lacks range.
#pragma once

#include "tile/copy.cuh"
#include "tile/gemm_sm80.cuh"

namespace cuflash {

// kRows rows of kCols floats, then of two halves. Of the high one alone the rest of a row is where its floats arrive.
template <int kRows_, int kCols_, int kHalves_ = 2>
struct HalvesTile {
  static constexpr int kRows = kRows_, kCols = kCols_, kHalves = kHalves_;
  using Halves = SharedTile<fp16, kRows, 2 * kCols>;               // all high ones, then all low ones
  static constexpr int kPitch = Halves::kPitch, kLow = kCols * 2;  // bytes from a high half to the low one

  Halves halves;
  float scale[kRows];

  CF_DEVICE float* at(int row, int col) { return reinterpret_cast<float*>(halves.at(row, 2 * col)); }
  CF_DEVICE uint32 address(int row, int col) { return halves.address(row, 2 * col); }
};

// Powers of two: `up` takes a number to [2^14, 2^15), or as far as a float can, and `down` back; NaN of infinity.
struct PowerScale {
  float up, down;

  CF_DEVICE static PowerScale of(float magnitude) {
    constexpr uint32 kBias = 127, kInfinite = 255;
    const uint32 exponent = __float_as_uint(magnitude) >> 23;
    const uint32 up = min_of(2 * kBias + 14 - exponent, 2 * kBias - 1);
    const float down = __uint_as_float((2 * kBias - up) << 23);
    return {__uint_as_float(up << 23), exponent == kInfinite ? __uint_as_float(0x7fffffffu) : down};
  }
};

// 1 / x of a power of two from 2^-126 to 2^126.
CF_DEVICE float inverse_power(float x) { return __uint_as_float(0x7f000000u - __float_as_uint(x)); }

// The low half times this; so it has its digits wherever the high one does.
constexpr float kLowUnit = 0x1p11f;

// Two numbers into their halves, or into the high one.
template <int kHalves>
CF_DEVICE void halve_pair(uint32& high, uint32& low, float a, float b) {
  float high_a, high_b;
  high = ptx::pack<fp16>(a, b);
  if (kHalves == 1) return;
  ptx::unpack(high, high_a, high_b);
  low = ptx::pack<fp16>((a - high_a) * kLowUnit, (b - high_b) * kLowUnit);
}

constexpr int kLanesOfRow = 8;  // that copy a row and turn it into halves

template <int kDim, int kBytes, int kThreads, class Tile, class Rows>
CF_DEVICE void load_floats_async(Tile& tile, const Rows& rows) {
  load_tile_async<kDim, kBytes, kThreads, kLanesOfRow>(tile, rows);
}

// Turns a tile of floats, copied by load_floats_async and waited for, into halves, for whoever comes behind a barrier.
// Each thread has what it copied itself, where that is whole units.
template <int kBytes, int kThreads, class Tile>
CF_DEVICE void halve_rows(Tile& tile) {
  constexpr int kUnits = Tile::kCols / 4, kAcross = min_of(kLanesOfRow, power_of_two_above(kUnits));
  constexpr int kUnitsPerLane = cdiv(kUnits, kAcross), kRowsAtOnce = kThreads / kAcross;
  if constexpr (kBytes < 16) ptx::sync_threads();
  const int first_row = ptx::thread_index() / kAcross, first_unit = ptx::thread_index() % kAcross;
#pragma unroll(kUnitsPerLane > 2 ? 1 : 2)
  for (int down = 0; down < Tile::kRows; down += kRowsAtOnce) {
    const int row = down + first_row;
    if (Tile::kRows % kRowsAtOnce != 0 && row >= Tile::kRows) break;  // whole warps
    float4 x[kUnitsPerLane];
    float largest = 0.f;
#pragma unroll
    for (int unit = 0; unit < kUnitsPerLane; ++unit) {
      const int col = (first_unit + unit * kAcross) * 4;
      const bool valid = kUnits % kAcross == 0 || col < Tile::kCols;
      x[unit] = valid ? *reinterpret_cast<const float4*>(tile.at(row, col)) : float4{0.f, 0.f, 0.f, 0.f};
      largest = max_of(
          largest, max_of(max_of(abs_of(x[unit].x), abs_of(x[unit].y)), max_of(abs_of(x[unit].z), abs_of(x[unit].w))));
    }
#pragma unroll
    for (int lanes = kAcross / 2; lanes > 0; lanes /= 2) {
      largest = max_of(largest, ptx::shuffle_xor(largest, lanes));
    }
    const PowerScale scale = PowerScale::of(largest);
    ptx::sync_warp();  // the row has been read
#pragma unroll
    for (int unit = 0; unit < kUnitsPerLane; ++unit) {
      const int col = (first_unit + unit * kAcross) * 4;
      if (kUnits % kAcross != 0 && col >= Tile::kCols) continue;
      uint2 high, low;
      halve_pair<Tile::kHalves>(high.x, low.x, x[unit].x * scale.up, x[unit].y * scale.up);
      halve_pair<Tile::kHalves>(high.y, low.y, x[unit].z * scale.up, x[unit].w * scale.up);
      *reinterpret_cast<uint2*>(tile.halves.at(row, col)) = high;
      if (Tile::kHalves == 2) *reinterpret_cast<uint2*>(tile.halves.at(row, Tile::kCols + col)) = low;
    }
    if (first_unit == 0) tile.scale[row] = scale.down;
  }
}

// The two halves of an A operand, by blocks of 16 columns and of 16 rows.
template <int kRows, int kCols>
struct OperandHalves {
  uint32 high[kCols / 16][kRows / 16][4], low[kCols / 16][kRows / 16][4];
};

template <int kHalves, int kRows, int kCols>
CF_DEVICE void halve_operand(OperandHalves<kRows, kCols>& operand, const Fragment<kRows, kCols>& f) {
#pragma unroll
  for (int k = 0; k < kCols / 16; ++k) {
#pragma unroll
    for (int m = 0; m < kRows / 16; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&block)[4] = f.x[m][2 * k + i / 2];
        halve_pair<kHalves>(operand.high[k][m][i], operand.low[k][m][i], block[i % 2 * 2], block[i % 2 * 2 + 1]);
      }
    }
  }
}

// Which operand of S = Q K^T is A: both products must round alike, as the gradient takes the forward's maximum off its
// own scores.
enum class Role { kQueries, kKeys };

// C += A B^T over kSteps * 16 columns, where A and B have these addresses. Small products are summed apart.
template <Role kA, int kSteps, int kM, int kN, class TileA, class TileB>
CF_DEVICE void add_columns_of_abt(Fragment<kM, kN>& c, uint32 a_address, uint32 b_address) {
  static_assert(TileA::kHalves == TileB::kHalves);
  constexpr bool kBoth = TileA::kHalves == 2;
  uint32 a_high[kSteps][kM / 16][4], a_low[kSteps][kM / 16][4];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int m = 0; m < kM; m += 16) {
      const uint32 address = a_address + (m * TileA::kPitch + step * 16) * 2;
      if (kBoth) ptx::ldmatrix_x4(a_low[step][m / 16], address + TileA::kLow);
      ptx::ldmatrix_x4(a_high[step][m / 16], address);
    }
  }
#pragma unroll
  for (int n = 0; n < kN; n += 16) {
    Fragment<kM, 16> small;
    small.clear();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32 address = b_address + (n * TileB::kPitch + step * 16) * 2;
      uint32 b_high[4], b_low[4];
      ptx::ldmatrix_x4(b_high, address);
      if (kBoth) ptx::ldmatrix_x4(b_low, address + TileB::kLow);
      if constexpr (kBoth && kA == Role::kQueries) add_blocks<fp16>(small, 0, a_low[step], b_high);
      if constexpr (kBoth && kA == Role::kKeys) add_blocks<fp16>(small, 0, a_high[step], b_low);
      add_blocks<fp16>(c, n, a_high[step], b_high);
      if constexpr (kBoth && kA == Role::kQueries) add_blocks<fp16>(small, 0, a_high[step], b_low);
      if constexpr (kBoth && kA == Role::kKeys) add_blocks<fp16>(small, 0, a_low[step], b_high);
    }
    if constexpr (!kBoth) continue;
    small.for_each_index([&](int r, int block, int i) {
      float& x = c.at(r, n / 8 + block, i);
      x = fma(small.at(r, block, i), 1 / kLowUnit, x);
    });
  }
}

// C = A B^T with A [M x K] and B [N x K] as halves in shared memory; A starts at row `a_row`, B at row `b_row`.
template <Role kA, int kM, int kN, class TileA, class TileB>
CF_DEVICE void gemm_abt_halves(Fragment<kM, kN>& c, TileA& a, int a_row, TileB& b, int b_row = 0) {
  static_assert(TileA::kCols == TileB::kCols);
  constexpr int kCols = TileA::kCols;
  const uint32 a_address = a.halves.address(a_row + down_first_row(), down_first_col());
  const uint32 b_address = b.halves.address(b_row + across_first_row(), across_first_col());
  c.clear();
#pragma unroll 1
  for (int k = 0; k + 32 <= kCols; k += 32) {
    add_columns_of_abt<kA, 2, kM, kN, TileA, TileB>(c, a_address + k * 2, b_address + k * 2);
  }
  if constexpr (kCols % 32 != 0) {
    constexpr int kLast = kCols - 16;
    add_columns_of_abt<kA, 1, kM, kN, TileA, TileB>(c, a_address + kLast * 2, b_address + kLast * 2);
  }
  const int lane = ptx::lane_index();
  float a_scale[kM / 8];
#pragma unroll
  for (int r = 0; r < kM / 8; ++r) a_scale[r] = a.scale[a_row + row_of(lane, r)];
#pragma unroll
  for (int n = 0; n < kN / 8; ++n) {
    const float2 b_scale = *reinterpret_cast<const float2*>(&b.scale[b_row + col_of(lane, n, 0)]);
#pragma unroll
    for (int r = 0; r < kM / 8; ++r) {
      c.at(r, n, 0) *= a_scale[r] * b_scale.x;
      c.at(r, n, 1) *= a_scale[r] * b_scale.y;
    }
  }
}

// f(r, n, i, x) of the elements of A B, 16 columns at a time, with the halves of A [M x K] in registers and those of
// B [K x N] in shared memory, from column `b_col` on, whose rows' scales are left out.
template <int kN, int kM, int kK, class TileB, class F>
CF_DEVICE void for_each_of_ab_halves(const OperandHalves<kM, kK>& a, TileB& b, int b_col, F&& f) {
  const uint32 b_address = b.halves.address(down_first_row(), b_col + down_first_col());
#pragma unroll
  for (int n = 0; n < kN; n += 16) {
    Fragment<kM, 16> large, small;
    large.clear();
    small.clear();
#pragma unroll
    for (int k = 0; k < kK / 16; ++k) {
      uint32 b_high[4], b_low[4];
      ptx::ldmatrix_x4_trans(b_high, b_address + (k * 16 * TileB::kPitch + n) * 2);
      if constexpr (TileB::kHalves == 2) {
        ptx::ldmatrix_x4_trans(b_low, b_address + (k * 16 * TileB::kPitch + n) * 2 + TileB::kLow);
        add_blocks<fp16>(small, 0, a.low[k], b_high);
      }
      add_blocks<fp16>(large, 0, a.high[k], b_high);
      if constexpr (TileB::kHalves == 2) add_blocks<fp16>(small, 0, a.high[k], b_low);
    }
    large.for_each_index([&](int r, int block, int i) {
      f(r, n / 8 + block, i, fma(small.at(r, block, i), 1 / kLowUnit, large.at(r, block, i)));
    });
  }
}

// The sum of products A B over tiles, whose rows are scaled by what is in `unit`: the largest scale of B's rows so far.
struct HalvesSum {
  float unit = 0x1p-126f;

  // sum += A B; see below.
  template <int kM, int kN, int kK, class TileB>
  CF_DEVICE void add(Fragment<kM, kN>& sum, Fragment<kM, kK>& a, TileB& b, int b_col) {
    float rescale[kM / 8];
#pragma unroll
    for (float& factor : rescale) factor = 1.f;
    add(sum, rescale, a, b, b_col);
  }

  // sum = sum * rescale + A B, with A [M x K] in registers, which it takes to pieces, and B [K x N] in shared memory from
  // column `b_col` on. Each row of B has a scale, which A is multiplied by; the largest number of a row of that then
  // scales the row. So a row of B counts as much as it adds, and not at all where A is 0, whatever its numbers.
  template <int kM, int kN, int kK, class TileB>
  CF_DEVICE void add(Fragment<kM, kN>& sum, float (&rescale)[kM / 8], Fragment<kM, kK>& a, TileB& b, int b_col = 0) {
    const int lane = ptx::lane_index();
    float2 scale[kK / 8];
    float largest = unit;
#pragma unroll
    for (int n = 0; n < kK / 8; ++n) {
      scale[n] = *reinterpret_cast<const float2*>(&b.scale[col_of(lane, n, 0)]);
      largest = max_of(largest, max_of(scale[n].x, scale[n].y));
    }
    largest = row_max(largest);  // over all rows of B
    const float to_unit = inverse_power(largest), shrink = unit * to_unit;
    unit = largest;
#pragma unroll
    for (int n = 0; n < kK / 8; ++n) {
      scale[n].x *= to_unit;
      scale[n].y *= to_unit;
    }
    float row_unit[kM / 8];
#pragma unroll
    for (int r = 0; r < kM / 8; ++r) {
      rescale[r] *= shrink;
      float most = 0.f;
#pragma unroll
      for (int n = 0; n < kK / 8; ++n) {
        a.at(r, n, 0) *= scale[n].x;
        a.at(r, n, 1) *= scale[n].y;
        most = max_of(most, max_of(abs_of(a.at(r, n, 0)), abs_of(a.at(r, n, 1))));
      }
      const PowerScale power = PowerScale::of(row_max(most));
      scale_row(a, r, power.up);
      row_unit[r] = power.down;
    }
    OperandHalves<kM, kK> halves;
    halve_operand<TileB::kHalves>(halves, a);
    for_each_of_ab_halves<kN>(halves, b, b_col, [&](int r, int n, int i, float x) {
      sum.at(r, n, i) = fma(sum.at(r, n, i), rescale[r], x * row_unit[r]);
    });
  }
};

}  // namespace cuflash
