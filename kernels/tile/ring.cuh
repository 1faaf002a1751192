// Ring: buffers in shared memory that one thread fills by TMA and several warpgroups read, in the same order.
#pragma once

#include "ptx/mbarrier.cuh"
#include "ptx/memory.cuh"

namespace cuflash {

// Which buffer is next, and in which round (modulo 2) the ring is. Every reader and the writer keep their own.
template <int kStages>
struct RingCursor {
  int stage = 0;
  int phase = 0;

  CF_DEVICE RingCursor next() const {
    const bool wraps = stage == kStages - 1;
    return {wraps ? 0 : stage + 1, phase ^ wraps};
  }
};

template <int kStages>
struct Ring {
  using Cursor = RingCursor<kStages>;

  uint64 full[kStages];   // phase completes when a buffer's bytes have come
  uint64 empty[kStages];  // phase completes when all readers are done with it

  CF_DEVICE void init(int readers) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(ptx::smem_u32(&full[stage]), 1);
      ptx::mbarrier_init(ptx::smem_u32(&empty[stage]), readers);
    }
  }

  // Writer: waits for the buffer (not in the first round) and announces its bytes; copies are to complete the returned
  // barrier.
  CF_DEVICE uint32 acquire(const Cursor& at, int bytes) {
    ptx::mbarrier_wait(ptx::smem_u32(&empty[at.stage]), at.phase ^ 1);
    const uint32 barrier = ptx::smem_u32(&full[at.stage]);
    ptx::mbarrier_arrive_expect_tx(barrier, bytes);
    return barrier;
  }

  // Reader: waits for the bytes.
  CF_DEVICE void wait(const Cursor& at) { ptx::mbarrier_wait(ptx::smem_u32(&full[at.stage]), at.phase); }

  // Reader, one thread of each: gives the buffer back.
  CF_DEVICE void release(const Cursor& at) { ptx::mbarrier_arrive(ptx::smem_u32(&empty[at.stage])); }
};

}  // namespace cuflash
