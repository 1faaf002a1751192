// Backward attention on mma.sync tensor cores (sm_80 and later): dk, dv and the sum for dq in one pass.
//
//   P = exp(score(Q K^T) - m) / l,  dP = dO V^T,  dS = P * (dP - delta) * slope
//   dV = P^T dO,   dK = scale * dS^T Q,   dQ = scale * dS K
//
//              q tiles of every head of the group ->
//            +----+----+----+     One block owns one kv tile of one kv head and walks the q tiles that can see it.
//   kv tile  |####|####|##\ |     Scores are computed transposed, S^T = K Q^T: each warp owns whole key rows, so P^T
//            +----+----+----+     and dS^T are already the A operands of dV and dK and never leave the registers.
//
//   load_kv, load_q(first)
//   for each q tile:   load_q(next) | S^T = K Q^T | dP^T = V dO^T | P, dS | dV += P^T dO | dK += dS^T Q | reduce_dq
//   store_dkdv
//
// Only dQ mixes key rows of different warps: dS^T passes through shared memory, and the block adds its share to an fp32
// accumulator in global memory. A group's query heads are summed here in fp32. With kDimSplits > 1 several blocks share
// the columns of one tile's dK, dV and dQ share, each recomputing the scores: what 256 columns need to fit in
// registers.
#pragma once

#include "attention/bias_gradient.cuh"
#include "tile/captured_gradient.cuh"
#include "attention/gradient.cuh"
#include "attention/schedule.cuh"
#include "tile/copy.cuh"
#include "tile/dropout.cuh"
#include "tile/dq_accum.cuh"
#include "tile/gradient_products_sm80.cuh"
#include "tile/tail.cuh"

namespace cuflash {

template <class Config>
struct BackwardSm80 {
  using Element = typename Config::Element;
  using Sequence = typename Config::Sequence;
  using Dropout = typename Config::Dropout;
  using Accum = DqAccum<Config>;
  using Real = typename Accum::Real;
  static constexpr int kThreads = Config::kThreads, kWarps = kThreads / 32;
  static constexpr int kTileQ = Config::kTileQ, kTileKv = Config::kTileKv, kWarpRows = kTileKv / kWarps;
  static constexpr int kDimQk = Accum::kDimQk, kDimV = round_up(Config::kDimV, 16 * Config::kDimSplits);
  static constexpr int kColsQk = kDimQk / Config::kDimSplits, kColsV = kDimV / Config::kDimSplits;
  static constexpr int kBytes = Config::kCopyBytes, kStages = Config::kStages;

  using Products = GradientProducts<Element, kWarpRows>;

  struct Stage {
    typename Products::template Tile<kTileQ, kDimQk> q;
    typename Products::template Tile<kTileQ, kDimV> dout;
    RowShift<Real> shift[kTileQ];
    Real delta[kTileQ];
  };
  struct SmemPlan {
    typename Products::template Tile<kTileKv, kDimQk> k;  // dk on the way out
    typename Products::template Tile<kTileKv, kDimV> v;   // dv on the way out
    typename Products::template ScoreTile<kTileKv, kTileQ> ds;
    Stage stage[kStages];
  };

  using Scores = Fragment<kWarpRows, kTileQ, Real>;

  // Starts the copy of one q tile with its dout, shifts and delta.
  CF_DEVICE static void load_q(Stage& stage, const BwdParams& p, const Sequence& sequence, int head, int q_first) {
    const auto q = query_rows<const Element>(p.q, p.q_stride, sequence, head).from(q_first);
    const auto dout = query_rows<const Element>(p.dout, p.dout_stride, sequence, head).from(q_first);
    const int64 row_offset = query_offset(p.delta_stride, sequence, head) + q_first;
    Products::template load<Config::kDimQk, kBytes, kThreads>(stage.q, q);
    Products::template load<Config::kDimV, kBytes, kThreads>(stage.dout, dout);
#pragma unroll 1
    for (int row = ptx::thread_index(); row < kTileQ; row += kThreads) {
      const bool valid = row < q.count;
      const int64 source = row_offset + (valid ? row : 0);
      const auto* g_shift = static_cast<const RowShift<Real>*>(p.shift) + source;
      ptx::cp_async<sizeof(*g_shift)>(ptx::smem_u32(stage.shift + row), g_shift, valid);
      ptx::cp_async<sizeof(Real)>(ptx::smem_u32(stage.delta + row), static_cast<const Real*>(p.delta) + source, valid);
    }
    ptx::cp_async_commit();
  }

  // Writes this warp's rows of a gradient: what is not rounded as it is, others through the shared tile its operand lay in.
  template <int kCols, int kDim, class Tile, class Grad>
  CF_DEVICE static void store_grad(Tile& tile, Grad& grad, Real scale, Real unit, void* pointer, const Strides& stride,
                                   const Sequence& sequence, int head, int kv_first, int first_col) {
    const int warp_row = ptx::warp_index() * kWarpRows, row = kv_first + warp_row;
    grad.for_each([&](Real& x) { x = x * scale * unit; });
    if constexpr (IsSame<Element, Real>::value) {
      const auto rows = key_rows<Element>(pointer, stride, sequence, head).from(row);
      grad.for_each(ptx::lane_index(), [&](Real x, int down, int col) {
        if (rows.has(down) && first_col + col < kDim) *rows.at(down, first_col, col) = x;
      });
    } else {
      Operand<kWarpRows, kCols> packed;
      pack_operand<Element>(packed, grad);
      store_operand(tile, warp_row, ptx::lane_index(), packed);
      ptx::sync_warp();
      auto rows = key_rows<Element>(pointer, stride, sequence, head).from(row);
      rows.data += first_col;
      store_tile<kWarpRows, kCols, kBytes, 32>(rows, kDim - first_col, tile, warp_row, ptx::lane_index());
    }
  }

  CF_DEVICE static void run(const BwdParams& p) {
    SmemPlan& smem = *reinterpret_cast<SmemPlan*>(ptx::dynamic_smem());
    const Attention& a = p.attention;
    const int lane = ptx::lane_index(), warp_row = ptx::warp_index() * kWarpRows;

    const int split = ptx::block_index() % Config::kDimSplits;
    const int kv_tiles_longest = num_tiles(a.len_kv, kTileKv);
    Work work = key_work(ptx::block_index() / Config::kDimSplits, kv_tiles_longest, a.heads_kv);
    work.tile = Config::Reduction::key_tile(work.tile, kv_tiles_longest);
    const Sequence sequence(a, work.batch);
    if (work.tile == 0 && split == 0) store_key_tail<Config, kThreads>(p, sequence, work.head);
    const int kv_first = work.tile * kTileKv;
    if (kv_first >= sequence.len_kv) return;

    const int group = a.heads_q / a.heads_kv, head_first = work.head * group;
    const auto tiles = typename Config::Mask(a, sequence, head_first).q_tiles(kv_first, kTileKv, kTileQ);
    const int num_steps = tiles.steps(group);
    const auto load_step = [&](int step) {
      load_q(smem.stage[step % kStages], p, sequence, head_first + tiles.member(step),
             tiles.number(tiles.place(step)) * kTileQ);
    };

    Products products;
    Fragment<kWarpRows, kColsQk, Real> dk;
    Fragment<kWarpRows, kColsV, Real> dv;
    dk.clear();
    dv.clear();

    if (num_steps > 0) {
      const auto k = key_rows<const Element>(p.k, p.k_stride, sequence, work.head).from(kv_first);
      const auto v = key_rows<const Element>(p.v, p.v_stride, sequence, work.head).from(kv_first);
      Products::template load<Config::kDimQk, kBytes, kThreads>(smem.k, k);
      Products::template load<Config::kDimV, kBytes, kThreads>(smem.v, v);
      load_step(0);
      Products::template prepare_first<kBytes, kThreads>(smem.k, smem.v);
    }
    for (int step = 0; step < num_steps; ++step) {
      const int head = head_first + tiles.member(step), place = tiles.place(step), tile = tiles.number(place);
      const int q_first = tile * kTileQ;
      Stage& stage = smem.stage[step % kStages];
      ptx::cp_async_wait<0>();
      Products::template prepare<kBytes, kThreads>(stage.q);
      Products::template prepare<kBytes, kThreads>(stage.dout);
      ptx::sync_threads();  // this stage is here, and every warp is done with the one before and with ds
      if (kStages > 1 && step + 1 < num_steps) load_step(step + 1);

      const ScoreGradient<Config> gradient(a, sequence, head);
      Scores s, dp;
      s.clear();
      dp.clear();
      Products::multiply(s, smem.k, warp_row, stage.q);
      Products::multiply(dp, smem.v, warp_row, stage.dout);

      const auto kept = kept_transposed<Scores>(gradient.dropout, q_first, kv_first + warp_row);

      // s becomes p and dp becomes ds, both transposed: rows are keys, columns are queries.
      const bool full = tiles.is_full(place);
#pragma unroll
      for (int n = 0; n < Scores::kN; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int col = col_of(lane, n, i);
          const RowShift<Real> shift = stage.shift[col];
          const Real delta = stage.delta[col];
#pragma unroll
          for (int r = 0; r < Scores::kRowsPerLane; ++r) {
            const int q = q_first + col, kv = kv_first + warp_row + row_of(lane, r);
            const Real raw = s.at(r, n, i);
            const Real weight = gradient.probability(raw, shift, q, kv, full);
            const bool keep = kept.has(r, n, i);
            s.at(r, n, i) = keep ? weight : Real(0);
            if (split == 0) {
              const Real ds = gradient.of_logit(weight, dp.at(r, n, i), delta, keep);
              Config::CapturedGradient::add(gradient.score, raw, ds, q, kv);
            }
            dp.at(r, n, i) = gradient.of_product(raw, weight, dp.at(r, n, i), delta, keep, q, kv);
          }
        }
      }

      if (split == 0) {
        Config::CapturedGradient::add_all(gradient.score, dp, q_first, kv_first + warp_row);
        const typename Config::BiasGradient bias_gradient(p, sequence, head);
        dp.for_each(lane, [&](Real ds, int row, int col) {
          bias_gradient.store(q_first + col, kv_first + warp_row + row, ds);
        });
      }

      products.add_to_dv(dv, s, stage.dout, split * kColsV);
      products.add_to_dk(dk, dp, smem.ds, smem.k, warp_row, stage.q, split * kColsQk);
      ptx::sync_threads();  // ds is complete, and with one stage every warp is done with q and dout
      if (kStages == 1 && step + 1 < num_steps) load_step(step + 1);

      const Turn turn = tiles.turn(gradient.mask, place, q_first, kTileQ, kTileKv, work.tile);
      if (turn.adds) {
        typename Accum::Share dq;
        products.multiply_dq(dq, smem.ds, Accum::warp_row(), smem.k, split * kColsQk + Accum::warp_col());
        const int64 index = Accum::index(a, sequence, head, tile, split);
        Config::Reduction::wait_turn(p.dq_turn + index, turn.before);
        Accum::for_each(dq, Accum::tile(p, index), [](Real x, Real* accumulator) { ptx::red_add(accumulator, x); });
        Config::Reduction::pass_turn(p.dq_turn + index);
      }
    }

    ptx::sync_threads();  // every warp is done with K and V, whose memory dk and dv take over
    store_grad<kColsQk, Config::kDimQk>(smem.k, dk, static_cast<Real>(a.softmax_scale), products.dk_unit(), p.dk,
                                        p.dk_stride, sequence, work.head, kv_first, split * kColsQk);
    store_grad<kColsV, Config::kDimV>(smem.v, dv, static_cast<Real>(Dropout::scale(a)), products.dv_unit(), p.dv,
                                      p.dv_stride, sequence, work.head, kv_first, split * kColsV);
  }
};

template <class Config>
CF_DEVICE void backward_sm80(const BwdParams& params) {
  SmemSizeCheck<sizeof(typename BackwardSm80<Config>::SmemPlan), Config::kSmemBytes>();
  BackwardSm80<Config>::run(params);
}

}  // namespace cuflash
