// Clusters (sm_90), most of two blocks, which run at once and see each other's shared memory.
#pragma once

#include "std.cuh"

namespace cuflash::ptx {

constexpr int kClusterBlocks = 2;

// Waits until all threads of all blocks are here, but those that have ended; what they wrote before is seen behind it.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-barrier-cluster
CF_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Number of this block in its cluster.
CF_DEVICE int rank_in_cluster() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// What a block of the cluster has where this one has `mine`, in shared memory.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-mapa
template <class T>
CF_DEVICE const T* in_block(const T* mine, int rank) {
  uint64 theirs;
  asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
  return reinterpret_cast<const T*>(theirs);
}

// What lies at an address of this block, in the other one of a cluster of two, of which this is number `rank`.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-mapa
CF_DEVICE uint32 across(uint32 shared, int rank) {
  uint32 remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared), "r"(1 - rank));
  return remote;
}

// Starts to store 16 bytes in the other block, whose barrier counts them.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-st-async
CF_DEVICE void store_across(uint32 remote, const float (&x)[4], uint32 remote_barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
               ::"r"(remote), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "r"(remote_barrier) : "memory");
}

// Arrives at a barrier of the other block, whose waiting threads see what this one did before.
CF_DEVICE void mbarrier_arrive_across(uint32 remote_barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote_barrier) : "memory");
}

// mbarrier_wait for what the other block stores or does.
CF_DEVICE void mbarrier_wait_across(uint32 barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again_%=:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra done_%=;\n"
      "bra again_%=;\n"
      "done_%=:\n"
      "}" ::"r"(barrier), "r"(parity) : "memory");
}

}  // namespace cuflash::ptx
