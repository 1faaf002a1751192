// Merges what the blocks of split rows found, shared by all families.
#include "config.cuh"
#include "forward/combine.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    fwd_combine(const __grid_constant__ cuflash::FwdParams params) {
  cuflash::forward_combine<cuflash::Config>(params);
}
