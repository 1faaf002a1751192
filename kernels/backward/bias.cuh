// Gradient of the additive bias, reduced over the axes it was broadcast along, in fp32 and in a fixed order.
//
//   dbias[b', h', i', j'] = sum of dS[b, h, i, j] over all (b, h, i, j) that read that element
//
// One block owns one kTileQ x kTileKv tile of dbias (the whole axis where it is broadcast) and recomputes dS for every
// (b, h, q tile, kv tile) that reads it: two products where an accumulator in global memory would need atomics and, for
// a broadcast bias, the full (b, h, len_q, len_kv) of memory.
#pragma once

#include "attention/softmax.cuh"
#include "tile/copy.cuh"
#include "tile/dropout.cuh"
#include "tile/gemm_sm80.cuh"

namespace cuflash {

// The parts of one axis that a block visits: all of it where the bias is broadcast, else its own.
struct Axis {
  int begin, end;

  CF_DEVICE static Axis of(bool broadcast, int own, int all) { return broadcast ? Axis{0, all} : Axis{own, own + 1}; }
};

template <class Config>
struct BackwardBiasSm80 {
  using Element = typename Config::Element;
  using Sequence = typename Config::Sequence;
  static constexpr int kThreads = Config::kThreads, kWarps = kThreads / 32;
  static constexpr int kTileQ = Config::kTileQ, kTileKv = Config::kTileKv, kWarpRows = kTileQ / kWarps;
  static constexpr int kDimQk = round_up(Config::kDimQk, 16), kDimV = round_up(Config::kDimV, 16);
  static constexpr int kBytes = Config::kCopyBytes;
  using Scores = Fragment<kWarpRows, kTileKv>;

  struct SmemPlan {
    SharedTile<Element, kTileQ, kDimQk> q;
    SharedTile<Element, kTileQ, kDimV> dout;
    SharedTile<Element, kTileKv, kDimQk> k;
    SharedTile<Element, kTileKv, kDimV> v;
    float sum[kTileQ][kTileKv + 1];
  };

  // Adds dS of one tile of one head to `total`.
  CF_DEVICE static void add_tile(SmemPlan& smem, const BwdParams& p, const Sequence& sequence, int head, int q_first,
                                 int kv_first, Scores& total) {
    const Attention& a = p.attention;
    const int lane = ptx::lane_index(), warp_row = ptx::warp_index() * kWarpRows, head_kv = head / (a.heads_q / a.heads_kv);
    const auto load = [&](auto& tile, auto dim, const void* base, const Strides& stride, int64 offset, int at_head,
                          int first, int rows) {
      load_tile_async<decltype(dim)::value, kBytes, kThreads>(
          tile, static_cast<const Element*>(base) + offset + at_head * stride.head + first * stride.row, stride.row,
          rows - first);
    };
    ptx::sync_threads();  // every warp is done with the tiles before
    load(smem.q, Constant<Config::kDimQk>(), p.q, p.q_stride, sequence.q_offset(p.q_stride), head, q_first,
         sequence.len_q);
    load(smem.dout, Constant<Config::kDimV>(), p.dout, p.dout_stride, sequence.q_offset(p.dout_stride), head, q_first,
         sequence.len_q);
    load(smem.k, Constant<Config::kDimQk>(), p.k, p.k_stride, sequence.kv_offset(p.k_stride), head_kv, kv_first,
         sequence.len_kv);
    load(smem.v, Constant<Config::kDimV>(), p.v, p.v_stride, sequence.kv_offset(p.v_stride), head_kv, kv_first,
         sequence.len_kv);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::sync_threads();

    Scores s, dp;
    s.clear();
    dp.clear();
    gemm_abt<Element>(s, smem.q, warp_row, smem.k);
    gemm_abt<Element>(dp, smem.dout, warp_row, smem.v);
    const typename Config::Dropout dropout(a, sequence, head);
    const float keep_scale = Config::Dropout::scale(a);
    dp.for_each(lane, [&](float& x, int, int) { x *= keep_scale; });
    for_each_dropped(dropout, dp, q_first + warp_row, kv_first, [&](int m, int n, int i) { dp.x[m][n][i] = 0.f; });

    const typename Config::Mask mask(a, sequence, head);
    const typename Config::Score score(a, sequence, head);
    const float log2_unit = score.unit() * static_cast<float>(kLog2E);
    const int64 row_offset = sequence.q_offset(p.delta_stride) + head * p.delta_stride.head;
    const float* g_lse2 = static_cast<const float*>(p.lse2) + row_offset;
    const float* g_delta = static_cast<const float*>(p.delta) + row_offset;
#pragma unroll
    for (int r = 0; r < Scores::kRowsPerLane; ++r) {
      const int q = q_first + warp_row + r * 8 + lane / 4;
      const bool exists = q < sequence.len_q;
      const float lse2 = exists ? g_lse2[q] : infinity<float>(), delta = exists ? g_delta[q] : 0.f;
#pragma unroll
      for (int n = 0; n < Scores::kN; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int kv = kv_first + n * 8 + lane % 4 * 2 + i;
          const float x = score.apply(s.at(r, n, i), q, kv);
          const float weight = exists && mask.keep(q, kv) ? exp2(x * log2_unit - lse2) : 0.f;
          total.at(r, n, i) += weight * (dp.at(r, n, i) - delta);
        }
      }
    }
  }

  CF_DEVICE static void run(const BwdParams& p) {
    SmemPlan& smem = *reinterpret_cast<SmemPlan*>(ptx::dynamic_smem());
    const Attention& a = p.attention;
    const bool one_batch = a.bias_batch == 0, one_head = a.bias_head == 0, one_row = a.bias_row == 0,
               one_column = a.bias_column == 0;
    const int tiles_q = cdiv(a.len_q, kTileQ), tiles_kv = cdiv(a.len_kv, kTileKv);
    int64 block = ptx::block_index();
    const auto digit = [&](bool one, int count) {  // of the block index, fastest axis first
      const int own = one ? 0 : static_cast<int>(block % count);
      block = one ? block : block / count;
      return own;
    };
    const int own_kv = digit(one_column, tiles_kv), own_q = digit(one_row, tiles_q), own_head = digit(one_head, a.heads_q),
              own_batch = digit(one_batch, a.batch);

    Scores total;
    total.clear();
    const Axis batches = Axis::of(one_batch, own_batch, a.batch), heads = Axis::of(one_head, own_head, a.heads_q);
    for (int batch = batches.begin; batch < batches.end; ++batch) {
      const Sequence sequence(a, batch);
      const Axis q_tiles = Axis::of(one_row, own_q, cdiv(sequence.len_q, kTileQ));
      for (int head = heads.begin; head < heads.end; ++head) {
        const typename Config::Mask mask(a, sequence, head);
        for (int q_tile = q_tiles.begin; q_tile < q_tiles.end && q_tile * kTileQ < sequence.len_q; ++q_tile) {
          const Tiles seen = mask.kv_tiles(q_tile * kTileQ, kTileQ, kTileKv);
          const Axis kv_tiles = Axis::of(one_column, own_kv, tiles_kv);
          for (int tile = max_of(kv_tiles.begin, seen.begin); tile < min_of(kv_tiles.end, seen.end); ++tile) {
            add_tile(smem, p, sequence, head, q_tile * kTileQ, tile * kTileKv, total);
          }
        }
      }
    }

    const int lane = ptx::lane_index(), warp_row = ptx::warp_index() * kWarpRows;
    total.for_each(lane, [&](float x, int row, int col) { smem.sum[warp_row + row][col] = x; });
    ptx::sync_threads();
    if (one_row) {
      reduce(kTileKv, kTileQ, [&](int col, int row) -> float& { return smem.sum[row][col]; });
    }
    if (one_column) {
      reduce(one_row ? 1 : kTileQ, kTileKv, [&](int row, int col) -> float& { return smem.sum[row][col]; });
    }
    const int rows = one_row ? 1 : min_of(kTileQ, a.len_q - own_q * kTileQ);
    const int cols = one_column ? 1 : min_of(kTileKv, a.len_kv - own_kv * kTileKv);
    float* g = p.dbias + own_batch * p.dbias_batch + own_head * p.dbias_head + own_q * kTileQ * p.dbias_row + own_kv * kTileKv;
    for (int index = ptx::thread_index(); index < rows * cols; index += kThreads) {
      g[index / cols * p.dbias_row + index % cols] = smem.sum[index / cols][index % cols];
    }
  }

  // Sums `count` numbers into the first, for each of `lines` lines; one thread a line.
  template <class At>
  CF_DEVICE static void reduce(int lines, int count, At&& at) {
    for (int line = ptx::thread_index(); line < lines; line += kThreads) {
      float sum = 0.f;
      for (int i = 0; i < count; ++i) sum += at(line, i);
      at(line, 0) = sum;
    }
    ptx::sync_threads();
  }
};

template <class Config>
CF_DEVICE void backward_bias_sm80(const BwdParams& params) {
  SmemSizeCheck<sizeof(typename BackwardBiasSm80<Config>::SmemPlan), Config::kSmemBytes>();
  BackwardBiasSm80<Config>::run(params);
}

}  // namespace cuflash
