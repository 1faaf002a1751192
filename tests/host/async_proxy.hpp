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

  void start();
  void note_write(int thread, uint32 address);
  void fence(int thread);
  void check(const char* who, uint32 address) const;
};

extern AsyncProxy async_proxy;

// Where 16 bytes of a matrix in 128-byte swizzle lie: hardware takes the row's number from the address, too.
inline uint32 swizzled(uint32 address) { return address ^ (address >> 3 & 0x70); }

// The 16 bytes at an address before swizzling, checked.
char* async_unit(const char* who, uint32 address);

}  // namespace cuflash::host
