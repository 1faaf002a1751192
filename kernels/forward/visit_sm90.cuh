// What a warpgroup of both Hopper forwards does for one work with the 64 rows that it has: each of its warps makes
// weights of the scores of 16 of them, and closes them at the end. How scores and weights come to be multiplied, and
// which columns of the output are whose, is each kernel's own affair.
#pragma once

#include "attention/heads.cuh"
#include "attention/place.cuh"
#include "attention/schedule.cuh"
#include "attention/split.cuh"
#include "tile/gemm_sm90.cuh"
#include "tile/parts.cuh"
#include "tile/softmax_sm90.cuh"

namespace cuflash {

// kCols: the columns of the output that a warpgroup has, those from first_col on.
template <class Config, class Heads, int kCols>
struct VisitSm90 {
  using Element = typename Config::Element;
  using Sequence = typename Config::Sequence;
  using Mask = typename Config::Mask;
  using Score = typename Config::Score;
  using Dropout = typename Config::Dropout;
  using Results = typename Config::Split::template Rows<Config>;
  static constexpr int kTileKv = Config::kTileKv;

  using Scores = Fragment<16, kTileKv>;
  using Weights = Operand<16, kTileKv>;
  using Output = Fragment<16, kCols>;

  const FwdParams& p;
  const Work& work;
  const Sequence& sequence;
  const Heads heads;
  const int lane;
  const int warp_row;         // the warp's first row among the warpgroup's
  const int q_first, q_warp;  // the warpgroup's first row among all of the sequence's, and this warp's
  const int rows;             // of the sequence
  const typename Heads::template Bound<Mask, Sequence> mask;
  const typename Heads::template Bound<Score, Sequence> score;
  const typename Heads::template Bound<Dropout, Sequence> dropout;
  Scores s;
  Weights weights;
  Output out;
  WarpSoftmax softmax;

  CF_DEVICE VisitSm90(const FwdParams& params, const Work& its_work, const Sequence& its_sequence, int first, int row,
                      int lane_index)
      : p(params), work(its_work), sequence(its_sequence), heads(p.attention, work.head), lane(lane_index),
        warp_row(row), q_first(first), q_warp(first + row), rows(Heads::rows(p.attention, sequence.len_q)),
        mask(in_registers(heads.template bind<Mask>(p.attention, sequence))),
        score(heads.template bind<Score>(p.attention, sequence)),
        dropout(heads.template bind<Dropout>(p.attention, sequence)) {}

  // Scores of a tile of keys to probabilities; whether the output so far must be rescaled. Where they must be looked at
  // after all, one warp multiplies q and k again.
  template <class QTile, class KTile, class Bias, class Cursor>
  CF_DEVICE bool weigh(int tile, bool look_first, bool some_hidden, QTile& q, KTile& k, Bias& bias, int bias_row,
                       const Cursor& at) {
    apply_score(tile);
    bias.add(s, bias_row, lane, at);
    bool grew;
    if (look_first || !softmax.look_after(s, grew)) {
      if (look_first) {
        if (some_hidden) hide(tile);
      } else {
        s.clear();
        gemm_abt_warp<Element>(s, q, warp_row, k);
        apply_score(ptx::keep(tile));  // positions for this rare case alone, not held ready for it
        bias.add(s, bias_row, lane, at);
      }
      grew = softmax.look_first(s, score.unit());
    }
    return grew;
  }
  CF_DEVICE void apply_score(int tile) {
    Scores::for_each_index([&](int r, int n, int i) {
      const Place q(q_warp + row_of(lane, r), row_of(0, r));
      const Place kv(tile * kTileKv + col_of(lane, n, i), col_of(0, n, i));
      s.at(r, n, i) = score.apply(s.at(r, n, i), q, kv);
    });
  }
  CF_DEVICE void hide(int tile) {
    s.for_each(lane, [&](float& x, int row, int col) {
      if (!mask.keep(q_warp + row, tile * kTileKv + col)) x = -infinity<float>();
    });
  }
  CF_DEVICE void rescale_output(const float (&factor)[2]) {
    Output::for_each_index([&](int r, int n, int i) { out.at(r, n, i) *= factor[r]; });
  }

  // out divided by its sums, and where it is this warpgroup's to write lse; or what a part has instead.
  CF_DEVICE void finish(bool writes) {
    const int64 number = Results::number(p, sequence, heads.first, work.split);
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = q_warp + row_of(lane, r);
      RowState<float> state = softmax.whole(r);
      const float shrink = Config::Sink::close(state, p.attention, heads.head(row), score.unit());
      factor[r] = shrink * state.inverse_sum() * static_cast<float>(Dropout::scale(p.attention));
      if (writes && lane % 4 == 0 && row < rows) {
        Results::close(p, number + heads.offset(row, Results::lse_stride(p)), state, score.unit());
      }
    }
    rescale_output(factor);
  }

  CF_DEVICE void store_part(int first_col) {
    const Strides stride = Results::out_stride(p);
    auto* part = Results::out(p, sequence, heads.first, work.split);
    Output::for_each_index([&](int r, int n, int i) {
      const int row = q_warp + row_of(lane, r), col = first_col + col_of(lane, n, 0);
      if (i != 0 || row >= rows || col >= Config::kDimV) return;
      auto* place = part + heads.offset(row, stride) + col;
      *reinterpret_cast<Columns<float, 2>*>(place) = {{out.at(r, n, 0), out.at(r, n, 1)}};
    });
  }
};

}  // namespace cuflash
