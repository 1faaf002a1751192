// ldmatrix: four 8x8 matrices of 16-bit elements from shared memory into the registers mma.sync wants.
#pragma once

#include "std.cuh"

namespace cuflash::ptx {

// Lane l gives the address of row l % 8 of matrix l / 8; register i receives matrix i: lane l holds elements
// (row l / 4, columns 2 * (l % 4) and + 1).
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-ldmatrix
CF_DEVICE void ldmatrix_x4(uint32 (&r)[4], uint32 shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared) : "memory");
}

// The same with every 8x8 matrix transposed on the way.
CF_DEVICE void ldmatrix_x4_trans(uint32 (&r)[4], uint32 shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared) : "memory");
}

}  // namespace cuflash::ptx
