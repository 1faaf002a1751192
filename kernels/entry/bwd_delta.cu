// Row sums the backward starts from, shared by all families.
#include "config.cuh"
#include "backward/delta.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    bwd_delta(const __grid_constant__ cuflash::BwdParams params) {
  cuflash::backward_delta<cuflash::Config>(params);
}
