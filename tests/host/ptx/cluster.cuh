// The host twin of kernels/ptx/cluster.cuh. What is stored in the other block comes at any time, as bulk copies do.
#pragma once

#include "block.hpp"
#include "ptx/mbarrier.cuh"
#include "ptx/memory.cuh"
#include "std.cuh"

namespace cuflash::ptx {

constexpr int kClusterBlocks = 2;

inline constexpr host::Instruction kSyncCluster{"sync_cluster", [](void* const*) { host::meet_cluster(); }};
inline void sync_cluster() { host::execute(kSyncCluster, nullptr); }

inline int rank_in_cluster() { return host::block.current->rank; }

template <class T>
const T* in_block(const T* mine, int rank) {
  smem_u32(mine);  // fails where it is not in shared memory
  if (rank < 0 || rank >= host::block.cluster) host::fail("in_block: block %d of %d", rank, host::block.cluster);
  bool runs = false;
  for (const host::Thread& thread : host::block.threads) {
    runs = runs || (thread.rank == rank && thread.state != host::State::kReturned);
  }
  if (!runs) host::fail("in_block: thread %d reaches for block %d, which has ended", host::block.current->index, rank);
  const int64 apart = (rank - host::block.current->rank) * static_cast<int64>(host::block.smem_stride);
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(mine) + apart);
}

inline uint32 across(uint32 shared, int rank) {
  const host::Thread& me = *host::block.current;
  if (rank != me.rank || host::block.cluster != kClusterBlocks) {
    host::fail("across: thread %d is in block %d of a cluster of %d", me.index, me.rank, host::block.cluster);
  }
  if (static_cast<int>(shared) / host::block.smem_stride != rank) host::fail("across: %u is not this block's", shared);
  for (const host::Thread& other : host::block.threads) {
    if (other.rank != rank && other.state != host::State::kReturned) {
      return shared + (1 - 2 * rank) * host::block.smem_stride;
    }
  }
  host::fail("across: thread %d reaches for the other block, which has ended", me.index);
}

void store_across(uint32 remote, const float (&x)[4], uint32 remote_barrier);

inline void mbarrier_arrive_across(uint32 remote_barrier) { mbarrier_arrive(remote_barrier); }
inline void mbarrier_wait_across(uint32 barrier, int parity) { mbarrier_wait(barrier, parity); }

}  // namespace cuflash::ptx
