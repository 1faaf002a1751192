// The gradient of a bias that is broadcast along batch or heads, on Hopper.
#include "config.cuh"
#include "backward/bias_sm90.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    bwd_bias_sm90(const __grid_constant__ cuflash::BwdParams params) {
  cuflash::backward_bias_sm90<cuflash::Config>(params);
}
