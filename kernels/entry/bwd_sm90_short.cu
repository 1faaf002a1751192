// Gradients of many sequences of up to 128 rows on Hopper.
#include "config.cuh"
#include "backward/sm90_short.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    bwd_sm90_short(const __grid_constant__ cuflash::BwdParams params) {
  cuflash::backward_sm90_short<cuflash::Config>(params);
}
