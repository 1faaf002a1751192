// Backward attention on Hopper for heads of more than 256 columns: dk, dv and the fp32 sums of dq, by clusters of blocks.
#include "config.cuh"
#include "backward/sm90_wide.cuh"

extern "C" __global__ void __cluster_dims__(cuflash::Config::kSlices)
    __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
        bwd_sm90_sliced(const __grid_constant__ cuflash::BwdParams params) {
  cuflash::backward_sm90_wide<cuflash::Config>(params);
}
