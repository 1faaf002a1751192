// stmatrix: ldmatrix the other way, four 8x8 matrices of 16-bit elements from registers into shared memory.
#pragma once

#include "std.cuh"

namespace cuflash::ptx {

// Lane l gives the address of row l % 8 of matrix l / 8; register i holds matrix i: lane l its elements (row l / 4,
// columns 2 * (l % 4) and + 1). Needs sm_90.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-stmatrix
CF_DEVICE void stmatrix_x4(uint32 shared, const uint32 (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(shared), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

// The same of transposed matrices: lane l's part of register i are rows 2 * (l % 4) and + 1 of column l / 4.
CF_DEVICE void stmatrix_x4_trans(uint32 shared, const uint32 (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(shared), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

}  // namespace cuflash::ptx
