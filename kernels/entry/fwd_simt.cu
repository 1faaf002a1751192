// Forward attention on plain multiply-adds: any element type, head size and architecture.
#include "config.cuh"
#include "forward/simt.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    fwd_simt(const __grid_constant__ cuflash::FwdParams params) {
  cuflash::forward_simt<cuflash::Config>(params);
}
