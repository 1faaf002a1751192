// Backward attention on Hopper: dk, dv and the fp32 sums of dq.
#include "config.cuh"
#include "backward/sm90.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    bwd_sm90(const __grid_constant__ cuflash::BwdParams params) {
  cuflash::backward_sm90<cuflash::Config>(params);
}
