// Writes new keys and values to a cache, and turns keys and queries by their positions.
#include "config.cuh"
#include "cache/append.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    cache_append(const __grid_constant__ cuflash::FwdParams params) {
  cuflash::cache_append<cuflash::Config>(params);
}
