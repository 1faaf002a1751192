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

template <class Config>
CF_DEVICE void backward_delta(const BwdParams& p) {
  using Element = typename Config::Element;
  using Real = Accumulator<Element>;
  using Vector = typename VectorOf<Config::kCopyBytes>::Type;
  constexpr int kWidth = Config::kCopyBytes / sizeof(Element), kVectors = Config::kDimV / kWidth;
  constexpr int kLanes = kVectors > 16 ? 32 : kVectors > 8 ? 16 : kVectors > 4 ? 8 : 4;  // that share a row
  constexpr int kRowsAtOnce = Config::kThreads / kLanes;

  const Attention& a = p.attention;
  const Work work = query_work(ptx::block_index(), num_tiles(a.len_q, Config::kTileQ), a.heads_q);
  const typename Config::Sequence sequence(a, work.batch);
  const Element* g_out = first_query<const Element>(p.out, p.out_stride, sequence, work.head);
  const Element* g_dout = first_query<const Element>(p.dout, p.dout_stride, sequence, work.head);
  const Real* g_lse = first_query<const Real>(p.lse, p.lse_stride, sequence, work.head);
  const Real* g_dlse = first_query<const Real>(p.dlse, p.dlse_stride, sequence, work.head);
  const auto* g_state = first_query<const RowState<Real>>(p.row_state, p.delta_stride, sequence, work.head);
  Real* g_delta = first_query<Real>(p.delta, p.delta_stride, sequence, work.head);
  RowShift<Real>* g_shift = first_query<RowShift<Real>>(p.shift, p.delta_stride, sequence, work.head);

  const int lane = ptx::thread_index() % kLanes;
  const int first = work.tile * Config::kTileQ, end = min_of(first + Config::kTileQ, sequence.len_q);
  for (int base = first; base < end; base += kRowsAtOnce) {  // the same trip count for every lane of a warp
    const int row = base + ptx::thread_index() / kLanes;
    Real sum = 0;
    if (row < end) {
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
    if (row < end && lane == 0) {
      using Shift = RowShift<Real>;
      const Shift shift = p.row_state ? Shift::of(g_state[row]) : Shift::of_lse(g_lse[row * p.lse_stride.row]);
      const Real dlse = p.dlse ? g_dlse[row * p.dlse_stride.row] : Real(0);
      g_shift[row] = shift;
      g_delta[row] = shift.is_empty() ? Real(0) : sum - dlse;  // dlse of an empty row may be anything
    }
  }
}

}  // namespace cuflash
