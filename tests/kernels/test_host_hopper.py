"""The host twins of Hopper's instructions: they compute what hardware does, and notice what is missing."""

from __future__ import annotations

import ctypes
import itertools
import re
from ctypes import c_int, c_void_p
from functools import cache

import ml_dtypes
import numpy as np
import pytest
from host.build import build, why_not
from host.run import tensor_map

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

INCLUDES = r"""
#include "ptx/stmatrix.cuh"
#include "ptx/sync.cuh"
#include "tile/copy_tma.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/gemm_sm90.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))
using namespace cuflash;

TensorMap map_of(const uint64* words) {
  TensorMap map;
  memcpy(map.words, words, sizeof map.words);
  return map;
}
"""

COPIES = r"""
// Thread 5 loads a box, everybody hands it on.
struct LoadArguments { TensorMap map; int x[4]; int bytes; uint8* out; };

void load(const void* params) {
  const LoadArguments& p = *static_cast<const LoadArguments*>(params);
  char* const smem = ptx::dynamic_smem();
  const uint32 barrier = ptx::smem_u32(smem + p.bytes);
  if (ptx::thread_index() == 5) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_wait(barrier, 1);  // the phase before the first
    ptx::tma_load(ptx::smem_u32(smem), p.map, p.x[0], p.x[1], p.x[2], p.x[3], barrier);
    ptx::mbarrier_arrive_expect_tx(barrier, p.bytes);  // may come after the bytes
  }
  ptx::sync_threads();
  ptx::mbarrier_wait(barrier, 0);
  for (int i = ptx::thread_index(); i < p.bytes; i += 64) p.out[i] = smem[i];
}

EXPORT const char* load_box(const uint64* words, const int* x, int bytes, uint8* out, unsigned seed) {
  const LoadArguments arguments{map_of(words), {x[0], x[1], x[2], x[3]}, bytes, out};
  return host::launch(load, &arguments, 1, 64, bytes + 8, seed);
}

// The same the other way.
struct StoreArguments { TensorMap map; int x[4]; int bytes; const uint8* in; };

void store(const void* params) {
  const StoreArguments& p = *static_cast<const StoreArguments*>(params);
  char* const smem = ptx::dynamic_smem();
  for (int i = ptx::thread_index(); i < p.bytes; i += 64) smem[i] = p.in[i];
  ptx::fence_proxy_async();
  ptx::sync_threads();
  if (ptx::thread_index() == 0) {
    ptx::tma_store(p.map, p.x[0], p.x[1], p.x[2], p.x[3], ptx::smem_u32(smem));
    ptx::tma_store_commit();
    ptx::tma_store_wait_read();
    memset(smem, 0, p.bytes);
  }
}

EXPORT const char* store_box(const uint64* words, const int* x, int bytes, const uint8* in, unsigned seed) {
  const StoreArguments arguments{map_of(words), {x[0], x[1], x[2], x[3]}, bytes, in};
  return host::launch(store, &arguments, 1, 64, bytes, seed);
}
"""

PRODUCTS = r"""
// One warpgroup: C [64 x kN] = A [64 x 128] B^T (kN x 128), or A [64 x 48] B (48 x kN) with A from registers, twice.
struct ProductArguments { TensorMap a, b; const void* a_global; float* c; };

template <class Element, int kN, bool kTransposed>
struct ProductSmem {
  SwizzledTile<Element, 64, 128> a;
  SwizzledTile<Element, kTransposed ? kN : 48, kTransposed ? 128 : kN> b;
  uint64 barrier;
};

template <class Element, int kN, bool kTransposed>
void product(const void* params) {
  const ProductArguments& p = *static_cast<const ProductArguments*>(params);
  using Smem = ProductSmem<Element, kN, kTransposed>;
  Smem& smem = *reinterpret_cast<Smem*>(ptx::dynamic_smem());
  const int lane = ptx::lane_index(), first_row = ptx::warp_index() * 16;
  const uint32 barrier = ptx::smem_u32(&smem.barrier);
  if (ptx::thread_index() == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(barrier, sizeof smem.b + (kTransposed ? sizeof smem.a : 0));
    if (kTransposed) load_boxes(smem.a, p.a, BoxOrigin{0, 0, 0}, barrier);
    load_boxes(smem.b, p.b, BoxOrigin{0, 0, 0}, barrier);
  }
  ptx::sync_threads();
  ptx::mbarrier_wait(barrier, 0);
  Fragment<16, kN> c;
  Operand<16, 48> a;
  if constexpr (kTransposed) {
    ptx::wgmma_fence();
    issue_abt<Element>(c, smem.a, &smem.b, 0);  // c was never written
    ptx::wgmma_commit();
  } else {
    Fragment<16, 48> values;
    values.for_each(lane, [&](float& x, int row, int col) {
      x = to_accumulator(static_cast<const Element*>(p.a_global)[(first_row + row) * 48 + col]);
    });
    pack_operand<Element>(a, values);
    c.clear();
    for (int group = 0; group < 2; ++group) {
      ptx::wgmma_fence();
      issue_ab<Element>(c, a, &smem.b, 0);
      ptx::wgmma_commit();
    }
    ptx::wgmma_wait<1>();
  }
  ptx::wgmma_wait<0>();
  c.for_each(lane, [&](float x, int row, int col) { p.c[(first_row + row) * kN + col] = x; });
}

template <class Element, bool kTransposed>
const char* multiply_as(int n, const ProductArguments& p, unsigned seed) {
  switch (n) {
#define CASE(kN)                                                                                              \
  case kN:                                                                                                    \
    return host::launch(product<Element, kN, kTransposed>, &p, 1, 128,                                        \
                        sizeof(ProductSmem<Element, kN, kTransposed>), seed);
    CASE(16) CASE(64) CASE(80) CASE(128) CASE(176) CASE(256)
  }
  return "no such kN";
}

EXPORT const char* multiply(bool half, bool transposed, int n, const uint64* a_map, const uint64* b_map, const void* a,
                            float* c, unsigned seed) {
  const ProductArguments p{map_of(a_map), map_of(b_map), a, c};
  if (transposed) return half ? multiply_as<fp16, true>(n, p, seed) : multiply_as<bf16, true>(n, p, seed);
  return half ? multiply_as<fp16, false>(n, p, seed) : multiply_as<bf16, false>(n, p, seed);
}
"""

SHARED_PRODUCTS = r"""
// One warpgroup: C [64 x kN] = A [64 x 64] B (64 x kN), both in shared memory, or A^T and B^T, twice.
template <class Element, int kN, bool kTransposed>
struct SharedProductSmem {
  SwizzledTile<Element, 64, 64> a;
  SwizzledTile<Element, kTransposed ? kN : 64, kTransposed ? 64 : kN> b;
  uint64 barrier;
};

template <class Element, int kN, bool kTransposed>
void shared_product(const void* params) {
  const ProductArguments& p = *static_cast<const ProductArguments*>(params);
  using Smem = SharedProductSmem<Element, kN, kTransposed>;
  Smem& smem = *reinterpret_cast<Smem*>(ptx::dynamic_smem());
  const int lane = ptx::lane_index(), first_row = ptx::warp_index() * 16;
  const uint32 barrier = ptx::smem_u32(&smem.barrier);
  if (ptx::thread_index() == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(barrier, sizeof smem.a + sizeof smem.b);
    load_boxes(smem.a, p.a, BoxOrigin{0, 0, 0}, barrier);
    load_boxes(smem.b, p.b, BoxOrigin{0, 0, 0}, barrier);
  }
  ptx::sync_threads();
  ptx::mbarrier_wait(barrier, 0);
  const uint64 a = ptx::wgmma_descriptor(smem.a.base(), 0);
  const uint64 b = ptx::wgmma_descriptor(smem.b.base(), smem.b.kChunkBytes);
  Fragment<16, kN> c;
  ptx::wgmma_fence();
  for (int time = 0; time < 2; ++time) {
    for (int k = 0; k < 64; k += ptx::kWgmmaDepth<Element>) {
      const bool accumulate = time > 0 || k > 0;
      if (kTransposed) {
        ptx::wgmma_atbt<Element>(c.x[0], ptx::advance_descriptor(a, smem.a.bytes_to_row(k)),
                                 ptx::advance_descriptor(b, smem.b.bytes_to_col(k)), accumulate);
      } else {
        ptx::wgmma_ab<Element>(c.x[0], ptx::advance_descriptor(a, smem.a.bytes_to_col(k)),
                               ptx::advance_descriptor(b, smem.b.bytes_to_row(k)), accumulate);
      }
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  c.for_each(lane, [&](float x, int row, int col) { p.c[(first_row + row) * kN + col] = x; });
}

template <class Element, bool kTransposed>
const char* multiply_shared_as(int n, const ProductArguments& p, unsigned seed) {
  switch (n) {
#define SHARED_CASE(kN)                                                             \
  case kN:                                                                          \
    return host::launch(shared_product<Element, kN, kTransposed>, &p, 1, 128,       \
                        sizeof(SharedProductSmem<Element, kN, kTransposed>), seed);
    SHARED_CASE(16) SHARED_CASE(64) SHARED_CASE(80) SHARED_CASE(128)
  }
  return "no such kN";
}

EXPORT const char* multiply_shared(bool half, bool transposed, int n, const uint64* a_map, const uint64* b_map,
                                   float* c, unsigned seed) {
  const ProductArguments p{map_of(a_map), map_of(b_map), nullptr, c};
  if (transposed) return half ? multiply_shared_as<fp16, true>(n, p, seed) : multiply_shared_as<bf16, true>(n, p, seed);
  return half ? multiply_shared_as<fp16, false>(n, p, seed) : multiply_shared_as<bf16, false>(n, p, seed);
}
"""

STORES = r"""
// One warp: a 16 x 16 accumulator to a tile, as it is or transposed.
struct StoredArguments { bool transposed; uint16* stored; };

void store_matrices(const void* params) {
  const StoredArguments& p = *static_cast<const StoredArguments*>(params);
  using Tile = SharedTile<fp16, 16, 16>;
  Tile& tile = *reinterpret_cast<Tile*>(ptx::dynamic_smem());
  const int lane = ptx::lane_index();
  uint32 packed[4];
  for (int i = 0; i < 4; ++i) {
    const int number = row_of(lane, i % 2) * 16 + col_of(lane, i / 2, 0);
    packed[i] = number | number + 1 << 16;
  }
  if (p.transposed) {
    ptx::stmatrix_x4_trans(tile.address(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8), packed);
  } else {
    ptx::stmatrix_x4(tile.address(lane % 16, lane / 16 * 8), packed);
  }
  ptx::sync_warp();
  for (int i = lane; i < 256; i += 32) p.stored[i] = tile.at(i / 16, i % 16)->bits;
}

EXPORT const char* stored_matrices(bool transposed, uint16* stored, int* conflicts) {
  const StoredArguments p{transposed, stored};
  const char* error = host::launch(store_matrices, &p, 1, 32, sizeof(SharedTile<fp16, 16, 16>), 0);
  *conflicts = static_cast<int>(host::block.bank_conflicts);
  return error;
}

// 64 threads: neighbouring floats by a bulk copy, and added to a sum by another, or four by every thread.
struct SumArguments { const float* in; int count; bool in_bulk; float* sum; };

void sum_bulk(const void* params) {
  const SumArguments& p = *static_cast<const SumArguments*>(params);
  char* const smem = ptx::dynamic_smem();
  float* const values = reinterpret_cast<float*>(smem + 16);
  const uint32 barrier = ptx::smem_u32(smem);
  if (ptx::thread_index() == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(barrier, p.count * 4);
    ptx::bulk_load(ptx::smem_u32(values), p.in, p.count * 4, barrier);
  }
  ptx::sync_threads();
  ptx::mbarrier_wait(barrier, 0);
  if (p.in_bulk) {
    if (ptx::thread_index() != 0) return;
    ptx::bulk_add(p.sum, ptx::smem_u32(values), p.count * 4);
    ptx::tma_store_commit();
    ptx::tma_store_wait();
    memset(values, 0, p.count * 4);
    return;
  }
  for (int i = ptx::thread_index() * 4; i < p.count; i += 256) {
    ptx::red_add_x4(p.sum + i, {values[i], values[i + 1], values[i + 2], values[i + 3]}, true);
  }
}

EXPORT const char* sum_of_bulk(const float* in, int count, bool in_bulk, float* sum, unsigned seed) {
  const SumArguments p{in, count, in_bulk, sum};
  return host::launch(sum_bulk, &p, 2, 64, 16 + count * 4, seed);
}
"""

STEPS = (
    "init_fence", "init_barrier", "lower", "raise", "wait_empty", "expect", "load", "wait_full", "turn", "wgmma_fence",
    "commit", "commit_last", "wgmma_wait", "wgmma_wait_last", "pass_turn", "release", "wait_read", "barrier_before_out",
    "proxy_fence", "barrier_after_out", "store_commit", "wait_read_last",
)  # fmt: skip
"""What the pipeline below can do without being told that it is wrong: each is left out once."""

PIPELINE = r"""
// A small attention without softmax: for every item of 64 x 64, out = (A B^T) B with 64 rows of A for each of two
// consumer warpgroups, which take turns at issuing; one producer warpgroup; a ring of two stages; persistent blocks.
struct PipelineArguments { TensorMap a, b, out; int items; int missing; int early_release; int* turns; };

struct PipelineSmem {
  SwizzledTile<fp16, 64, 64> a[2], b[2], out[2];
  uint64 a_full, full[2], empty[2];
};

enum class Step { STEPS };

void pipeline(const void* params) {
  const PipelineArguments& p = *static_cast<const PipelineArguments*>(params);
  PipelineSmem& smem = *reinterpret_cast<PipelineSmem*>(ptx::dynamic_smem());
  const auto has = [&](Step step) { return p.missing != static_cast<int>(step); };
  const auto address = [](uint64& barrier) { return ptx::smem_u32(&barrier); };
  constexpr int kBytes = sizeof smem.b[0];
  if (ptx::thread_index() == 0) {
    ptx::mbarrier_init(address(smem.a_full), 1);
    for (int stage = 0; stage < 2; ++stage) {
      ptx::mbarrier_init(address(smem.full[stage]), 1);
      ptx::mbarrier_init(address(smem.empty[stage]), 2);
    }
    if (has(Step::init_fence)) ptx::fence_mbarrier_init();
  }
  if (has(Step::init_barrier)) ptx::sync_threads();
  const int warpgroup = ptx::warpgroup_index();
  if (warpgroup == 0) {
    if (has(Step::lower) || ptx::warp_index() != 2) ptx::lower_registers<24>();
    if (ptx::warp_index() != 0 || !ptx::elect()) return;
    ptx::mbarrier_arrive_expect_tx(address(smem.a_full), 2 * kBytes);
    for (int w = 0; w < 2; ++w) load_boxes(smem.a[w], p.a, BoxOrigin{w * 64, 0, 0}, address(smem.a_full));
    for (int i = 0, item = ptx::block_index(); item < p.items; item += ptx::num_blocks(), ++i) {
      const int stage = i % 2, phase = i / 2 % 2;
      if (has(Step::wait_empty)) ptx::mbarrier_wait(address(smem.empty[stage]), phase ^ 1);
      if (has(Step::expect)) {
        ptx::mbarrier_arrive_expect_tx(address(smem.full[stage]), kBytes);
      } else {
        ptx::mbarrier_arrive(address(smem.full[stage]));
      }
      if (!has(Step::load) && i == 3) continue;
      load_boxes(smem.b[stage], p.b, BoxOrigin{item * 64, 0, 0}, address(smem.full[stage]));
    }
    return;
  }
  if (has(Step::raise)) {
    ptx::raise_registers<240>();
  } else {
    ptx::raise_registers<248>();
  }
  const int consumer = warpgroup - 1, warp_row = ptx::warp_index() % 4 * 16, out_barrier = 3 + consumer;
  const bool leader = ptx::thread_index() % 128 == 0;
  if (consumer == 1) ptx::arrive_named(1, 256);
  ptx::mbarrier_wait(address(smem.a_full), 0);
  for (int i = 0, item = ptx::block_index(); item < p.items; item += ptx::num_blocks(), ++i) {
    const int stage = i % 2, phase = i / 2 % 2;
    Fragment<16, 64> s, out;
    Operand<16, 64> weights;
    if (has(Step::wait_full)) ptx::mbarrier_wait(address(smem.full[stage]), phase);
    if (has(Step::turn)) ptx::sync_named(1 + consumer, 256);
    if (leader) p.turns[item * 2 + p.turns[p.items * 2]++ % 2] = consumer;
    if (has(Step::wgmma_fence)) ptx::wgmma_fence();
    issue_abt<fp16>(s, smem.a[consumer], smem.b, stage);
    if (has(Step::commit)) ptx::wgmma_commit();
    if (has(Step::pass_turn)) ptx::arrive_named(2 - consumer, 256);
    if (has(Step::wgmma_wait)) ptx::wgmma_wait<0>();
    pack_operand<fp16>(weights, s);
    out.clear();
    ptx::wgmma_fence();
    issue_ab<fp16>(out, weights, smem.b, stage);
    if (has(Step::commit_last)) ptx::wgmma_commit();
    if (p.early_release && leader) ptx::mbarrier_arrive(address(smem.empty[stage]));
    if (has(Step::wgmma_wait_last)) ptx::wgmma_wait<0>();
    if (!p.early_release && has(Step::release) && leader) ptx::mbarrier_arrive(address(smem.empty[stage]));
    if (has(Step::wait_read) && leader) ptx::tma_store_wait_read();
    if (has(Step::barrier_before_out)) ptx::sync_named(out_barrier, 128);
    store_fragment<fp16>(smem.out[consumer], warp_row, 0, ptx::lane_index(), out);
    if (has(Step::proxy_fence) || ptx::thread_index() != 300) ptx::fence_proxy_async();
    if (has(Step::barrier_after_out)) ptx::sync_named(out_barrier, 128);
    if (leader) {
      store_boxes(p.out, BoxOrigin{item * 128 + consumer * 64, 0, 0}, smem.out[consumer]);
      if (has(Step::store_commit)) ptx::tma_store_commit();
    }
  }
  if (has(Step::wait_read_last) && leader) ptx::tma_store_wait_read();
}

EXPORT const char* run_pipeline(const uint64* a, const uint64* b, const uint64* out, int items, int missing,
                                int early_release, int* turns, unsigned seed) {
  const PipelineArguments p{map_of(a), map_of(b), map_of(out), items, missing, early_release, turns};
  return host::launch(pipeline, &p, 2, 384, sizeof(PipelineSmem), seed);
}
""".replace("STEPS", ", ".join(STEPS))

FAULTS = {
    "mbarrier_wait: mbarrier 8192 was not initialised": "ptx::mbarrier_wait(barrier, 1);",
    "mbarrier_init: a count of 0": "ptx::mbarrier_init(barrier, 0);",
    "mbarrier_init at 8196": "ptx::mbarrier_init(barrier + 4, 1);",
    "mbarrier 8192 is initialised twice": "init(1); ptx::sync_threads(); init(1);",
    "mbarrier_arrive: mbarrier 8192 was overwritten": "init(1); if (thread == 0) smem[8195] = 0, arrive();",
    "mbarrier 8192: more than 2 arrivals in one phase": (
        "init(2); if (thread == 0) ptx::mbarrier_arrive_expect_tx(barrier, 8), arrive(), arrive();"
    ),
    "mbarrier_wait: a parity of 2": "init(1); ptx::sync_threads(); ptx::mbarrier_wait(barrier, 2);",
    r"mbarrier 8192: \d+ bytes came that were not announced": "init(1); if (thread == 0) load(0), arrive();",
    r"mbarrier 8192: 1048576 bytes": "init(1); if (thread == 0) ptx::mbarrier_arrive_expect_tx(barrier, 1 << 20);",
    "mbarrier 8192 completed two phases before thread 9, which waits for the first, could see it": (
        "init(1); ptx::sync_threads(); if (thread == 9) ptx::mbarrier_wait(barrier, 0);"
        "if (thread == 40) arrive(), arrive();"
    ),
    r"thread 0 waits at mbarrier_wait \(barrier 8192, parity 0, which lacks 1 of 2 arrivals and 96 bytes\), "
    r"thread 32 at sync_named \(barrier 3, 32 of 96 threads there\), thread 64 at the end of the kernel: deadlock": (
        "init(2); ptx::sync_threads(); if (thread == 70) ptx::mbarrier_arrive_expect_tx(barrier, 96);"
        "if (thread < 32) ptx::mbarrier_wait(barrier, 0); else if (thread < 64) ptx::sync_named(3, 96);"
    ),
    "tma_load: mbarrier 8192 lacks fence_mbarrier_init": ("if (thread == 0) ptx::mbarrier_init(barrier, 1), load(0);"),
    "tma_load: shared 512 is not a multiple of 1024": "init(1); if (thread == 0) load(512);",
    "tma_load of 8192 bytes at 1024: beyond shared memory": "init(1); if (thread == 0) load(1024);",
    "tma_load: the box lies wholly outside the tensor": (
        "init(1); if (thread == 0) ptx::tma_load(0, p.map, 0, 64, 0, 0, barrier);"
    ),
    "tma_store: the box lies wholly outside the tensor": ("if (thread == 0) ptx::tma_store(p.map, 0, 0, -1, 0, 0);"),
    "tma_load by thread 0 to 0, where a tma_load by thread 0 is under way": (
        "init(1); if (thread == 0) for (int i = 0; i < 9; ++i) load(0);"
    ),
    "tma_store: the tensor map is empty": "if (thread == 0) ptx::tma_store(TensorMap{}, 0, 0, 0, 0, 0);",
    "the block ended while a tma_load by thread 0 was under way": (
        "init(1); if (thread == 0) ptx::mbarrier_arrive_expect_tx(barrier, 8192), load(0);"
    ),
    "thread 3 returned before its tma_store had read shared memory": (
        "if (thread == 3) ptx::tma_store(p.map, 0, 0, 0, 0, 0), ptx::tma_store_wait_read();"
    ),
    "named barrier 1: thread [0-9]+ says (64|96) threads, one that came before (96|64)": (
        "ptx::sync_named(1, thread < 32 ? 64 : 96);"
    ),
    "named barrier 16: there are 0 to 15": "ptx::arrive_named(16, 32);",
    "named barrier 2 for 40 threads: not whole warps of this block": "ptx::arrive_named(2, 40);",
    "the lanes of a warp come to named barriers [12] and [12]": "ptx::sync_named(1 + thread % 2, 128);",
    "lower_registers of thread [0-9]+: from 24 to 32": "ptx::lower_registers<24>(); ptx::lower_registers<32>();",
    "the warps of warpgroup 0 have unequal registers": "if (thread < 64) ptx::lower_registers<40>();",
    "bulk_load: mbarrier 8192 lacks fence_mbarrier_init": (
        "if (thread == 0) ptx::mbarrier_init(barrier, 1), ptx::bulk_load(0, &p, 16, barrier);"
    ),
    "bulk_load: shared 8 is not a multiple of 16": (
        "init(1); if (thread == 0) ptx::bulk_load(8, reinterpret_cast<void*>(64), 16, barrier);"
    ),
    "bulk_load of 24 bytes": "init(1); if (thread == 0) ptx::bulk_load(0, &p, 24, barrier);",
    "bulk_load: an address is not a multiple of 16": (
        "init(1); if (thread == 0) ptx::bulk_load(0, reinterpret_cast<void*>(72), 16, barrier);"
    ),
    "bulk_load of 8208 bytes at 16: beyond shared memory": (
        "init(1); if (thread == 0) ptx::bulk_load(16, reinterpret_cast<void*>(64), 8208, barrier);"
    ),
    "bulk_add of 40 bytes": "if (thread == 0) ptx::bulk_add(reinterpret_cast<float*>(64), 0, 40);",
    "bulk_add: an address is not a multiple of 16": (
        "if (thread == 0) ptx::bulk_add(reinterpret_cast<float*>(72), 0, 16);"
    ),
    "bulk_add: shared 8 is not a multiple of 16": (
        "if (thread == 0) ptx::bulk_add(reinterpret_cast<float*>(64), 8, 16);"
    ),
    "thread 7 returned before its tma_store had read shared memory": (
        "alignas(16) static float sums[4]; if (thread == 7) ptx::bulk_add(sums, 0, 16), ptx::tma_store_wait();"
    ),
    "red_add_x4: an address is not a multiple of 16": (
        "float sums[8] = {}; ptx::red_add_x4(sums + (reinterpret_cast<size_t>(sums) % 16 == 0), {1.f, 1.f, 1.f, 1.f}, "
        "true);"
    ),
    "stmatrix: row address 8 is not a multiple of 16": "uint32 r[4] = {}; ptx::stmatrix_x4(8 + lane * 16, r);",
    "wgmma meets bytes at [0-9]+ that lack their writer's fence_proxy_async": (
        "uint32 r[4] = {}; ptx::stmatrix_x4(lane * 16, r); ptx::sync_threads(); multiply(); ptx::wgmma_wait<0>();"
    ),
    "wgmma descriptor 0: not in 128-byte swizzle": (
        "ptx::wgmma_fence(); ptx::wgmma_abt<fp16>(c.x[0], 0, 0, false); ptx::wgmma_commit(); ptx::wgmma_wait<0>();"
    ),
    "wgmma descriptor: no matrix starts at 128": (
        "ptx::wgmma_fence(); const uint64 m = ptx::wgmma_descriptor(128, 0);"
        "ptx::wgmma_abt<fp16>(c.x[0], m, m, false); ptx::wgmma_commit(); ptx::wgmma_wait<0>();"
    ),
    "wgmma beyond shared memory, at 8208": (
        "ptx::wgmma_fence(); const uint64 m = ptx::wgmma_descriptor(1024, 0);"
        "ptx::wgmma_abt<fp16>(c.x[0], m, m, false); ptx::wgmma_commit(); ptx::wgmma_wait<0>();"
    ),
    "an accumulator was written while wgmma was changing it": "multiply(); c.x[0][0][0] = 0; ptx::wgmma_wait<0>();",
    "A's registers were written while wgmma read them": (
        "uint32 a[4] = {}; ptx::wgmma_fence(); ptx::wgmma_ab<fp16>(c.x[0], a, ptx::wgmma_descriptor(0, 0), false);"
        "ptx::wgmma_commit(); a[2] = 1; ptx::wgmma_wait<0>();"
    ),
    "wgmma lacks a wgmma_fence since the last commit or wait": (
        "multiply(); ptx::wgmma_abt<fp16>(c.x[0], 0, 0, true); ptx::wgmma_wait<0>();"
    ),
    "the block ended before wgmma was waited for": "multiply();",
    "the warps of warpgroup 0 issue different wgmma": (
        "ptx::wgmma_fence(); ptx::wgmma_abt<fp16>(c.x[0], ptx::wgmma_descriptor(0, 0),"
        "ptx::wgmma_descriptor(0, 0), thread < 32); ptx::wgmma_commit(); ptx::wgmma_wait<0>();"
    ),
    r"at wgmma_wait \(for its warpgroup's commits\).*: deadlock": (
        "if (thread < 96) { multiply(); ptx::wgmma_wait<0>(); }"
    ),
}
"""By the message, what one block of 128 threads must not do."""

FAULTY = r"""
struct FaultyArguments { TensorMap map; int number; };

void faulty(const void* params) {
  const FaultyArguments& p = *static_cast<const FaultyArguments*>(params);
  char* const smem = ptx::dynamic_smem();
  const int thread = ptx::thread_index(), lane = ptx::lane_index();
  const uint32 barrier = 8192;
  Fragment<16, 64> c;
  const auto init = [&](int count) {
    if (thread == 0) ptx::mbarrier_init(barrier, count), ptx::fence_mbarrier_init();
  };
  const auto arrive = [&] { ptx::mbarrier_arrive(barrier); };
  const auto load = [&](uint32 shared) { ptx::tma_load(shared, p.map, 0, 0, 0, 0, barrier); };
  const auto multiply = [&] {
    const uint64 tile = ptx::wgmma_descriptor(0, 0);
    ptx::wgmma_fence();
    ptx::wgmma_abt<fp16>(c.x[0], tile, tile, false);
    ptx::wgmma_commit();
  };
  switch (p.number) { BODIES }
}

EXPORT const char* run_faulty(const uint64* map, int number, unsigned seed) {
  const FaultyArguments p{map_of(map), number};
  return host::launch(faulty, &p, 1, 128, 8208, seed);
}
""".replace("BODIES", "\n".join(f"case {i}: {{ {body} break; }}" for i, body in enumerate(FAULTS.values())))


@cache
def unit() -> ctypes.CDLL:
    library = build("".join((INCLUDES, COPIES, PRODUCTS, SHARED_PRODUCTS, STORES, PIPELINE, FAULTY)))
    for name in (
        *("load_box", "store_box", "multiply", "multiply_shared", "stored_matrices", "sum_of_bulk"),
        *("run_pipeline", "run_faulty"),
    ):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def pointer(array: np.ndarray) -> c_void_p:
    return c_void_p(array.ctypes.data)


def map_of(array: np.ndarray, box: tuple[int, ...]) -> np.ndarray:
    """The map of an array of up to four dimensions, the last contiguous; ``box`` innermost first, padded with ones."""
    dims, strides = [*array.shape[::-1], 1, 1, 1][:4], [*array.strides[-2::-1], 16, 16, 16][:3]
    return tensor_map(array.ctypes.data, dims, strides, [*box, 1, 1, 1][:4], array.itemsize)


def swizzle(rows: np.ndarray) -> np.ndarray:
    """Rows of 128 bytes, (..., 128) uint8, as they lie in shared memory, and back."""
    units = rows.reshape(-1, 8, 16)
    return np.stack([unit[np.arange(8) ^ row % 8] for row, unit in enumerate(units)]).reshape(rows.shape)


TENSOR = np.random.default_rng(0).integers(1, 2**15, (3, 4, 21, 88), dtype=np.int16)
BOXES = [
    ((0, 0, 0, 0), (64, 8, 1, 1)),
    ((64, 0, 2, 1), (64, 16, 1, 1)),  # 24 columns are left
    ((8, -3, 0, 2), (64, 24, 1, 1)),  # both ends of the rows stick out
    ((-5, 13, -1, 2), (64, 8, 3, 2)),
    ((0, 20, 0, 0), (64, 8, 1, 1)),  # one row inside
    ((-63, 0, 0, 0), (64, 8, 1, 1)),
]


def box_of(tensor: np.ndarray, at: tuple[int, ...], box: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Indices (n, 4), outermost first, of a box's elements, and which of them are inside."""
    ranges = [range(x, x + n) for x, n in zip(at[::-1], box[::-1], strict=True)]
    index = np.array(list(itertools.product(*ranges)))
    return index, ((index >= 0) & (index < tensor.shape)).all(1)


@pytest.mark.parametrize(("at", "box"), BOXES)
@pytest.mark.parametrize("seed", range(3))
def test_loads_are_swizzled_and_filled_with_zeros(at: tuple[int, ...], box: tuple[int, ...], seed: int) -> None:
    index, inside = box_of(TENSOR, at, box)
    expected = np.zeros(len(index), np.int16)
    expected[inside] = TENSOR[tuple(index[inside].T)]
    out = np.zeros(2 * len(index), np.uint8)
    error = unit().load_box(pointer(map_of(TENSOR, box)), (c_int * 4)(*at), len(out), pointer(out), seed)
    assert error is None, error
    np.testing.assert_array_equal(swizzle(out.reshape(-1, 128)).reshape(-1).view(np.int16), expected)


@pytest.mark.parametrize(("at", "box"), BOXES)
@pytest.mark.parametrize("seed", range(3))
def test_stores_are_clipped(at: tuple[int, ...], box: tuple[int, ...], seed: int) -> None:
    surroundings = np.zeros((3, 6, 25, 96), np.int16)
    tensor = surroundings[:, 1:5, 2:23, :88]
    index, inside = box_of(tensor, at, box)
    values = np.arange(1, len(index) + 1, dtype=np.int16)
    expected = np.zeros_like(surroundings)
    expected[:, 1:5, 2:23, :88][tuple(index[inside].T)] = values[inside]
    in_shared = swizzle(values.view(np.uint8).reshape(-1, 128)).reshape(-1)
    error = unit().store_box(
        pointer(map_of(tensor, box)), (c_int * 4)(*at), len(in_shared), pointer(in_shared), c_int(seed)
    )
    assert error is None, error
    np.testing.assert_array_equal(surroundings, expected)


def test_ragged_maps_end_where_sequences_do() -> None:
    """A map that starts before its array: two dimensions step along the packed rows, and one of them says where."""
    total, heads, starts = 50, 2, (0, 7, 7, 40, 50)
    packed = np.random.default_rng(1).integers(1, 2**15, (total, heads, 64), dtype=np.int16)
    stored = np.zeros_like(packed)
    row, head, _ = packed.strides
    load_map, store_map = (
        tensor_map(x.ctypes.data - total * row, (64, total, total + 1, heads), (row, row, head), (64, 16, 1, 1), 2)
        for x in (packed, stored)
    )
    for (start, end), first in itertools.product(itertools.pairwise(starts), (0, 3, 16)):
        if start + first >= end:  # a box wholly outside is a fault
            continue
        rows = packed[start:end, 1][first : first + 16]
        expected = np.zeros((16, 64), np.int16)
        expected[: len(rows)] = rows
        at = (c_int * 4)(0, total - (end - start) + first, end, 1)
        out = np.zeros((16, 128), np.uint8)
        assert unit().load_box(pointer(load_map), at, out.size, pointer(out), 1) is None
        np.testing.assert_array_equal(swizzle(out).view(np.int16), expected)
        stored[...] = 0
        assert unit().store_box(pointer(store_map), at, out.size, pointer(out), 1) is None
        np.testing.assert_array_equal(stored[start:end, 1][first : first + 16], rows)
        assert np.count_nonzero(stored) == rows.size, "wrote into another sequence"


@pytest.mark.parametrize("n", [16, 64, 80, 128, 176, 256])
@pytest.mark.parametrize("transposed", [True, False], ids=["abt", "ab"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["fp16", "bf16"])
def test_products(dtype: type, transposed: bool, n: int) -> None:
    rng = np.random.default_rng(n)
    a = rng.standard_normal((64, 128 if transposed else 48)).astype(dtype)
    b = rng.standard_normal((n, 128) if transposed else (48, n)).astype(dtype)
    exact = a.astype(np.float64) @ (b.T if transposed else 2 * b).astype(np.float64)
    c = np.full((64, n), np.nan, np.float32)
    maps = [map_of(x, (64, len(x))) for x in (a, b)]
    for seed in range(4):
        c[...] = np.nan
        error = unit().multiply(dtype is np.float16, transposed, n, *map(pointer, maps), pointer(a), pointer(c), seed)
        assert error is None, error
        np.testing.assert_allclose(c, exact, rtol=0, atol=1e-6 * np.abs(exact).max() * 16)


@pytest.mark.parametrize("n", [16, 64, 80, 128])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("transposed", [True, False], ids=["atbt", "ab"])
def test_products_of_operands_in_shared_memory(transposed: bool, dtype: type, n: int) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.standard_normal((64, 64)).astype(dtype), rng.standard_normal((64, n)).astype(dtype)
    exact = 2 * a.astype(np.float64) @ b.astype(np.float64)
    in_rows = [x.T.copy() if transposed else x for x in (a, b)]
    maps = [map_of(x, (64, len(x))) for x in in_rows]
    for seed in range(4):
        c = np.full((64, n), np.nan, np.float32)
        error = unit().multiply_shared(dtype is np.float16, transposed, n, *map(pointer, maps), pointer(c), seed)
        assert error is None, error
        np.testing.assert_allclose(c, exact, rtol=0, atol=1e-6 * np.abs(exact).max() * 16)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_stored_as_they_are_or_transposed(transposed: bool) -> None:
    stored, conflicts = np.full((16, 16), 2**16 - 1, np.uint16), c_int()
    assert unit().stored_matrices(transposed, pointer(stored), ctypes.byref(conflicts)) is None
    expected = np.arange(256).reshape(16, 16)
    np.testing.assert_array_equal(stored, expected.T if transposed else expected)
    assert conflicts.value == 0


@pytest.mark.parametrize("count", [4, 252, 256, 1000])
@pytest.mark.parametrize("in_bulk", [False, True], ids=["four", "bulk"])
def test_bulk_loads_and_sums(in_bulk: bool, count: int) -> None:
    rng = np.random.default_rng(count)
    memory = rng.integers(-99, 99, 2 * count + 8).astype(np.float32)  # every sum is exact
    start = -memory.ctypes.data // 4 % 4  # floats to a multiple of 16 bytes
    values, sums = memory[start : start + count], memory[start + count : start + 2 * count]
    expected = memory.copy()
    expected[start + count : start + 2 * count] += 2 * values  # by each of two blocks
    for seed in range(4):
        before = sums.copy()
        assert unit().sum_of_bulk(pointer(values), count, in_bulk, pointer(sums), seed) is None
        np.testing.assert_array_equal(memory, expected)
        sums[...] = before


ITEMS = 9


@cache
def pipeline_data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A, all B and the expected output; every sum is exact in fp16."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-1, 2, (n * 64, 64)).astype(np.float16) for n in (2, ITEMS))
    tiles = b.astype(np.float64).reshape(ITEMS, 64, 64)
    return a, b, (a.astype(np.float64) @ tiles.transpose(0, 2, 1) @ tiles).reshape(ITEMS * 128, 64)


def pipeline(seed: int, missing: str | None = None, early_release: bool = False) -> str | None:
    """Run the pipeline; what it was found to lack: a message, or "wrong" where its output or its turns are."""
    a, b, expected = pipeline_data()
    out = np.full(expected.shape, np.nan, np.float16)
    turns = np.zeros(ITEMS * 2 + 1, np.int32)
    maps = [map_of(x, (64, 64)) for x in (a, b, out)]
    step = -1 if missing is None else STEPS.index(missing)
    error = unit().run_pipeline(*map(pointer, maps), ITEMS, step, early_release, pointer(turns), seed)
    if error is not None:
        return error.decode()
    right = np.array_equal(out, expected) and turns[:-1].tolist() == [0, 1] * ITEMS
    return None if right else "wrong"


def symptom(missing: str | None = None, early_release: bool = False) -> str | None:
    """What gives the fault away first, over some seeds."""
    return next(filter(None, (pipeline(seed, missing, early_release) for seed in range(60))), None)


def test_a_pipeline_runs() -> None:
    for seed in range(40):
        assert pipeline(seed) is None


SYMPTOMS = {
    "init_fence": "lacks fence_mbarrier_init",
    "init_barrier": "was not initialised",
    "lower": "unequal registers|raise_registers.*: deadlock",
    "raise": "raise_registers.*: deadlock",
    "expect": "bytes came that were not announced",
    "load": "mbarrier_wait .* which lacks 0 of 1 arrivals and 8192 bytes.*: deadlock",
    "wgmma_fence": "lacks a wgmma_fence",
    "pass_turn": "sync_named .*: deadlock",
    "release": "mbarrier_wait .* which lacks 2 of 2 arrivals.*: deadlock",
    "proxy_fence": "tma_store meets bytes at .* that lack their writer's fence_proxy_async",
    "wait_read_last": "returned before its tma_store had read",
    "store_commit": "returned before its tma_store had read",
}


@pytest.mark.parametrize("missing", STEPS)
def test_no_step_of_the_pipeline_can_be_left_out(missing: str) -> None:
    sign = symptom(missing)
    assert sign is not None and re.search(SYMPTOMS.get(missing, ""), sign), sign


def test_a_buffer_that_is_given_back_too_early() -> None:
    assert symptom(early_release=True) is not None


@pytest.mark.parametrize("message", FAULTS)
def test_faults_end_the_launch_with_a_message(message: str) -> None:
    tensor = np.ones((64, 64), np.float16)
    map_words = map_of(tensor, (64, 64))
    number = list(FAULTS).index(message)
    errors = [unit().run_faulty(pointer(map_words), number, seed) for seed in range(20)]
    assert any(error is not None and re.search(message, error.decode()) for error in errors), errors
