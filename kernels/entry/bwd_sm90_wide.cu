// Backward attention on Hopper for wide heads: dk, dv and the fp32 sums of dq.
#include "config.cuh"
#include "backward/sm90_wide.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    bwd_sm90_wide(const __grid_constant__ cuflash::BwdParams params) {
  cuflash::backward_sm90_wide<cuflash::Config>(params);
}
