// One thread block on a CPU: every thread is a fiber that runs until it meets a barrier or a warp-wide instruction.
//
// A launch runs its blocks one after another, in rising order. Inside a block one warp at a time runs until all its
// lanes stand at a block barrier or have returned; the order of the warps is drawn anew at every barrier, so a kernel
// that lacks a barrier reads what another warp has not written yet, or has already overwritten, and its numbers are
// wrong. Threads that wait for something that cannot happen end the launch with a message.
#pragma once

#include <setjmp.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <utility>
#include <vector>

namespace cuflash::host {

using int64 = long long;

// A warp-wide instruction: `run` acts on what its 32 lanes brought, once all of them are there.
struct Instruction {
  const char* name;
  void (*run)(void* const* lanes);
};

// A copy that cp.async has started: it happens when the thread waits for it, the destination being NaN until then.
struct Copy {
  char* shared;
  const char* global;  // null: zeros
  int bytes;
};

enum class State { kRunnable, kAtInstruction, kAtBarrier, kReturned };

struct Thread {
  int index;
  State state;
  bool started;
  ucontext_t start;
  jmp_buf resume;
  char* stack;
  const Instruction* instruction;
  void* operands;
  std::vector<Copy> copies;                // not yet committed
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  int spins;                               // reads of one global flag since this thread last moved on
};

struct Block {
  static constexpr int kStackBytes = 128 * 1024;
  static constexpr int kGuardBytes = 4096;  // behind the dynamic shared memory, where nothing may be written
  static constexpr int kMaxSpins = 1000;

  std::vector<Thread> threads;
  std::vector<char> memory;
  char* smem;
  int smem_bytes;
  int64 index;
  int64 count;
  void (*kernel)(const void* params);
  const void* params;

  Thread* current = nullptr;
  jmp_buf scheduler;
  char error[512] = "";
  unsigned long long random;  // state of a linear congruential generator (Knuth's MMIX)
  int64 bank_conflicts = 0;  // of ldmatrix, over the whole launch
};

inline Block block;

// Notes the first fault of a launch; nothing runs after it.
template <class... Values>
void note_fault(const char* format, Values... values) {
  if (block.error[0]) return;
  const int prefix = snprintf(block.error, sizeof block.error, "block %lld: ", block.index);
  snprintf(block.error + prefix, sizeof block.error - prefix, format, values...);
}

// Ends the launch from inside a thread or an instruction.
template <class... Values>
[[noreturn]] void fail(const char* format, Values... values) {
  note_fault(format, values...);
  _longjmp(block.scheduler, 1);
}

inline void suspend(State state) {
  block.current->state = state;
  block.current->spins = 0;
  if (_setjmp(block.current->resume) == 0) _longjmp(block.scheduler, 1);
}

// Uniform in [0, n), close enough.
inline size_t random_below(size_t n) {
  block.random = block.random * 6364136223846793005ull + 1442695040888963407ull;
  return (block.random >> 33) % n;
}

// Meets the other lanes of the warp at `instruction`.
inline void execute(const Instruction& instruction, void* operands) {
  block.current->instruction = &instruction;
  block.current->operands = operands;
  suspend(State::kAtInstruction);
}

inline void thread_main() {
  block.kernel(block.params);
  suspend(State::kReturned);
}

inline void resume(Thread& thread) {
  block.current = &thread;
  if (_setjmp(block.scheduler) != 0) return;
  if (thread.started) _longjmp(thread.resume, 1);
  thread.started = true;
  setcontext(&thread.start);
}

inline const char* place_of(const Thread& thread) {
  if (thread.state == State::kAtInstruction) return thread.instruction->name;
  return thread.state == State::kAtBarrier ? "sync_threads" : "the end of the kernel";
}

// Runs one warp until every lane is at a block barrier or has returned; false when the launch has failed.
inline bool run_warp(Thread* lanes) {
  for (;;) {
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes[lane].state == State::kRunnable) resume(lanes[lane]);
      if (block.error[0]) return false;
    }
    const Thread& first = lanes[0];
    for (int lane = 1; lane < 32; ++lane) {
      const Thread& other = lanes[lane];
      if (other.state != first.state ||
          (first.state == State::kAtInstruction && other.instruction != first.instruction)) {
        note_fault("the lanes of a warp part: thread %d is at %s, thread %d at %s", first.index, place_of(first),
                   other.index, place_of(other));
        return false;
      }
    }
    if (first.state != State::kAtInstruction) return true;
    void* operands[32];
    for (int lane = 0; lane < 32; ++lane) {
      operands[lane] = lanes[lane].operands;
      lanes[lane].state = State::kRunnable;
    }
    block.current = &lanes[0];
    if (_setjmp(block.scheduler) == 0) first.instruction->run(operands);
    if (block.error[0]) return false;
  }
}

inline void run_block() {
  memset(block.memory.data(), 0xff, block.memory.size());  // NaN in every element type
  for (Thread& thread : block.threads) {
    thread.state = State::kRunnable;
    thread.started = false;
    thread.copies.clear();
    thread.groups.clear();
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack;
    thread.start.uc_stack.ss_size = Block::kStackBytes;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, thread_main, 0);
  }
  std::vector<int> order(block.threads.size() / 32);
  for (size_t warp = 0; warp < order.size(); ++warp) order[warp] = static_cast<int>(warp);
  for (;;) {
    for (size_t left = order.size(); left > 1; --left) std::swap(order[left - 1], order[random_below(left)]);
    for (int warp : order) {
      if (!run_warp(&block.threads[warp * 32])) return;
    }
    const State state = block.threads[0].state;
    for (Thread& thread : block.threads) {
      if (thread.state != state) {
        note_fault("thread 0 waits at %s, thread %d at %s: deadlock", place_of(block.threads[0]), thread.index,
                   place_of(thread));
        return;
      }
    }
    if (state == State::kReturned) break;
    for (Thread& thread : block.threads) thread.state = State::kRunnable;
  }
  for (int i = 0; i < Block::kGuardBytes; ++i) {
    if (block.smem[block.smem_bytes + i] != static_cast<char>(0xff)) {
      note_fault("wrote %d bytes past the end of shared memory", i);
      return;
    }
  }
}

// Null, or what went wrong.
inline const char* launch(void (*kernel)(const void*), const void* params, int64 num_blocks, int num_threads,
                          int smem_bytes, unsigned seed) {
  block.kernel = kernel;
  block.params = params;
  block.count = num_blocks;
  block.smem_bytes = smem_bytes;
  block.memory.resize(smem_bytes + Block::kGuardBytes + 128);
  block.smem = block.memory.data() + 128 - reinterpret_cast<size_t>(block.memory.data()) % 128;
  block.error[0] = 0;
  block.bank_conflicts = 0;
  block.random = seed;
  block.threads.resize(num_threads);
  const size_t stack_bytes = size_t(num_threads) * Block::kStackBytes;
  void* const mapped = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return "no memory for the threads' stacks";
  for (int index = 0; index < num_threads; ++index) {
    block.threads[index].index = index;
    block.threads[index].stack = static_cast<char*>(mapped) + size_t(index) * Block::kStackBytes;
  }
  for (block.index = 0; block.index < num_blocks && !block.error[0]; ++block.index) run_block();
  munmap(mapped, stack_bytes);
  return block.error[0] ? block.error : nullptr;
}

}  // namespace cuflash::host
