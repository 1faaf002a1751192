// Forward attention with its tangent on plain multiply-adds: how out and lse change as q, k, v, bias and sink change,
// for any element type, any head size, any architecture. attention/tangent.cuh has the formulas.
//
//   for each kv tile:   S += Q K^T, S' += Q' K^T + Q K'^T, piece by piece of dim_qk | mask_tile | softmax_tile
//                       out += P V, out' += P V' + W V, piece by piece of the keys         W = P (S' - mean)
//   store_out, store_lse
//
// Its walk and its loads are those of forward/simt.cuh.
#pragma once

#include "attention/dropout.cuh"
#include "attention/query_tile.cuh"
#include "attention/tangent.cuh"
#include "tile/gemm_simt.cuh"
#include "tile/tail.cuh"

namespace cuflash {

template <class Config>
struct JvpSimt {
  using Element = typename Config::Element;
  using Real = Accumulator<Element>;
  using Sequence = typename Config::Sequence;
  using Results = WholeRows<Config>;
  static constexpr int kThreads = Config::kThreads, kTileQ = Config::kTileQ, kTileKv = Config::kTileKv;

  using Block = SimtBlock<Config, kTileQ, kTileKv>;
  using SmemPlan = typename Block::SmemPlan;
  using Grid = typename Block::Grid;
  using Scores = typename Block::Scores;
  using Output = typename Block::template Output<Config::kDimV>;
  using States = RowState<Real>[Scores::kM];
  using Tangents = RowTangent<Real>[Scores::kM];

  // S to probabilities relative to the running maximum, S' to how far it is from the mean of s' over the keys so far;
  // what was accumulated before shrinks and moves to match. Each thread sums only its own columns into l.
  CF_DEVICE static void softmax_tile(Scores& s, Scores& ds, States& states, Tangents& tangents, Output& out,
                                     Output& dout, Real log2_unit) {
#pragma unroll
    for (int m = 0; m < Scores::kM; ++m) {
      Real tile_max = -infinity<Real>();
#pragma unroll
      for (int n = 0; n < Scores::kN; ++n) tile_max = max_of(tile_max, s.x[m][n]);
      const Real rescale = states[m].update(Grid::row_max(tile_max), log2_unit);
      Real moved = Real(0);
#pragma unroll
      for (int n = 0; n < Scores::kN; ++n) {
        s.x[m][n] = states[m].weight(s.x[m][n], log2_unit);
        states[m].l += s.x[m][n];
        ds.x[m][n] -= tangents[m].mean;
        moved += s.x[m][n] * ds.x[m][n];
      }
      const Real move = tangents[m].update(Grid::row_sum(moved), Grid::row_sum(states[m].l));
#pragma unroll
      for (int n = 0; n < Scores::kN; ++n) ds.x[m][n] -= move;
#pragma unroll
      for (int n = 0; n < Output::kN; ++n) {
        out.x[m][n] *= rescale;
        dout.x[m][n] = dout.x[m][n] * rescale - move * out.x[m][n];
      }
    }
  }

  // Divides this thread's sums by those of the weights, and writes out, lse and their tangents.
  CF_DEVICE static void finish(const JvpParams& p, const QueryTile<Config>& own, Real unit, States& states,
                               Tangents& tangents, Output& out, Output& dout) {
    const Sequence& sequence = own.sequence;
    const int head = own.heads.first, q_first = own.first;
    const int64 first_number = Results::number(p, sequence, head, 0);
    Real* g_tangent_lse = first_query<Real>(p.tangent_lse, p.tangent_lse_stride, sequence, head);
    Real factor[Scores::kM];  // from the sums to out and its tangent
#pragma unroll
    for (int m = 0; m < Scores::kM; ++m) {
      const Real l_of_keys = Grid::row_sum(states[m].l);
      states[m].l = l_of_keys;
      const Real rescale = Config::Sink::close(states[m], p.attention, head, unit);
      const Real move = tangents[m].add_sink(p, head, l_of_keys * rescale, states[m].l);
#pragma unroll
      for (int n = 0; n < Output::kN; ++n) dout.x[m][n] -= move * out.x[m][n];
      factor[m] = rescale * states[m].inverse_sum() * static_cast<Real>(Config::Dropout::scale(p.attention));
      const int row = Scores::row_of(m);
      if (Grid::col() == 0 && row < own.rows) {
        if (p.lse) Results::close(p, first_number + q_first + row, states[m], unit);
        g_tangent_lse[q_first + row] = tangents[m].mean;
      }
    }
    const auto g_out = query_rows<Element>(p.out, p.out_stride, sequence, head).from(q_first);
    const auto g_dout = query_rows<Element>(p.tangent_out, p.tangent_out_stride, sequence, head).from(q_first);
    if (p.out) Block::template store<Config::kDimV>(g_out, out, [&](int m) { return factor[m]; });
    Block::template store<Config::kDimV>(g_dout, dout, [&](int m) { return factor[m]; });
  }

  CF_DEVICE static void run(const JvpParams& p) {
    SmemPlan& smem = *reinterpret_cast<SmemPlan*>(ptx::dynamic_smem());
    const Attention& a = p.attention;

    const QueryTile<Config> own(p, ptx::block_index());
    const Sequence& sequence = own.sequence;
    const int head = own.heads.first, head_kv = own.heads.kv;
    if (own.has_tail()) store_tails<Config, kThreads>(p, sequence, head);
    const int q_first = own.first;
    if (own.rows <= 0) return;

    const auto q = query_rows<const Element>(p.q, p.q_stride, sequence, head).from(q_first);
    const auto dq = query_rows<const Element>(p.tangent_q, p.tangent_q_stride, sequence, head).from(q_first);
    const auto k = key_rows<const Element>(p.k, p.k_stride, sequence, head_kv);
    const auto dk = key_rows<const Element>(p.tangent_k, p.tangent_k_stride, sequence, head_kv);
    const auto v = key_rows<const Element>(p.v, p.v_stride, sequence, head_kv);
    const auto dv = key_rows<const Element>(p.tangent_v, p.tangent_v_stride, sequence, head_kv);

    const ScoreTangent<Config> pairs(p, sequence, head);
    const typename Config::Dropout dropout(a, sequence, head);
    const Real unit = pairs.score.unit(), log2_unit = unit * static_cast<Real>(kLog2E);
    const Tiles tiles = pairs.mask.kv_tiles(q_first, kTileQ, kTileKv);

    Output out, dout;
    out.clear();
    dout.clear();
    States states;
    Tangents tangents;
#pragma unroll
    for (int m = 0; m < Scores::kM; ++m) {
      states[m].init();
      tangents[m].init();
    }

#pragma unroll 1
    for (int tile = tiles.begin; tile < tiles.end; ++tile) {
      const int kv_first = tile * kTileKv;
      Scores s, ds;
      s.clear();
      ds.clear();
      Block::template multiply<Config::kDimQk>(s, smem.operands, q, k.from(kv_first));
      if (p.tangent_q) Block::template multiply<Config::kDimQk>(ds, smem.operands, dq, k.from(kv_first));
      if (p.tangent_k) Block::template multiply<Config::kDimQk>(ds, smem.operands, q, dk.from(kv_first));
      const bool full = tiles.is_full(tile);
#pragma unroll
      for (int m = 0; m < Scores::kM; ++m) {
#pragma unroll
        for (int n = 0; n < Scores::kN; ++n) {
          pairs.apply(s.x[m][n], ds.x[m][n], q_first + s.row_of(m), kv_first + s.col_of(n), full);
        }
      }
      softmax_tile(s, ds, states, tangents, out, dout, log2_unit);
#pragma unroll
      for (int m = 0; m < Scores::kM; ++m) {
#pragma unroll
        for (int n = 0; n < Scores::kN; ++n) {
          if (!dropout.keep(q_first + s.row_of(m), kv_first + s.col_of(n))) s.x[m][n] = Real(0);
          ds.x[m][n] *= s.x[m][n];
        }
      }
      Block::template accumulate<Config::kDimV>(out, smem.weighted, s, v.from(kv_first));
      if (p.tangent_v) Block::template accumulate<Config::kDimV>(dout, smem.weighted, s, dv.from(kv_first));
      Block::template accumulate<Config::kDimV>(dout, smem.weighted, ds, v.from(kv_first));
    }
    finish(p, own, unit, states, tangents, out, dout);
  }
};

template <class Config>
CF_DEVICE void jvp_simt(const JvpParams& params) {
  SmemSizeCheck<sizeof(typename JvpSimt<Config>::SmemPlan), Config::kSmemBytes>();
  JvpSimt<Config>::run(params);
}

}  // namespace cuflash
