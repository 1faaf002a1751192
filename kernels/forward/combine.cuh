// Last step of a forward whose keys are split: merges the parts of every row (attention/split.cuh) into out and lse.
//
//   l = sum_s exp(m_s - m) l_s,   out = sum_s exp(m_s - m) l_s out_s / l,   lse = m + log(l)
//
// Splits are taken in their order whichever block came first, so results are bit-equal from run to run. A sink joins
// here, once a row.
#pragma once

#include "attention/ranges.cuh"
#include "attention/schedule.cuh"
#include "attention/softmax.cuh"
#include "attention/split.cuh"
#include "ptx/sync.cuh"
#include "tile/parts.cuh"

namespace cuflash {

template <class Config>
CF_DEVICE void forward_combine(const FwdParams& p) {
  using Element = typename Config::Element;
  using Real = Accumulator<Element>;
  constexpr int kWidth = Config::kDimV * sizeof(Real) % 16 == 0 ? 16 / sizeof(Real) : 1;  // columns of a thread at once
  constexpr int kColumns = Config::kDimV / kWidth;
  constexpr int kAcross = min_of(Config::kThreads, power_of_two_above(kColumns));  // threads that share a row
  constexpr int kRowsAtOnce = Config::kThreads / kAcross;

  const Attention& a = p.attention;
  const Work work = query_work(ptx::block_index(), num_tiles(a.len_q, Config::kTileQ), a.heads_q);
  const typename Config::Sequence sequence(a, work.batch);
  const Real unit = typename Config::Score(a, sequence, work.head).unit(), log2_unit = unit * static_cast<Real>(kLog2E);
  using Whole = WholeRows<Config>;
  using Part = typename Config::Split::template Rows<Config>;
  const int64 step = Part::step(p, sequence, work.head);

  const int first = work.tile * Config::kTileQ, end = min_of(first + Config::kTileQ, sequence.len_q);
#pragma unroll 1
  for (int row = first + ptx::thread_index() / kAcross; row < end; row += kRowsAtOnce) {
#pragma unroll 1
    for (int col = ptx::thread_index() % kAcross * kWidth; col < Config::kDimV; col += kAcross * kWidth) {
      const int64 number = Part::first(p, sequence, work.head, row);
      const Parts<Real, kWidth> parts{static_cast<const RowState<Real>*>(p.partial_state) + number,
                                      static_cast<const Real*>(p.partial_out) + number * Config::kDimV + col, step,
                                      step * Config::kDimV};
      Columns<Real, kWidth> out;
      RowState<Real> state = merge_parts<8>(out, parts, Part::count(p, sequence, work.head), log2_unit);
      const Real rescale = Config::Sink::close(state, a, work.head, unit);
      Element* place = Whole::out(p, sequence, work.head, 0) + row * p.out_stride.row + col;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) place[i] = from_accumulator<Element>(out.x[i] * rescale * state.inverse_sum());
      if (col == 0) Whole::close(p, Whole::number(p, sequence, work.head, 0) + row, state, unit);
    }
  }
}

}  // namespace cuflash
