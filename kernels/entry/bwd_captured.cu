// Gradients of what a written score reads, rounded from exact sums, shared by all families.
#include "config.cuh"
#include "backward/captured.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    bwd_captured(const __grid_constant__ cuflash::BwdParams params) {
  cuflash::backward_captured<cuflash::Config>(params);
}
