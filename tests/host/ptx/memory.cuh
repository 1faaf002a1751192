// The host twin of kernels/ptx/memory.cuh. Blocks run one after another, so an addition needs no atomicity.
#pragma once

#include "block.hpp"
#include "std.cuh"

namespace cuflash::ptx {

inline char* dynamic_smem() { return host::block.smem + host::block.current->rank * host::block.smem_stride; }

inline uint32 smem_u32(const void* pointer) {
  const int64 offset = static_cast<const char*>(pointer) - host::block.smem;
  if (offset < 0 || offset >= host::block.smem_bytes) {
    host::fail("an address %lld bytes from the base of %d bytes of shared memory", offset, host::block.smem_bytes);
  }
  return static_cast<uint32>(offset);
}

inline void red_add(float* address, float x) { *address += x; }
inline void red_add(double* address, double x) { *address += x; }
inline void red_add(int64* address, int64 x) { *address += x; }
template <class Real>
void add_to(Real* address, Real x) {
  *address += x;
}
constexpr bool kAddsFour = true;
inline void red_add_x4(float* address, const float (&x)[4], bool some) {
  if (!some) return;
  if (reinterpret_cast<size_t>(address) % 16 != 0) host::fail("red_add_x4: an address is not a multiple of 16");
  for (int i = 0; i < 4; ++i) address[i] += x[i];
}

inline void red_add_release(int* address, int x) { *address += x; }

inline int count(int* address) { return (*address)++; }

inline int count_around(int* address, int last) {
  const int before = *address;
  *address = before >= last ? 0 : before + 1;
  return before;
}

inline int count_around_in_order(int* address, int last) { return count_around(address, last); }

inline uint64 evict_first() { return 0; }

inline int load_acquire(const int* address) {
  if (++host::block.current->spins > host::Block::kMaxSpins) {
    host::fail("thread %d waits for a turn that no block before it gives (the flag is %d)", host::block.current->index,
               *address);
  }
  return *address;
}

inline void fence() {}

}  // namespace cuflash::ptx
