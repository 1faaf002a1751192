// What the kernels use of CUDA's header of this name: half precision, and the vector types.
#pragma once

#include <string.h>

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

struct __half {
  unsigned short bits;
  __half() = default;
  explicit __half(float x);
};

inline float __half2float(__half h) {
  const unsigned sign = (h.bits & 0x8000u) << 16, exponent = h.bits >> 10 & 31, mantissa = h.bits & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = mantissa * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const unsigned bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// To nearest, ties to even.
inline __half __float2half_rn(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  const unsigned short sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  __half h;
  if (bits > 0x7f800000u) {
    h.bits = 0x7fff;
  } else if (bits >= 0x477ff000u) {  // rounds to 65536 or more
    h.bits = sign | 0x7c00;
  } else if (bits < 0x38800000u) {  // subnormal: adding 0.5 lines the mantissa up with units of 2^-24
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, 4);
    h.bits = sign | static_cast<unsigned short>(bits - 0x3f000000u);
  } else {
    bits += 0xfffu + (bits >> 13 & 1);
    h.bits = sign | static_cast<unsigned short>((bits >> 13) - (112u << 10));
  }
  return h;
}

inline __half::__half(float x) : __half(__float2half_rn(x)) {}
