// The host twin of kernels/ptx/mma.cuh: products and sums in float, elements where the PTX manual's figures put them.
#pragma once

#include "block.hpp"
#include "element.cuh"

namespace cuflash::ptx {

// Every 16-bit element as a float.
template <class Element>
struct Floats {
  float of[65536];
  Floats() {
    for (uint32 bits = 0; bits < 65536; ++bits) {
      Element element;
      const unsigned short narrow = static_cast<unsigned short>(bits);
      memcpy(&element, &narrow, 2);
      of[bits] = to_accumulator(element);
    }
  }
};
template <class Element>
inline const Floats<Element> kFloats;

template <class Element>
struct Mma {
  float* c;
  const uint32* a;
  uint32 b0, b1;

  static void run(void* const* lanes) {
    float a[16][16], b[16][8], c[16][8];
    const float* floats = kFloats<Element>.of;
    for (int lane = 0; lane < 32; ++lane) {
      const Mma& mine = *static_cast<const Mma*>(lanes[lane]);
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int i = 0; i < 8; ++i) {  // a0 .. a7
        const int row = group + (i / 2 % 2 ? 8 : 0), col = pair + i % 2 + (i < 4 ? 0 : 8);
        a[row][col] = floats[mine.a[i / 2] >> (i % 2 * 16) & 0xffff];
      }
      for (int i = 0; i < 4; ++i) {  // b0 .. b3
        const int row = pair + i % 2 + (i < 2 ? 0 : 8);
        b[row][group] = floats[(i < 2 ? mine.b0 : mine.b1) >> (i % 2 * 16) & 0xffff];
      }
      for (int i = 0; i < 4; ++i) c[group + (i < 2 ? 0 : 8)][pair + i % 2] = mine.c[i];
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {
        for (int col = 0; col < 8; ++col) c[row][col] += a[row][k] * b[k][col];
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const Mma& mine = *static_cast<const Mma*>(lanes[lane]);
      for (int i = 0; i < 4; ++i) mine.c[i] = c[lane / 4 + (i < 2 ? 0 : 8)][lane % 4 * 2 + i % 2];
    }
  }
  static constexpr host::Instruction kInstruction{"mma_m16n8k16", run};
};

template <class Element>
void mma_m16n8k16(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
  Mma<Element> operands{c, a, b0, b1};
  host::execute(Mma<Element>::kInstruction, &operands);
}

template <class Element>
uint32 pack(float low, float high) {
  const Element elements[2] = {from_accumulator<Element>(low), from_accumulator<Element>(high)};
  uint32 packed;
  memcpy(&packed, elements, 4);
  return packed;
}

}  // namespace cuflash::ptx
