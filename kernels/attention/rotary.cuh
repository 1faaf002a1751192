// Rotary: what position does to queries and keys (Su et al. 2021, arXiv 2104.09864). The first kDim columns are pairs,
// each turned in its plane by an angle of the position; the others stay as they are.
//
//   column    0   1   2   3   4   5   6   7
//   Halves    a0  b0' a1  ...              pair i is columns i and i + kDim / 2, as GPT-NeoX has it
//   Pairs     a0  b0  a1  b1               pair i is columns 2 i and 2 i + 1, as GPT-J has it
//
// A pair (a, b) becomes (a cos - b sin, a sin + b cos).
#pragma once

#include "element.cuh"

namespace cuflash {

struct NoRotary {
  static constexpr int kDim = 0;
  using Angle = float;

  CF_DEVICE static int pair_of(int col) { return col; }
  CF_DEVICE static int partner_of(int col) { return col; }
  CF_DEVICE static bool is_second(int) { return false; }
};

// Cosines and sines are numbers of type `Angle_`.
template <class Angle_, int kDim_>
struct Halves {
  static constexpr int kDim = kDim_;
  using Angle = Angle_;

  CF_DEVICE static int pair_of(int col) { return col % (kDim / 2); }
  CF_DEVICE static int partner_of(int col) { return col < kDim / 2 ? col + kDim / 2 : col - kDim / 2; }
  CF_DEVICE static bool is_second(int col) { return col >= kDim / 2; }
};

template <class Angle_, int kDim_>
struct Pairs {
  static constexpr int kDim = kDim_;
  using Angle = Angle_;

  CF_DEVICE static int pair_of(int col) { return col / 2; }
  CF_DEVICE static int partner_of(int col) { return col ^ 1; }
  CF_DEVICE static bool is_second(int col) { return col % 2 == 1; }
};

}  // namespace cuflash
