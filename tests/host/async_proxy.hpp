// Shared memory as the copy engine and the tensor cores see it: swizzled, and through a proxy of their own.
//
// What a thread writes by an instruction reaches that proxy by the thread's fence_proxy_async. Writes by stmatrix are
// followed up to their fences; plain stores and cp.async are not.
#pragma once

#include "block.hpp"
#include "std.cuh"

namespace cuflash::host {

struct AsyncProxy {
  std::vector<int> unfenced;                 // of every 16 bytes: threads that wrote to them and have not fenced since
  std::vector<std::vector<uint32>> written;  // by every thread: the 16 bytes that it wrote to and has not fenced since

  void start() {
    unfenced.assign(block.smem_bytes / 16, 0);
    written.assign(block.threads.size(), {});
  }
  void note_write(int thread, uint32 address) {
    written[thread].push_back(address / 16);
    ++unfenced[address / 16];
  }
  void fence(int thread) {
    for (const uint32 unit : written[thread]) --unfenced[unit];
    written[thread].clear();
  }
  void check(const char* who, uint32 address) const {
    if (unfenced[address / 16]) fail("%s meets bytes at %u that lack their writer's fence_proxy_async", who, address);
  }
};

inline AsyncProxy async_proxy;
inline const Register kAsyncProxy{{[] { async_proxy.start(); }, nullptr, nullptr}};

// Where 16 bytes of a matrix in 128-byte swizzle lie: hardware takes the row's number from the address, too.
inline uint32 swizzled(uint32 address) { return address ^ (address >> 3 & 0x70); }

// The 16 bytes at an address before swizzling, checked.
inline char* async_unit(const char* who, uint32 address) {
  if (int64(address) + 16 > block.smem_bytes) fail("%s beyond shared memory, at %u", who, address);
  async_proxy.check(who, swizzled(address));
  return block.smem + swizzled(address);
}

}  // namespace cuflash::host
