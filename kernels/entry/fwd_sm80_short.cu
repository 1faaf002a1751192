// Forward of many short sequences on tensor cores.
#include "config.cuh"
#include "forward/sm80_short.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    fwd_sm80_short(const __grid_constant__ cuflash::FwdParams params) {
  cuflash::forward_sm80_short<cuflash::Config>(params);
}
