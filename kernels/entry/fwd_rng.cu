// Seed and offset of one call's dropout.
#include "config.cuh"
#include "forward/rng.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    fwd_rng(const __grid_constant__ cuflash::FwdParams params) {
  cuflash::forward_rng(params);
}
