// The host twin of kernels/ptx/mbarrier.cuh. Barriers are kept beside shared memory; their eight bytes there hold a
// pattern that must not change.
#pragma once

#include <unordered_map>

#include "block.hpp"
#include "std.cuh"

namespace cuflash::host {

constexpr int kMostMbarrierCount = (1 << 20) - 1;  // of arrivals, and of bytes

struct Mbarrier {
  static constexpr char kPattern[] = "mbarrier";

  uint32 address;
  int count;
  int pending;   // arrivals that the phase under way lacks
  int64 bytes;   // that were announced and have not come yet; less than 0 where copies come first
  int64 phase;   // phases completed
  int maker;     // the thread that initialised it
  bool fenced;   // known to the copy engine

  void arrive() {
    if (pending == 0) fail("mbarrier %u: more than %d arrivals in one phase", address, count);
    --pending;
    settle();
  }
  void expect(int64 more_bytes) {
    bytes += more_bytes;
    if (bytes > kMostMbarrierCount || bytes < -kMostMbarrierCount) fail("mbarrier %u: %lld bytes", address, bytes);
  }
  void complete(int64 copied_bytes) {
    expect(-copied_bytes);
    settle();
  }

 private:
  void settle() {
    if (pending > 0 || bytes > 0) return;
    if (bytes < 0) fail("mbarrier %u: %lld bytes came that were not announced", address, -bytes);
    ++phase;
    pending = count;
    for (const Thread& thread : block.threads) {
      if (thread.wait.at == this && thread.wait.phase + 1 < phase) {
        fail("mbarrier %u completed two phases before thread %d, which waits for the first, could see it", address,
             thread.index);
      }
    }
    wake(this);
  }
};

inline std::unordered_map<uint32, Mbarrier> mbarriers;  // by address
inline const Register kMbarriers{{[] { mbarriers.clear(); }, nullptr, [] {
  for (const auto& [address, barrier] : mbarriers) {
    if (barrier.bytes < 0) fail("mbarrier %u: %lld bytes came that were not announced", address, -barrier.bytes);
  }
}}};

inline Mbarrier& mbarrier_at(const char* who, uint32 address) {
  const auto found = mbarriers.find(address);
  if (found == mbarriers.end()) fail("%s: mbarrier %u was not initialised", who, address);
  if (memcmp(block.smem + address, Mbarrier::kPattern, 8) != 0) fail("%s: mbarrier %u was overwritten", who, address);
  return found->second;
}

}  // namespace cuflash::host

namespace cuflash::ptx {

inline void mbarrier_init(uint32 barrier, int count) {
  if (barrier % 8 != 0 || int64(barrier) + 8 > host::block.smem_bytes) host::fail("mbarrier_init at %u", barrier);
  if (count < 1 || count > host::kMostMbarrierCount) host::fail("mbarrier_init: a count of %d", count);
  const host::Mbarrier fresh{barrier, count, count, 0, 0, host::block.current->index, false};
  if (!host::mbarriers.emplace(barrier, fresh).second) host::fail("mbarrier %u is initialised twice", barrier);
  memcpy(host::block.smem + barrier, host::Mbarrier::kPattern, 8);
}

inline void fence_mbarrier_init() {
  for (auto& [address, barrier] : host::mbarriers) {
    barrier.fenced = barrier.fenced || barrier.maker == host::block.current->index;
  }
}

inline void mbarrier_arrive(uint32 barrier) {
  host::mbarrier_at("mbarrier_arrive", barrier).arrive();
  host::pause();
}

inline void mbarrier_arrive_expect_tx(uint32 barrier, int bytes) {
  host::Mbarrier& known = host::mbarrier_at("mbarrier_arrive_expect_tx", barrier);
  known.expect(bytes);
  known.arrive();
  host::pause();
}

inline void mbarrier_wait(uint32 barrier, int parity) {
  const auto describe = [](const host::Wait& wait) {
    const host::Mbarrier& barrier = *static_cast<const host::Mbarrier*>(wait.at);
    return "mbarrier_wait (barrier " + std::to_string(barrier.address) + ", parity " + std::to_string(wait.phase % 2) +
           ", which lacks " + std::to_string(barrier.pending) + " of " + std::to_string(barrier.count) +
           " arrivals and " + std::to_string(barrier.bytes) + " bytes)";
  };
  const host::Mbarrier& known = host::mbarrier_at("mbarrier_wait", barrier);
  if (parity != 0 && parity != 1) host::fail("mbarrier_wait: a parity of %d", parity);
  if (known.phase % 2 != parity) return host::pause();
  while (known.phase % 2 == parity) host::wait({&known, known.phase, describe});
}

}  // namespace cuflash::ptx
