// What the compiler may not compute anew.
#pragma once

#include "std.cuh"

namespace cuflash::ptx {

// A number for a register. The compiler would rather convert a parameter from double anew in every round of a loop.
CF_DEVICE float keep(float x) {
  asm volatile("" : "+f"(x));
  return x;
}
CF_DEVICE double keep(double x) { return x; }

// Nor does it know this number from the one it was, so that what follows from both is computed for each.
CF_DEVICE int keep(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

template <class T>
CF_DEVICE T* keep(T* x) {
  asm volatile("" : "+l"(x));
  return x;
}

}  // namespace cuflash::ptx
