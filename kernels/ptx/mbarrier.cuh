// mbarrier: a counter in shared memory on which threads wait for threads and for bulk copies.
//
// A barrier alternates between phases 0 and 1. The current phase completes when `count` arrivals came in and every byte
// that was announced has been copied; wait(parity) returns once the phase of that parity is complete.
#pragma once

#include "std.cuh"

namespace cuflash::ptx {

// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-mbarrier-init
CF_DEVICE void mbarrier_init(uint32 barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes the initialised barriers known to the copy engine; a block barrier makes them known to the other threads.
CF_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-mbarrier-arrive
CF_DEVICE void mbarrier_arrive(uint32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// One arrival, and `bytes` that copies will bring.
CF_DEVICE void mbarrier_arrive_expect_tx(uint32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-mbarrier-test-wait-try-wait
CF_DEVICE void mbarrier_wait(uint32 barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra done_%=;\n"
      "bra again_%=;\n"
      "done_%=:\n"
      "}" ::"r"(barrier), "r"(parity) : "memory");
}

}  // namespace cuflash::ptx
