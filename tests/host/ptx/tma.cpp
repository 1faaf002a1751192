#include "ptx/tma.cuh"

#include <functional>

#include "async_proxy.hpp"
#include "block.hpp"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"

namespace cuflash::host {

struct Tensor {
  uint64 address;
  int64 dim[5];
  uint64 stride[5];  // bytes
  int64 box[5];

  Tensor(const char* who, const TensorMap& map) : address(map.words[0]) {
    const uint64 itemsize = map.words[15];
    if (reinterpret_cast<size_t>(&map) % 64 != 0) fail("%s: the tensor map is not aligned to 64 bytes", who);
    if (itemsize == 0) fail("%s: the tensor map is empty", who);
    for (int axis = 0; axis < 5; ++axis) {
      dim[axis] = static_cast<int64>(map.words[1 + axis]);
      stride[axis] = axis == 0 ? itemsize : map.words[5 + axis];
      box[axis] = static_cast<int64>(map.words[10 + axis]);
      if (dim[axis] < 1 || dim[axis] > int64(1) << 32) fail("%s: dimension %d has %lld elements", who, axis, dim[axis]);
      if (box[axis] < 1 || box[axis] > 256) fail("%s: a box has %lld elements along %d", who, box[axis], axis);
      if (axis > 0 && stride[axis] % 16 != 0) fail("%s: a stride of %llu bytes", who, stride[axis]);
    }
    if (address % 16 != 0) fail("%s: the tensor is not aligned to 16 bytes", who);
    if (box[0] * static_cast<int64>(itemsize) != 128) fail("%s: rows of a box are not 128 bytes", who);
  }

  int box_bytes() const { return static_cast<int>(128 * box[1] * box[2] * box[3] * box[4]); }
};

// A box of a tensor, and where it lies in shared memory.
struct Box {
  Tensor tensor;
  int at[5];
  uint32 shared;

  // For such a box hardware touches the map's first element, be it there or not.
  bool misses() const {
    for (int axis = 0; axis < 5; ++axis) {
      if (at[axis] >= tensor.dim[axis] || at[axis] + tensor.box[axis] <= 0) return true;
    }
    return false;
  }

  void copy(bool to_shared) const {
    char row[128];
    uint32 row_address = shared;
    for_each_row([&](char* global, size_t first, size_t bytes) {
      memset(row, 0, 128);
      if (to_shared) memcpy(row + first, global, bytes);
      for (int unit = 0; unit < 128; unit += 16) {
        char* const place = block.smem + swizzled(row_address + unit);
        to_shared ? memcpy(place, row + unit, 16) : memcpy(row + unit, place, 16);
      }
      if (!to_shared) memcpy(global, row + first, bytes);
      row_address += 128;
    });
  }

 private:
  // f(global address of a row's first byte inside the tensor, where in the row it is, bytes inside) for every row.
  template <class F>
  void for_each_row(const F& f) const {
    const int64 first = clamp_to<int64>(-int64(at[0]), 0, tensor.box[0]);
    const int64 end = clamp_to<int64>(tensor.dim[0] - at[0], first, tensor.box[0]);
    for (int64 x4 = at[4]; x4 < at[4] + tensor.box[4]; ++x4) {
      for (int64 x3 = at[3]; x3 < at[3] + tensor.box[3]; ++x3) {
        for (int64 x2 = at[2]; x2 < at[2] + tensor.box[2]; ++x2) {
          for (int64 x1 = at[1]; x1 < at[1] + tensor.box[1]; ++x1) {
            const bool inside = has(1, x1) && has(2, x2) && has(3, x3) && has(4, x4);
            const uint64 global = tensor.address + (at[0] + first) * tensor.stride[0] + x1 * tensor.stride[1] +
                                  x2 * tensor.stride[2] + x3 * tensor.stride[3] + x4 * tensor.stride[4];
            f(reinterpret_cast<char*>(global), first * tensor.stride[0], inside ? (end - first) * tensor.stride[0] : 0);
          }
        }
      }
    }
  }
  bool has(int axis, int64 x) const { return x >= 0 && x < tensor.dim[axis]; }
};

// A copy under way.
struct Transfer {
  const char* name;
  int thread;         // that started it
  Mbarrier* barrier;  // that a load completes; null: a store
  bool committed;     // a store in a group
  uint32 shared;
  int bytes, alignment;
  std::function<void()> copy;

  void run() const {
    copy();
    if (barrier) barrier->complete(bytes);
  }
};

struct CopyEngine {
  struct Stores {
    int started, committed;  // that the thread has not waited for
  };

  std::vector<Transfer> transfers;
  std::vector<Stores> stores;  // of every thread
  bool stores_last;            // do no store while there is a load to do

  void start() {
    transfers.clear();
    stores_last = random_below(2) == 0;
    stores.assign(block.threads.size(), {0, 0});
  }

  void add(const Transfer& transfer) {
    const int64 bytes = transfer.bytes, first = transfer.shared;
    const char* const name = transfer.name;
    if (first % transfer.alignment != 0) {
      fail("%s: shared %lld is not a multiple of %d", name, first, transfer.alignment);
    }
    if (first + bytes > block.smem_bytes) fail("%s of %lld bytes at %lld: beyond shared memory", name, bytes, first);
    for (int64 address = first; address < first + bytes; address += 16) async_proxy.check(name, address);
    if (transfer.barrier) {
      for (const Transfer& other : transfers) {
        if (first < other.shared + other.bytes && other.shared < first + bytes) {
          fail("%s by thread %d to %lld, where a %s by thread %d is under way", name, transfer.thread, first,
               other.name, other.thread);
        }
      }
      memset(block.smem + first, 0xff, bytes);
    }
    transfers.push_back(transfer);
    pause();
  }
  void add(const char* name, Mbarrier* barrier, const Box& box) {
    add({name, block.current->index, barrier, false, box.shared, box.tensor.box_bytes(), Block::kSmemAlignment,
         [=] { box.copy(barrier != nullptr); }});
  }

  bool work() {
    if (transfers.empty()) return false;
    size_t number = random_below(transfers.size());
    for (size_t passed = 0; stores_last && !transfers[number].barrier && passed < transfers.size(); ++passed) {
      number = (number + 1) % transfers.size();
    }
    finish(number);
    return true;
  }
  void finish(size_t number) {
    const Transfer transfer = transfers[number];
    transfers.erase(transfers.begin() + number);
    transfer.run();
  }

  // Nothing may touch the shared memory of a block that has ended.
  void end() const {
    for (const Transfer& transfer : transfers) {
      if (!transfer.barrier) continue;
      fail("the block ended while a %s by thread %d was under way", transfer.name, transfer.thread);
    }
    for (const Thread& thread : block.threads) {
      const Stores& left = stores[thread.index];
      if (left.started + left.committed > 0) {
        fail("thread %d returned before its tma_store had read shared memory", thread.index);
      }
    }
  }
};

static CopyEngine copy_engine;
static const Register kCopyEngine{
    {[] { copy_engine.start(); }, [] { return copy_engine.work(); }, [] { copy_engine.end(); }}};

}  // namespace cuflash::host

namespace cuflash::ptx {

static host::Mbarrier& barrier_of_load(const char* who, uint32 barrier) {
  host::Mbarrier& known = host::mbarrier_at(who, barrier);
  if (!known.fenced) host::fail("%s: mbarrier %u lacks fence_mbarrier_init", who, barrier);
  return known;
}

static host::Box box_of(const char* who, const TensorMap& map, const int (&at)[5], uint32 shared) {
  const host::Box box{host::Tensor(who, map), {at[0], at[1], at[2], at[3], at[4]}, shared};
  if (box.misses()) host::fail("%s: the box lies wholly outside the tensor", who);
  return box;
}

void tma_load(uint32 shared, const TensorMap& map, int x0, int x1, int x2, int x3, int x4, uint32 barrier) {
  host::Mbarrier& known = barrier_of_load("tma_load", barrier);
  host::copy_engine.add("tma_load", &known, box_of("tma_load", map, {x0, x1, x2, x3, x4}, shared));
}

void tma_load(uint32 shared, const TensorMap& map, int x0, int x1, int x2, int x3, uint32 barrier) {
  tma_load(shared, map, x0, x1, x2, x3, 0, barrier);
}

void tma_load_by(uint64, uint32 shared, const TensorMap& map, int x0, int x1, int x2, int x3, int x4, uint32 barrier) {
  tma_load(shared, map, x0, x1, x2, x3, x4, barrier);
}

void tma_load_by(uint64, uint32 shared, const TensorMap& map, int x0, int x1, int x2, int x3, uint32 barrier) {
  tma_load(shared, map, x0, x1, x2, x3, barrier);
}

static void check_bulk(const char* who, const void* global, int bytes) {
  if (bytes <= 0 || bytes % 16 != 0) host::fail("%s of %d bytes", who, bytes);
  if (reinterpret_cast<size_t>(global) % 16 != 0) host::fail("%s: an address is not a multiple of 16", who);
}

void bulk_load(uint32 shared, const void* global, int bytes, uint32 barrier) {
  host::Mbarrier& known = barrier_of_load("bulk_load", barrier);
  check_bulk("bulk_load", global, bytes);
  const auto copy = [=] { memcpy(host::block.smem + shared, global, bytes); };
  host::copy_engine.add({"bulk_load", host::block.current->index, &known, false, shared, bytes, 16, copy});
}

void store_across(uint32 remote, const float (&x)[4], uint32 remote_barrier) {
  host::Mbarrier& known = barrier_of_load("store_across", remote_barrier);
  struct {
    float x[4];
  } four{{x[0], x[1], x[2], x[3]}};
  const auto store = [=] { memcpy(host::block.smem + remote, &four, 16); };
  host::copy_engine.add({"store_across", host::block.current->index, &known, false, remote, 16, 16, store});
}

void bulk_add(float* global, uint32 shared, int bytes) {
  check_bulk("bulk_add", global, bytes);
  const auto add = [=] {
    for (int i = 0; i < bytes / 4; ++i) {
      float x;
      memcpy(&x, host::block.smem + shared + i * 4, 4);
      global[i] += x;
    }
  };
  ++host::copy_engine.stores[host::block.current->index].started;
  host::copy_engine.add({"bulk_add", host::block.current->index, nullptr, false, shared, bytes, 16, add});
}

void tma_store(const TensorMap& map, int x0, int x1, int x2, int x3, uint32 shared) {
  const host::Box box = box_of("tma_store", map, {x0, x1, x2, x3, 0}, shared);
  ++host::copy_engine.stores[host::block.current->index].started;
  host::copy_engine.add("tma_store", nullptr, box);
}

void tma_store_commit() {
  host::CopyEngine::Stores& mine = host::copy_engine.stores[host::block.current->index];
  mine.committed += std::exchange(mine.started, 0);
  for (host::Transfer& transfer : host::copy_engine.transfers) {
    const bool is_mine = !transfer.barrier && transfer.thread == host::block.current->index;
    transfer.committed = transfer.committed || is_mine;
  }
}

void tma_store_wait_read() {
  const int thread = host::block.current->index;
  host::copy_engine.stores[thread].committed = 0;
  for (size_t number = host::copy_engine.transfers.size(); number-- > 0;) {
    const host::Transfer& transfer = host::copy_engine.transfers[number];
    if (transfer.committed && transfer.thread == thread) host::copy_engine.finish(number);
  }
}

void tma_store_wait() { tma_store_wait_read(); }

void fence_proxy_async() { host::async_proxy.fence(host::block.current->index); }

}  // namespace cuflash::ptx
