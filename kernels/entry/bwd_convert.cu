// dq from its fp32 accumulator, the last step of bwd_sm80.
#include "config.cuh"
#include "backward/convert.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    bwd_convert(const __grid_constant__ cuflash::BwdParams params) {
  cuflash::backward_convert<cuflash::Config>(params);
}
