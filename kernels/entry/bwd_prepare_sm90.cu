// What the Hopper backward must know of its rows, and its sums at 0.
#include "config.cuh"
#include "backward/prepare_sm90.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    bwd_prepare_sm90(const __grid_constant__ cuflash::BwdParams params) {
  cuflash::backward_prepare_sm90<cuflash::Config>(params);
}
