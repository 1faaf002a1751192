// Last step of the gradient of a broadcast bias whose tiles several blocks share (backward/bias.cuh).
#pragma once

#include "attention/bias_gradient.cuh"
#include "element.cuh"
#include "params.cuh"
#include "ptx/sync.cuh"

namespace cuflash {

// dbias = the sum of its parts, in their order; one thread an element.
template <class Config>
CF_DEVICE void backward_bias_sum(const BwdParams& p) {
  using Real = Accumulator<typename Config::Element>;
  const int64 index = ptx::block_index() * Config::kThreads + ptx::thread_index();
  const BiasSums layout(p);
  if (index >= layout.part) return;
  const Real* part = static_cast<const Real*>(p.dbias_parts) + index;
  Real sum = 0;
#pragma unroll 8
  for (int i = 0; i < p.bias_parts; ++i) sum += part[i * layout.part];
  const int column = static_cast<int>(index % layout.columns);
  const int64 rows = index / layout.columns, heads = rows / layout.rows;
  Real* row = static_cast<Real*>(p.dbias) + rows % layout.rows * p.dbias_row;
  row[heads % layout.heads * p.dbias_head + heads / layout.heads * p.dbias_batch + column] = sum;
}

}  // namespace cuflash
