// Gradients of merged results.
#include "config.cuh"
#include "backward/merge.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    bwd_merge(const __grid_constant__ cuflash::MergeParams params) {
  cuflash::backward_merge<cuflash::Config>(params);
}
