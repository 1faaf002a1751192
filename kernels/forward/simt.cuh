// Forward attention on plain multiply-adds: any element type, any head size, any architecture.
//
//   out = softmax(score(Q K^T)) V,   lse = log sum exp
//
//              kv tiles ->
//           +----+----+----+      One block owns one q tile of one head and walks the kv tiles its mask can let
//    q tile |####|####|##\ |      through, keeping out and, for each row, the largest score so far and the sum of the
//           +----+----+----+      weights relative to it (online softmax). Each thread has micro-tiles of S and out.
//
//   for each kv tile:   load_q, load_k, S += Q K^T, piece by piece of dim_qk | mask_tile | softmax_tile
//                       load_v, out += P V, piece by piece of the keys
//   store_out, store_lse
//
// Q is staged anew for every kv tile: pieces of it and of K share one bounded buffer, whatever the head size. A block
// does not overlap its loads with its products; the blocks that share a multiprocessor do that for each other.
#pragma once

#include "attention/dropout.cuh"
#include "attention/query_tile.cuh"
#include "attention/softmax.cuh"
#include "tile/gemm_simt.cuh"
#include "tile/tail.cuh"

namespace cuflash {

template <class Config>
struct ForwardSimt {
  using Element = typename Config::Element;
  using Real = Accumulator<Element>;
  using Sequence = typename Config::Sequence;
  using Heads = typename Config::Heads;
  using Split = typename Config::Split;
  using Results = typename Split::template Rows<Config>;
  static constexpr int kThreads = Config::kThreads, kTileQ = Config::kTileQ, kTileKv = Config::kTileKv;

  using Block = SimtBlock<Config, kTileQ, kTileKv>;
  using SmemPlan = typename Block::SmemPlan;
  using Rows = typename Block::Rows;
  using Scores = typename Block::Scores;
  using Output = typename Block::template Output<Config::kDimV>;
  using States = RowState<Real>[Scores::kM];

  // Logits to probabilities relative to the running maximum; what was accumulated before shrinks to match.
  // Each thread sums only its own columns into l; row_sum joins them once at the end.
  CF_DEVICE static void softmax_tile(Scores& s, States& states, Output& out, Real log2_unit) {
#pragma unroll
    for (int m = 0; m < Scores::kM; ++m) {
      Real tile_max = -infinity<Real>();
#pragma unroll
      for (int n = 0; n < Scores::kN; ++n) tile_max = max_of(tile_max, s.x[m][n]);
      const Real rescale = states[m].update(Block::Grid::row_max(tile_max), log2_unit);
#pragma unroll
      for (int n = 0; n < Scores::kN; ++n) {
        s.x[m][n] = states[m].weight(s.x[m][n], log2_unit);
        states[m].l += s.x[m][n];
      }
#pragma unroll
      for (int n = 0; n < Output::kN; ++n) out.x[m][n] *= rescale;
    }
  }

  CF_DEVICE static void run(const FwdParams& p) {
    SmemPlan& smem = *reinterpret_cast<SmemPlan*>(ptx::dynamic_smem());
    const Attention& a = p.attention;

    const QueryTile<Config> own(p, ptx::block_index());
    const Split& split = own.split;
    const Sequence& sequence = own.sequence;
    const Heads& heads = own.heads;
    if (own.has_tail()) heads.for_each([&](int head) { store_tail<Config, kThreads>(p, sequence, head); });
    const int q_first = own.first, q_rows = own.rows;
    if (q_rows <= 0) return;

    const Element* g_q = first_query<const Element>(p.q, p.q_stride, sequence, heads.first);
    const Element* g_k = first_key<const Element>(p.k, p.k_stride, sequence, heads.kv);
    const Element* g_v = first_key<const Element>(p.v, p.v_stride, sequence, heads.kv);
    const auto q = rows_of(heads, g_q, p.q_stride, q_first, q_rows);

    const auto mask = own.template bind<typename Config::Mask>(a);
    const int visible = first_visible_key<typename Config::Mask>(mask, q_first, kTileQ);
    const auto k = kv_rows(p, sequence, g_k, p.k_stride, 0, visible);
    const auto v = kv_rows(p, sequence, g_v, p.v_stride, 0, visible);
    const auto score = own.template bind<typename Config::Score>(a);
    const auto dropout = own.template bind<typename Config::Dropout>(a);
    const Real log2_unit = score.unit() * static_cast<Real>(kLog2E);
    const auto tiles = split.part(mask.kv_tiles(q_first, kTileQ, kTileKv));

    Output out;
    out.clear();
    States states;
#pragma unroll
    for (int m = 0; m < Scores::kM; ++m) states[m].init();

#pragma unroll 1
    for (int place = tiles.begin; place < tiles.end; ++place) {
      const int kv_first = tiles.number(place) * kTileKv;
      Scores s;
      s.clear();
      Block::template multiply<Config::kDimQk>(s, smem.operands, q, k.from(kv_first));
      s.for_each([&](Real& x, int row, int col) { x = score.apply(x, q_first + row, kv_first + col); });
      if (!tiles.is_full(place)) {
        s.for_each([&](Real& x, int row, int col) {
          if (!mask.keep(q_first + row, kv_first + col)) x = -infinity<Real>();
        });
      }
      softmax_tile(s, states, out, log2_unit);
      s.for_each([&](Real& x, int row, int col) {
        if (!dropout.keep(q_first + row, kv_first + col)) x = Real(0);
      });
      Block::template accumulate<Config::kDimV>(out, smem.weighted, s, v.from(kv_first));
    }

    const int64 first_number = Results::number(p, sequence, heads.first, split.index);
    Real factor[Scores::kM];  // from the sum of weighted values to out
#pragma unroll
    for (int m = 0; m < Scores::kM; ++m) {
      states[m].l = Block::Grid::row_sum(states[m].l);
      const Real rescale = Config::Sink::close(states[m], a, heads.head(q_first + Scores::row_of(m)), score.unit());
      factor[m] = rescale * states[m].inverse_sum() * static_cast<Real>(Config::Dropout::scale(a));
      const int row = Scores::row_of(m);
      if (Block::Grid::col() == 0 && row < q_rows) {
        Results::close(p, first_number + heads.offset(q_first + row, Results::lse_stride(p)), states[m], score.unit());
      }
    }
    const auto g_out =
        rows_of(heads, Results::out(p, sequence, heads.first, split.index), Results::out_stride(p), q_first, q_rows);
    Block::template store<Config::kDimV>(g_out, out, [&](int m) { return factor[m]; });
  }
};

template <class Config>
CF_DEVICE void forward_simt(const FwdParams& params) {
  SmemSizeCheck<sizeof(typename ForwardSimt<Config>::SmemPlan), Config::kSmemBytes>();
  ForwardSimt<Config>::run(params);
}

}  // namespace cuflash
