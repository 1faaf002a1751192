#include "ptx/mbarrier.cuh"

#include <unordered_map>

namespace cuflash::host {

constexpr int kMostMbarrierCount = (1 << 20) - 1;  // of arrivals, and of bytes
constexpr char kPattern[] = "mbarrier";

void Mbarrier::arrive() {
  if (pending == 0) fail("mbarrier %u: more than %d arrivals in one phase", address, count);
  --pending;
  settle();
}

void Mbarrier::expect(int64 more_bytes) {
  bytes += more_bytes;
  if (bytes > kMostMbarrierCount || bytes < -kMostMbarrierCount) fail("mbarrier %u: %lld bytes", address, bytes);
}

void Mbarrier::complete(int64 copied_bytes) {
  expect(-copied_bytes);
  settle();
}

void Mbarrier::settle() {
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

static std::unordered_map<uint32, Mbarrier> mbarriers;  // by address
static const Register kMbarriers{{[] { mbarriers.clear(); }, nullptr, [] {
  for (const auto& [address, barrier] : mbarriers) {
    if (barrier.bytes < 0) fail("mbarrier %u: %lld bytes came that were not announced", address, -barrier.bytes);
  }
}}};

Mbarrier& mbarrier_at(const char* who, uint32 address) {
  const auto found = mbarriers.find(address);
  if (found == mbarriers.end()) fail("%s: mbarrier %u was not initialised", who, address);
  if (memcmp(block.smem + address, kPattern, 8) != 0) fail("%s: mbarrier %u was overwritten", who, address);
  return found->second;
}

}  // namespace cuflash::host

namespace cuflash::ptx {

void mbarrier_init(uint32 barrier, int count) {
  if (barrier % 8 != 0 || int64(barrier) + 8 > host::block.smem_bytes) host::fail("mbarrier_init at %u", barrier);
  if (count < 1 || count > host::kMostMbarrierCount) host::fail("mbarrier_init: a count of %d", count);
  const host::Mbarrier fresh{barrier, count, count, 0, 0, host::block.current->index, false};
  if (!host::mbarriers.emplace(barrier, fresh).second) host::fail("mbarrier %u is initialised twice", barrier);
  memcpy(host::block.smem + barrier, host::kPattern, 8);
}

void fence_mbarrier_init() {
  for (auto& [address, barrier] : host::mbarriers) {
    barrier.fenced = barrier.fenced || barrier.maker == host::block.current->index;
  }
}

void mbarrier_arrive(uint32 barrier) {
  host::mbarrier_at("mbarrier_arrive", barrier).arrive();
  host::pause();
}

void mbarrier_arrive_expect_tx(uint32 barrier, int bytes) {
  host::Mbarrier& known = host::mbarrier_at("mbarrier_arrive_expect_tx", barrier);
  known.expect(bytes);
  known.arrive();
  host::pause();
}

void mbarrier_wait(uint32 barrier, int parity) {
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
