#include "ptx/mma.cuh"

namespace cuflash::ptx {

template <class Element>
const float* floats() {
  static float of[65536];
  static const bool made = [] {
    for (uint32 bits = 0; bits < 65536; ++bits) {
      Element element;
      const unsigned short narrow = static_cast<unsigned short>(bits);
      memcpy(&element, &narrow, 2);
      of[bits] = to_accumulator(element);
    }
    return true;
  }();
  (void)made;
  return of;
}
template const float* floats<fp16>();
template const float* floats<bf16>();

template <class Element>
void Mma<Element>::run(void* const* lanes) {
  float a[16][16], b[16][8], c[16][8];
  const float* of = floats<Element>();
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& mine = *static_cast<const Mma*>(lanes[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 8; ++i) {  // a0 .. a7
      const int row = group + (i / 2 % 2 ? 8 : 0), col = pair + i % 2 + (i < 4 ? 0 : 8);
      a[row][col] = of[mine.a[i / 2] >> (i % 2 * 16) & 0xffff];
    }
    for (int i = 0; i < 4; ++i) {  // b0 .. b3
      const int row = pair + i % 2 + (i < 2 ? 0 : 8);
      b[row][group] = of[(i < 2 ? mine.b0 : mine.b1) >> (i % 2 * 16) & 0xffff];
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
template struct Mma<fp16>;
template struct Mma<bf16>;

void MmaDouble::run(void* const* lanes) {
  double a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaDouble& mine = *static_cast<const MmaDouble*>(lanes[lane]);
    const int group = lane / 4, of_four = lane % 4;
    for (int i = 0; i < 8; ++i) a[group + (i % 2 ? 8 : 0)][of_four + i / 2 * 4] = mine.a[i];
    for (int i = 0; i < 4; ++i) b[of_four + i * 4][group] = mine.b[i];
    for (int i = 0; i < 4; ++i) c[group + (i < 2 ? 0 : 8)][of_four * 2 + i % 2] = mine.c[i];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int col = 0; col < 8; ++col) c[row][col] = std::fma(a[row][k], b[k][col], c[row][col]);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const MmaDouble& mine = *static_cast<const MmaDouble*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) mine.c[i] = c[lane / 4 + (i < 2 ? 0 : 8)][lane % 4 * 2 + i % 2];
  }
}

}  // namespace cuflash::ptx
