// Forward attention on Hopper's warpgroup tensor cores and copy engine (sm_90a), of wide heads.
#include "config.cuh"
#include "forward/sm90_wide.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    fwd_sm90_wide(const __grid_constant__ cuflash::FwdParams params) {
  cuflash::forward_sm90_wide<cuflash::Config>(params);
}
