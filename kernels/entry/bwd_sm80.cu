// Backward attention on mma.sync tensor cores: dk, dv and the fp32 sum for dq.
#include "config.cuh"
#include "backward/sm80.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    bwd_sm80(const __grid_constant__ cuflash::BwdParams params) {
  cuflash::backward_sm80<cuflash::Config>(params);
}
