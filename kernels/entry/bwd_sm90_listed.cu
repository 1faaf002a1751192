// Backward attention on Hopper by lists of tiles: dq, dk and dv.
#include "config.cuh"
#include "backward/listed_sm90.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    bwd_sm90_listed(const __grid_constant__ cuflash::BwdParams params) {
  cuflash::backward_listed_sm90<cuflash::Config>(params);
}
