// Gradients of many short sequences on tensor cores.
#include "config.cuh"
#include "backward/sm80_short.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    bwd_sm80_short(const __grid_constant__ cuflash::BwdParams params) {
  cuflash::backward_sm80_short<cuflash::Config>(params);
}
