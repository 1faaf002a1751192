// Forward attention with its tangent on Hopper's warpgroup tensor cores and copy engine (sm_90a).
#include "config.cuh"
#include "forward/jvp_sm90.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    jvp_sm90(const __grid_constant__ cuflash::JvpParams params) {
  cuflash::jvp_sm90<cuflash::Config>(params);
}
