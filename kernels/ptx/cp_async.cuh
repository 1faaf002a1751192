// cp.async: 4, 8 or 16 bytes from global to shared memory without passing through registers.
#pragma once

#include "std.cuh"

namespace cuflash::ptx {

// Copies kBytes, or writes kBytes of zeros when `valid` is false (`global` is not read then).
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-non-bulk-copy
template <int kBytes>
CF_DEVICE void cp_async(uint32 shared, const void* global, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const int source_bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {  // only the 16-byte form may bypass L1
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 ::"r"(shared), "l"(global), "r"(source_bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 ::"r"(shared), "l"(global), "n"(kBytes), "r"(source_bytes) : "memory");
  }
}

// The same of 16 bytes, which L2 keeps by a policy (ptx/memory.cuh).
CF_DEVICE void cp_async_by(uint64 policy, uint32 shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;"
               ::"r"(shared), "l"(global), "r"(valid ? 16 : 0), "l"(policy) : "memory");
}

CF_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are still in flight.
template <int kPending>
CF_DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory"); }

}  // namespace cuflash::ptx
