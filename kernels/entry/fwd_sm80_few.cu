// Forward attention of few queries on mma.sync tensor cores: Ampere, Ada, Hopper, Blackwell.
#include "config.cuh"
#include "forward/sm80_few.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    fwd_sm80_few(const __grid_constant__ cuflash::FwdParams params) {
  cuflash::forward_sm80_few<cuflash::Config>(params);
}
