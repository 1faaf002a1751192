// The host twin of kernels/ptx/mbarrier.cuh. Barriers are kept beside shared memory; their eight bytes there hold a
// pattern that must not change.
#pragma once

#include "block.hpp"
#include "std.cuh"

namespace cuflash::host {

struct Mbarrier {
  uint32 address;
  int count;
  int pending;  // arrivals that the phase under way lacks
  int64 bytes;  // that were announced and have not come yet; less than 0 where copies come first
  int64 phase;  // phases completed
  int maker;    // the thread that initialised it
  bool fenced;  // known to the copy engine

  void arrive();
  void expect(int64 more_bytes);
  void complete(int64 copied_bytes);

 private:
  void settle();
};

Mbarrier& mbarrier_at(const char* who, uint32 address);

}  // namespace cuflash::host

namespace cuflash::ptx {

void mbarrier_init(uint32 barrier, int count);
void fence_mbarrier_init();
void mbarrier_arrive(uint32 barrier);
void mbarrier_arrive_expect_tx(uint32 barrier, int bytes);
void mbarrier_wait(uint32 barrier, int parity);

}  // namespace cuflash::ptx
