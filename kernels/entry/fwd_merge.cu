// Merges results of the same queries over different keys.
#include "config.cuh"
#include "forward/merge.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    fwd_merge(const __grid_constant__ cuflash::MergeParams params) {
  cuflash::forward_merge<cuflash::Config>(params);
}
