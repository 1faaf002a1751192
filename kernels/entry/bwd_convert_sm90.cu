// The Hopper backward's sums to dq.
#include "config.cuh"
#include "backward/convert_sm90.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    bwd_convert_sm90(const __grid_constant__ cuflash::BwdParams params) {
  cuflash::backward_convert_sm90<cuflash::Config>(params);
}
