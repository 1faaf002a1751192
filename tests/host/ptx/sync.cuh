// The host twin of kernels/ptx/sync.cuh.
#pragma once

#include "block.hpp"
#include "std.cuh"

namespace cuflash::ptx {

inline int thread_index() { return host::block.current->index - host::block.current->rank * host::block.threads_each; }
inline int lane_index() { return thread_index() % 32; }
inline int warp_index() { return thread_index() / 32; }
inline int64 block_index() { return host::block.index * host::block.cluster + host::block.current->rank; }
inline int num_blocks() { return static_cast<int>(host::block.count); }

inline constexpr host::Instruction kSyncThreads{"sync_threads",
                                                [](void* const*) { host::meet(0, host::block.threads_each, true); }};
inline void sync_threads() { host::execute(kSyncThreads, nullptr); }

inline constexpr host::Instruction kSyncWarp{"sync_warp", [](void* const*) {}};
inline void sync_warp() { host::execute(kSyncWarp, nullptr); }

inline void sleep_ns(int) {}

template <class T>
struct Shuffle {
  T x;
  T result;
  int source;  // lane that is read

  static void run(void* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      Shuffle& mine = *static_cast<Shuffle*>(lanes[lane]);
      mine.result = static_cast<Shuffle*>(lanes[mine.source])->x;
    }
  }
  static constexpr host::Instruction kInstruction{"shuffle", run};
};

template <class T>
T shuffle(T x, int source_lane) {
  Shuffle<T> shuffle{x, x, source_lane};
  host::execute(Shuffle<T>::kInstruction, &shuffle);
  return shuffle.result;
}

template <class T>
T shuffle_xor(T x, int lane_mask) {
  return shuffle(x, lane_index() ^ lane_mask);
}

}  // namespace cuflash::ptx
