// One tile of dS on mma.sync tensor cores, for the gradient of a broadcast bias; of 16-bit elements, or of floats in halves.
//
// Every visit of a block adds the same bias, which therefore lies in shared memory. A warp owns 32 rows of up to 64
// columns, and goes through them 32 at a time: registers hold the sums, but not all of S and dP too.
#pragma once

#include "backward/bias.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/copy.cuh"
#include "tile/dropout.cuh"
#include "tile/held_bias.cuh"
#include "tile/products_sm80.cuh"

namespace cuflash {

template <class Config>
struct BiasTileSm80 {
  using Element = typename Config::Element;
  using Sequence = typename Config::Sequence;
  static constexpr int kThreads = Config::kThreads, kWarps = kThreads / 32, kStages = Config::kStages;
  static constexpr int kTileQ = Config::kTileQ, kTileKv = Config::kTileKv;
  static constexpr int kWarpRows = min_of(32, kTileQ* kTileKv / kWarps / 32), kWarpsDown = kTileQ / kWarpRows;
  static constexpr int kWarpsAcross = kWarps / kWarpsDown, kWarpCols = kTileKv / kWarpsAcross;
  static constexpr int kCols = 32, kPieces = kWarpCols / kCols;
  static_assert(kWarpsDown * kWarpsAcross == kWarps && kPieces * kCols == kWarpCols);
  static constexpr int kDimQk = round_up(Config::kDimQk, 16), kDimV = round_up(Config::kDimV, 16);
  static constexpr int kBytes = Config::kCopyBytes;
  static constexpr float kLog2 = static_cast<float>(kLog2E);
  using Piece = Fragment<kWarpRows, kCols>;
  using Products = cuflash::Products<Element, kWarpRows, Config::kHalves>;
  using Block = Fragment<16, 16>;

  struct SmemPlan {
    typename HeldBias<typename Config::Bias>::template Tile<kTileQ, kTileKv> bias;
    struct Stage {
      typename Products::template Tile<kTileQ, kDimQk> q;
      typename Products::template Tile<kTileQ, kDimV> dout;
      typename Products::template Tile<kTileKv, kDimQk> k;
      typename Products::template Tile<kTileKv, kDimV> v;
      RowShift<float> shift[kTileQ];
      float delta[kTileQ];
    } stage[kStages];
  };

  CF_DEVICE static int warp_row() { return ptx::warp_index() / kWarpsAcross * kWarpRows; }
  CF_DEVICE static int warp_col() { return ptx::warp_index() % kWarpsAcross * kWarpCols; }

  // Starts the copy of the bias for the tile of dbias that begins with this row and column; numbers of broadcast axes
  // are 0.
  CF_DEVICE static void begin(SmemPlan& smem, const Attention& a, int batch, int head, int q_first, int kv_first) {
    smem.bias.template load<kThreads>(a, batch, head, q_first, kv_first);
  }

  // Starts the copy of what one visit reads.
  CF_DEVICE static void load(SmemPlan& smem, int buffer, const BwdParams& p, const Sequence& sequence, int head,
                             int q_first, int kv_first) {
    const int head_kv = head / (p.attention.heads_q / p.attention.heads_kv);
    auto& stage = smem.stage[buffer];
    const auto q = query_rows<const Element>(p.q, p.q_stride, sequence, head).from(q_first);
    Products::template load<Config::kDimQk, kBytes, kThreads>(stage.q, q);
    Products::template load<Config::kDimV, kBytes, kThreads>(
        stage.dout, query_rows<const Element>(p.dout, p.dout_stride, sequence, head).from(q_first));
    Products::template load<Config::kDimQk, kBytes, kThreads>(
        stage.k, key_rows<const Element>(p.k, p.k_stride, sequence, head_kv).from(kv_first));
    Products::template load<Config::kDimV, kBytes, kThreads>(
        stage.v, key_rows<const Element>(p.v, p.v_stride, sequence, head_kv).from(kv_first));
    const int64 row_offset = query_offset(p.delta_stride, sequence, head) + q_first;
#pragma unroll 1
    for (int row = ptx::thread_index(); row < kTileQ; row += kThreads) {
      const bool valid = row < q.count;
      const int64 source = row_offset + (valid ? row : 0);
      const auto* g_shift = static_cast<const RowShift<float>*>(p.shift) + source;
      ptx::cp_async<8>(ptx::smem_u32(stage.shift + row), g_shift, valid);
      ptx::cp_async<4>(ptx::smem_u32(stage.delta + row), static_cast<const float*>(p.delta) + source, valid);
    }
    ptx::cp_async_commit();
  }

  // What that needs once it is here, by all threads.
  CF_DEVICE static void prepare(SmemPlan& smem, int buffer) {
    auto& stage = smem.stage[buffer];
    Products::template prepare<kBytes, kThreads>(stage.q);
    Products::template prepare<kBytes, kThreads>(stage.dout);
    Products::template prepare<kBytes, kThreads>(stage.k);
    Products::template prepare<kBytes, kThreads>(stage.v);
  }

  struct State {
    Piece total[kPieces];

    CF_DEVICE void clear() {
#pragma unroll
      for (Piece& piece : total) piece.clear();
    }

    // Adds dS of one tile of one head; `full` where nothing of it is hidden or past the end.
    CF_DEVICE void add(SmemPlan& smem, int buffer, const BwdParams& p, const Sequence& sequence, int head, int q_first,
                       int kv_first, bool full) {
      auto& stage = smem.stage[buffer];
      const ScoreGradient<Config> gradient(p.attention, sequence, head);
      const bool far = ptx::any(stage.shift[warp_row() + ptx::lane_index() % kWarpRows].is_far(kLog2));
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        ptx::sync_warp();  // here and below, or the compiler would begin what follows early, which takes registers
        const int col = warp_col() + piece * kCols;
        Piece s, dp;
        Products::multiply(s, stage.q, warp_row(), stage.k, col);
        ptx::sync_warp();
        Products::multiply(dp, stage.dout, warp_row(), stage.v, col);
        drop(gradient.dropout, dp, q_first + warp_row(), kv_first + col);
        if (full && !far && sizeof(Element) == 2) {  // a folded shift shows in floats
          add_piece<false>(piece, smem, buffer, gradient, s, dp, sequence.len_q, q_first, kv_first + col);
        } else {
          add_piece<true>(piece, smem, buffer, gradient, s, dp, sequence.len_q, q_first, kv_first + col);
        }
      }
    }

    template <bool kCareful>
    CF_DEVICE void add_piece(int piece, SmemPlan& smem, int buffer, const ScoreGradient<Config>& gradient, Piece& s,
                             Piece& dp, int len_q, int q_first, int kv_first) {
      const auto& stage = smem.stage[buffer];
      const int lane = ptx::lane_index(), warp_col = BiasTileSm80::warp_col() + piece * kCols;
#pragma unroll
      for (int m = 0; m < Piece::kM; ++m) {
        RowShift<float> shift[2];
        float delta[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = warp_row() + row_of(lane, m * 2 + r);
          shift[r] = kCareful ? stage.shift[row] : stage.shift[row].folded(kLog2);
          delta[r] = stage.delta[row];
        }
#pragma unroll
        for (int n = 0; n < Piece::kN; n += 2) {
          const auto block = smem.bias.block(warp_row() + m * 16, warp_col + n * 8, lane);
          Block::for_each_index([&](int down, int across, int i) {
            const int r = m * 2 + down, q = q_first + warp_row() + row_of(lane, r);
            const int kv = kv_first + col_of(lane, n + across, i);
            // A row past the end has a bias of its own perhaps, which may be infinite; but it has no dS.
            const float bias = !kCareful || q < len_q ? block.at(down, across, i) : 0.f;
            const float weight = gradient.probability(s.at(r, n + across, i), bias, shift[down], q, kv, !kCareful);
            total[piece].at(r, n + across, i) += gradient.of_logit(weight, dp.at(r, n + across, i), delta[down], true);
          });
        }
      }
    }

    // f(element, row, column) of the tile over this thread's elements.
    template <class F>
    CF_DEVICE void for_each(F&& f) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        total[piece].for_each(ptx::lane_index(), [&](float x, int row, int col) {
          f(x, warp_row() + row, warp_col() + piece * kCols + col);
        });
      }
    }
  };
};

}  // namespace cuflash
