// The host twin of kernels/ptx/wgmma.cuh: a product happens at any time between its issue and the wait for its group.
//
// Until a warp has waited, its accumulator is NaN, and the registers of A must keep their values. As on hardware, a
// group is done for the whole warpgroup or not at all: the first of the four warps to wait for it waits until all of
// them have committed it, and then every product of the group has read its operands.
#pragma once

#include "block.hpp"
#include "element.cuh"

namespace cuflash::host {

// What lies in rows of shared memory, by the name of the product: A and B^T, A and B, A^T and B^T, or B alone.
enum class Form { kAbt, kAb, kAtbt, kAbFromRegisters };

// What a lane brings to a product.
struct WgmmaOperands {
  float* c;
  uint64 a_descriptor;
  const uint32* a_registers;  // null: A is in shared memory
  uint64 b;
  bool accumulate;
};

// Does one warp's part of a product.
template <class Element, Form kForm>
void multiply(const struct Product& product);
extern template void multiply<fp16, Form::kAbt>(const Product&);
extern template void multiply<fp16, Form::kAb>(const Product&);
extern template void multiply<fp16, Form::kAtbt>(const Product&);
extern template void multiply<fp16, Form::kAbFromRegisters>(const Product&);
extern template void multiply<bf16, Form::kAbt>(const Product&);
extern template void multiply<bf16, Form::kAb>(const Product&);
extern template void multiply<bf16, Form::kAtbt>(const Product&);
extern template void multiply<bf16, Form::kAbFromRegisters>(const Product&);

// Starts a warp's part of a product with n columns.
void issue(void* const* lanes, void (*multiply)(const Product&), int n);

// Each lane brings a bool: whether the products have been waited for. Else the warp is to try again once it is woken.
void wait_for_products(void* const* lanes, int pending);

}  // namespace cuflash::host

namespace cuflash::ptx {

template <class Element>
constexpr int kWgmmaDepth = 32 / sizeof(Element);

void wgmma_fence();
void wgmma_commit();

template <int kPending>
struct WgmmaWait {
  static void run(void* const* lanes) { host::wait_for_products(lanes, kPending); }
  static constexpr host::Instruction kInstruction{"wgmma_wait", run, true};
};

template <int kPending>
void wgmma_wait() {
  bool done = false;
  while (!done) host::execute(WgmmaWait<kPending>::kInstruction, &done);
}

template <int kBlocks>
void wgmma_hold(float (&)[kBlocks][4]) {}

inline uint64 wgmma_descriptor(uint32 shared, int chunk_bytes) {
  return (shared & 0x3ffff) >> 4 | uint64(chunk_bytes >> 4) << 16 | uint64(1024 >> 4) << 32 | uint64(1) << 62;
}

inline uint64 advance_descriptor(uint64 descriptor, int bytes) { return descriptor + (bytes >> 4); }

template <class Element, int kN, host::Form kForm>
struct Wgmma {
  static_assert(kN % 16 == 0 && kN >= 16 && kN <= 256);

  static void run(void* const* lanes) { host::issue(lanes, host::multiply<Element, kForm>, kN); }
  static constexpr const char* kName = kForm == host::Form::kAbt    ? "wgmma_abt"
                                       : kForm == host::Form::kAtbt ? "wgmma_atbt"
                                                                    : "wgmma_ab";
  static constexpr host::Instruction kInstruction{kName, run};
};

template <class Element, int kBlocks>
void wgmma_abt(float (&c)[kBlocks][4], uint64 a, uint64 b, bool accumulate) {
  host::WgmmaOperands operands{c[0], a, nullptr, b, accumulate};
  host::execute(Wgmma<Element, kBlocks * 8, host::Form::kAbt>::kInstruction, &operands);
}

template <class Element, int kBlocks>
void wgmma_ab(float (&c)[kBlocks][4], uint64 a, uint64 b, bool accumulate) {
  host::WgmmaOperands operands{c[0], a, nullptr, b, accumulate};
  host::execute(Wgmma<Element, kBlocks * 8, host::Form::kAb>::kInstruction, &operands);
}

template <class Element, int kBlocks>
void wgmma_atbt(float (&c)[kBlocks][4], uint64 a, uint64 b, bool accumulate) {
  host::WgmmaOperands operands{c[0], a, nullptr, b, accumulate};
  host::execute(Wgmma<Element, kBlocks * 8, host::Form::kAtbt>::kInstruction, &operands);
}

template <class Element, int kBlocks>
void wgmma_ab(float (&c)[kBlocks][4], const uint32 (&a)[4], uint64 b, bool accumulate) {
  host::WgmmaOperands operands{c[0], 0, a, b, accumulate};
  host::execute(Wgmma<Element, kBlocks * 8, host::Form::kAbFromRegisters>::kInstruction, &operands);
}

}  // namespace cuflash::ptx
