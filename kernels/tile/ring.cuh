// Ring: buffers in shared memory that one thread fills and several readers empty, in the same order.
#pragma once

#include "attention/schedule.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/memory.cuh"
#include "ptx/sync.cuh"
#include "ptx/warpgroup.cuh"

namespace cuflash {

// Barriers of the block from number kFirst on, of kThreads threads each: those that wait, and those that only arrive.
template <int kFirst, int kThreads>
struct NamedBarriers {
  CF_DEVICE static void wait(int number) { ptx::sync_named(kFirst + number, kThreads); }
  CF_DEVICE static void arrive(int number) { ptx::arrive_named(kFirst + number, kThreads); }
};

// How often a warp arrives: once, by a lane that has met the others. racecheck of compute-sanitizer follows whoever arrives,
// not those whom it met before: it takes what other lanes have read or written for a hazard. In its build every lane
// arrives by itself.
#ifdef CF_DEBUG
constexpr int kWarpArrivals = 32;
#else
constexpr int kWarpArrivals = 1;
#endif

// Which buffer is next, and in which round (modulo 2) the ring is. Every reader and the writer keep their own.
template <int kStages>
struct RingCursor {
  int stage = 0;
  int phase = 0;

  CF_DEVICE RingCursor next() const {
    const bool wraps = stage == kStages - 1;
    return {wraps ? 0 : stage + 1, phase ^ wraps};
  }
  CF_DEVICE RingCursor before() const {
    const bool wraps = stage == 0;
    return {wraps ? kStages - 1 : stage - 1, phase ^ wraps};
  }
  CF_DEVICE RingCursor next(int count) const {
    const int after = stage + count;
    return {after % kStages, phase ^ (after / kStages % 2)};
  }
};

template <int kStages>
struct Ring {
  using Cursor = RingCursor<kStages>;

  uint64 full[kStages];   // the writers arrive, and the bytes that they announced: the buffer may be read
  uint64 empty[kStages];  // `readers` arrive, each once it is done with the buffer: it may be written

  // How many arrivals there are of readers and writers: one thread arrives for each of them, or a warp as below. Called by
  // one thread.
  CF_DEVICE void init(int readers, int writers = 1) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(ptx::smem_u32(&full[stage]), writers);
      ptx::mbarrier_init(ptx::smem_u32(&empty[stage]), readers);
    }
  }

  // Writer: waits for the buffer (not in the first round) and announces bytes; copies are to complete the returned
  // barrier.
  CF_DEVICE uint32 acquire(const Cursor& at, int bytes) {
    wait_empty(at);
    ptx::mbarrier_arrive_expect_tx(full_barrier(at), bytes);
    return full_barrier(at);
  }

  // The same by a whole warp, of which all lanes start copies.
  CF_DEVICE uint32 acquire_by_warp(const Cursor& at, int bytes) {
    if (ptx::lane_index() == 0) acquire(at, bytes);
    ptx::sync_warp();
    return full_barrier(at);
  }

  // Writer: waits for the buffer; and says that what it stored is there.
  CF_DEVICE void wait_empty(const Cursor& at) { ptx::mbarrier_wait(empty_barrier(at), at.phase ^ 1); }
  CF_DEVICE void publish(const Cursor& at) { ptx::mbarrier_arrive(full_barrier(at)); }

  // Reader: waits for what it is to read.
  CF_DEVICE void wait(const Cursor& at) { ptx::mbarrier_wait(full_barrier(at), at.phase); }

  // Reader, one thread of each: gives the buffer back.
  CF_DEVICE void release(const Cursor& at) { ptx::mbarrier_arrive(empty_barrier(at)); }
  // Both of a whole warp, whose lanes have all read or stored.
  CF_DEVICE void release_by_warp(const Cursor& at) {
    if (arrives_for_warp()) release(at);
  }
  CF_DEVICE void publish_by_warp(const Cursor& at) {
    if (arrives_for_warp()) publish(at);
  }
  CF_DEVICE static bool arrives_for_warp() {
    ptx::sync_warp();
    return kWarpArrivals > 1 || ptx::lane_index() == 0;
  }

  // The same of a ring in each block of a cluster of two, whose buffers the other one fills: the reader, of number `rank`,
  // gives its buffer back to the writer there, which waits for that. Its readers announce and await what will be stored.
  CF_DEVICE void release_across(const Cursor& at, int rank) {
    ptx::mbarrier_arrive_across(ptx::across(empty_barrier(at), rank));
  }
  CF_DEVICE void wait_empty_across(const Cursor& at) { ptx::mbarrier_wait_across(empty_barrier(at), at.phase ^ 1); }
  CF_DEVICE uint32 full_across(const Cursor& at, int rank) const { return ptx::across(full_barrier(at), rank); }
  CF_DEVICE void announce(const Cursor& at, int bytes) { ptx::mbarrier_arrive_expect_tx(full_barrier(at), bytes); }
  CF_DEVICE void wait_across(const Cursor& at) { ptx::mbarrier_wait_across(full_barrier(at), at.phase); }

 private:
  // Sums, not addresses of elements: those NVRTC computes anew where they are used, and a release would come late.
  CF_DEVICE uint32 full_barrier(const Cursor& at) const { return ptx::smem_u32(full) + at.stage * sizeof(uint64); }
  CF_DEVICE uint32 empty_barrier(const Cursor& at) const { return ptx::smem_u32(empty) + at.stage * sizeof(uint64); }
};

// Works that one thread hands to whole warps, each of which takes them all, and to a thread, with what else they are to know of each.
template <class With>
struct WorkRing {
  using Slots = Ring<2>;
  using Cursor = Slots::Cursor;

  Slots ring;  // the writer is one thread, the readers are warps
  Work works[2];
  With more[2];

  CF_DEVICE void put(const Cursor& at, const Work& work, const With& with) {
    ring.wait_empty(at);
    works[at.stage] = work;
    more[at.stage] = with;
    ring.publish(at);
  }
  CF_DEVICE Work take(const Cursor& at, With& with) {
    ring.wait(at);
    const Work work = works[at.stage];
    with = more[at.stage];
    ptx::sync_warp();  // every lane has read it
    if (ptx::lane_index() == 0) ring.release(at);
    return {ptx::uniform(work.tile), ptx::uniform(work.head), ptx::uniform(work.batch), ptx::uniform(work.split)};
  }
};

template <>
struct WorkRing<Nothing> {
  using Slots = Ring<2>;
  using Cursor = Slots::Cursor;

  Slots ring;
  Work works[2];

  CF_DEVICE void put(const Cursor& at, const Work& work) {
    ring.wait_empty(at);
    works[at.stage] = work;
    ring.publish(at);
  }
  CF_DEVICE Work take(const Cursor& at, Nothing&) {
    ring.wait(at);
    const Work& work = works[at.stage];
    const Work taken{ptx::uniform(work.tile), ptx::uniform(work.head), ptx::uniform(work.batch),
                     ptx::uniform(work.split)};
    if (ptx::lane_index() == 0) ring.release(at);
    return taken;
  }
};

}  // namespace cuflash
