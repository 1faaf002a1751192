// Gradient of an additive bias that is broadcast, summed over the axes that it is broadcast along, in accumulator type
// and a fixed order.
//
//   dbias[b', h', i', j'] = sum of dS[b, h, i, j] over all (b, h, i, j) that read that element
//
//             visits: the (batch, head, q tile, kv tile) that read the tile ->
//   part 0   |####|####|####|####|
//   part 1                       |####|####|####|####|       One block sums one part of the visits of one tile of dbias
//   part 2                                           |####   in registers; bwd_bias_sum adds the parts up in their order.
//
// It recomputes dS, two products, where the kernels that make dk, dv and dq would need atomics or memory for every dS.
// How a tile of dS is computed is the family's affair (bias_sm80.cuh, bias_simt.cuh).
#pragma once

#include "attention/bias_gradient.cuh"
#include "attention/gradient.cuh"
#include "element.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/memory.cuh"
#include "ptx/sync.cuh"

namespace cuflash {

// The tile of dbias that is a block's own: a number on every axis, 0 where the bias is broadcast; and its part.
struct BiasTile {
  bool one_batch, one_head, one_row, one_column;
  int batch, head, q_tile, kv_tile;
  int part;

  CF_DEVICE BiasTile(const Attention& a, int64 block, int tiles_q, int tiles_kv)
      : one_batch(a.bias_batch == 0), one_head(a.bias_head == 0), one_row(a.bias_row == 0),
        one_column(a.bias_column == 0) {
    // Neighbours differ in the tile, not in the part: blocks in flight read the same rows.
    const auto digit = [&](bool one, int count) {
      const int own = one ? 0 : static_cast<int>(block % count);
      block = one ? block : block / count;
      return own;
    };
    kv_tile = digit(one_column, tiles_kv);
    q_tile = digit(one_row, tiles_q);
    head = digit(one_head, a.heads_q);
    batch = digit(one_batch, a.batch);
    part = static_cast<int>(block);
  }
};

// One (batch, head, q tile, kv tile), and how many are left of the part.
template <class Config>
struct BiasVisit {
  using Sequence = typename Config::Sequence;
  static constexpr int kTileQ = Config::kTileQ, kTileKv = Config::kTileKv;

  int batch, head, q_tile, kv_tile;
  int left;
  bool full;  // nothing of it is hidden or past the end

  // Number `first` among those of a tile.
  CF_DEVICE BiasVisit(const Attention& a, const BiasTile& own, int tiles_q, int tiles_kv, int64 first, int count)
      : left(count), full(false) {
    const auto digit = [&](bool one, int tile, int tiles) {
      if (!one || tiles == 0) return tile;
      const int number = static_cast<int>(first % tiles);
      first /= tiles;
      return number;
    };
    kv_tile = digit(own.one_column, own.kv_tile, tiles_kv);
    q_tile = digit(own.one_row, own.q_tile, tiles_q);
    head = digit(own.one_head, own.head, a.heads_q);
    batch = digit(own.one_batch, own.batch, a.batch);
  }

  // The first of a block's part of which something is visible.
  CF_DEVICE static BiasVisit first_of(const BwdParams& p, const BiasTile& own, int tiles_q, int tiles_kv) {
    const Attention& a = p.attention;
    const int64 visits = int64(own.one_batch ? a.batch : 1) * (own.one_head ? a.heads_q : 1) *
                         (own.one_row ? tiles_q : 1) * (own.one_column ? tiles_kv : 1);
    const int64 first = visits * own.part / p.bias_parts, end = visits * (own.part + 1) / p.bias_parts;
    BiasVisit visit(a, own, tiles_q, tiles_kv, first, static_cast<int>(end - first));
    visit.find(a, own, tiles_q, tiles_kv);
    return visit;
  }

  // The next one.
  CF_DEVICE BiasVisit next(const Attention& a, const BiasTile& own, int tiles_q, int tiles_kv) const {
    BiasVisit visit = *this;
    visit.step(a, own, tiles_q, tiles_kv);
    visit.find(a, own, tiles_q, tiles_kv);
    return visit;
  }

  CF_DEVICE void step(const Attention& a, const BiasTile& own, int tiles_q, int tiles_kv) {
    --left;
    if (own.one_column && ++kv_tile < tiles_kv) return;
    kv_tile = own.one_column ? 0 : kv_tile;
    if (own.one_row && ++q_tile < tiles_q) return;
    q_tile = own.one_row ? 0 : q_tile;
    if (own.one_head && ++head < a.heads_q) return;
    head = own.one_head ? 0 : head;
    ++batch;
  }

  // Goes on until something of the visit is visible or none is left.
  CF_DEVICE void find(const Attention& a, const BiasTile& own, int tiles_q, int tiles_kv) {
    for (; left > 0; step(a, own, tiles_q, tiles_kv)) {
      const Sequence sequence(a, batch);
      const int q_first = q_tile * kTileQ;
      if (q_first >= sequence.len_q) continue;
      const Tiles seen = typename Config::Mask(a, sequence, head).kv_tiles(q_first, kTileQ, kTileKv);
      full = seen.is_full(kv_tile) && q_first + kTileQ <= sequence.len_q;
      if (seen.contains(kv_tile)) return;
    }
  }
};

// Engine: Config -> a SmemPlan; a State with the tile's sums, which for_each(f(element, row, column)) goes through;
// begin(), which starts to copy what all visits need; load(), which starts to copy what one needs into one of kStages
// buffers; prepare(), which does to it what is to be done once it is here; and add(), which adds dS to the sums.
template <class Config, class Engine>
struct BackwardBias {
  using Real = Accumulator<typename Config::Element>;
  using Sequence = typename Config::Sequence;
  using Visit = BiasVisit<Config>;
  static constexpr int kThreads = Config::kThreads, kTileQ = Config::kTileQ, kTileKv = Config::kTileKv;

  union SmemPlan {
    typename Engine::SmemPlan engine;
    Real sum[kTileQ][kTileKv + 1];
  };

  CF_DEVICE static void run(const BwdParams& p) {
    SmemPlan& smem = *reinterpret_cast<SmemPlan*>(ptx::dynamic_smem());
    const Attention& a = p.attention;
    const int tiles_q = cdiv(a.len_q, kTileQ), tiles_kv = cdiv(a.len_kv, kTileKv);
    const BiasTile own(a, ptx::block_index(), tiles_q, tiles_kv);

    typename Engine::State state;
    state.clear();
    Visit visit = Visit::first_of(p, own, tiles_q, tiles_kv);
    const auto load = [&](const Visit& which, int buffer) {
      Engine::load(smem.engine, buffer, p, Sequence(a, which.batch), which.head, which.q_tile * kTileQ,
                   which.kv_tile * kTileKv);
    };
    if (visit.left > 0) {
      Engine::begin(smem.engine, a, own.batch, own.head, own.q_tile * kTileQ, own.kv_tile * kTileKv);
      load(visit, 0);
    }
    for (int buffer = 0; visit.left > 0; buffer = (buffer + 1) % Engine::kStages) {
      const Visit next = visit.next(a, own, tiles_q, tiles_kv);
      ptx::cp_async_wait<0>();
      Engine::prepare(smem.engine, buffer);
      ptx::sync_threads();  // this visit's rows are here, and every warp is done with those of the one before
      if (Engine::kStages > 1 && next.left > 0) load(next, (buffer + 1) % Engine::kStages);
      state.add(smem.engine, buffer, p, Sequence(a, visit.batch), visit.head, visit.q_tile * kTileQ,
                visit.kv_tile * kTileKv, visit.full);
      if (Engine::kStages == 1 && next.left > 0) {
        ptx::sync_threads();
        load(next, 0);
      }
      visit = next;
    }

    ptx::sync_threads();  // every warp is done with the rows, whose memory the sums take over
    state.for_each([&](Real x, int row, int col) { smem.sum[row][col] = x; });
    ptx::sync_threads();
    if (own.one_row) {
      reduce(kTileKv, kTileQ, [&](int col, int row) -> Real& { return smem.sum[row][col]; });
    }
    if (own.one_column) {
      reduce(own.one_row ? 1 : kTileQ, kTileKv, [&](int row, int col) -> Real& { return smem.sum[row][col]; });
    }
    const int rows = own.one_row ? 1 : min_of(kTileQ, a.len_q - own.q_tile * kTileQ);
    const int cols = own.one_column ? 1 : min_of(kTileKv, a.len_kv - own.kv_tile * kTileKv);
    const BiasSums layout(p);
    Real* sums = layout.of_part<Real>(p, own.part) + own.batch * layout.batch + own.head * layout.head +
                 own.q_tile * kTileQ * layout.row + own.kv_tile * kTileKv;
    for (int row = ptx::warp_index(); row < rows; row += kThreads / 32) {
      for (int col = ptx::lane_index(); col < cols; col += 32) sums[row * layout.row + col] = smem.sum[row][col];
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
