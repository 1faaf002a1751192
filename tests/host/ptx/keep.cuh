// The host twin of kernels/ptx/keep.cuh.
#pragma once

namespace cuflash::ptx {

inline float keep(float x) { return x; }
inline double keep(double x) { return x; }
inline int keep(int x) { return x; }
template <class T>
T* keep(T* x) {
  return x;
}

}  // namespace cuflash::ptx
