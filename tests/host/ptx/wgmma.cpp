#include "ptx/wgmma.cuh"

#include <deque>
#include <list>

#include "async_proxy.hpp"
#include "ptx/mma.cuh"

namespace cuflash::host {

// Where element i of a lane lies in its warp's accumulator, or in an A.
constexpr int row_of(int lane, int i) { return lane / 4 + i / 2 % 2 * 8; }
constexpr int col_of(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

// A 16 x n accumulator that products of one warp are changing.
struct BusyAccumulator {
  static constexpr uint32 kNan = 0xffffffff;

  float* registers[32];  // of each lane
  int n;
  int products;  // not yet waited for
  std::vector<float> value;

  int count() const { return n / 2; }  // of registers
  float& value_of(int lane, int i) { return value[row_of(lane, i) * n + col_of(lane, i)]; }

  void take() {
    value.resize(16 * n);
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < count(); ++i) value_of(lane, i) = registers[lane][i];
      memset(registers[lane], 0xff, count() * 4);
    }
  }
  void check() const {
    for (const float* mine : registers) {
      for (int i = 0; i < count(); ++i) {
        if (memcmp(&mine[i], &kNan, 4) != 0) fail("an accumulator was written while wgmma was changing it");
      }
    }
  }
  void give_back() {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < count(); ++i) registers[lane][i] = value_of(lane, i);
    }
  }
};

// What the four warps of a warpgroup must agree on.
struct ProductOfFour {
  void (*multiply)(const Product&);
  int n;        // columns
  uint64 a, b;  // descriptors
  uint32 base;  // of the block's shared memory, which addresses in them are relative to
  bool accumulate;

  bool operator!=(const ProductOfFour& other) const {
    return multiply != other.multiply || n != other.n || a != other.a || b != other.b || accumulate != other.accumulate;
  }
};

// One warp's part of a product.
struct Product {
  ProductOfFour whole;
  int quarter;  // of the warpgroup's 64 rows
  BusyAccumulator* c;
  const uint32* a_registers[32];  // of each lane; null: A is in shared memory
  uint32 a_values[32][4];         // at the issue
  bool done;

  void check_registers() const {
    for (int lane = 0; lane < 32 && a_registers[lane]; ++lane) {
      if (memcmp(a_registers[lane], a_values[lane], 16) != 0) fail("A's registers were written while wgmma read them");
    }
  }
};

struct TensorCore {
  bool fenced;                   // since the last commit or wait
  std::deque<Product> products;  // not yet waited for, oldest first
  std::deque<size_t> groups;     // products in each committed group that has not been waited for, oldest first
  size_t uncommitted;            // products after those
  std::list<BusyAccumulator> busy;
  size_t issued;    // products
  int64 committed;  // groups

  // Does the oldest `count` products that are here.
  void work(size_t count) {
    for (size_t number = 0; number < count; ++number) {
      Product& product = products[number];
      if (!product.done) product.whole.multiply(product);
      product.done = true;
    }
  }
  bool work_a_little() {
    for (size_t number = 0; number < products.size(); ++number) {
      if (products[number].done) continue;
      work(number + 1);
      return true;
    }
    return false;
  }
  // Does the products of the oldest `count` groups.
  void work_groups(size_t count) {
    size_t number = 0;
    for (size_t group = 0; group < count; ++group) number += groups[group];
    work(number);
  }
  BusyAccumulator* accumulator(const BusyAccumulator& fresh) {
    for (BusyAccumulator& known : busy) {
      const float* const end = known.registers[0] + known.count();
      if (fresh.registers[0] >= end || known.registers[0] >= fresh.registers[0] + fresh.count()) continue;
      if (known.registers[0] != fresh.registers[0] || known.n != fresh.n) fail("accumulators of wgmma overlap");
      known.check();
      return &known;
    }
    busy.push_back(fresh);
    busy.back().take();
    return &busy.back();
  }
  void retire_group() {
    for (size_t left = groups.front(); left > 0; --left) {
      products.front().check_registers();
      BusyAccumulator* const c = products.front().c;
      products.pop_front();
      if (--c->products > 0) continue;
      c->check();
      c->give_back();
      busy.remove_if([&](const BusyAccumulator& other) { return &other == c; });
    }
    groups.pop_front();
  }
};

struct TensorCores {
  std::vector<TensorCore> of_warp;
  std::vector<std::vector<ProductOfFour>> issued;  // by every warpgroup, in order

  void start() {
    of_warp.assign(block.threads.size() / 32, TensorCore{});
    issued.assign(block.threads.size() / 128, {});
  }
  TensorCore& mine() { return of_warp[executing_warp()]; }
  const TensorCore* warpgroup() { return &of_warp[executing_warp() / 4 * 4]; }

  void issue(Product& product, const BusyAccumulator& c) {
    const size_t warpgroup = executing_warp() / 4;
    if (warpgroup >= issued.size()) fail("wgmma outside a warpgroup");
    TensorCore& core = mine();
    if (!core.fenced) fail("wgmma lacks a wgmma_fence since the last commit or wait, thread %d", block.current->index);
    std::vector<ProductOfFour>& before = issued[warpgroup];
    if (core.issued == before.size()) before.push_back(product.whole);
    if (before[core.issued++] != product.whole) fail("the warps of warpgroup %zu issue different wgmma", warpgroup);
    product.c = core.accumulator(c);
    ++product.c->products;
    core.products.push_back(product);
    ++core.uncommitted;
  }
  bool work() {
    const size_t first = random_below(of_warp.size());
    for (size_t i = 0; i < of_warp.size(); ++i) {
      if (of_warp[(first + i) % of_warp.size()].work_a_little()) return true;
    }
    return false;
  }
  // False while another warp of this warpgroup has not committed what is to be waited for.
  bool wait(int pending) {
    TensorCore& core = mine();
    core.fenced = false;
    const int64 target = core.committed - pending;
    TensorCore* const four = &of_warp[executing_warp() / 4 * 4];
    for (int warp = 0; warp < 4; ++warp) {
      if (four[warp].committed < target) return false;
    }
    for (int warp = 0; warp < 4; ++warp) {
      const int64 oldest = four[warp].committed - static_cast<int64>(four[warp].groups.size());
      if (oldest < target) four[warp].work_groups(target - oldest);
    }
    while (static_cast<int64>(core.groups.size()) > pending) core.retire_group();
    return true;
  }
  void end() const {
    for (const TensorCore& core : of_warp) {
      if (!core.products.empty()) fail("the block ended before wgmma was waited for");
    }
  }
};

static TensorCores tensor_cores;
static const Register kTensorCores{
    {[] { tensor_cores.start(); }, [] { return tensor_cores.work(); }, [] { tensor_cores.end(); }}};

// Where a matrix in shared memory lies.
struct Descriptor {
  uint32 start, chunk_bytes;

  // `step` is what start addresses are multiples of inside a swizzled group of eight rows.
  Descriptor(uint64 bits, uint32 base, uint32 step)
      : start(base + ((bits & 0x3fff) << 4)), chunk_bytes((bits >> 16 & 0x3fff) << 4) {
    constexpr uint64 kFields = 0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 3ull << 62;
    if (bits & ~kFields) fail("wgmma descriptor %#llx: bits outside its fields are set", bits);
    if (bits >> 62 != 1) fail("wgmma descriptor %#llx: not in 128-byte swizzle", bits);
    if ((bits >> 32 & 0x3fff) << 4 != 1024) fail("wgmma descriptor %#llx: groups of rows are not 1024 bytes", bits);
    if (start % 128 % step != 0 || start % 1024 >= 128) fail("wgmma descriptor: no matrix starts at %u", start);
  }
};

// The eight elements in 16 bytes of shared memory.
template <class Element>
void read_eight(float* eight, int stride, uint32 address) {
  unsigned short bits[8];
  memcpy(bits, async_unit("wgmma", address), 16);
  for (int i = 0; i < 8; ++i) eight[i * stride] = ptx::floats<Element>()[bits[i]];
}

template <class Element, Form kForm>
void multiply(const Product& product) {
  constexpr int kRowBytes = 128, kChunk = 64, kMostColumns = 256;  // columns of a row, of a product
  const int n = product.whole.n;
  float a[16][16], b[16][kMostColumns];
  if constexpr (kForm == Form::kAbFromRegisters) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 8; ++i) {
        const uint32 bits = product.a_values[lane][i / 2] >> i % 2 * 16 & 0xffff;
        a[row_of(lane, i)][col_of(lane, i)] = ptx::floats<Element>()[bits];
      }
    }
  } else if constexpr (kForm == Form::kAtbt) {
    const Descriptor a_matrix(product.whole.a, product.whole.base, 128);
    for (int k = 0; k < 16; ++k) {
      const uint32 address = a_matrix.start + k * kRowBytes + product.quarter * 32;
      for (int row = 0; row < 16; row += 8) read_eight<Element>(&a[row][k], 16, address + row * 2);
    }
  } else {
    const Descriptor a_matrix(product.whole.a, product.whole.base, 32);
    for (int row = 0; row < 16; ++row) {
      const uint32 address = a_matrix.start + (product.quarter * 16 + row) * kRowBytes;
      for (int k = 0; k < 16; k += 8) read_eight<Element>(&a[row][k], 1, address + k * 2);
    }
  }
  if constexpr (kForm == Form::kAbt || kForm == Form::kAtbt) {
    const Descriptor b_matrix(product.whole.b, product.whole.base, 32);
    for (int col = 0; col < n; ++col) {
      const uint32 address = b_matrix.start + col * kRowBytes;
      for (int k = 0; k < 16; k += 8) read_eight<Element>(&b[k][col], kMostColumns, address + k * 2);
    }
  } else {
    const Descriptor b_matrix(product.whole.b, product.whole.base, 128);
    for (int k = 0; k < 16; ++k) {
      for (int col = 0; col < n; col += 8) {
        const uint32 address = b_matrix.start + col / kChunk * b_matrix.chunk_bytes + k * kRowBytes;
        read_eight<Element>(&b[k][col], 1, address + col % kChunk * 2);
      }
    }
  }
  float* const c = product.c->value.data();
  if (!product.whole.accumulate) memset(c, 0, 16 * n * sizeof(float));
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int col = 0; col < n; ++col) c[row * n + col] += a[row][k] * b[k][col];
    }
  }
}

template void multiply<fp16, Form::kAbt>(const Product&);
template void multiply<fp16, Form::kAb>(const Product&);
template void multiply<fp16, Form::kAtbt>(const Product&);
template void multiply<fp16, Form::kAbFromRegisters>(const Product&);
template void multiply<bf16, Form::kAbt>(const Product&);
template void multiply<bf16, Form::kAb>(const Product&);
template void multiply<bf16, Form::kAtbt>(const Product&);
template void multiply<bf16, Form::kAbFromRegisters>(const Product&);

void issue(void* const* lanes, void (*multiply)(const Product&), int n) {
  const WgmmaOperands& first = *static_cast<const WgmmaOperands*>(lanes[0]);
  const uint32 base = block.current->rank * block.smem_stride;
  Product product{
      {multiply, n, first.a_descriptor, first.b, base, first.accumulate}, executing_warp() % 4, nullptr, {}, {}, false};
  BusyAccumulator c{{}, n, 0, {}};
  for (int lane = 0; lane < 32; ++lane) {
    const WgmmaOperands& mine = *static_cast<const WgmmaOperands*>(lanes[lane]);
    if (mine.a_descriptor != first.a_descriptor || mine.b != first.b || mine.accumulate != first.accumulate) {
      fail("the lanes of a warp issue different wgmma");
    }
    c.registers[lane] = mine.c;
    product.a_registers[lane] = mine.a_registers;
    if (mine.a_registers) memcpy(product.a_values[lane], mine.a_registers, 16);
  }
  tensor_cores.issue(product, c);
}

void wait_for_products(void* const* lanes, int pending) {
  const bool done = tensor_cores.wait(pending);
  for (int lane = 0; lane < 32; ++lane) *static_cast<bool*>(lanes[lane]) = done;
  if (!done) {
    const auto describe = [](const Wait&) -> std::string { return "wgmma_wait (for its warpgroup's commits)"; };
    hold_warp({tensor_cores.warpgroup(), 0, describe});
  }
}

}  // namespace cuflash::host

namespace cuflash::ptx {

static constexpr host::Instruction kWgmmaFence{"wgmma_fence",
                                               [](void* const*) { host::tensor_cores.mine().fenced = true; }, true};
void wgmma_fence() { host::execute(kWgmmaFence, nullptr); }

static constexpr host::Instruction kWgmmaCommit{"wgmma_commit", [](void* const*) {
  host::TensorCore& core = host::tensor_cores.mine();
  core.groups.push_back(std::exchange(core.uncommitted, 0));
  ++core.committed;
  core.fenced = false;
  host::wake(host::tensor_cores.warpgroup());
}, true};
void wgmma_commit() { host::execute(kWgmmaCommit, nullptr); }

}  // namespace cuflash::ptx
