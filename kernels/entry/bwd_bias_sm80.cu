// Gradient of a broadcast bias, on tensor cores.
#include "config.cuh"
#include "backward/bias_sm80.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    bwd_bias_sm80(const __grid_constant__ cuflash::BwdParams params) {
  cuflash::backward_bias<cuflash::Config, cuflash::BiasTileSm80<cuflash::Config>>(params);
}
