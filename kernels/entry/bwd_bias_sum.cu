// The gradient of the bias from its parts.
#include "config.cuh"
#include "backward/bias_sum.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    bwd_bias_sum(const __grid_constant__ cuflash::BwdParams params) {
  cuflash::backward_bias_sum<cuflash::Config>(params);
}
