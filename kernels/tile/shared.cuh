// Tiles of 16-bit elements in shared memory.
#pragma once

#include "element.cuh"
#include "ptx/memory.cuh"

namespace cuflash {

// kRows rows of kCols elements. Eight elements of padding make the pitch an odd number of 16-byte units, so the eight
// rows that one ldmatrix phase reads lie in different banks, and addresses stay linear: a k-step is an immediate.
template <class Element, int kRows_, int kCols_>
struct SharedTile {
  static_assert(sizeof(Element) == 2 && kCols_ % 16 == 0);
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kPitch = kCols + 8;

  Element data[kRows * kPitch];

  CF_DEVICE Element* at(int row, int col) { return data + row * kPitch + col; }
  CF_DEVICE uint32 address(int row, int col) { return ptx::smem_u32(at(row, col)); }
};

}  // namespace cuflash
