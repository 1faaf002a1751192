// The ground every kernel header stands on: integer names, small functions, and what differs between compilers.
#pragma once

#ifdef __CUDACC__
#define CF_DEVICE __device__ __forceinline__
#define CF_INFINITY __longlong_as_double(0x7ff0000000000000ll)
#define CF_OFFSET(type, member) __INTADDR__(&((type*)0)->member)  // NVRTC has no offsetof
#else  // a host compiler: the policies are unit-tested, and the kernels emulated, without a GPU
#include <cmath>
#include <cstddef>
#define CF_DEVICE inline
#define CF_INFINITY HUGE_VAL
#define CF_OFFSET(type, member) offsetof(type, member)
#endif

#ifdef CF_DEBUG
#define CF_ASSERT(condition) ((condition) ? void() : __trap())
#else
#define CF_ASSERT(condition) ((void)0)
#endif

namespace cuflash {

#ifndef __CUDACC__
using std::fma;
using std::log;
using std::log2;
using std::tanh;
inline double exp2(double x) { return std::exp2(x); }
inline float exp2(float x) { return std::exp2(x) < 0x1p-126f ? 0.f : std::exp2(x); }  // -ftz=true
inline float __fdividef(float a, float b) { return a / b; }
inline float __log2f(float x) { return std::log2(x); }
#endif

using int64 = long long;
using uint32 = unsigned int;
using uint64 = unsigned long long;
using uint16 = unsigned short;
using uint8 = unsigned char;

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

template <class T>
CF_DEVICE constexpr T min_of(T a, T b) {
  return a < b ? a : b;
}

template <class T>
CF_DEVICE constexpr T max_of(T a, T b) {
  return a > b ? a : b;
}
CF_DEVICE float max_of(float a, float b) { return fmaxf(a, b); }
CF_DEVICE double max_of(double a, double b) { return fmax(a, b); }

CF_DEVICE float abs_of(float x) { return fabsf(x); }
CF_DEVICE double abs_of(double x) { return fabs(x); }

// To about 2^-22.
CF_DEVICE float approximate_log2(float x) { return __log2f(x); }

// 1 / x for x >= 0, to about two units in the last place for float; 0 from 2^126 on.
CF_DEVICE float reciprocal(float x) { return __fdividef(1.f, x); }
CF_DEVICE double reciprocal(double x) { return 1. / x; }

template <class T>
CF_DEVICE constexpr T clamp_to(T x, T low, T high) {
  return min_of(max_of(x, low), high);
}

// ceil(a / b) for a >= 0.
CF_DEVICE constexpr int cdiv(int a, int b) { return (a + b - 1) / b; }

CF_DEVICE constexpr int round_up(int a, int multiple) { return cdiv(a, multiple) * multiple; }

// The smallest power of two >= n.
CF_DEVICE constexpr int power_of_two_above(int n) { return n <= 1 ? 1 : 2 * power_of_two_above((n + 1) / 2); }

template <class First, class Second>
struct IsSame {
  static constexpr bool value = false;
};
template <class T>
struct IsSame<T, T> {
  static constexpr bool value = true;
};

template <bool kCondition, class Yes, class No>
struct If {
  using Type = Yes;
};
template <class Yes, class No>
struct If<false, Yes, No> {
  using Type = No;
};

struct Nothing {};

template <class T>
CF_DEVICE T infinity() {
  return static_cast<T>(CF_INFINITY);
}

// A compile error here means that Python's shared-memory formula (plan/families/) and the kernel's struct disagree.
template <int kActual, int kPlanned>
struct SmemSizeCheck {
  static_assert(kActual == kPlanned, "sizeof(SmemPlan) != Config::kSmemBytes: first number kActual, second kPlanned");
};

}  // namespace cuflash
