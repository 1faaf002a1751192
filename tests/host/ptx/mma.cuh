// The host twin of kernels/ptx/mma.cuh: products and sums in float or double, elements where the PTX manual's figures put them.
#pragma once

#include "block.hpp"
#include "element.cuh"

namespace cuflash::ptx {

// Every 16-bit element as a float, by its bits.
template <class Element>
const float* floats();
extern template const float* floats<fp16>();
extern template const float* floats<bf16>();

template <class Element>
struct Mma {
  float* c;
  const uint32* a;
  uint32 b0, b1;

  static void run(void* const* lanes);
  static constexpr host::Instruction kInstruction{"mma_m16n8k16", run};
};

extern template struct Mma<fp16>;
extern template struct Mma<bf16>;

template <class Element>
void mma_m16n8k16(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
  Mma<Element> operands{c, a, b0, b1};
  host::execute(Mma<Element>::kInstruction, &operands);
}

struct MmaDouble {
  double* c;
  const double *a, *b;

  static void run(void* const* lanes);
  static constexpr host::Instruction kInstruction{"mma_m16n8k16 of doubles", run};
};

inline void mma_m16n8k16(double (&c)[4], const double (&a)[8], const double (&b)[4]) {
  MmaDouble operands{c, a, b};
  host::execute(MmaDouble::kInstruction, &operands);
}

template <class Element>
uint32 pack(float low, float high) {
  const Element elements[2] = {from_accumulator<Element>(low), from_accumulator<Element>(high)};
  uint32 packed;
  memcpy(&packed, elements, 4);
  return packed;
}

inline void unpack(uint32 packed, float& low, float& high) {
  low = floats<fp16>()[packed & 0xffff];
  high = floats<fp16>()[packed >> 16];
}

}  // namespace cuflash::ptx
