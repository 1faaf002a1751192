// Forward attention with its tangent on plain multiply-adds: any element type, head size and architecture.
#include "config.cuh"
#include "forward/jvp_simt.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    jvp_simt(const __grid_constant__ cuflash::JvpParams params) {
  cuflash::jvp_simt<cuflash::Config>(params);
}
