// Gradient of the additive bias, reduced over the axes it was broadcast along, in accumulator type and a fixed order.
//
//   dbias[b', h', i', j'] = sum of dS[b, h, i, j] over all (b, h, i, j) that read that element
//
// One block owns one kTileQ x kTileKv tile of dbias (the whole axis where it is broadcast) and recomputes dS for every
// (b, h, q tile, kv tile) that reads it: two products where an accumulator in global memory would need atomics and, for
// a broadcast bias, the full (b, h, len_q, len_kv) of memory. How a tile of dS is computed is the family's affair
// (bias_sm80.cuh, bias_simt.cuh).
#pragma once

#include "attention/gradient.cuh"
#include "element.cuh"
#include "ptx/memory.cuh"
#include "ptx/sync.cuh"

namespace cuflash {

// The parts of one axis that a block visits: all of it where the bias is broadcast, else its own.
struct Axis {
  int begin, end;

  CF_DEVICE static Axis of(bool broadcast, int own, int all) { return broadcast ? Axis{0, all} : Axis{own, own + 1}; }
};

// Engine: Config -> a SmemPlan, a Total with for_each(f(element, row, column)), and add_tile(), which adds dS of one
// tile of one head to a Total.
template <class Config, class Engine>
struct BackwardBias {
  using Real = Accumulator<typename Config::Element>;
  using Sequence = typename Config::Sequence;
  static constexpr int kThreads = Config::kThreads, kTileQ = Config::kTileQ, kTileKv = Config::kTileKv;

  struct SmemPlan {
    typename Engine::SmemPlan engine;
    Real sum[kTileQ][kTileKv + 1];
  };

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
    const int own_kv = digit(one_column, tiles_kv), own_q = digit(one_row, tiles_q),
              own_head = digit(one_head, a.heads_q), own_batch = digit(one_batch, a.batch);

    typename Engine::Total total;
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
            Engine::add_tile(smem.engine, p, sequence, head, q_tile * kTileQ, tile * kTileKv, total);
          }
        }
      }
    }

    Engine::for_each(total, [&](Real x, int row, int col) { smem.sum[row][col] = x; });
    ptx::sync_threads();
    if (one_row) {
      reduce(kTileKv, kTileQ, [&](int col, int row) -> Real& { return smem.sum[row][col]; });
    }
    if (one_column) {
      reduce(one_row ? 1 : kTileQ, kTileKv, [&](int row, int col) -> Real& { return smem.sum[row][col]; });
    }
    const int rows = one_row ? 1 : min_of(kTileQ, a.len_q - own_q * kTileQ);
    const int cols = one_column ? 1 : min_of(kTileKv, a.len_kv - own_kv * kTileKv);
    Real* g = static_cast<Real*>(p.dbias) + own_batch * p.dbias_batch + own_head * p.dbias_head +
              own_q * kTileQ * p.dbias_row + own_kv * kTileKv;
    for (int index = ptx::thread_index(); index < rows * cols; index += kThreads) {
      g[index / cols * p.dbias_row + index % cols] = smem.sum[index / cols][index % cols];
    }
  }

  // Sums `count` numbers into the first, for each of `lines` lines; one thread a line.
  template <class At>
  CF_DEVICE static void reduce(int lines, int count, At&& at) {
    for (int line = ptx::thread_index(); line < lines; line += kThreads) {
      Real sum = 0;
      for (int i = 0; i < count; ++i) sum += at(line, i);
      at(line, 0) = sum;
    }
    ptx::sync_threads();
  }
};

template <class Config, class Engine>
CF_DEVICE void backward_bias(const BwdParams& params) {
  using Kernel = BackwardBias<Config, Engine>;
  SmemSizeCheck<sizeof(typename Kernel::SmemPlan), Config::kSmemBytes>();
  Kernel::run(params);
}

}  // namespace cuflash
