// wgmma: the tensor-core product of a warpgroup, C (64 x kN, float) += A (64 x kWgmmaDepth) B, asynchronous.
//
// Registers hold C as the 16-row accumulators of four warps one below the other, blocks of 8 columns side by side
// (tile/fragment.cuh). Operands in shared memory lie in swizzled rows of 128 bytes (tile/shared.cuh) and are named by
// 64-bit descriptors. A product may read its operands, and its C is not the program's, until wgmma_wait has returned
// for its group.
#pragma once

#include "element.cuh"

namespace cuflash::ptx {

// Columns of A, and rows of B, that a product takes: as many as 32 bytes have elements.
template <class Element>
constexpr int kWgmmaDepth = 32 / sizeof(Element);

// Orders this warpgroup's register accesses before its next products.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions-wgmma-fence
CF_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of products since the last commit.
CF_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending groups are still running.
template <int kPending>
CF_DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory"); }

// Ties an accumulator's registers to this point of the program: the compiler, which takes a product to be done once it
// is issued, would otherwise move reads of the result before the wait, or writes of the operands after the issue.
template <int kBlocks>
CF_DEVICE void wgmma_hold(float (&c)[kBlocks][4]) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[n][i])::"memory");
  }
}

// Names a matrix in shared memory in 128-byte swizzle: address, bytes from one 64-column chunk to the next (for a
// matrix that is contiguous along M or N), bytes from one group of eight rows to the next, layout 1.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-shared-memory-layout-matrix-descriptor
CF_DEVICE uint64 wgmma_descriptor(uint32 shared, int chunk_bytes) {
  constexpr uint64 kGroupBytes = 8 * 128, kSwizzle128 = uint64(1) << 62;
  return (shared & 0x3ffff) >> 4 | uint64(chunk_bytes >> 4) << 16 | (kGroupBytes >> 4) << 32 | kSwizzle128;
}

// Descriptor of the matrix that starts `bytes` later.
CF_DEVICE uint64 advance_descriptor(uint64 descriptor, int bytes) { return descriptor + (bytes >> 4); }

// C += A B, or C = A B where `accumulate` is false. A is in registers or, as B is, in shared memory. A name says what
// lies there in rows: of `wgmma_abt` A and B^T, both contiguous along K; of `wgmma_ab` A and B, which is contiguous
// along N; of `wgmma_atbt` A^T, contiguous along M, and B^T.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions-wgmma-mma-async
template <class Element, int kN>
struct Wgmma;

template <class Element, int kBlocks>
CF_DEVICE void wgmma_abt(float (&c)[kBlocks][4], uint64 a, uint64 b, bool accumulate) {
  Wgmma<Element, kBlocks * 8>::template shared<0, 0>(c, a, b, accumulate);
}
template <class Element, int kBlocks>
CF_DEVICE void wgmma_ab(float (&c)[kBlocks][4], uint64 a, uint64 b, bool accumulate) {
  Wgmma<Element, kBlocks * 8>::template shared<0, 1>(c, a, b, accumulate);
}
template <class Element, int kBlocks>
CF_DEVICE void wgmma_atbt(float (&c)[kBlocks][4], uint64 a, uint64 b, bool accumulate) {
  Wgmma<Element, kBlocks * 8>::template shared<1, 0>(c, a, b, accumulate);
}
template <class Element, int kBlocks>
CF_DEVICE void wgmma_ab(float (&c)[kBlocks][4], const uint32 (&a)[4], uint64 b, bool accumulate) {
  Wgmma<Element, kBlocks * 8>::ab(c, a, b, accumulate);
}

// The accumulator as an asm operand list, by number and by name, eight registers (16 columns) at a time.
#define CF_FOUR(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define CF_EIGHT(group) CF_FOUR(2 * group), CF_FOUR(2 * group + 1)

#define CF_NUMBERS_1 "%0, %1, %2, %3, %4, %5, %6, %7"
#define CF_NUMBERS_2 CF_NUMBERS_1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define CF_NUMBERS_3 CF_NUMBERS_2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define CF_NUMBERS_4 CF_NUMBERS_3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define CF_NUMBERS_5 CF_NUMBERS_4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define CF_NUMBERS_6 CF_NUMBERS_5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define CF_NUMBERS_7 CF_NUMBERS_6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define CF_NUMBERS_8 CF_NUMBERS_7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define CF_NUMBERS_9 CF_NUMBERS_8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define CF_NUMBERS_10 CF_NUMBERS_9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define CF_NUMBERS_11 CF_NUMBERS_10 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define CF_NUMBERS_12 CF_NUMBERS_11 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define CF_NUMBERS_13 CF_NUMBERS_12 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define CF_NUMBERS_14 CF_NUMBERS_13 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define CF_NUMBERS_15 CF_NUMBERS_14 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define CF_NUMBERS_16 CF_NUMBERS_15 ", %120, %121, %122, %123, %124, %125, %126, %127"

#define CF_REGISTERS_1 CF_EIGHT(0)
#define CF_REGISTERS_2 CF_REGISTERS_1, CF_EIGHT(1)
#define CF_REGISTERS_3 CF_REGISTERS_2, CF_EIGHT(2)
#define CF_REGISTERS_4 CF_REGISTERS_3, CF_EIGHT(3)
#define CF_REGISTERS_5 CF_REGISTERS_4, CF_EIGHT(4)
#define CF_REGISTERS_6 CF_REGISTERS_5, CF_EIGHT(5)
#define CF_REGISTERS_7 CF_REGISTERS_6, CF_EIGHT(6)
#define CF_REGISTERS_8 CF_REGISTERS_7, CF_EIGHT(7)
#define CF_REGISTERS_9 CF_REGISTERS_8, CF_EIGHT(8)
#define CF_REGISTERS_10 CF_REGISTERS_9, CF_EIGHT(9)
#define CF_REGISTERS_11 CF_REGISTERS_10, CF_EIGHT(10)
#define CF_REGISTERS_12 CF_REGISTERS_11, CF_EIGHT(11)
#define CF_REGISTERS_13 CF_REGISTERS_12, CF_EIGHT(12)
#define CF_REGISTERS_14 CF_REGISTERS_13, CF_EIGHT(13)
#define CF_REGISTERS_15 CF_REGISTERS_14, CF_EIGHT(14)
#define CF_REGISTERS_16 CF_REGISTERS_15, CF_EIGHT(15)

// kN, its groups of eight registers, and the numbers of the six operands that follow them. Members are templates, as
// the compiler takes time over those in use alone.
#define CF_WGMMA(kN, groups, o0, o1, o2, o3, o4, o5)                                                                  \
  CF_WGMMA_OF(fp16, "f16", kN, groups, o0, o1, o2, o3, o4, o5)                                                        \
  CF_WGMMA_OF(bf16, "bf16", kN, groups, o0, o1, o2, o3, o4, o5)

#define CF_WGMMA_OF(Element, type, kN, groups, o0, o1, o2, o3, o4, o5)                                                \
  template <>                                                                                                         \
  struct Wgmma<Element, kN> {                                                                                         \
    template <int kTransposedA, int kTransposedB, int kBlocks>                                                        \
    CF_DEVICE static void shared(float (&c)[kBlocks][4], uint64 a, uint64 b, bool accumulate) {                       \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o2 ", 0;\n"                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." type "." type " {" CF_NUMBERS_##groups "}, "    \
                   "%" #o0 ", %" #o1 ", p, 1, 1, %" #o3 ", %" #o4 ";\n}"                                              \
                   : CF_REGISTERS_##groups                                                                            \
                   : "l"(a), "l"(b), "r"(int(accumulate)), "n"(kTransposedA), "n"(kTransposedB));                     \
    }                                                                                                                 \
    template <int kBlocks>                                                                                            \
    CF_DEVICE static void ab(float (&c)[kBlocks][4], const uint32 (&a)[4], uint64 b, bool accumulate) {               \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o5 ", 0;\n"                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." type "." type " {" CF_NUMBERS_##groups "}, "    \
                   "{%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4 ", p, 1, 1, 1;\n}"                               \
                   : CF_REGISTERS_##groups                                                                            \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));                       \
    }                                                                                                                 \
  };

CF_WGMMA(16, 1, 8, 9, 10, 11, 12, 13)
CF_WGMMA(32, 2, 16, 17, 18, 19, 20, 21)
CF_WGMMA(48, 3, 24, 25, 26, 27, 28, 29)
CF_WGMMA(64, 4, 32, 33, 34, 35, 36, 37)
CF_WGMMA(80, 5, 40, 41, 42, 43, 44, 45)
CF_WGMMA(96, 6, 48, 49, 50, 51, 52, 53)
CF_WGMMA(112, 7, 56, 57, 58, 59, 60, 61)
CF_WGMMA(128, 8, 64, 65, 66, 67, 68, 69)
CF_WGMMA(144, 9, 72, 73, 74, 75, 76, 77)
CF_WGMMA(160, 10, 80, 81, 82, 83, 84, 85)
CF_WGMMA(176, 11, 88, 89, 90, 91, 92, 93)
CF_WGMMA(192, 12, 96, 97, 98, 99, 100, 101)
CF_WGMMA(208, 13, 104, 105, 106, 107, 108, 109)
CF_WGMMA(224, 14, 112, 113, 114, 115, 116, 117)
CF_WGMMA(240, 15, 120, 121, 122, 123, 124, 125)
CF_WGMMA(256, 16, 128, 129, 130, 131, 132, 133)

}  // namespace cuflash::ptx
