// Gradient of the additive bias, on plain multiply-adds.
#include "config.cuh"
#include "backward/bias_simt.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    bwd_bias_simt(const __grid_constant__ cuflash::BwdParams params) {
  cuflash::backward_bias<cuflash::Config, cuflash::BiasTileSimt<cuflash::Config>>(params);
}
