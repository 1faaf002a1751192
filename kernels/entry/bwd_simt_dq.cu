// Backward attention on plain multiply-adds: dq.
#include "config.cuh"
#include "backward/simt.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    bwd_simt_dq(const __grid_constant__ cuflash::BwdParams params) {
  cuflash::backward_simt_dq<cuflash::Config>(params);
}
