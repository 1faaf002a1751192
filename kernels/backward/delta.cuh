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
// rows past the sequence are empty ones.
template <class Config, int kThreads = Config::kThreads, int kUnroll = 4, class Sequence, class F>
CF_DEVICE void for_each_delta(const BwdParams& p, const Sequence& sequence, const Work& work, F&& f,
                              int thread = ptx::thread_index()) {
  using Element = typename Config::Element;
  using Real = Accumulator<Element>;
  using Shift = RowShift<Real>;
  using Vector = typename VectorOf<Config::kCopyBytes>::Type;
  constexpr int kWidth = Config::kCopyBytes / sizeof(Element), kVectors = Config::kDimV / kWidth;
  constexpr int kLanes = kVectors > 16 ? 32 : kVectors > 8 ? 16 : kVectors > 4 ? 8 : 4;  // that share a row
  constexpr int kRowsAtOnce = kThreads / kLanes;

  const Element* g_out = first_query<const Element>(p.out, p.out_stride, sequence, work.head);
  const Element* g_dout = first_query<const Element>(p.dout, p.dout_stride, sequence, work.head);
  const Real* g_lse = first_query<const Real>(p.lse, p.lse_stride, sequence, work.head);
  const Real* g_dlse = first_query<const Real>(p.dlse, p.dlse_stride, sequence, work.head);
  const auto* g_state = first_query<const RowState<Real>>(p.row_state, p.delta_stride, sequence, work.head);

  const int lane = thread % kLanes, first = work.tile * Config::kTileQ;
#pragma unroll kUnroll
  for (int base = 0; base < Config::kTileQ; base += kRowsAtOnce) {  // the same trip count for every lane of a warp
    const int in_tile = base + thread / kLanes, row = first + in_tile;
    const bool some = row < sequence.len_q;
    Real sum = 0;
    if (some) {
      for (int vector = lane; vector < kVectors; vector += kLanes) {
        const Vector o = *reinterpret_cast<const Vector*>(g_out + row * p.out_stride.row + vector * kWidth);
        const Vector d = *reinterpret_cast<const Vector*>(g_dout + row * p.dout_stride.row + vector * kWidth);
        const Element* o_elements = reinterpret_cast<const Element*>(&o);
        const Element* d_elements = reinterpret_cast<const Element*>(&d);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum += to_accumulator(o_elements[i]) * to_accumulator(d_elements[i]);
      }
    }
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
    if (lane != 0 || in_tile >= Config::kTileQ) continue;
    Shift shift = Shift::empty();
    if (some) shift = p.row_state ? Shift::of(g_state[row]) : Shift::of_lse(g_lse[row * p.lse_stride.row]);
    const Real dlse = some && p.dlse ? g_dlse[row * p.dlse_stride.row] : Real(0);
    f(in_tile, shift, shift.is_empty() ? Real(0) : sum - dlse);  // dlse of an empty row may be anything
  }
}

// Leaves delta and shift of a row for the kernels that read them row by row.
template <class Real, class Sequence>
CF_DEVICE void keep_delta(const BwdParams& p, const Sequence& sequence, int head, int row, const RowShift<Real>& shift,
                          Real delta) {
  first_query<RowShift<Real>>(p.shift, p.delta_stride, sequence, head)[row] = shift;
  first_query<Real>(p.delta, p.delta_stride, sequence, head)[row] = delta;
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
