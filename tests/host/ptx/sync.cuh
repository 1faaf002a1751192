// The host twin of kernels/ptx/sync.cuh.
#pragma once

#include "block.hpp"
#include "std.cuh"

namespace cuflash::ptx {

inline int thread_index() { return host::block.current->index; }
inline int lane_index() { return thread_index() % 32; }
inline int warp_index() { return thread_index() / 32; }
inline int64 block_index() { return host::block.index; }
inline int64 num_blocks() { return host::block.count; }

inline void sync_threads() { host::suspend(host::State::kAtBarrier); }

inline constexpr host::Instruction kSyncWarp{"sync_warp", [](void* const*) {}};
inline void sync_warp() { host::execute(kSyncWarp, nullptr); }

template <class T>
struct Shuffle {
  T x;
  T result;
  int lane_mask;

  static void run(void* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      Shuffle& mine = *static_cast<Shuffle*>(lanes[lane]);
      mine.result = static_cast<Shuffle*>(lanes[lane ^ mine.lane_mask])->x;
    }
  }
  static constexpr host::Instruction kInstruction{"shuffle_xor", run};
};

template <class T>
T shuffle_xor(T x, int lane_mask) {
  Shuffle<T> shuffle{x, x, lane_mask};
  host::execute(Shuffle<T>::kInstruction, &shuffle);
  return shuffle.result;
}

}  // namespace cuflash::ptx
