// Shared memory's base and global memory shared between blocks.
#pragma once

#include "std.cuh"

namespace cuflash::ptx {

CF_DEVICE char* dynamic_smem() {
  extern __shared__ __align__(1024) char smem[];
  return smem;
}

// Shared-space address of a generic pointer, as ldmatrix and cp.async take it.
CF_DEVICE uint32 smem_u32(const void* pointer) { return static_cast<uint32>(__cvta_generic_to_shared(pointer)); }

// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-red
CF_DEVICE void red_add(float* address, float x) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(address), "f"(x) : "memory");
}

CF_DEVICE void red_add(double* address, double x) {
  asm volatile("red.relaxed.gpu.global.add.f64 [%0], %1;" ::"l"(address), "d"(x) : "memory");
}

CF_DEVICE void red_add(int64* address, int64 x) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(address), "l"(x) : "memory");
}

// The same by the compiler's own function, whose address may be a register and a number.
CF_DEVICE void add_to(float* address, float x) { atomicAdd(address, x); }
CF_DEVICE void add_to(double* address, double x) { atomicAdd(address, x); }

// Whether red_add_x4 is there.
#if __CUDA_ARCH__ >= 900
constexpr bool kAddsFour = true;
#else
constexpr bool kAddsFour = false;
#endif

// If `some`, four neighbours, 16 bytes from a multiple of 16 on; each is added on its own. Needs sm_90. There is no branch,
// as one under products would wait for their end.
CF_DEVICE void red_add_x4(float* address, const float (&x)[4], bool some) {
  asm volatile("{\n.reg .pred some;\nsetp.ne.b32 some, %5, 0;\n"
               "@some red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n}"
               ::"l"(address), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "r"(int(some)) : "memory");
}

CF_DEVICE void red_add_release(int* address, int x) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(address), "r"(x) : "memory");
}

// Adds one; returns what was there.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-atom
CF_DEVICE int count(int* address) {
  int before;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(address) : "memory");
  return before;
}

// The same, but goes from `last` to 0.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-atom
CF_DEVICE int count_around(int* address, int last) {
  int before;
  asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(last) : "memory");
  return before;
}

// The same, and who counts sees all that those who counted before had written or, by a barrier of their block, seen.
CF_DEVICE int count_around_in_order(int* address, int last) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(last) : "memory");
  return before;
}

// The policy of what is read once, and makes room in L2 first.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-createpolicy
CF_DEVICE uint64 evict_first() {
  uint64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-ld
CF_DEVICE int load_acquire(const int* address) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(address) : "memory");
  return x;
}

// Orders this thread's global accesses before its later ones, as every other block sees them.
CF_DEVICE void fence() { __threadfence(); }

}  // namespace cuflash::ptx
