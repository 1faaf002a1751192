// First step of the backward: for each query row, delta = rowsum(dout * out) - dlse and what is taken off its scores.
//
// delta is what softmax's Jacobian subtracts: ds = p * (dp - delta); the gradient of lse enters as ds += p * dlse.
#pragma once

#include "attention/schedule.cuh"
#include "attention/softmax.cuh"
#include "element.cuh"
#include "ptx/sync.cuh"
#include "tile/copy.cuh"

namespace cuflash {

// f(row, shift, delta) for every row of a query tile, by one of kThreads threads each, of which this is number `thread`;
// rows past the sequence are empty ones. A thread has the loads of kAtOnce rows under way together.
template <class Config, int kThreads = Config::kThreads, int kAtOnce = 2, class Sequence, class F>
CF_DEVICE void for_each_delta(const BwdParams& p, const Sequence& sequence, const Work& work, F&& f,
                              int thread = ptx::thread_index()) {
  using Element = typename Config::Element;
  using Real = Accumulator<Element>;
  using Shift = RowShift<Real>;
  using Vector = typename VectorOf<Config::kCopyBytes>::Type;
  constexpr int kWidth = Config::kCopyBytes / sizeof(Element), kVectors = Config::kDimV / kWidth;
  constexpr int kLanes = kVectors > 16 ? 32 : kVectors > 8 ? 16 : kVectors > 4 ? 8 : 4;  // that share a row
  constexpr int kRowsAtOnce = kThreads / kLanes;
  constexpr int kRows = min_of(kAtOnce, cdiv(Config::kTileQ, kRowsAtOnce));

  const Element* g_out = first_query<const Element>(p.out, p.out_stride, sequence, work.head);
  const Element* g_dout = first_query<const Element>(p.dout, p.dout_stride, sequence, work.head);
  const Real* g_lse = first_query<const Real>(p.lse, p.lse_stride, sequence, work.head);
  const Real* g_dlse = first_query<const Real>(p.dlse, p.dlse_stride, sequence, work.head);
  const auto* g_state = first_query<const RowState<Real>>(p.row_state, p.delta_stride, sequence, work.head);

  const int lane = thread % kLanes, first = work.tile * Config::kTileQ;
#pragma unroll 1
  for (int base = 0; base < Config::kTileQ;
       base += kRows * kRowsAtOnce) {  // the same trip count for every lane of a warp
    const auto in_tile = [&](int i) { return base + i * kRowsAtOnce + thread / kLanes; };
    const auto is_there = [&](int i) { return in_tile(i) < Config::kTileQ && first + in_tile(i) < sequence.len_q; };
    Real sums[kRows] = {}, dlse[kRows] = {};
    RowState<Real> state[kRows];  // or lse alone; under way with the rows
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      state[i] = {Real(0), Real(0)};
      if (lane != 0 || !is_there(i)) continue;
      const int row = first + in_tile(i);
      state[i] = p.row_state ? g_state[row] : RowState<Real>{g_lse[row * p.lse_stride.row], Real(0)};
      if (p.dlse) dlse[i] = g_dlse[row * p.dlse_stride.row];
    }
    for (int vector = lane; vector < kVectors; vector += kLanes) {
      Vector o[kRows] = {}, d[kRows] = {};
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (!is_there(i)) continue;
        const int64 row = first + in_tile(i);
        o[i] = *reinterpret_cast<const Vector*>(g_out + row * p.out_stride.row + vector * kWidth);
        d[i] = *reinterpret_cast<const Vector*>(g_dout + row * p.dout_stride.row + vector * kWidth);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const Element* o_elements = reinterpret_cast<const Element*>(&o[i]);
        const Element* d_elements = reinterpret_cast<const Element*>(&d[i]);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) sums[i] += to_accumulator(o_elements[j]) * to_accumulator(d_elements[j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int mask = kLanes / 2; mask > 0; mask /= 2) sums[i] += ptx::shuffle_xor(sums[i], mask);
    }
    if (lane != 0) continue;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (in_tile(i) >= Config::kTileQ) continue;
      Shift shift = Shift::empty();
      if (is_there(i)) shift = p.row_state ? Shift::of(state[i]) : Shift::of_lse(state[i].m);
      f(in_tile(i), shift, shift.is_empty() ? Real(0) : sums[i] - dlse[i]);  // dlse of an empty row may be anything
    }
  }
}

// Leaves delta and shift of a row for the kernels that read them row by row.
template <class Real, class Sequence>
CF_DEVICE void keep_delta(const BwdParams& p, const Sequence& sequence, int head, int row, const RowShift<Real>& shift,
                          Real delta) {
  first_query<RowShift<Real>>(p.shift, p.delta_stride, sequence, head)[row] = shift;
  first_query<Real>(p.delta, p.delta_stride, sequence, head)[row] = delta;
}

// The same where there are such kernels, or a caller who wants delta.
template <class Real, class Sequence>
CF_DEVICE void keep_wanted_delta(const BwdParams& p, const Sequence& sequence, int head, int row,
                                 const RowShift<Real>& shift, Real delta) {
  if (p.shift) first_query<RowShift<Real>>(p.shift, p.delta_stride, sequence, head)[row] = shift;
  if (p.delta) first_query<Real>(p.delta, p.delta_stride, sequence, head)[row] = delta;
}

template <class Config>
CF_DEVICE void backward_delta(const BwdParams& p) {
  using Real = Accumulator<typename Config::Element>;
  const Attention& a = p.attention;
  const Work work = query_work(ptx::block_index(), num_tiles(a.len_q, Config::kTileQ), a.heads_q);
  const typename Config::Sequence sequence(a, work.batch);
  const int first = work.tile * Config::kTileQ;
  if (first >= sequence.len_q) return;
  for_each_delta<Config>(p, sequence, work, [&](int row, const RowShift<Real>& shift, Real delta) {
    if (first + row < sequence.len_q) keep_delta(p, sequence, work.head, first + row, shift, delta);
  });
}

}  // namespace cuflash
