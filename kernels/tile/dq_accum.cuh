// The accumulator of dq, in fp32 or fp64, in global memory, to which every key tile's block adds its share.
//
// One tile of kTileQ rows x kCols columns is stored in fragment order, [element][thread], or where four elements are added
// at once [four elements][thread][element]: a warp's addition is one coalesced piece, and whoever reads it back
// (backward/convert.cuh) owns the same fragment.
#pragma once

#include "attention/sequence.cuh"
#include "element.cuh"
#include "ptx/memory.cuh"
#include "ptx/sync.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/fragment.cuh"

namespace cuflash {

template <class Config>
struct DqAccum {
  using Real = Accumulator<typename Config::Element>;
  static constexpr int kThreads = Config::kThreads, kWarps = kThreads / 32;
  // Four warps across make square fragments; two where the columns would need padding for four.
  static constexpr int kWidest = Config::kDimQk % (64 * Config::kDimSplits) == 0 ? 4 : 2;
  static constexpr int kWarpsDown = max_of(1, min_of(kWarps / kWidest, Config::kTileQ / 16));
  static constexpr int kWarpsAcross = kWarps / kWarpsDown;
  // Columns of q and k in shared memory, a whole number of fragments for every warp of every split.
  static constexpr int kDimQk = round_up(Config::kDimQk, 16 * kWarpsAcross * Config::kDimSplits);
  static constexpr int kCols = kDimQk / Config::kDimSplits;  // of one block's share
  static constexpr int kTileSize = Config::kTileQ * kCols;
  static constexpr int kWarpRows = Config::kTileQ / kWarpsDown, kWarpCols = kCols / kWarpsAcross;
  using Share = Fragment<kWarpRows, kWarpCols, Real>;

  CF_DEVICE static int warp_row() { return ptx::warp_index() / kWarpsAcross * kWarpRows; }
  CF_DEVICE static int warp_col() { return ptx::warp_index() % kWarpsAcross * kWarpCols; }

  CF_DEVICE static Real* tile(const BwdParams& p, int64 index) {
    return static_cast<Real*>(p.dq_accum) + index * kTileSize;
  }
  // Number of the tile among all (heads_q, query tiles, splits).
  CF_DEVICE static int64 index(const Attention& a, const typename Config::Sequence& sequence, int head, int tile,
                               int split) {
    const int64 tiles = Config::Sequence::num_q_tiles(a, Config::kTileQ);
    return (head * tiles + sequence.first_q_tile(Config::kTileQ) + tile) * Config::kDimSplits + split;
  }

  // Neighbours in a lane's fragment that are added at once: by one instruction, or one by one.
  static constexpr int kTogether = ptx::kAddsFour && IsSame<Real, float>::value ? 4 : 1;

  // f(elements, address of their accumulators)
  template <class F>
  CF_DEVICE static void for_each(Share& share, Real* tile, F&& f) {
    Real* address = tile + ptx::thread_index() * kTogether;
#pragma unroll
    for (int m = 0; m < Share::kM; ++m) {
#pragma unroll
      for (int n = 0; n < Share::kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; i += kTogether) {
          f(share.x[m][n] + i, address);
          address += kThreads * kTogether;
        }
      }
    }
  }
  CF_DEVICE static void add(Share& share, Real* tile) {
    for_each(share, tile, [](Real* x, Real* accumulator) {
      if constexpr (kTogether == 4) {
        const float four[4] = {x[0], x[1], x[2], x[3]};
        ptx::red_add_x4(accumulator, four, true);
      } else {
        ptx::red_add(accumulator, *x);
      }
    });
  }
  CF_DEVICE static void read(Share& share, Real* tile) {
    for_each(share, tile, [](Real* x, const Real* accumulator) {
      if constexpr (kTogether == 4) {
        const float4 four = *reinterpret_cast<const float4*>(accumulator);
        x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
      } else {
        *x = *accumulator;
      }
    });
  }
};

// Blocks add in whatever order they arrive: fast, and different in the last bits from run to run. The first key tile
// comes first: under a causal mask it is the longest.
struct AtomicReduction {
  static constexpr bool kOrdered = false;
  CF_DEVICE static int key_tile(int index, int /*tiles*/) { return index; }
  // From which query tile on a key tile walks: neighbours add to different ones.
  CF_DEVICE static int first_query_tile(int key_tile) { return key_tile; }
  template <class... Who>
  CF_DEVICE static void wait_turn(int*, int, Who...) {}
  template <class... Who>
  CF_DEVICE static void pass_turn(int*, Who...) {}
};

// Blocks add to a query tile in falling order of their key tiles. Under a causal mask all blocks of a head thus start
// at their diagonals at once and follow each other like a wave. A block waits only for blocks of lower index, which the
// hardware starts first.
struct OrderedReduction {
  static constexpr bool kOrdered = true;
  CF_DEVICE static int key_tile(int index, int tiles) { return tiles - 1 - index; }
  CF_DEVICE static int first_query_tile(int /*key_tile*/) { return 0; }
  CF_DEVICE static void wait_turn(const int* turn, int before) {
    if (ptx::thread_index() == 0) spin(turn, before);
    ptx::sync_threads();
  }
  CF_DEVICE static void pass_turn(int* turn) {
    ptx::fence();
    ptx::sync_threads();
    if (ptx::thread_index() == 0) ptx::red_add_release(turn, 1);
  }
  // The same of a warpgroup by itself, one of whose threads is the leader, and which has a named barrier.
  CF_DEVICE static void wait_turn(const int* turn, int before, bool leader, int barrier) {
    if (leader) spin(turn, before);
    ptx::sync_named(barrier, ptx::kWarpgroupThreads);
  }
  CF_DEVICE static void pass_turn(int* turn, bool leader, int barrier) {
    ptx::fence();
    ptx::sync_named(barrier, ptx::kWarpgroupThreads);
    if (leader) ptx::red_add_release(turn, 1);
  }

 private:
  CF_DEVICE static void spin(const int* turn, int before) {
    while (ptx::load_acquire(turn) != before) {}
  }
};

}  // namespace cuflash
