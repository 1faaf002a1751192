// One thread block on a CPU: how it is run.
#include "block.hpp"

#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>

namespace cuflash::host {

Block block;

static std::vector<Part>& parts() {
  static std::vector<Part> known;
  return known;
}

Register::Register(const Part& part) { parts().push_back(part); }

// Notes the first fault of a launch; nothing runs after it.
static void note(const char* format, va_list values) {
  if (block.error[0]) return;
  const int prefix = snprintf(block.error, sizeof block.error, "block %lld: ", block.index);
  vsnprintf(block.error + prefix, sizeof block.error - prefix, format, values);
}

__attribute__((format(printf, 1, 2))) static void note_fault(const char* format, ...) {
  va_list values;
  va_start(values, format);
  note(format, values);
  va_end(values);
}

void fail(const char* format, ...) {
  va_list values;
  va_start(values, format);
  note(format, values);
  va_end(values);
  _longjmp(block.scheduler, 1);
}

// Calls what may fail.
template <class F>
static void guarded(const F& f) {
  if (_setjmp(block.scheduler) == 0) f();
}

void suspend(State state) {
  block.current->state = state;
  block.current->spins = 0;
  if (_setjmp(block.current->resume) == 0) _longjmp(block.scheduler, 1);
}

static void draw_order() {
  for (size_t left = block.order.size(); left > 1; --left) {
    std::swap(block.order[left - 1], block.order[random_below(left)]);
  }
}

void wait(const Wait& what) {
  block.current->wait = what;
  suspend(State::kWaiting);
  block.current->wait.at = nullptr;
}

void hold_warp(const Wait& what) {
  for (int lane = 0; lane < 32; ++lane) {
    block.current[lane].wait = what;
    block.current[lane].state = State::kWaiting;
  }
}

void wake(const void* at) {
  for (Thread& thread : block.threads) {
    if (thread.state == State::kWaiting && thread.wait.at == at) thread.state = State::kRunnable;
  }
}

void execute(const Instruction& instruction, void* operands) {
  block.current->instruction = &instruction;
  block.current->operands = operands;
  suspend(State::kAtInstruction);
}

static void meet_at(NamedBarrier& barrier, int number, int threads, bool waits) {
  const auto describe = [](const Wait& wait) -> std::string {
    const NamedBarrier& barrier = *static_cast<const NamedBarrier*>(wait.at);
    const int64 number = (&barrier - block.barriers.data()) % Block::kBarriers;
    if (number == 0) return "sync_threads";
    return "sync_named (barrier " + std::to_string(number) + ", " + std::to_string(barrier.arrived) + " of " +
           std::to_string(barrier.threads) + " threads there)";
  };
  if (barrier.arrived == 0) barrier.threads = threads;
  if (barrier.threads != threads) {
    fail("named barrier %d: thread %d says %d threads, one that came before %d", number, block.current->index, threads,
         barrier.threads);
  }
  barrier.arrived += 32;
  if (waits) hold_warp({&barrier, 0, describe});
  if (barrier.arrived < barrier.threads) return;
  barrier.arrived = 0;
  wake(&barrier);
  if (number == 0) draw_order();
}

void meet(int number, int threads, bool waits) {
  if (number < 0 || number >= Block::kBarriers) fail("named barrier %d: there are 0 to 15", number);
  if (threads <= 0 || threads % 32 != 0 || threads > block.threads_each) {
    fail("named barrier %d for %d threads: not whole warps of this block", number, threads);
  }
  meet_at(block.barriers[block.current->rank * Block::kBarriers + number], number, threads, waits);
}

// Lets the cluster go on once everybody is there who has not returned.
static void pass_cluster() {
  NamedBarrier& barrier = block.barriers.back();
  if (barrier.arrived == 0 || barrier.arrived + block.returned < block.threads.size()) return;
  barrier.arrived = 0;
  wake(&barrier);
  draw_order();
}

void meet_cluster() {
  NamedBarrier& barrier = block.barriers.back();
  barrier.arrived += 32;
  hold_warp({&barrier, 0, [](const Wait&) -> std::string { return "sync_cluster"; }});
  pass_cluster();
}

static void thread_main() {
  block.kernel(block.params);
  ++block.returned;
  pass_cluster();
  suspend(State::kReturned);
}

static void resume(Thread& thread) {
  block.current = &thread;
  if (_setjmp(block.scheduler) != 0) return;
  if (thread.started) _longjmp(thread.resume, 1);
  thread.started = true;
  setcontext(&thread.start);
}

static std::string place_of(const Thread& thread) {
  if (thread.state == State::kAtInstruction) return thread.instruction->name;
  return thread.state == State::kWaiting ? thread.wait.describe(thread.wait) : "the end of the kernel";
}

// The instruction at which all lanes of a warp stand; null when some wait elsewhere, may run, or can never come there.
static const Instruction* meeting_point(const Thread* lanes) {
  const Thread* first = lanes;
  while (first < lanes + 32 && first->state != State::kAtInstruction) ++first;
  if (first == lanes + 32) return nullptr;
  bool complete = true;
  for (const Thread* other = lanes; other < lanes + 32; ++other) {
    const bool at_another = other->state == State::kAtInstruction && other->instruction != first->instruction;
    if (at_another || other->state == State::kReturned) {
      note_fault("the lanes of a warp part: thread %d is at %s, thread %d at %s", first->index,
                 place_of(*first).c_str(), other->index, place_of(*other).c_str());
      return nullptr;
    }
    complete = complete && other->state == State::kAtInstruction;
  }
  return complete ? first->instruction : nullptr;
}

static bool can_run(const Thread* lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes[lane].state == State::kRunnable) return true;
  }
  return meeting_point(lanes) != nullptr;
}

// Runs one warp until it has to wait, has returned, or pauses.
static void run_warp(Thread* lanes) {
  for (;;) {
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes[lane].state == State::kRunnable) resume(lanes[lane]);
      if (block.error[0]) return;
    }
    const Instruction* instruction = meeting_point(lanes);
    if (!instruction || (instruction->pauses && random_below(2) == 0)) return;
    void* operands[32];
    for (int lane = 0; lane < 32; ++lane) {
      operands[lane] = lanes[lane].operands;
      lanes[lane].state = State::kRunnable;
    }
    block.current = &lanes[0];
    guarded([&] { instruction->run(operands); });
    if (block.error[0]) return;
  }
}

// Where everybody stands, as "thread 0 waits at X, thread 5 at Y": threads 1 to 4 are at X, too.
static void note_deadlock() {
  std::string places, last;
  for (const Thread& thread : block.threads) {
    const std::string place = place_of(thread);
    if (place == last) continue;
    places += (places.empty() ? "thread " : ", thread ") + std::to_string(thread.index);
    places += (thread.index == 0 ? " waits at " : " at ") + place;
    last = place;
  }
  note_fault("%s: deadlock", places.c_str());
}

static bool work(size_t part) {
  bool worked = false;
  guarded([&] { worked = parts()[part].work && parts()[part].work(); });
  return worked;
}

// Lets the first in the order that can do something do it; false when nobody can.
static bool step() {
  const int num_warps = static_cast<int>(block.threads.size() / 32);
  for (const int who : block.order) {
    if (who < num_warps) {
      Thread* const lanes = &block.threads[who * 32];
      if (!can_run(lanes)) continue;
      run_warp(lanes);
      return true;
    }
    if (random_below(block.laziness[who - num_warps]) == 0 && work(who - num_warps)) return true;
  }
  for (size_t part = 0; part < parts().size(); ++part) {
    if (work(part)) return true;
  }
  return false;
}

static void run_block() {
  memset(block.memory.data(), 0xff, block.memory.size());  // NaN in every element type
  block.barriers.assign(block.cluster * Block::kBarriers + 1, {0, 0});
  for (Thread& thread : block.threads) {
    thread.state = State::kRunnable;
    thread.started = false;
    thread.wait = {};
    thread.copies.clear();
    thread.groups.clear();
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack;
    thread.start.uc_stack.ss_size = Block::kStackBytes;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, thread_main, 0);
  }
  block.laziness.clear();
  for (const Part& part : parts()) {
    part.start();
    block.laziness.push_back(size_t(1) << 4 * random_below(4));
  }
  block.order.resize(block.threads.size() / 32 + parts().size());
  for (size_t who = 0; who < block.order.size(); ++who) block.order[who] = static_cast<int>(who);
  draw_order();
  const size_t patience = size_t(1) << 2 * random_below(4);  // 1 to 64 steps in the same order
  block.returned = 0;
  while (block.returned < block.threads.size()) {
    const bool moved = step();
    if (block.error[0]) return;
    if (!moved) return note_deadlock();
    if (random_below(patience) == 0) draw_order();
  }
  for (const Part& part : parts()) {
    if (part.end) guarded([&] { part.end(); });
  }
  for (int i = 0; i < block.cluster * Block::kGuardBytes; ++i) {
    const int rank = i / Block::kGuardBytes, behind = i % Block::kGuardBytes;
    if (block.smem[rank * block.smem_stride + block.smem_bytes_each + behind] != static_cast<char>(0xff)) {
      note_fault("wrote %d bytes past the end of shared memory", behind);
      return;
    }
  }
}

const char* launch(void (*kernel)(const void*), const void* params, int64 num_blocks, int num_threads, int smem_bytes,
                   unsigned seed, int cluster) {
  if (num_blocks % cluster != 0) return "the blocks are no whole clusters";
  block.kernel = kernel;
  block.params = params;
  block.count = num_blocks;
  block.cluster = cluster;
  block.threads_each = num_threads;
  block.smem_bytes_each = smem_bytes;
  block.smem_stride = Block::kClusterStride;
  block.smem_bytes = (cluster - 1) * block.smem_stride + smem_bytes;
  block.memory.resize(block.smem_bytes + Block::kGuardBytes + Block::kSmemAlignment);
  const size_t misalignment = reinterpret_cast<size_t>(block.memory.data()) % Block::kSmemAlignment;
  block.smem = block.memory.data() + Block::kSmemAlignment - misalignment;
  block.error[0] = 0;
  block.bank_conflicts = 0;
  block.random = seed;
  block.threads.resize(cluster * num_threads);
  const size_t stack_bytes = block.threads.size() * Block::kStackBytes;
  void* const mapped = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return "no memory for the threads' stacks";
  for (int index = 0; index < cluster * num_threads; ++index) {
    block.threads[index].index = index;
    block.threads[index].rank = index / num_threads;
    block.threads[index].stack = static_cast<char*>(mapped) + size_t(index) * Block::kStackBytes;
  }
  for (block.index = 0; block.index < num_blocks / cluster && !block.error[0]; ++block.index) run_block();
  munmap(mapped, stack_bytes);
  return block.error[0] ? block.error : nullptr;
}

}  // namespace cuflash::host
