// The host twin of kernels/ptx/stmatrix.cuh. Counts bank conflicts, and notes what lacks a fence, on the way.
#pragma once

#include "async_proxy.hpp"
#include "block.hpp"
#include "std.cuh"

namespace cuflash::ptx {

struct Stmatrix {
  const uint32* r;
  uint32 shared;

  template <bool kTransposed>
  static void run(void* const* lanes) {
    const auto at = [&](int lane) -> const Stmatrix& { return *static_cast<const Stmatrix*>(lanes[lane]); };
    for (int matrix = 0; matrix < 4; ++matrix) {
      int writes_of_bank[8] = {};  // groups of four banks: one row is 16 bytes
      for (int row = 0; row < 8; ++row) {
        const uint32 address = at(matrix * 8 + row).shared;
        if (address % 16 != 0) host::fail("stmatrix: row address %u is not a multiple of 16", address);
        if (int64(address) + 16 > host::block.smem_bytes) host::fail("stmatrix beyond shared memory");
        for (int col = 0; col < 8; ++col) {
          const int holder = kTransposed ? col * 4 + row / 2 : row * 4 + col / 2;
          const int half = (kTransposed ? row : col) % 2;
          const uint16 element = static_cast<uint16>(at(holder).r[matrix] >> half * 16);
          memcpy(host::block.smem + address + col * 2, &element, 2);
          host::async_proxy.note_write(host::executing_warp() * 32 + holder, address);
        }
        host::block.bank_conflicts += writes_of_bank[address / 16 % 8]++ > 0;
      }
    }
  }
};

inline constexpr host::Instruction kStmatrix{"stmatrix_x4", Stmatrix::run<false>};
inline constexpr host::Instruction kStmatrixTrans{"stmatrix_x4_trans", Stmatrix::run<true>};

inline void stmatrix_x4(uint32 shared, const uint32 (&r)[4]) {
  Stmatrix operands{r, shared};
  host::execute(kStmatrix, &operands);
}

inline void stmatrix_x4_trans(uint32 shared, const uint32 (&r)[4]) {
  Stmatrix operands{r, shared};
  host::execute(kStmatrixTrans, &operands);
}

}  // namespace cuflash::ptx
