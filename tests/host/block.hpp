// One thread block on a CPU: every thread is a fiber that runs until it meets a barrier or a warp-wide instruction.
//
// A launch runs its blocks one after another, in rising order, and those of a cluster together: what is called a block here
// then has the threads of all of them, and their shared memories one behind the other. Inside a block one warp at a time runs until its lanes
// wait or have returned; which one is next follows a random order that is drawn anew all the time, and in which the
// parts of the multiprocessor that work on their own (tensor cores, copy engine) stand like warps. A kernel that lacks
// a barrier reads what another warp has not written yet, or has already overwritten, and its numbers are wrong. Threads
// that wait for something that cannot happen end the launch with a message.
//
// What headers of the twin only declare is compiled once, into an archive that every kernel is linked with.
#pragma once

#include <setjmp.h>
#include <stddef.h>
#include <string.h>
#include <ucontext.h>

#include <string>
#include <utility>
#include <vector>

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}

namespace cuflash::host {

using int64 = long long;

// A warp-wide instruction: `run` acts on what its 32 lanes brought, once all of them are there.
struct Instruction {
  const char* name;
  void (*run)(void* const* lanes);
  bool pauses = false;  // other warps may run before it
};

// A copy that cp.async has started: it happens when the thread waits for it, the destination being NaN until then.
struct Copy {
  char* shared;
  const char* global;  // null: zeros
  int bytes;
};

// What a thread waits for, until somebody wakes those who wait `at` it.
struct Wait {
  const void* at;
  int64 phase;
  std::string (*describe)(const Wait&);
};

enum class State { kRunnable, kAtInstruction, kWaiting, kReturned };

struct Thread {
  int index;  // among those of the cluster
  int rank;   // of its block in the cluster
  State state;
  bool started;
  ucontext_t start;
  jmp_buf resume;
  char* stack;
  const Instruction* instruction;
  void* operands;
  Wait wait;
  std::vector<Copy> copies;               // not yet committed
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  int spins;                              // reads of one global flag since this thread last moved on
};

// bar.sync's: completes when as many threads have come as the first of them said.
struct NamedBarrier {
  int threads;
  int arrived;
};

// A part of the multiprocessor beside its warps.
struct Part {
  void (*start)();  // of a block
  bool (*work)();   // does a piece of what it has to do, if there is any; null: nothing ever
  void (*end)();    // looks at what a block has left behind; null: nothing to see
};

// As a global variable: makes a part known.
struct Register {
  explicit Register(const Part& part);
};

struct Block {
  static constexpr int kStackBytes = 128 * 1024;
  static constexpr int kSmemAlignment = 1024;
  static constexpr int kGuardBytes = 4096;  // behind the dynamic shared memory, where nothing may be written
  static constexpr int kMaxSpins = 1000;

  static constexpr int kBarriers = 16;
  static constexpr int kClusterStride = 1 << 18;  // so that 18 bits of an address are what they are inside its block

  std::vector<Thread> threads;
  int cluster;                         // blocks that run together
  int threads_each;                    // of such a block
  int smem_stride;                     // bytes from the shared memory of one to that of the next
  size_t returned;                     // threads
  std::vector<int> order;              // warps, then parts; who comes first runs first
  std::vector<size_t> laziness;        // of parts: how often they pass before they work, on the average
  std::vector<NamedBarrier> barriers;  // of every block, and behind them the cluster's
  std::vector<char> memory;
  char* smem;
  int smem_bytes;       // to the end of the last block's
  int smem_bytes_each;  // of a block
  int64 index;          // of the cluster
  int64 count;          // of blocks
  void (*kernel)(const void* params);
  const void* params;

  Thread* current = nullptr;
  jmp_buf scheduler;
  char error[2048] = "";
  unsigned long long random;  // state of a linear congruential generator (Knuth's MMIX)
  int64 bank_conflicts = 0;   // of ldmatrix and stmatrix, over the whole launch
};

extern Block block;

// Ends the launch from inside a thread, an instruction or a part.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void suspend(State state);

// Uniform in [0, n), close enough.
inline size_t random_below(size_t n) {
  block.random = block.random * 6364136223846793005ull + 1442695040888963407ull;
  return (block.random >> 33) % n;
}

// Lets others run now and then.
inline void pause() {
  if (random_below(4) == 0) suspend(State::kRunnable);
}

// Suspends the thread until it is woken.
void wait(const Wait& what);

// The same for a whole warp, from inside its instruction: the lanes stay where they are until they are woken.
void hold_warp(const Wait& what);

void wake(const void* at);

// Meets the other lanes of the warp at `instruction`.
void execute(const Instruction& instruction, void* operands);

// Inside an instruction: which warp executes it.
inline int executing_warp() { return block.current->index / 32; }

// Inside an instruction: counts the warp in at barrier `number` of its block, one of `threads` threads, and lets it wait
// there.
void meet(int number, int threads, bool waits);

// The same at the barrier of the cluster.
void meet_cluster();

// Null, or what went wrong.
const char* launch(void (*kernel)(const void*), const void* params, int64 num_blocks, int num_threads, int smem_bytes,
                   unsigned seed, int cluster = 1);

}  // namespace cuflash::host
