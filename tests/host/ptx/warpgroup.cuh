// The host twin of kernels/ptx/warpgroup.cuh. Registers are handed out as on an SM that the block has for itself.
#pragma once

#include "block.hpp"
#include "ptx/sync.cuh"
#include "std.cuh"

namespace cuflash::host {

struct RegisterFile {
  std::vector<int> of_warp;  // registers of each of its threads
  std::vector<int> left;     // of 32 threads, that warps of a block have given back
  int elected;               // the lane that elect picks, always the same one

  void start();
  bool change(int registers, bool raise);  // false while there are too few
  void end() const;
};

extern RegisterFile register_file;

// Each lane brings a bool: whether it was done. Where it was not, the warp is to try again once it is woken.
void change_registers(void* const* lanes, int registers, bool raise);

}  // namespace cuflash::host

namespace cuflash::ptx {

constexpr int kWarpgroupThreads = 128;

// Fails where the lanes disagree: the number would be lane 0's on a GPU.
inline int uniform(int x) {
  if (shuffle(x, 0) != x) host::fail("uniform: thread %d has %d, lane 0 another number", thread_index(), x);
  return x;
}

inline int warpgroup_index() { return shuffle(thread_index() / kWarpgroupThreads, 0); }

struct Named {
  int barrier, threads;

  template <bool kWaits>
  static void run(void* const* lanes) {
    const Named& first = *static_cast<const Named*>(lanes[0]);
    for (int lane = 1; lane < 32; ++lane) {
      const Named& other = *static_cast<const Named*>(lanes[lane]);
      if (other.barrier != first.barrier || other.threads != first.threads) {
        host::fail("the lanes of a warp come to named barriers %d and %d", first.barrier, other.barrier);
      }
    }
    host::meet(first.barrier, first.threads, kWaits);
  }
};

inline constexpr host::Instruction kSyncNamed{"sync_named", Named::run<true>, true};
inline constexpr host::Instruction kArriveNamed{"arrive_named", Named::run<false>, true};

inline void sync_named(int barrier, int threads) {
  Named operands{barrier, threads};
  host::execute(kSyncNamed, &operands);
}
inline void arrive_named(int barrier, int threads) {
  Named operands{barrier, threads};
  host::execute(kArriveNamed, &operands);
}

template <int kRegisters, bool kRaise>
struct ChangeRegisters {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);

  static void run(void* const* lanes) { host::change_registers(lanes, kRegisters, kRaise); }
  static constexpr host::Instruction kInstruction{kRaise ? "raise_registers" : "lower_registers", run, true};
};

template <int kRegisters>
void lower_registers() {
  bool done = false;
  while (!done) host::execute(ChangeRegisters<kRegisters, false>::kInstruction, &done);
}
template <int kRegisters>
void raise_registers() {
  bool done = false;
  while (!done) host::execute(ChangeRegisters<kRegisters, true>::kInstruction, &done);
}

inline constexpr host::Instruction kElect{"elect", [](void* const*) {}};
inline bool elect() {
  host::execute(kElect, nullptr);
  return lane_index() == host::register_file.elected;
}

inline constexpr host::Instruction kAny{"any", [](void* const* lanes) {
  bool found = false;
  for (int lane = 0; lane < 32; ++lane) found = found || *static_cast<const bool*>(lanes[lane]);
  for (int lane = 0; lane < 32; ++lane) *static_cast<bool*>(lanes[lane]) = found;
}};
inline bool any(bool predicate) {
  host::execute(kAny, &predicate);
  return predicate;
}

}  // namespace cuflash::ptx
