// Element types and how they meet their accumulator: fp16, bf16 and float sum in float, double in double.
#pragma once

#include "ptx/convert.cuh"
#include "std.cuh"

namespace cuflash {

// Structs of our own, as the compiler takes longer over CUDA's headers of them than over any of ours.
struct fp16 {
  uint16 bits;
  fp16() = default;
  CF_DEVICE explicit fp16(float x) : bits(ptx::fp16_of(x)) {}
};
struct bf16 {
  uint16 bits;
  bf16() = default;
  CF_DEVICE explicit bf16(float x) : bits(ptx::bf16_of(x)) {}
};

template <class Element>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};

template <class Element>
using Accumulator = typename AccumulatorOf<Element>::Type;

CF_DEVICE float to_accumulator(fp16 x) { return ptx::float_of_fp16(x.bits); }
CF_DEVICE float to_accumulator(bf16 x) { return ptx::float_of_bf16(x.bits); }
CF_DEVICE float to_accumulator(float x) { return x; }
CF_DEVICE double to_accumulator(double x) { return x; }

template <class Element>
CF_DEVICE Element from_accumulator(Accumulator<Element> x) {
  return static_cast<Element>(x);
}

}  // namespace cuflash
