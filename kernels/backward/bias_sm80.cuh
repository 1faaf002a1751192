// One tile of dS on mma.sync tensor cores, for the gradient of a broadcast bias.
//
// Every visit of a block adds the same bias, which therefore lies in shared memory, in the order of fragments. A warp owns
// 32 rows of up to 64 columns, and goes through them 32 at a time: registers hold the sums, but not all of S and dP too.
#pragma once

#include "backward/bias.cuh"
#include "tile/copy.cuh"
#include "tile/dropout.cuh"
#include "tile/gemm_sm80.cuh"

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
  using Piece = Fragment<kWarpRows, kCols>;

  using Bias = typename Config::Bias;
  struct alignas(2 * sizeof(Bias)) BiasPair {  // two neighbours of a row
    Bias x[2];
  };

  struct SmemPlan {
    BiasPair bias[kPieces][Piece::kElements / 2][kThreads];  // each thread's own
    struct Stage {
      SharedTile<Element, kTileQ, kDimQk> q;
      SharedTile<Element, kTileQ, kDimV> dout;
      SharedTile<Element, kTileKv, kDimQk> k;
      SharedTile<Element, kTileKv, kDimV> v;
      RowShift<float> shift[kTileQ];
      float delta[kTileQ];
    } stage[kStages];
  };

  CF_DEVICE static int warp_row() { return ptx::warp_index() / kWarpsAcross * kWarpRows; }
  CF_DEVICE static int warp_col() { return ptx::warp_index() % kWarpsAcross * kWarpCols; }

  // Starts the copy of what one visit reads.
  CF_DEVICE static void load(SmemPlan& smem, int buffer, const BwdParams& p, const Sequence& sequence, int head,
                             int q_first, int kv_first) {
    const int head_kv = head / (p.attention.heads_q / p.attention.heads_kv);
    auto& stage = smem.stage[buffer];
    const auto q = query_rows<const Element>(p.q, p.q_stride, sequence, head).from(q_first);
    load_tile_async<Config::kDimQk, kBytes, kThreads>(stage.q, q);
    load_tile_async<Config::kDimV, kBytes, kThreads>(
        stage.dout, query_rows<const Element>(p.dout, p.dout_stride, sequence, head).from(q_first));
    load_tile_async<Config::kDimQk, kBytes, kThreads>(
        stage.k, key_rows<const Element>(p.k, p.k_stride, sequence, head_kv).from(kv_first));
    load_tile_async<Config::kDimV, kBytes, kThreads>(
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

  struct State {
    Piece total[kPieces];

    // For the tile of dbias that begins with this row and column; numbers of broadcast axes are 0.
    CF_DEVICE State(SmemPlan& smem, const Attention& a, int batch, int head, int q_first, int kv_first) {
      const Bias* g_bias = static_cast<const Bias*>(a.bias) + batch * a.bias_batch + head * a.bias_head;
      const int row_first = q_first + warp_row(), col_first = kv_first + warp_col();
      const bool one_row = a.bias_row == 0, one_column = a.bias_column == 0;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        total[piece].clear();
#pragma unroll
        for (int r = 0; r < Piece::kRowsPerLane; ++r) {
          const int row = row_first + row_of(ptx::lane_index(), r);
#pragma unroll
          for (int n = 0; n < Piece::kN; ++n) {
            BiasPair& pair = smem.bias[piece][Piece::number_of(r, n, 0) / 2][ptx::thread_index()];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int col = col_first + piece * kCols + col_of(ptx::lane_index(), n, i);
              const bool some = (one_row || row < a.len_q) && (one_column || col < a.len_kv);
              pair.x[i] = some ? g_bias[row * a.bias_row + col * a.bias_column] : Bias(0.f);
            }
          }
        }
      }
    }

    // Adds dS of one tile of one head; `full` where nothing of it is hidden or past the end.
    CF_DEVICE void add(SmemPlan& smem, int buffer, const BwdParams& p, const Sequence& sequence, int head, int q_first,
                       int kv_first, bool full) {
      auto& stage = smem.stage[buffer];
      const ScoreGradient<Config> gradient(p.attention, sequence, head);
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        ptx::sync_warp();  // here and below, or the compiler would begin what follows early, which takes registers
        const int col = warp_col() + piece * kCols;
        Piece s, dp;
        s.clear();
        dp.clear();
        gemm_abt<Element>(s, stage.q, warp_row(), stage.k, col);
        ptx::sync_warp();
        gemm_abt<Element>(dp, stage.dout, warp_row(), stage.v, col);
        drop(gradient.dropout, dp, q_first + warp_row(), kv_first + col);
        if (full) {
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
      const int lane = ptx::lane_index();
#pragma unroll
      for (int r = 0; r < Piece::kRowsPerLane; ++r) {
        const int row = warp_row() + row_of(lane, r), q = q_first + row;
        const RowShift<float> shift = stage.shift[row];
        const float delta = stage.delta[row];
#pragma unroll
        for (int n = 0; n < Piece::kN; ++n) {
          const BiasPair pair = smem.bias[piece][Piece::number_of(r, n, 0) / 2][ptx::thread_index()];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int kv = kv_first + col_of(lane, n, i);
            const float logit = gradient.score.apply(s.at(r, n, i), q, kv) + to_accumulator(pair.x[i]);
            const bool seen = !kCareful || (q < len_q && gradient.mask.keep(q, kv));
            const float weight = seen ? shift.probability(logit, gradient.log2_unit) : 0.f;
            // A row past the end has a bias of its own perhaps, which may be infinite; but it has no dS.
            total[piece].at(r, n, i) += gradient.of_logit(weight, dp.at(r, n, i), delta, true);
          }
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
