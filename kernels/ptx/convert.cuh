// Conversions between float and the bits of 16-bit floating point, to nearest, ties to even.
#pragma once

#include "std.cuh"

namespace cuflash::ptx {

// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cvt
CF_DEVICE float float_of_fp16(uint16 bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
CF_DEVICE uint16 fp16_of(float x) {
  uint16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

CF_DEVICE float float_of(uint32 bits) { return __uint_as_float(bits); }
CF_DEVICE double double_of(uint64 bits) { return __longlong_as_double(static_cast<int64>(bits)); }
CF_DEVICE uint32 bits_of(float x) { return __float_as_uint(x); }
CF_DEVICE uint64 bits_of(double x) { return static_cast<uint64>(__double_as_longlong(x)); }

// bfloat16 is the upper half of a float. There is an instruction from sm_80 on, but this suits all.
CF_DEVICE float float_of_bf16(uint16 bits) { return float_of(uint32(bits) << 16); }
CF_DEVICE uint16 bf16_of(float x) {
  const uint32 bits = __float_as_uint(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

}  // namespace cuflash::ptx
