// The seed and offset of one call's dropout, drawn on the device: a captured graph draws fresh ones at every replay.
#pragma once

#include "params.cuh"
#include "ptx/sync.cuh"

namespace cuflash {

CF_DEVICE void forward_rng(const FwdParams& p) {
  if (ptx::thread_index() != 0) return;
  p.rng_state[0] = p.generator ? p.generator[0] : p.seed;
  p.rng_state[1] = p.generator ? p.generator[1] : p.offset;
  if (p.generator) p.generator[1] += p.increment;
}

}  // namespace cuflash
