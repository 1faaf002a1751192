// The host twin of kernels/ptx/cp_async.cuh: as late as the instruction may be, with NaN in place of what is under way.
#pragma once

#include "block.hpp"
#include "std.cuh"

namespace cuflash::ptx {

template <int kBytes>
void cp_async(uint32 shared, const void* global, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if (shared % kBytes != 0 || (valid && reinterpret_cast<size_t>(global) % kBytes != 0)) {
    host::fail("cp_async of %d bytes: shared %u or global %p is not aligned", kBytes, shared, global);
  }
  if (static_cast<int>(shared) + kBytes > host::block.smem_bytes) host::fail("cp_async beyond shared memory");
  char* destination = host::block.smem + shared;
  memset(destination, 0xff, kBytes);
  host::block.current->copies.push_back({destination, valid ? static_cast<const char*>(global) : nullptr, kBytes});
}

inline void cp_async_commit() {
  host::Thread& thread = *host::block.current;
  thread.groups.push_back(std::move(thread.copies));
  thread.copies.clear();
}

template <int kPending>
void cp_async_wait() {
  std::vector<std::vector<host::Copy>>& groups = host::block.current->groups;
  while (groups.size() > kPending) {
    for (const host::Copy& copy : groups.front()) {
      if (copy.global) {
        memcpy(copy.shared, copy.global, copy.bytes);
      } else {
        memset(copy.shared, 0, copy.bytes);
      }
    }
    groups.erase(groups.begin());
  }
}

}  // namespace cuflash::ptx
