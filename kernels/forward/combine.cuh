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

  using Whole = WholeRows<Config>;
  using Part = typename Config::Split::template Rows<Config>;

  const Attention& a = p.attention;
  // Rows of all heads of a sequence, head by head; a block has kRows neighbours.
  const int64 rows = static_cast<int64>(a.len_q) * a.heads_q;
  const int64 blocks = max_of((rows + Config::kRows - 1) / Config::kRows, int64(1));
  const int batch = static_cast<int>(ptx::block_index() / blocks);
  const int64 first = (ptx::block_index() - batch * blocks) * Config::kRows;
  const int first_row = static_cast<int>(first / a.heads_q), first_head = static_cast<int>(first % a.heads_q);
  const int count = static_cast<int>(min_of(static_cast<int64>(Config::kRows), rows - first));
  const typename Config::Sequence sequence(a, batch);
#pragma unroll 1
  for (int index = ptx::thread_index() / kAcross; index < count; index += kRowsAtOnce) {
    const int row = first_row + (first_head + index) / a.heads_q, head = (first_head + index) % a.heads_q;
    if (row >= sequence.len_q) break;
    const Real unit = typename Config::Score(a, sequence, head).unit(), log2_unit = unit * static_cast<Real>(kLog2E);
    const int64 number = Part::first(p, sequence, head, row), step = Part::step(p, sequence, head);
#pragma unroll 1
    for (int col = ptx::thread_index() % kAcross * kWidth; col < Config::kDimV; col += kAcross * kWidth) {
      const Parts<Real, kWidth> parts{static_cast<const RowState<Real>*>(p.partial_state) + number,
                                      static_cast<const Real*>(p.partial_out) + number * Config::kDimV + col, step,
                                      step * Config::kDimV};
      Columns<Real, kWidth> out;
      RowState<Real> state = merge_parts<8>(out, parts, Part::count(p, sequence, head), log2_unit);
      const Real rescale = Config::Sink::close(state, a, head, unit);
      Element* place = Whole::out(p, sequence, head, 0) + row * p.out_stride.row + col;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) place[i] = from_accumulator<Element>(out.x[i] * rescale * state.inverse_sum());
      if (col == 0) Whole::close(p, Whole::number(p, sequence, head, 0) + row, state, unit);
    }
  }
}

}  // namespace cuflash
