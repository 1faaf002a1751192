#include "ptx/warpgroup.cuh"

namespace cuflash::host {

RegisterFile register_file;
static const Register kRegisterFile{{[] { register_file.start(); }, nullptr, [] { register_file.end(); }}};

void RegisterFile::start() {
  const int at_launch = min_of(256, static_cast<int>(65536 / block.threads_each / 8 * 8));
  of_warp.assign(block.threads.size() / 32, at_launch);
  left.assign(block.cluster, 0);
  elected = static_cast<int>(random_below(32));
}

bool RegisterFile::change(int registers, bool raise) {
  int& mine = of_warp[executing_warp()];
  if (raise ? registers < mine : registers > mine) {
    fail("%s of thread %d: from %d to %d", raise ? "raise_registers" : "lower_registers", block.current->index, mine,
         registers);
  }
  int& free = left[block.current->rank];
  if (free < registers - mine) return false;
  free -= registers - mine;
  mine = registers;
  if (!raise) wake(this);
  return true;
}

void RegisterFile::end() const {
  for (size_t warp = 0; warp < of_warp.size(); ++warp) {
    if (of_warp[warp] != of_warp[warp / 4 * 4]) fail("the warps of warpgroup %zu have unequal registers", warp / 4);
  }
}

void change_registers(void* const* lanes, int registers, bool raise) {
  const bool done = register_file.change(registers, raise);
  for (int lane = 0; lane < 32; ++lane) *static_cast<bool*>(lanes[lane]) = done;
  if (!done) hold_warp({&register_file, 0, [](const Wait&) -> std::string { return "raise_registers"; }});
}

}  // namespace cuflash::host
