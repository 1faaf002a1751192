// Warpgroups (four warps, 128 threads, sm_90): who am I, barriers among some of a block's warps, and register shares.
#pragma once

#include "std.cuh"

namespace cuflash::ptx {

constexpr int kWarpgroupThreads = 128;

// A number that is the same in all lanes of the warp, said so that the compiler knows it and keeps it, and what follows
// from it, in uniform registers.
CF_DEVICE int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

CF_DEVICE int warpgroup_index() { return uniform(threadIdx.x / kWarpgroupThreads); }

// Barriers 1 to 15 (0 is sync_threads): the one that completes when `threads` threads have come, of which those that
// only arrive do not wait.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-bar
CF_DEVICE void sync_named(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
CF_DEVICE void arrive_named(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Gives registers of every thread of this warpgroup back to the block's pool, or takes some out of it.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#miscellaneous-instructions-setmaxnreg
template <int kRegisters>
CF_DEVICE void lower_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters)); }
template <int kRegisters>
CF_DEVICE void raise_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters)); }

// True in one lane of the warp; the compiler knows that it is one.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-elect-sync
CF_DEVICE bool elect() {
  uint32 elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
}

// Whether the predicate holds in any lane of the warp.
CF_DEVICE bool any(bool predicate) { return __any_sync(0xffffffffu, predicate); }

}  // namespace cuflash::ptx
