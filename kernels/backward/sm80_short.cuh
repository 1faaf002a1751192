// Backward attention on mma.sync tensor cores (sm_80 and later) of many short sequences: all queries and keys of one are
// one tile, so that dq, too, is whole when its products are.
//
//   P = exp(score(Q K^T) - m) / l,  dP = dO V^T,  dS = P * (dP - delta) * slope
//   dV = P^T dO,   dK = scale * dS^T Q,   dQ = scale * dS K
//
//              batch elements ->
//            +----+----+----+----+     One block owns one head and some batch elements. While it computes the gradients
//   head     |    |####|    |    |     of one, the next one's rows are under way.
//            +----+----+----+----+
//
//   load(first)
//   for each batch element:   load(next) | S^T = K Q^T | dP^T = V dO^T | P, dS | dV = P^T dO | dK = dS^T Q | dQ = dS K
//
// Each warp owns 16 keys, in transposed scores, as in backward/sm80.cuh, and the same 16 rows of dq. A bias that the batch
// shares stays in shared memory, and its gradient is summed in registers from one batch element to the next; bwd_bias_sum
// adds up what several blocks have of a head. What must be known of rows (backward/delta.cuh) is made on the way.
#pragma once

#include "attention/batch_share.cuh"
#include "attention/bias_gradient.cuh"
#include "attention/gradient.cuh"
#include "backward/delta.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/captured_gradient.cuh"
#include "tile/copy.cuh"
#include "tile/dropout.cuh"
#include "tile/gemm_sm80.cuh"
#include "tile/held_bias.cuh"
#include "tile/tail.cuh"

namespace cuflash {

template <class Config>
struct BackwardSm80Short {
  using Element = typename Config::Element;
  using Sequence = typename Config::Sequence;
  using Dropout = typename Config::Dropout;
  using Gradient = ScoreGradient<Config>;
  static constexpr int kThreads = Config::kThreads, kTile = Config::kTileQ, kWarpRows = 16;
  static_assert(Config::kTileKv == kTile && kThreads / 32 * kWarpRows == kTile);
  static constexpr int kQueries = Config::kQueries,
                       kPieces = kTile / kQueries;  // queries of which S and dP are in registers at once
  static constexpr int kDimQk = round_up(Config::kDimQk, 16), kDimV = round_up(Config::kDimV, 16);
  static constexpr int kBytes = Config::kCopyBytes, kStages = Config::kStages;

  struct Stage {
    SharedTile<Element, kTile, kDimQk> q;  // dk and dq on the way out
    SharedTile<Element, kTile, kDimQk> k;
    SharedTile<Element, kTile, kDimV> dout;
    SharedTile<Element, kTile, kDimV> v;  // dv on the way out
    RowShift<float> shift[kTile];
    float delta[kTile];
  };
  using Bias = typename Config::BiasHeld::template Tile<kTile, kTile>;
  struct SmemPlan : Bias {
    SharedTile<Element, kTile, kTile> ds;  // transposed
    Stage stage[kStages];
  };

  using Scores = Fragment<kWarpRows, kQueries>;  // transposed: rows are keys, columns are queries
  using Weights = Operand<kWarpRows, kQueries>;

  // Starts the copy of what one batch element's gradients are made of.
  CF_DEVICE static void load(Stage& stage, const BwdParams& p, const Sequence& sequence, int head) {
    load_tile_async<Config::kDimQk, kBytes, kThreads>(stage.q,
                                                      query_rows<const Element>(p.q, p.q_stride, sequence, head));
    load_tile_async<Config::kDimQk, kBytes, kThreads>(stage.k,
                                                      key_rows<const Element>(p.k, p.k_stride, sequence, head));
    load_tile_async<Config::kDimV, kBytes, kThreads>(stage.dout,
                                                     query_rows<const Element>(p.dout, p.dout_stride, sequence, head));
    load_tile_async<Config::kDimV, kBytes, kThreads>(stage.v, key_rows<const Element>(p.v, p.v_stride, sequence, head));
    ptx::cp_async_commit();
  }

  // Makes what must be known of its rows, which others read too.
  CF_DEVICE static void prepare(Stage& stage, const BwdParams& p, const Sequence& sequence, int head) {
    const Work whole{0, head, static_cast<int>(sequence.batch)};
    for_each_delta<Config>(p, sequence, whole, [&](int row, const RowShift<float>& shift, float delta) {
      stage.shift[row] = shift;
      stage.delta[row] = delta;
      if (row < sequence.len_q) keep_wanted_delta(p, sequence, head, row, shift, delta);
    });
  }

  // Writes this warp's rows of a gradient through its rows of a shared tile.
  template <int kDim, class Tile, int kCols, class Rows>
  CF_DEVICE static void store(Tile& tile, Fragment<kWarpRows, kCols>& grad, double scale, const Rows& rows) {
    const int warp_row = ptx::warp_index() * kWarpRows, lane = ptx::lane_index();
    grad.for_each([&](float& x) { x *= static_cast<float>(scale); });
    Operand<kWarpRows, kCols> packed;
    pack_operand<Element>(packed, grad);
    ptx::sync_warp();
    store_operand(tile, warp_row, lane, packed);
    ptx::sync_warp();
    store_tile<kWarpRows, kCols, kBytes, 32>(rows.from(warp_row), kDim, tile, warp_row, lane);
  }

  struct State {
    Fragment<kWarpRows, kTile> dbias;  // transposed, summed over the block's batch elements

    // s becomes p and dp becomes ds.
    template <bool kCareful>
    CF_DEVICE void differentiate(Scores& s, Scores& dp, Bias& bias, const Stage& stage, const Gradient& gradient,
                                 int first_q, int len_q, const typename Config::BiasGradient& bias_gradient) {
      const int warp_row = ptx::warp_index() * kWarpRows, lane = ptx::lane_index();
      const auto kept = kept_transposed<Scores>(gradient.dropout, first_q, warp_row);
#pragma unroll
      for (int n = 0; n < Scores::kN; ++n) {
        const auto beside = bias.transposed(first_q + n / 2 * 16, warp_row, lane);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int q = first_q + col_of(lane, n, i);
          RowShift<float> shift = stage.shift[q];
          if (Config::BiasHeld::kHeld && !kCareful) shift = shift.folded(static_cast<float>(kLog2E));
          const float delta = stage.delta[q];
#pragma unroll
          for (int r = 0; r < Scores::kRowsPerLane; ++r) {
            const int kv = warp_row + row_of(lane, r);
            const float raw = s.at(r, n, i);
            float weight;
            if (Config::BiasHeld::kHeld) {
              // A row past the end has a bias of its own perhaps, which may be infinite.
              const float bias = !kCareful || q < len_q ? beside.at(r, n % 2, i) : 0.f;
              weight = gradient.probability(raw, bias, shift, q, kv, !kCareful);
            } else {
              weight = gradient.probability(raw, shift, q, kv, !kCareful);
            }
            const bool keep = kept.has(r, n, i);
            const float ds = gradient.of_logit(weight, dp.at(r, n, i), delta, keep);
            s.at(r, n, i) = keep ? weight : 0.f;
            dp.at(r, n, i) = gradient.times_slope(ds, raw, q, kv);
            bias_gradient.store(q, kv, ds);
            Config::CapturedGradient::add(gradient.score, raw, ds, q, kv);
            if (Config::kSumBias) dbias.at(r, first_q / 8 + n, i) += ds;
          }
        }
      }
      Config::CapturedGradient::add_all(gradient.score, dp, first_q, warp_row);
    }

    // `prepare_next` is called where few registers are in use.
    template <class PrepareNext>
    CF_DEVICE void visit(SmemPlan& smem, Stage& stage, const BwdParams& p, const Sequence& sequence, int head,
                         PrepareNext&& prepare_next) {
      const Attention& a = p.attention;
      const int warp_row = ptx::warp_index() * kWarpRows, lane = ptx::lane_index();
      const Gradient gradient(a, sequence, head);
      const typename Config::BiasGradient bias_gradient(p, sequence, head);
      bool full = gradient.mask.q_tiles(0, kTile, kTile).is_full(0);
      if (Config::BiasHeld::kHeld) {
        bool far = false;
#pragma unroll
        for (int q = lane; q < kTile; q += 32) far = far || stage.shift[q].is_far(static_cast<float>(kLog2E));
        full = full && sequence.len_q == kTile && !ptx::any(far);
      }
      Fragment<kWarpRows, kDimQk> dk;
      Fragment<kWarpRows, kDimV> dv;
      dk.clear();
      dv.clear();
#pragma unroll
      for (int first_q = 0; first_q < kTile; first_q += kQueries) {
        Scores s, dp;
        s.clear();
        dp.clear();
        gemm_abt<Element>(s, stage.k, warp_row, stage.q, first_q);
        gemm_abt<Element>(dp, stage.v, warp_row, stage.dout, first_q);
        if (full) {
          differentiate<false>(s, dp, smem, stage, gradient, first_q, sequence.len_q, bias_gradient);
        } else {
          differentiate<true>(s, dp, smem, stage, gradient, first_q, sequence.len_q, bias_gradient);
        }
        Weights weights;
        pack_operand<Element>(weights, s);
        gemm_ab<Element>(dv, weights, stage.dout, 0, first_q);
        pack_operand<Element>(weights, dp);
        store_operand(smem.ds, warp_row, lane, weights, first_q);
        gemm_ab<Element>(dk, weights, stage.q, 0, first_q);
      }
      store<Config::kDimV>(stage.v, dv, Dropout::scale(a), key_rows<Element>(p.dv, p.dv_stride, sequence, head));
      ptx::sync_threads();  // ds is whole, and every warp is done with q
      store<Config::kDimQk>(stage.q, dk, a.softmax_scale, key_rows<Element>(p.dk, p.dk_stride, sequence, head));
      prepare_next();
      Fragment<kWarpRows, kDimQk> dq;
      dq.clear();
      gemm_atb<Element>(dq, smem.ds, warp_row, stage.k, 0);
      store<Config::kDimQk>(stage.q, dq, a.softmax_scale, query_rows<Element>(p.dq, p.dq_stride, sequence, head));
    }
  };

  CF_DEVICE static void run(const BwdParams& p) {
    SmemPlan& smem = *reinterpret_cast<SmemPlan*>(ptx::dynamic_smem());
    const Attention& a = p.attention;
    const BatchShare share(a);
    const int head = share.head, first = share.first, end = share.end;

    State state;
    state.dbias.clear();
    if (first < end) {
      smem.Bias::template load<kThreads>(a, 0, a.bias_head ? head : 0, 0, 0);
      load(smem.stage[0], p, Sequence(a, first), head);
      prepare(smem.stage[0], p, Sequence(a, first), head);
    }
#pragma unroll 1
    for (int batch = first; batch < end; ++batch) {
      const Sequence sequence(a, batch);
      ptx::cp_async_wait<0>();
      ptx::sync_threads();  // this batch element is here, and every warp is done with the one before and with ds
      Stage& next = smem.stage[(batch - first + 1) % kStages];
      const bool more = batch + 1 < end;
      if (kStages > 1 && more) load(next, p, Sequence(a, batch + 1), head);
      store_query_tail<Config, kThreads>(p, sequence, head);
      store_key_tail<Config, kThreads>(p, sequence, head);
      state.visit(smem, smem.stage[(batch - first) % kStages], p, sequence, head, [&] {
        if (kStages > 1 && more) prepare(next, p, Sequence(a, batch + 1), head);
      });
      if (kStages > 1 || !more) continue;
      ptx::sync_threads();  // every warp is done with this one
      load(next, p, Sequence(a, batch + 1), head);
      prepare(next, p, Sequence(a, batch + 1), head);
    }
    if (!Config::kSumBias) return;
    const BiasSums layout(p);
    float* sums = layout.of_part<float>(p, share.part) + head * layout.head;
    state.dbias.for_each(ptx::lane_index(), [&](float x, int row, int q) {
      const int kv = ptx::warp_index() * kWarpRows + row;
      if (q < a.len_q && kv < a.len_kv) sums[q * layout.row + kv] = x;
    });
  }
};

template <class Config>
CF_DEVICE void backward_sm80_short(const BwdParams& params) {
  SmemSizeCheck<sizeof(typename BackwardSm80Short<Config>::SmemPlan), Config::kSmemBytes>();
  BackwardSm80Short<Config>::run(params);
}

}  // namespace cuflash
