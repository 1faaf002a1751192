// Forward attention with its tangent on mma.sync tensor cores: Ampere, Ada, Hopper, Blackwell.
#include "config.cuh"
#include "forward/jvp_sm80.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    jvp_sm80(const __grid_constant__ cuflash::JvpParams params) {
  cuflash::jvp_sm80<cuflash::Config>(params);
}
