// Forward attention on Hopper's warpgroup tensor cores and copy engine (sm_90a).
#include "config.cuh"
#include "forward/sm90.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    fwd_sm90(const __grid_constant__ cuflash::FwdParams params) {
  cuflash::forward_sm90<cuflash::Config>(params);
}
