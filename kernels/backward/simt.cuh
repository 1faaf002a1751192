// Backward attention on plain multiply-adds, in two kernels without atomics: always the same bits.
//
//   P = exp(score(Q K^T) - m) / l,  dP = dO V^T,  dS = P * (dP - delta) * slope
//   dV = P^T dO,   dK = scale * dS^T Q,   dQ = scale * dS K
//
//              q tiles of every head of the group ->             kv tiles ->
//            +----+----+----+                                  +----+----+----+
//   kv tile  |####|####|##\ |   bwd_simt_dkdv: dk, dv   q tile |####|####|##\ |   bwd_simt_dq: dq
//            +----+----+----+                                  +----+----+----+
//
//   for each tile:   load, S = Q K^T | load, dP = dO V^T | P, dS | load, dV += P^T dO, dK += dS^T Q or dQ += dS K
//   store_dkdv or store_dq
//
// Either kernel owns the rows of its micro-tiles: keys in the first, where every matrix is transposed, queries in the
// second. Recomputing P twice costs two products more than sharing it, and spares an accumulator for dq.
#pragma once

#include "attention/bias_gradient.cuh"
#include "attention/gradient.cuh"
#include "attention/schedule.cuh"
#include "tile/captured_gradient.cuh"
#include "tile/gemm_simt.cuh"
#include "tile/tail.cuh"

namespace cuflash {

template <class Config>
struct BackwardSimt {
  using Element = typename Config::Element;
  using Real = Accumulator<Element>;
  using Sequence = typename Config::Sequence;
  static constexpr int kThreads = Config::kThreads, kTileQ = Config::kTileQ, kTileKv = Config::kTileKv;
  static constexpr int kDimQk = Config::kDimQk, kDimV = Config::kDimV;

  // What one query head reads. It lies in shared memory: in registers, the compiler would keep a row address of every
  // operand besides over the whole kernel.
  struct Inputs {
    GlobalRows<const Element> q, k, v, dout;
    const RowShift<Real>* shift;
    const Real* delta;

    CF_DEVICE Inputs(const BwdParams& p, const Sequence& sequence, int head) {
      const int head_kv = head / (p.attention.heads_q / p.attention.heads_kv);
      q = query_rows<const Element>(p.q, p.q_stride, sequence, head);
      k = key_rows<const Element>(p.k, p.k_stride, sequence, head_kv);
      v = key_rows<const Element>(p.v, p.v_stride, sequence, head_kv);
      dout = query_rows<const Element>(p.dout, p.dout_stride, sequence, head);
      shift = first_query<const RowShift<Real>>(p.shift, p.delta_stride, sequence, head);
      delta = first_query<const Real>(p.delta, p.delta_stride, sequence, head);
    }

    // Rows past the end are empty rows.
    CF_DEVICE RowShift<Real> shift_of(int row) const { return row < q.count ? shift[row] : RowShift<Real>::empty(); }
    CF_DEVICE Real delta_of(int row) const { return row < q.count ? delta[row] : Real(0); }
  };

  template <class Block>
  struct SmemPlan {
    typename Block::SmemPlan products;
    Inputs inputs;
  };
  using BlockDkdv = SimtBlock<Config, kTileKv, kTileQ>;
  using BlockDq = SimtBlock<Config, kTileQ, kTileKv>;

  CF_DEVICE static const Inputs& share_inputs(Inputs& inputs, const BwdParams& p, const Sequence& sequence, int head) {
    if (ptx::thread_index() == 0) inputs = Inputs(p, sequence, head);
    ptx::sync_threads();
    return inputs;
  }

  // From q.k and dout.v: s becomes the weight of v, exactly 0 where masked or dropped, and dp becomes ds.
  template <class CapturedGradient>
  CF_DEVICE static void grad_s(const ScoreGradient<Config>& gradient, Real& s, Real& dp, const RowShift<Real>& shift,
                               Real delta, int q, int kv, bool full) {
    const Real weight = gradient.probability(s, shift, q, kv, full);
    const bool kept = gradient.dropout.keep(q, kv);
    CapturedGradient::add(gradient.score, s, gradient.of_logit(weight, dp, delta, kept), q, kv);
    dp = gradient.of_product(s, weight, dp, delta, kept, q, kv);
    s = kept ? weight : Real(0);
  }

  CF_DEVICE static void run_dkdv(const BwdParams& p) {
    using Block = BlockDkdv;
    SmemPlan<Block>& smem = *reinterpret_cast<SmemPlan<Block>*>(ptx::dynamic_smem());
    const Attention& a = p.attention;
    const Work work = key_work(ptx::block_index(), num_tiles(a.len_kv, kTileKv), a.heads_kv);
    const Sequence sequence(a, work.batch);
    if (work.tile == 0) store_key_tail<Config, kThreads>(p, sequence, work.head);
    const int kv_first = work.tile * kTileKv;
    if (kv_first >= sequence.len_kv) return;

    typename Block::template Output<kDimQk> dk;
    typename Block::template Output<kDimV> dv;
    dk.clear();
    dv.clear();

    const int group = a.heads_q / a.heads_kv;
#pragma unroll 1
    for (int head = work.head * group; head < (work.head + 1) * group; ++head) {
      const Inputs& inputs = share_inputs(smem.inputs, p, sequence, head);
      const ScoreGradient<Config> gradient(a, sequence, head);
      const auto tiles = gradient.mask.q_tiles(kv_first, kTileKv, kTileQ);
#pragma unroll 1
      for (int place = tiles.begin; place < tiles.end; ++place) {
        if (!tiles.is_of(place, head - work.head * group)) continue;
        const int q_first = tiles.number(place) * kTileQ;
        typename Block::Scores s, dp;  // transposed: rows are keys, columns are queries
        s.clear();
        dp.clear();
        Block::template multiply<kDimQk>(s, smem.products.operands, inputs.k.from(kv_first), inputs.q.from(q_first));
        Block::template multiply<kDimV>(dp, smem.products.operands, inputs.v.from(kv_first), inputs.dout.from(q_first));

        const bool full = tiles.is_full(place);
#pragma unroll
        for (int n = 0; n < Block::Scores::kN; ++n) {
          const int q = q_first + s.col_of(n);
          const RowShift<Real> shift = inputs.shift_of(q);
          const Real delta = inputs.delta_of(q);
#pragma unroll
          for (int m = 0; m < Block::Scores::kM; ++m) {
            grad_s<NoCapturedGradient>(gradient, s.x[m][n], dp.x[m][n], shift, delta, q, kv_first + s.row_of(m), full);
          }
        }
        Block::template accumulate<kDimV>(dv, smem.products.weighted, s, inputs.dout.from(q_first));
        Block::template accumulate<kDimQk>(dk, smem.products.weighted, dp, inputs.q.from(q_first));
      }
    }
    const Real scale = static_cast<Real>(a.softmax_scale);
    const auto g_dk = key_rows<Element>(p.dk, p.dk_stride, sequence, work.head).from(kv_first);
    const auto g_dv = key_rows<Element>(p.dv, p.dv_stride, sequence, work.head).from(kv_first);
    Block::template store<kDimQk>(g_dk, dk, [&](int) { return scale; });
    Block::template store<kDimV>(g_dv, dv, [&](int) { return static_cast<Real>(Config::Dropout::scale(a)); });
  }

  CF_DEVICE static void run_dq(const BwdParams& p) {
    using Block = BlockDq;
    SmemPlan<Block>& smem = *reinterpret_cast<SmemPlan<Block>*>(ptx::dynamic_smem());
    const Attention& a = p.attention;
    const Work work = query_work(ptx::block_index(), num_tiles(a.len_q, kTileQ), a.heads_q);
    const Sequence sequence(a, work.batch);
    if (work.tile == 0) store_query_tail<Config, kThreads>(p, sequence, work.head);
    const int q_first = work.tile * kTileQ;
    if (q_first >= sequence.len_q) return;

    const Inputs& inputs = share_inputs(smem.inputs, p, sequence, work.head);
    const ScoreGradient<Config> gradient(a, sequence, work.head);
    const auto tiles = gradient.mask.kv_tiles(q_first, kTileQ, kTileKv);
    typename Block::template Output<kDimQk> dq;
    dq.clear();

#pragma unroll 1
    for (int place = tiles.begin; place < tiles.end; ++place) {
      const int kv_first = tiles.number(place) * kTileKv;
      typename Block::Scores s, dp;
      s.clear();
      dp.clear();
      Block::template multiply<kDimQk>(s, smem.products.operands, inputs.q.from(q_first), inputs.k.from(kv_first));
      Block::template multiply<kDimV>(dp, smem.products.operands, inputs.dout.from(q_first), inputs.v.from(kv_first));

      const bool full = tiles.is_full(place);
#pragma unroll
      for (int m = 0; m < Block::Scores::kM; ++m) {
        const int q = q_first + s.row_of(m);
        const RowShift<Real> shift = inputs.shift_of(q);
        const Real delta = inputs.delta_of(q);
#pragma unroll
        for (int n = 0; n < Block::Scores::kN; ++n) {
          grad_s<typename Config::CapturedGradient>(gradient, s.x[m][n], dp.x[m][n], shift, delta, q,
                                                    kv_first + s.col_of(n), full);
        }
      }
      const typename Config::BiasGradient bias_gradient(p, sequence, work.head);
      dp.for_each([&](Real ds, int row, int col) { bias_gradient.store(q_first + row, kv_first + col, ds); });
      Block::template accumulate<kDimQk>(dq, smem.products.weighted, dp, inputs.k.from(kv_first));
    }
    const Real scale = static_cast<Real>(a.softmax_scale);
    const auto g_dq = query_rows<Element>(p.dq, p.dq_stride, sequence, work.head).from(q_first);
    Block::template store<kDimQk>(g_dq, dq, [&](int) { return scale; });
  }
};

template <class Config>
CF_DEVICE void backward_simt_dkdv(const BwdParams& params) {
  using Kernel = BackwardSimt<Config>;
  SmemSizeCheck<sizeof(typename Kernel::template SmemPlan<typename Kernel::BlockDkdv>), Config::kSmemBytes>();
  Kernel::run_dkdv(params);
}

template <class Config>
CF_DEVICE void backward_simt_dq(const BwdParams& params) {
  using Kernel = BackwardSimt<Config>;
  SmemSizeCheck<sizeof(typename Kernel::template SmemPlan<typename Kernel::BlockDq>), Config::kSmemBytes>();
  Kernel::run_dq(params);
}

}  // namespace cuflash
