// The host twin of kernels/ptx/cp_async.cuh: as late as the instruction may be, with NaN in place of what is under way.
#pragma once

#include "block.hpp"
#include "std.cuh"

namespace cuflash::host {

void start_copy(int bytes, uint32 shared, const void* global, bool valid);

// Does the copies of the oldest groups, all but `pending`.
void finish_copies(size_t pending);

}  // namespace cuflash::host

namespace cuflash::ptx {

template <int kBytes>
void cp_async(uint32 shared, const void* global, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  host::start_copy(kBytes, shared, global, valid);
}

inline void cp_async_by(uint64, uint32 shared, const void* global, bool valid) { cp_async<16>(shared, global, valid); }

void cp_async_commit();

template <int kPending>
void cp_async_wait() {
  host::finish_copies(kPending);
}

}  // namespace cuflash::ptx
