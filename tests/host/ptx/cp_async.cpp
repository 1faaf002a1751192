#include "ptx/cp_async.cuh"

namespace cuflash::host {

void start_copy(int bytes, uint32 shared, const void* global, bool valid) {
  if (shared % bytes != 0 || (valid && reinterpret_cast<size_t>(global) % bytes != 0)) {
    fail("cp_async of %d bytes: shared %u or global %p is not aligned", bytes, shared, global);
  }
  if (static_cast<int>(shared) + bytes > block.smem_bytes) fail("cp_async beyond shared memory");
  char* const destination = block.smem + shared;
  memset(destination, 0xff, bytes);
  block.current->copies.push_back({destination, valid ? static_cast<const char*>(global) : nullptr, bytes});
}

void finish_copies(size_t pending) {
  std::vector<std::vector<Copy>>& groups = block.current->groups;
  while (groups.size() > pending) {
    for (const Copy& copy : groups.front()) {
      if (copy.global) {
        memcpy(copy.shared, copy.global, copy.bytes);
      } else {
        memset(copy.shared, 0, copy.bytes);
      }
    }
    groups.erase(groups.begin());
  }
}

}  // namespace cuflash::host

namespace cuflash::ptx {

void cp_async_commit() {
  host::Thread& thread = *host::block.current;
  thread.groups.push_back(std::move(thread.copies));
  thread.copies.clear();
}

}  // namespace cuflash::ptx
