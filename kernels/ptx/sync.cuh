// Who am I, and who waits for whom: thread coordinates, barriers, warp shuffles.
#pragma once

#include "std.cuh"

namespace cuflash::ptx {

CF_DEVICE int thread_index() { return threadIdx.x; }
CF_DEVICE int lane_index() { return threadIdx.x % 32; }
CF_DEVICE int warp_index() { return threadIdx.x / 32; }
CF_DEVICE int64 block_index() { return blockIdx.x; }
CF_DEVICE int num_blocks() { return gridDim.x; }

CF_DEVICE void sync_threads() { __syncthreads(); }
CF_DEVICE void sync_warp() { __syncwarp(); }

// Sleeps for about so long, at most twice.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#miscellaneous-instructions-nanosleep
CF_DEVICE void sleep_ns(int time) { asm volatile("nanosleep.u32 %0;" ::"r"(time)); }

template <class T>
CF_DEVICE T shuffle_xor(T x, int lane_mask) { return __shfl_xor_sync(0xffffffffu, x, lane_mask); }

template <class T>
CF_DEVICE T shuffle(T x, int source_lane) { return __shfl_sync(0xffffffffu, x, source_lane); }

}  // namespace cuflash::ptx
