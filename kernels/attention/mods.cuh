// Written scores and masks: functions of the caller's, printed into config.cuh by jit/written.py as ScoreMod and MaskMod,
// and what their text is made of (cuflash/mods/emit.py).
#pragma once

#include "attention/exact_sum.cuh"
#include "attention/mask.cuh"
#include "attention/place.cuh"
#include "element.cuh"
#include "params.cuh"
#include "ptx/memory.cuh"

namespace cuflash {

// The operations of cuflash/mods/expression.py that are not operators, as NumPy has them. Real numbers are float or double,
// and as exact as CUDA's library has them; a quotient of floats errs by two units in the last place (-prec-div=false), as
// one rounded to nearest takes a branch a score and four times as long to compile.
namespace mods {

CF_DEVICE float power(float a, float b) { return powf(a, b); }
CF_DEVICE double power(double a, double b) { return ::pow(a, b); }
CF_DEVICE float exp(float x) { return expf(x); }
CF_DEVICE double exp(double x) { return ::exp(x); }
CF_DEVICE float log(float x) { return logf(x); }
CF_DEVICE double log(double x) { return ::log(x); }
CF_DEVICE float sqrt(float x) { return sqrtf(x); }
CF_DEVICE double sqrt(double x) { return ::sqrt(x); }
CF_DEVICE float tanh(float x) { return tanhf(x); }
CF_DEVICE double tanh(double x) { return ::tanh(x); }
// tanh(x / (2 log2(e))) to 2^-23: two instructions, where tanhf takes a branch.
template <class Real>
CF_DEVICE Real tanh_of_exponent(Real x) {
  return fma(Real(-2), reciprocal(exp2(x) + Real(1)), Real(1));
}
// Of an integer of up to 2^22: the digits of a float between 2^23 and 2^24, less that.
CF_DEVICE float small_real(int x) { return ptx::float_of(static_cast<uint32>(x) + 0x4b400000u) - 12582912.f; }
CF_DEVICE float sin(float x) { return sinf(x); }
CF_DEVICE double sin(double x) { return ::sin(x); }
CF_DEVICE float cos(float x) { return cosf(x); }
CF_DEVICE double cos(double x) { return ::cos(x); }
CF_DEVICE float floor(float x) { return floorf(x); }
CF_DEVICE double floor(double x) { return ::floor(x); }

CF_DEVICE int abs(int x) { return x < 0 ? -x : x; }
CF_DEVICE int64 abs(int64 x) { return x < 0 ? -x : x; }
CF_DEVICE float abs(float x) { return abs_of(x); }
CF_DEVICE double abs(double x) { return abs_of(x); }

// Whichever is no number, if one is.
template <class T>
CF_DEVICE T minimum(T a, T b) {
  return a < b || a != a ? a : b;
}
template <class T>
CF_DEVICE T maximum(T a, T b) {
  return b < a || a != a ? a : b;
}

CF_DEVICE uint32 bits(int x) { return static_cast<uint32>(x); }
CF_DEVICE uint64 bits(int64 x) { return static_cast<uint64>(x); }

// Of whole numbers, rounded down; 0 where b is.
template <class Int>
CF_DEVICE Int floor_divide(Int a, Int b) {
  if (b == 0) return 0;
  if (b == -1) return static_cast<Int>(0 - bits(a));  // the only quotient that may be too large
  return a / b - (a % b != 0 && (a < 0) != (b < 0));
}
template <class Int>
CF_DEVICE Int remainder(Int a, Int b) {
  if (b == 0 || b == -1) return 0;
  const Int rest = a % b;
  return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}

CF_DEVICE bool invert(bool x) { return !x; }
template <class Int>
CF_DEVICE Int invert(Int x) {
  return ~x;
}

// By no number of bits that there is, everything goes.
template <class Int>
CF_DEVICE Int left_shift(Int a, Int n) {
  return bits(n) < 8 * sizeof(Int) ? static_cast<Int>(bits(a) << n) : 0;
}
template <class Int>
CF_DEVICE Int right_shift(Int a, Int n) {
  constexpr int kBits = 8 * sizeof(Int);
  return a >> (bits(n) < kBits ? n : kBits - 1);
}

// Elements of an array that is read, as numbers of an expression.
template <class Element>
CF_DEVICE Accumulator<Element> real_of(Element x) {
  return to_accumulator(x);
}
template <class Element>
CF_DEVICE int int_of(Element x) {
  return static_cast<int>(x);
}
CF_DEVICE int64 int_of(int64 x) { return x; }
CF_DEVICE bool bool_of(uint8 x) { return x != 0; }

// An index along an axis, or the nearest that there is.
CF_DEVICE int nearest(int i, int size) { return clamp_to(i, 0, size - 1); }
CF_DEVICE int nearest(int64 i, int size) { return static_cast<int>(clamp_to(i, int64(0), int64(size - 1))); }

}  // namespace mods

// What a caller's function makes of another policy's score. `Mod` has value(s, unit, b, h, q, k) of the score s * unit, in
// units of its unit(unit), the slope of it, and add_gradients(), which adds up those of the numbers that it reads; and says
// whether its slope is bounded, and its value finite for a score of 0 and queries past the last one.
template <class Inner, class Mod>
struct WrittenScore {
  using Number = typename Inner::Number;

  Inner inner;
  Mod mod;
  int len_q;
  int batch, head;

  template <class Sequence>
  CF_DEVICE WrittenScore(const Attention& a, const Sequence& sequence, int query_head)
      : inner(a, sequence, query_head), mod(a, static_cast<int>(sequence.batch), query_head), len_q(sequence.len_q),
        batch(static_cast<int>(sequence.batch)), head(query_head) {}
  CF_DEVICE Number unit() const { return mod.unit(inner.unit()); }
  CF_DEVICE Number apply(Number s, Place q, Place kv) const {
    return mod.value(inner.apply(s, q, kv), inner.unit(), batch, head, q, kv);
  }
  CF_DEVICE Number within(Number x, int q) const { return q < len_q ? x : Number(0); }
  CF_DEVICE Number slope(Number s, Place q, Place kv) const {
    return mod.slope(inner.apply(s, q, kv), inner.unit(), batch, head, q, kv) * inner.slope(s, q, kv);
  }
  CF_DEVICE static constexpr bool any_slope() { return Inner::any_slope() || !Mod::kBoundedSlope; }
  CF_DEVICE static constexpr bool finite_beyond() { return Inner::finite_beyond() && Mod::kFiniteBeyond; }
  // ds: d(logit)
  CF_DEVICE void add_gradients(Number s, Number ds, Place q, Place kv) const {
    mod.add_gradients(inner.apply(s, q, kv), inner.unit(), batch, head, q, kv, ds);
  }
  // The same of all pairs of a distance q - kv, where that alone decides what is read, and added to the score.
  CF_DEVICE void add_at_distance(Number ds, int distance) const { mod.add_at_distance(batch, head, distance, ds); }
};

// A mask and a caller's rule: elements must pass both. Nothing is known about whole tiles of the rule.
template <class Band, class Mod>
struct WrittenMask {
  static constexpr bool kFullFromStart = false, kFullToEnd = false, kNoneFull = true;
  using Walk = Tiles;

  Band band;
  Mod mod;
  int batch, head;

  template <class Sequence>
  CF_DEVICE WrittenMask(const Attention& a, const Sequence& sequence, int query_head)
      : band(a, sequence, query_head), mod(a, static_cast<int>(sequence.batch), query_head),
        batch(static_cast<int>(sequence.batch)), head(query_head) {}

  CF_DEVICE bool keep(int q, int kv) const {
    const bool seen = mod.template value<float>(batch, head, q, kv);
    return band.keep(q, kv) & seen;
  }

  CF_DEVICE Tiles kv_tiles(int q, int rows, int tile) const { return band.kv_tiles(q, rows, tile).none_full(); }
  CF_DEVICE Tiles q_tiles(int kv, int rows, int tile) const { return band.q_tiles(kv, rows, tile).none_full(); }
};

}  // namespace cuflash
