// Backward attention on plain multiply-adds: dk and dv.
#include "config.cuh"
#include "backward/simt.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    bwd_simt_dkdv(const __grid_constant__ cuflash::BwdParams params) {
  cuflash::backward_simt_dkdv<cuflash::Config>(params);
}
