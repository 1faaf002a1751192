// Element types and how they meet their accumulator: fp16, bf16 and float sum in float, double in double.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "std.cuh"

namespace cuflash {

using fp16 = __half;
using bf16 = __nv_bfloat16;

template <class Element>
struct AccumulatorOf { using Type = float; };
template <>
struct AccumulatorOf<double> { using Type = double; };

template <class Element>
using Accumulator = typename AccumulatorOf<Element>::Type;

CF_DEVICE float to_accumulator(fp16 x) { return __half2float(x); }
CF_DEVICE float to_accumulator(bf16 x) { return __bfloat162float(x); }
CF_DEVICE float to_accumulator(float x) { return x; }
CF_DEVICE double to_accumulator(double x) { return x; }

template <class Element>
CF_DEVICE Element from_accumulator(Accumulator<Element> x) { return static_cast<Element>(x); }
template <>
CF_DEVICE fp16 from_accumulator<fp16>(float x) { return __float2half_rn(x); }
template <>
CF_DEVICE bf16 from_accumulator<bf16>(float x) { return __float2bfloat16_rn(x); }

}  // namespace cuflash
