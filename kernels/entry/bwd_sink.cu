// Gradient of the sink logits, shared by all families.
#include "config.cuh"
#include "backward/sink.cuh"

extern "C" __global__ void __launch_bounds__(cuflash::Config::kThreads, cuflash::Config::kBlocksPerSm)
    bwd_sink(const __grid_constant__ cuflash::BwdParams params) {
  cuflash::backward_sink<cuflash::Config>(params);
}
