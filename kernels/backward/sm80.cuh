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
// the columns of one tile's dK, dV and dQ share, each recomputing the scores: what some wide heads need to fit in
// registers.
//
// With kWarpsAcross > 1 several warps share key rows, each with some of the queries, and P^T passes through shared memory
// as dS^T does: fragments of S, dK, dV and dQ are then closer to squares, which read less from there than long ones.
#pragma once

#include "attention/bias_gradient.cuh"
#include "attention/gradient.cuh"
#include "attention/schedule.cuh"
#include "tile/captured_gradient.cuh"
#include "tile/copy.cuh"
#include "tile/dq_accum.cuh"
#include "tile/dropout.cuh"
#include "tile/gradient_products_sm80.cuh"
#include "tile/held_bias.cuh"
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
  static constexpr int kTileQ = Config::kTileQ, kTileKv = Config::kTileKv;
  // What a warp has of the scores, and of dk and dv.
  static constexpr int kWarpsAcross = Config::kWarpsAcross;
  static constexpr bool kShared = kWarpsAcross > 1;
  static constexpr int kWarpRows = kTileKv / (kWarps / kWarpsAcross), kWarpCols = kTileQ / kWarpsAcross;
  static constexpr int kGradDown = kShared ? min_of(kWarps, kTileKv / 32) : kWarps, kGradAcross = kWarps / kGradDown;
  static constexpr int kGradRows = kTileKv / kGradDown;
  static constexpr int kDimQk = Accum::kDimQk, kDimV = round_up(Config::kDimV, 16 * kGradAcross * Config::kDimSplits);
  static constexpr int kColsQk = kDimQk / Config::kDimSplits, kColsV = kDimV / Config::kDimSplits;
  static_assert(kColsQk % (16 * kGradAcross) == 0);
  using GradK = Fragment<kGradRows, kColsQk / kGradAcross, Real>;
  using GradV = Fragment<kGradRows, kColsV / kGradAcross, Real>;
  static constexpr int kBytes = Config::kCopyBytes, kStages = Config::kStages;

  // Additions to dQ of a wide head are so many that they had better run under dK. There is no branch between the two then.
  static constexpr bool kDqFirst = kShared && kStages > 1 && kDimQk > 128;
  // Whether tiles without hidden pairs have code of their own: where scores are products alone, and registers suffice.
  static constexpr bool kFolds = sizeof(Element) == 2 && kShared && !kDqFirst && !Config::Mask::kNoneFull &&
                                 IsSame<typename Config::Score, ScaledScore<Real>>::value &&
                                 IsSame<Dropout, NoDropout>::value;

  using Products = GradientProducts<Element, kWarpRows, Config::kHalves>;

  using Bias = typename Config::BiasHeld::template Tile<kTileQ, kTileKv>;
  struct Stage : Bias {
    typename Products::template Tile<kTileQ, kDimQk> q;
    typename Products::template Tile<kTileQ, kDimV> dout;
    RowShift<Real> shift[kTileQ];
    Real delta[kTileQ];
  };
  struct SmemPlan {
    typename Products::template Tile<kTileKv, kDimQk> k;                             // dk on the way out
    typename Products::template Tile<kTileKv, kDimV> v;                              // dv on the way out
    typename Products::template ScoreTile<kTileKv, kTileQ> scores[kShared ? 2 : 1];  // dS^T, and P^T
    Stage stage[kStages];
  };

  using Scores = Fragment<kWarpRows, kWarpCols, Real>;

  // Starts the copy of one q tile with its dout, shifts and delta, and of the bias that it has with the key tile.
  CF_DEVICE static void load_q(Stage& stage, const BwdParams& p, const Sequence& sequence, int head, int q_first,
                               int kv_first) {
    const auto q = query_rows<const Element>(p.q, p.q_stride, sequence, head).from(q_first);
    const auto dout = query_rows<const Element>(p.dout, p.dout_stride, sequence, head).from(q_first);
    const int64 row_offset = query_offset(p.delta_stride, sequence, head) + q_first;
    Products::template load<Config::kDimQk, kBytes, kThreads>(stage.q, q);
    Products::template load<Config::kDimV, kBytes, kThreads>(stage.dout, dout);
    stage.Bias::template load<kThreads>(p.attention, sequence.batch, head, q_first, kv_first);
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

  // Writes a gradient, of which this warp has what lies from a row and a column on: what is not rounded as it is, others
  // through the shared tile its operand lay in.
  template <int kCols, int kDim, class Tile, class Grad>
  CF_DEVICE static void store_grad(Tile& tile, Grad& grad, int grad_row, int grad_col, Real scale, Real unit,
                                   void* pointer, const Strides& stride, const Sequence& sequence, int head,
                                   int kv_first, int first_col) {
    const auto all = key_rows<Element>(pointer, stride, sequence, head);
    grad.for_each([&](Real& x) { x = x * scale * unit; });
    if constexpr (IsSame<Element, Real>::value) {
      const auto rows = all.from(kv_first + grad_row);
      grad.for_each(ptx::lane_index(), [&](Real x, int down, int col) {
        const int from = first_col + grad_col;
        if (rows.has(down) && from + col < kDim) *rows.at(down, from, col) = x;
      });
    } else {
      Operand<Grad::kM * 16, Grad::kN * 8> packed;
      pack_operand<Element>(packed, grad);
      store_operand(tile, grad_row, ptx::lane_index(), packed, grad_col);
      ptx::sync_threads();
      auto rows = all.from(kv_first);
      rows.data += first_col;
      store_tile<kTileKv, kCols, kBytes, kThreads>(rows, kDim - first_col, tile, 0, ptx::thread_index());
    }
  }

  // s becomes p and dp becomes ds, both transposed: rows are keys, columns are queries. Folded shifts, for tiles that are
  // visible whole (`full`) and have no far rows, save a subtraction a score.
  CF_DEVICE static void differentiate(Scores& s, Scores& dp, Stage& stage, const ScoreGradient<Config>& gradient,
                                      const Sequence& sequence, int q_first, int kv_first, int warp_row, int warp_col,
                                      int lane, int split, bool full, bool folded) {
    const auto kept = kept_transposed<Scores>(gradient.dropout, q_first + warp_col, kv_first + warp_row);
#pragma unroll
    for (int n = 0; n < Scores::kN; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int col = warp_col + col_of(lane, n, i);
        const RowShift<Real> shift = folded ? stage.shift[col].folded(gradient.log2_unit) : stage.shift[col];
        const Real delta = stage.delta[col];
#pragma unroll
        for (int r = 0; r < Scores::kRowsPerLane; ++r) {
          const int q = q_first + col, kv = kv_first + warp_row + row_of(lane, r);
          const Real raw = s.at(r, n, i);
          Real weight;
          if constexpr (Config::BiasHeld::kHeld) {
            // A row past the end has a bias of its own perhaps, which may be infinite.
            const Real bias = q < sequence.len_q ? stage.element(col, warp_row + row_of(lane, r)) : Real(0);
            weight = gradient.probability_beside(raw, bias, shift, q, kv, full);
          } else {
            weight = folded ? gradient.visible_probability(raw, shift.log2_l, q, kv)
                            : gradient.probability(raw, shift, q, kv, full);
          }
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
  }

  CF_DEVICE static void run(const BwdParams& p) {
    SmemPlan& smem = *reinterpret_cast<SmemPlan*>(ptx::dynamic_smem());
    const Attention& a = p.attention;
    const int lane = ptx::lane_index(), warp = ptx::warp_index();
    const int warp_row = warp / kWarpsAcross * kWarpRows, warp_col = warp % kWarpsAcross * kWarpCols;
    const int grad_row = warp / kGradAcross * kGradRows;
    const int grad_col_k = warp % kGradAcross * GradK::kN * 8, grad_col_v = warp % kGradAcross * GradV::kN * 8;

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
    const auto load_step = [&](int number, Step step) {
      load_q(smem.stage[number % kStages], p, sequence, head_first + tiles.member(step),
             tiles.number(step.place) * kTileQ, kv_first);
    };

    Products products;
    GradK dk;
    GradV dv;
    dk.clear();
    dv.clear();

    if (num_steps > 0) {
      const auto k = key_rows<const Element>(p.k, p.k_stride, sequence, work.head).from(kv_first);
      const auto v = key_rows<const Element>(p.v, p.v_stride, sequence, work.head).from(kv_first);
      Products::template load<Config::kDimQk, kBytes, kThreads>(smem.k, k);
      Products::template load<Config::kDimV, kBytes, kThreads>(smem.v, v);
      load_step(0, tiles.first_step());
      Products::template prepare_first<kBytes, kThreads>(smem.k, smem.v);
    }
    Step step = tiles.first_step();
    ScoreGradient<Config> gradient(a, sequence, head_first);
    int head_before = head_first;
    // A tile that is here, number `number` of the walk.
    const auto visit = [&](int number, bool full, bool folded) {
      const int head = head_first + tiles.member(step), place = step.place, tile = tiles.number(place);
      const int q_first = tile * kTileQ;
      Stage& stage = smem.stage[number % kStages];
      step = tiles.next_step(step);
      if (kStages > 1 && number + 1 < num_steps) load_step(number + 1, step);

      if (!kDqFirst || head != head_before) gradient = ScoreGradient<Config>(a, sequence, head);
      head_before = head;
      Scores s, dp;
      s.clear();
      dp.clear();
      Products::multiply(s, smem.k, warp_row, stage.q, warp_col);
      Products::multiply(dp, smem.v, warp_row, stage.dout, warp_col);

      differentiate(s, dp, stage, gradient, sequence, q_first, kv_first, warp_row, warp_col, lane, split, full, folded);
      if (split == 0) {
        Config::CapturedGradient::add_all(gradient.score, dp, q_first + warp_col, kv_first + warp_row);
        const typename Config::BiasGradient bias_gradient(p, sequence, head);
        dp.for_each(lane, [&](Real ds, int row, int col) {
          bias_gradient.store(q_first + warp_col + col, kv_first + warp_row + row, ds);
        });
      }

      if constexpr (kShared) {
        Products::share(smem.scores[1], warp_row, warp_col, s);
        Products::share(smem.scores[0], warp_row, warp_col, dp);
        ptx::sync_threads();  // P and dS are complete
        Products::add_shared(dv, smem.scores[1], grad_row, stage.dout, split * kColsV + grad_col_v);
        if (!kDqFirst) Products::add_shared(dk, smem.scores[0], grad_row, stage.q, split * kColsQk + grad_col_k);
      } else {
        products.add_to_dv(dv, s, stage.dout, split * kColsV);
        products.add_to_dk(dk, dp, smem.scores[0], smem.k, warp_row, stage.q, split * kColsQk);
      }
      // dS is complete, and with one stage every warp is done with q and dout
      if (!kShared || kStages == 1) ptx::sync_threads();
      if (kStages == 1 && number + 1 < num_steps) load_step(number + 1, step);

      const Turn turn = tiles.turn(gradient.mask, place, q_first, kTileQ, kTileKv, work.tile);
      if ((kDqFirst && !Config::Reduction::kOrdered) || turn.adds) {
        typename Accum::Share dq;
        products.multiply_dq(dq, smem.scores[0], Accum::warp_row(), smem.k, split * kColsQk + Accum::warp_col());
        const int64 index = Accum::index(a, sequence, head, tile, split);
        Config::Reduction::wait_turn(p.dq_turn + index, turn.before);
        Accum::add(dq, Accum::tile(p, index));
        Config::Reduction::pass_turn(p.dq_turn + index);
      }
      if constexpr (kDqFirst) {
        Products::add_shared(dk, smem.scores[0], grad_row, stage.q, split * kColsQk + grad_col_k);
      }
    };
    for (int number = 0; number < num_steps; ++number) {
      Stage& stage = smem.stage[number % kStages];
      ptx::cp_async_wait<0>();
      Products::template prepare<kBytes, kThreads>(stage.q);
      Products::template prepare<kBytes, kThreads>(stage.dout);
      ptx::sync_threads();  // this stage is here, and every warp is done with the one before and with ds
      const bool full = tiles.is_full(step.place);
      if constexpr (kFolds) {
        const Real log2_unit = typename Config::Score(a, sequence, head_first).unit() * static_cast<Real>(kLog2E);
        bool far = false;
        for (int row = lane; row < kTileQ; row += 32) far |= stage.shift[row].is_far(log2_unit);
        if (full && !ptx::any(far)) {
          visit(number, true, true);
        } else {
          visit(number, full, false);
        }
      } else {
        visit(number, full, false);
      }
    }

    ptx::sync_threads();  // every warp is done with K and V, whose memory dk and dv take over
    store_grad<kColsQk, Config::kDimQk>(smem.k, dk, grad_row, grad_col_k, static_cast<Real>(a.softmax_scale),
                                        products.dk_unit(), p.dk, p.dk_stride, sequence, work.head, kv_first,
                                        split * kColsQk);
    store_grad<kColsV, Config::kDimV>(smem.v, dv, grad_row, grad_col_v, static_cast<Real>(Dropout::scale(a)),
                                      products.dv_unit(), p.dv, p.dv_stride, sequence, work.head, kv_first,
                                      split * kColsV);
  }
};

template <class Config>
CF_DEVICE void backward_sm80(const BwdParams& params) {
  SmemSizeCheck<sizeof(typename BackwardSm80<Config>::SmemPlan), Config::kSmemBytes>();
  BackwardSm80<Config>::run(params);
}

}  // namespace cuflash
