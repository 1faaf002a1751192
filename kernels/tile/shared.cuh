// Tiles in shared memory.
#pragma once

#include "element.cuh"
#include "ptx/memory.cuh"

namespace cuflash {

// kRows rows of kCols elements. Eight elements of padding make the pitch of 16-bit ones an odd number of 16-byte units,
// so the eight rows that one ldmatrix phase reads lie in different banks, and addresses stay linear: a k-step is an
// immediate.
template <class Element, int kRows_, int kCols_>
struct SharedTile {
  static_assert(kCols_ % 16 == 0);
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kPitch = kCols + 8;

  Element data[kRows * kPitch];

  CF_DEVICE Element* at(int row, int col) { return data + row * kPitch + col; }
  CF_DEVICE uint32 address(int row, int col) { return ptx::smem_u32(at(row, col)); }
};

// kRows rows of kCols elements as TMA writes and wgmma reads them: chunks of 128 bytes of columns one after the other,
// and in every row the 16-byte units permuted by the row's number, so that eight rows of one column lie in different
// banks. The last chunk may be wider than kCols.
template <class Element, int kRows_, int kCols_>
struct alignas(1024) SwizzledTile {
  static_assert(kRows_ % 8 == 0 && kCols_ % 16 == 0);
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kUnit = 16 / sizeof(Element), kChunkCols = 8 * kUnit, kRowBytes = 128;
  static constexpr int kChunks = cdiv(kCols, kChunkCols), kChunkBytes = kRows * kRowBytes;

  Element data[kChunks * kRows * kChunkCols];

  CF_DEVICE uint32 base() { return ptx::smem_u32(data); }

  // Bytes from the base to where the matrix of rows from `row` on, or of columns from `col` on, begins for wgmma, which
  // permutes by address; col is a multiple of what a product takes.
  CF_DEVICE static constexpr int bytes_to_row(int row) { return row * kRowBytes; }
  CF_DEVICE static constexpr int bytes_to_col(int col) {
    return col / kChunkCols * kChunkBytes + col % kChunkCols * int(sizeof(Element));
  }

  CF_DEVICE uint32 address(int row, int col) { return behind(base(), row, col); }
  CF_DEVICE Element* at(int row, int col) {
    return reinterpret_cast<Element*>(reinterpret_cast<char*>(data) + behind(0, row, col));
  }

 private:
  CF_DEVICE static uint32 behind(uint32 start, int row, int col) {
    return start + col / kChunkCols * kChunkBytes + row * kRowBytes + (col % kChunkCols / kUnit ^ row % 8) * 16 +
           col % kUnit * sizeof(Element);
  }
};

}  // namespace cuflash
