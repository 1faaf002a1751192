// The host twin of kernels/ptx/ldmatrix.cuh. Counts bank conflicts on the way.
#pragma once

#include "block.hpp"
#include "std.cuh"

namespace cuflash::ptx {

struct Ldmatrix {
  uint32* r;
  uint32 shared;

  template <bool kTranspose>
  static void run(void* const* lanes) {
    const auto at = [&](int lane) -> Ldmatrix& { return *static_cast<Ldmatrix*>(lanes[lane]); };
    for (int matrix = 0; matrix < 4; ++matrix) {
      unsigned short element[8][8];
      int64 read_of_bank[8];  // groups of four banks, one row being 16 bytes: what was read last, here -1 for nothing
      for (int64& address : read_of_bank) address = -1;
      for (int row = 0; row < 8; ++row) {
        const uint32 address = at(matrix * 8 + row).shared;
        if (address % 16 != 0) host::fail("ldmatrix: row address %u is not a multiple of 16", address);
        if (static_cast<int>(address) + 16 > host::block.smem_bytes) host::fail("ldmatrix beyond shared memory");
        memcpy(element[row], host::block.smem + address, 16);
        int64& before = read_of_bank[address / 16 % 8];  // one read serves all that want the same bytes
        host::block.bank_conflicts += before != -1 && before != address;
        before = address;
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int row = lane / 4, col = lane % 4 * 2;
        const unsigned short low = kTranspose ? element[col][row] : element[row][col];
        const unsigned short high = kTranspose ? element[col + 1][row] : element[row][col + 1];
        at(lane).r[matrix] = low | static_cast<uint32>(high) << 16;
      }
    }
  }
};

inline constexpr host::Instruction kLdmatrix{"ldmatrix_x4", Ldmatrix::run<false>};
inline constexpr host::Instruction kLdmatrixTrans{"ldmatrix_x4_trans", Ldmatrix::run<true>};

inline void ldmatrix_x4(uint32 (&r)[4], uint32 shared) {
  Ldmatrix operands{r, shared};
  host::execute(kLdmatrix, &operands);
}

inline void ldmatrix_x4_trans(uint32 (&r)[4], uint32 shared) {
  Ldmatrix operands{r, shared};
  host::execute(kLdmatrixTrans, &operands);
}

}  // namespace cuflash::ptx
