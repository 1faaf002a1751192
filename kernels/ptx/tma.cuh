// TMA: boxes of a tensor between global and shared memory, started by one thread and done by the copy engine.
//
// A TensorMap (params.cuh) says where the tensor lies and how large a box is. What a box holds outside the tensor is
// read as zeros and not written. Coordinates are in elements, innermost dimension first.
#pragma once

#include "params.cuh"

namespace cuflash::ptx {

// Starts the copy of a box; `barrier` (an mbarrier that expects the box's bytes, zeros included) completes with it.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk-tensor
CF_DEVICE void tma_load(uint32 shared, const TensorMap& map, int x0, int x1, int x2, int x3, uint32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared), "l"(&map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(barrier)
      : "memory");
}

// The same of a box that L2 keeps by a policy (ptx/memory.cuh).
CF_DEVICE void tma_load_by(uint64 policy, uint32 shared, const TensorMap& map, int x0, int x1, int x2, int x3,
                           uint32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, "
      "%3, %4, %5}], [%6], %7;" ::"r"(shared), "l"(&map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(barrier),
      "l"(policy)
      : "memory");
}

// Both of a tensor of five dimensions.
CF_DEVICE void tma_load(uint32 shared, const TensorMap& map, int x0, int x1, int x2, int x3, int x4, uint32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, "
      "%6}], [%7];" ::"r"(shared), "l"(&map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(barrier)
      : "memory");
}
CF_DEVICE void tma_load_by(uint64 policy, uint32 shared, const TensorMap& map, int x0, int x1, int x2, int x3, int x4,
                           uint32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, "
      "%3, %4, %5, %6}], [%7], %8;" ::"r"(shared), "l"(&map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4),
      "r"(barrier), "l"(policy)
      : "memory");
}

CF_DEVICE void tma_store(const TensorMap& map, int x0, int x1, int x2, int x3, uint32 shared) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];"
               ::"l"(&map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(shared) : "memory");
}

// Starts the copy of neighbouring bytes, a multiple of 16 from such an address to such an address.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk
CF_DEVICE void bulk_load(uint32 shared, const void* global, int bytes, uint32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(shared), "l"(global), "r"(bytes), "r"(barrier) : "memory");
}

// Starts to add neighbouring floats to others, likewise; part of the next group of stores.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-reduce-async-bulk
CF_DEVICE void bulk_add(float* global, uint32 shared, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
               ::"l"(global), "r"(shared), "r"(bytes) : "memory");
}

// Closes the group of this thread's stores since the last commit.
CF_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until this thread's stores have read their shared memory; until they are done.
CF_DEVICE void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
CF_DEVICE void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Makes this thread's writes to shared memory visible to the copy engine and to wgmma.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-membar
CF_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace cuflash::ptx
