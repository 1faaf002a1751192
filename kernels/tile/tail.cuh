// Tails: packed rows behind those of a sequence that take part in nothing, which its first tile's block fills. Their
// outputs are those of empty rows, so that every number of an output is defined.
#pragma once

#include "element.cuh"
#include "ptx/sync.cuh"
#include "tile/rows.cuh"

namespace cuflash {

// Zeroes the first kDim columns of the `tail` rows behind some, by kThreads threads of which this is number `thread`.
template <int kDim, int kThreads, class Element>
CF_DEVICE void zero_tail(const GlobalRows<Element>& rows, int tail, int thread = ptx::thread_index()) {
  if (tail == 0) return;  // known of dense sequences
  const GlobalRows<Element> behind = rows.from(rows.count);
#pragma unroll 1
  for (int64 index = thread; index < int64(tail) * kDim; index += kThreads) {
    behind.data[index / kDim * behind.stride + index % kDim] = Element(0.f);
  }
}

// The tails of dq, and of dk and dv.
template <class Config, int kThreads, class Sequence>
CF_DEVICE void store_query_tail(const BwdParams& p, const Sequence& sequence, int head) {
  using Element = typename Config::Element;
  zero_tail<Config::kDimQk, kThreads>(query_rows<Element>(p.dq, p.dq_stride, sequence, head), sequence.tail_q);
}
template <class Config, int kThreads, class Sequence>
CF_DEVICE void store_key_tail(const BwdParams& p, const Sequence& sequence, int head,
                              int thread = ptx::thread_index()) {
  using Element = typename Config::Element;
  zero_tail<Config::kDimQk, kThreads>(key_rows<Element>(p.dk, p.dk_stride, sequence, head), sequence.tail_kv, thread);
  zero_tail<Config::kDimV, kThreads>(key_rows<Element>(p.dv, p.dv_stride, sequence, head), sequence.tail_kv, thread);
}

// The tail of out and lse.
template <class Config, int kThreads, class Sequence>
CF_DEVICE void store_tail(const FwdParams& p, const Sequence& sequence, int head, int thread = ptx::thread_index()) {
  using Element = typename Config::Element;
  using Real = Accumulator<Element>;
  zero_tail<Config::kDimV, kThreads>(query_rows<Element>(p.out, p.out_stride, sequence, head), sequence.tail_q, thread);
  if (sequence.tail_q == 0) return;
  Real* lse = first_query<Real>(p.lse, p.lse_stride, sequence, head) + sequence.len_q;
#pragma unroll 1
  for (int row = thread; row < sequence.tail_q; row += kThreads) lse[row] = static_cast<Real>(p.tail_lse);
}

// The same where they may not be wanted, and those of their tangents.
template <class Config, int kThreads, class Sequence>
CF_DEVICE void store_tails(const JvpParams& p, const Sequence& sequence, int head) {
  using Element = typename Config::Element;
  using Real = Accumulator<Element>;
  if (p.out) store_tail<Config, kThreads>(p, sequence, head);
  const auto out = query_rows<Element>(p.tangent_out, p.tangent_out_stride, sequence, head);
  zero_tail<Config::kDimV, kThreads>(out, sequence.tail_q);
  const GlobalRows<Real> lse{first_query<Real>(p.tangent_lse, p.tangent_lse_stride, sequence, head), 1, sequence.len_q};
  zero_tail<1, kThreads>(lse, sequence.tail_q);
}

}  // namespace cuflash
