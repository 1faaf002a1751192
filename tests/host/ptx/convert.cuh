// The host twin of kernels/ptx/convert.cuh.
#pragma once

#include <string.h>

#include "std.cuh"

namespace cuflash::ptx {

inline float float_of(uint32 bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32 bits_of(float x) {
  uint32 bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline double double_of(uint64 bits) {
  double x;
  memcpy(&x, &bits, 8);
  return x;
}
inline uint64 bits_of(double x) {
  uint64 bits;
  memcpy(&bits, &x, 8);
  return bits;
}

inline float float_of_fp16(uint16 half) {
  const uint32 sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, mantissa = half & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = mantissa * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return float_of(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13);
}

inline uint16 fp16_of(float x) {
  uint32 bits = bits_of(x);
  const uint16 sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return 0x7fff;
  if (bits >= 0x477ff000u) return sign | 0x7c00;  // rounds to 65536 or more
  if (bits < 0x38800000u) {                       // subnormal: adding 0.5 lines the mantissa up with units of 2^-24
    return sign | static_cast<uint16>(bits_of(float_of(bits) + 0.5f) - 0x3f000000u);
  }
  bits += 0xfffu + (bits >> 13 & 1);
  return sign | static_cast<uint16>((bits >> 13) - (112u << 10));
}

inline float float_of_bf16(uint16 bits) { return float_of(static_cast<uint32>(bits) << 16); }

inline uint16 bf16_of(float x) {
  const uint32 bits = bits_of(x);
  return x != x ? 0x7fff : static_cast<uint16>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

}  // namespace cuflash::ptx
