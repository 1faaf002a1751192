// The host twin of kernels/ptx/tma.cuh: a copy happens at any time after its start, in any order, the destination being
// NaN until then. Stores happen at the latest when their thread waits for them, were it for their reading alone.
//
// The words of a TensorMap are what the driver was told: address, 5 dims, 4 strides in bytes (of dims 1 to 4), 5 sizes
// of a box, bytes of an element; a tensor of four has one element along the last, with a stride of 0. Boxes are in 128-byte swizzle, rows of 128 bytes.
#pragma once

#include "params.cuh"
#include "std.cuh"

namespace cuflash::ptx {

void tma_load(uint32 shared, const TensorMap& map, int x0, int x1, int x2, int x3, uint32 barrier);
void tma_load_by(uint64, uint32 shared, const TensorMap& map, int x0, int x1, int x2, int x3, uint32 barrier);
void tma_load(uint32 shared, const TensorMap& map, int x0, int x1, int x2, int x3, int x4, uint32 barrier);
void tma_load_by(uint64, uint32 shared, const TensorMap& map, int x0, int x1, int x2, int x3, int x4, uint32 barrier);
void bulk_load(uint32 shared, const void* global, int bytes, uint32 barrier);
void bulk_add(float* global, uint32 shared, int bytes);
void tma_store(const TensorMap& map, int x0, int x1, int x2, int x3, uint32 shared);
void tma_store_commit();
void tma_store_wait_read();
void tma_store_wait();
void fence_proxy_async();

}  // namespace cuflash::ptx
