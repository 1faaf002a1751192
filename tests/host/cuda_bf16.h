// What the kernels use of CUDA's header of this name: bfloat16, the upper half of a float.
#pragma once

#include <string.h>

struct __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x);
};

inline float __bfloat162float(__nv_bfloat16 b) {
  const unsigned bits = static_cast<unsigned>(b.bits) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// To nearest, ties to even.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  __nv_bfloat16 b;
  b.bits = x != x ? 0x7fff : static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
  return b;
}

inline __nv_bfloat16::__nv_bfloat16(float x) : __nv_bfloat16(__float2bfloat16_rn(x)) {}
