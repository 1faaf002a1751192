// What the Hopper backward keeps of each query tile in global memory: the fp32 sums of dQ, and what its rows need.
//
// Key tiles add their shares of dQ = dS K to the sums as they lie in registers. So a tile is stored in fragment order,
// [share][warp][four registers][lane] of four floats: a warp's addition is 512 neighbouring bytes, all that it adds
// lies together, and whoever reads it back (backward/convert_sm90.cuh) owns the same registers. A share is 64 queries
// and up to 64 columns: of 128 queries those of one half, else all queries and a chunk of the columns.
#pragma once

#include "attention/sequence.cuh"
#include "attention/softmax.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/copy_tma.cuh"
#include "tile/gemm_sm90.cuh"

namespace cuflash {

template <class Config>
struct QueryTiles {
  static constexpr int kTileQ = Config::kTileQ;
  static constexpr bool kByRows = kTileQ == 128;
  static constexpr int kShares = kByRows ? 2 : cdiv(Config::kDimQk, 64);
  static constexpr int kShareColumns = kByRows ? round_up(Config::kDimQk, 16) : 64;
  static constexpr int kColumns = kByRows ? kShareColumns : 64 * kShares;
  static constexpr int kShareFloats = 64 * kShareColumns;
  using Share = Fragment<16, kShareColumns>;

  CF_DEVICE static int64 index(const Attention& a, const typename Config::Sequence& sequence, int head, int tile) {
    return head * Config::Sequence::num_q_tiles(a, kTileQ) + sequence.first_q_tile(kTileQ) + tile;
  }

  // Starts a share of dQ = dS K, with dS = ds[buffer] and K in tiles of 64 keys.
  template <class Element, class DsTile, class KTile>
  CF_DEVICE static void issue(Share& dq, DsTile* ds, int buffer, KTile* k, int share) {
    static_assert(kByRows ? Config::kDimQk <= 64 : kTileQ == 64);
    issue_ab<Element>(dq, ds, buffer, kByRows ? share * 64 : 0, k, kByRows ? 0 : share * 64);
  }

  // A thread's part of a share, the first of its groups of four; the next ones lie a warp's further.
  CF_DEVICE static int64 part(int64 index, int share, int thread) {
    return (index * kShares + share) * kShareFloats + thread / 32 * (kShareFloats / 4) + thread % 32 * 4;
  }
  static constexpr int kGroupFloats = 4 * 32;

  // Puts a warp's part of a share where it belongs in the whole tile.
  template <class Element, class Tile>
  CF_DEVICE static void store(Tile& tile, const Share& dq, int share, int warp, int lane) {
    store_fragment<Element>(tile, (kByRows ? share * 64 : 0) + warp * 16, kByRows ? 0 : share * 64, lane, dq);
  }
};

// How a warp adds its part of a share to the sums, of which `sums` is the thread's: from registers,
template <class Share, bool kCopied>
struct ShareAdder {
  CF_DEVICE void add(float* sums, const Share& dq, bool some) {
    if (!some) return;  // of each addition there would be a branch of its own
#pragma unroll
    for (int n = 0; n < Share::kN; ++n) ptx::red_add_x4(sums + n * 4 * 32, dq.x[0][n], true);
  }
  CF_DEVICE void finish() {}
};

// or from shared memory by the copy engine, while the warp goes on.
template <class Share>
struct ShareAdder<Share, true> {
  struct alignas(16) Four {
    float x[4];
  };
  Four part[Share::kN][32];

  CF_DEVICE void add(float* sums, const Share& dq, bool some) {
    const int lane = ptx::lane_index();
    finish();
    ptx::sync_warp();
#pragma unroll
    for (int n = 0; n < Share::kN; ++n) {
      part[n][lane] = {dq.x[0][n][0], dq.x[0][n][1], dq.x[0][n][2], dq.x[0][n][3]};
    }
    ptx::fence_proxy_async();
    ptx::sync_warp();
    if (some && lane == 0) {
      ptx::bulk_add(sums, ptx::smem_u32(part), sizeof(part));
      ptx::tma_store_commit();
    }
  }
  // Until the part has been read.
  CF_DEVICE void finish() {
    if (ptx::lane_index() == 0) ptx::tma_store_wait_read();
  }
};

// What must be known of a query tile's rows: exp2(x * log2_unit - shift) is the probability of a score x. Of a far row
// (RowState::is_far), whose shift would round, m is what must be taken off its scores first; else m is 0.
template <int kTileQ>
struct alignas(16) RowTile {
  struct alignas(16) Four {
    float x[4];
  };

  float shift[kTileQ];
  float delta[kTileQ];
  float m[kTileQ];
  int far;  // whether some row is
  int unused[3];

  // Takes in a row; `far` must have been 0 before all.
  CF_DEVICE void put(int row, const RowShift<float>& its, float its_delta, float log2_unit) {
    const bool is_far = its.is_far(log2_unit);
    shift[place(row)] = is_far ? its.log2_l : its.m * log2_unit + its.log2_l;
    m[place(row)] = is_far ? its.m : 0.f;
    delta[place(row)] = its_delta;
    if (is_far) far = 1;
  }

  // Where a row's numbers are: those of the four columns that a lane has of 16 of a transposed fragment are neighbours,
  // as a load of 16 bytes costs what one of 4 does.
  CF_DEVICE static int place(int row) { return row / 16 * 16 + row % 8 / 2 * 4 + row % 16 / 8 * 2 + row % 2; }
  CF_DEVICE static Four of_lane(const float (&numbers)[kTileQ], int k, int lane) {
    return *reinterpret_cast<const Four*>(numbers + k * 16 + lane % 4 * 4);
  }
};

}  // namespace cuflash
