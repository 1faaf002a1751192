// Gradient of the additive bias, for the tensor-core family.
#include "config.cuh"
#include "backward/bias.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
bwd_bias_sm80(const __grid_constant__ cuflash::BwdParams params) {
  cuflash::backward_bias_sm80<cuflash::Config>(params);
}
