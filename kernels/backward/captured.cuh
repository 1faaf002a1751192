// Last step of the gradients of what a written score reads, where they are to be the same every time: exact sums, rounded.
#pragma once

#include "attention/exact_sum.cuh"
#include "element.cuh"
#include "params.cuh"
#include "ptx/sync.cuh"

namespace cuflash {

template <class Real, int kThreads>
struct RoundSums {
  CF_DEVICE void operator()(void* gradient, const void* sums, int64 count) const {
    const int64 first = static_cast<int64>(ptx::block_index()) * kThreads + ptx::thread_index();
    for (int64 i = first; i < count; i += static_cast<int64>(ptx::num_blocks()) * kThreads) {
      static_cast<Real*>(gradient)[i] = ExactSum<Real>::rounded(sums, i);
    }
  }
};

template <class Config>
CF_DEVICE void backward_captured(const BwdParams& p) {
  Config::Score::for_each_sum(&p.attention, RoundSums<Accumulator<typename Config::Element>, Config::kThreads>());
}

}  // namespace cuflash
