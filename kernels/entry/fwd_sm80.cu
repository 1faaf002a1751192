// Forward attention on mma.sync tensor cores: Ampere, Ada, Hopper, Blackwell.
#include "config.cuh"
#include "forward/sm80.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    fwd_sm80(const __grid_constant__ cuflash::FwdParams params) {
  cuflash::forward_sm80<cuflash::Config>(params);
}
