// A sum that is the same in whatever order its addends come.
//
// Every number is a multiple of the least positive one. A sum counts these in digits of 24 bits, each in a word of 64, to
// which blocks add as they come: whole numbers add up alike in any order. It has room for 2^39 addends, and is rounded
// once, at the end. After Kulisch's long accumulator (Kulisch and Miranker 1986, doi 10.1137/1028001), whose carries
// wait until then.
//
//   words   | 2^0 | 2^24 | 2^48 | ... | up to the largest number | marks of what is no finite number |
#pragma once

#include "element.cuh"
#include "ptx/memory.cuh"

namespace cuflash {

template <class Real>
struct ExactSum {
  static constexpr int kFraction = sizeof(Real) == 4 ? 23 : 52;  // bits of a number behind its first
  static constexpr int kLast = sizeof(Real) == 4 ? 255 : 2047;   // the exponent of what is not finite
  static constexpr int kDigit = 24;
  static constexpr int kDigits = cdiv(kLast - 1 + kFraction, kDigit);
  static constexpr int kWords = kDigits + 1;  // plan/steps.py allocates them
  static constexpr uint64 kMask = (uint64(1) << kDigit) - 1;

  enum Mark { kNaN, kPositive, kNegative };  // bytes of the last word

  // To the sum with a number of an array of them.
  CF_DEVICE static void add(void* sums, int64 number, Real x) {
    int64* words = static_cast<int64*>(sums) + number * kWords;
    const uint64 bits = ptx::bits_of(x);
    const int exponent = static_cast<int>(bits >> kFraction) & kLast;
    const bool negative = bits >> (8 * sizeof(Real) - 1);
    uint64 rest = bits & ((uint64(1) << kFraction) - 1);
    if (exponent == kLast) {  // all who mark store the same
      reinterpret_cast<uint8*>(words + kDigits)[rest ? kNaN : negative ? kNegative : kPositive] = 1;
      return;
    }
    if (exponent > 0) rest |= uint64(1) << kFraction;
    const int place = max_of(exponent - 1, 0), shift = place % kDigit;
    words += place / kDigit;
    uint64 digit = rest << shift & kMask;
    rest >>= kDigit - shift;
    for (;; digit = rest & kMask, rest >>= kDigit) {
      ptx::red_add(words++, negative ? -static_cast<int64>(digit) : static_cast<int64>(digit));
      if (rest == 0) break;
    }
  }

  CF_DEVICE static Real rounded(const void* sums, int64 number) {
    const int64* words = static_cast<const int64*>(sums) + number * kWords;
    const uint8* marks = reinterpret_cast<const uint8*>(words + kDigits);
    if (marks[kNaN] || (marks[kPositive] && marks[kNegative])) return infinity<Real>() - infinity<Real>();
    if (marks[kPositive]) return infinity<Real>();
    if (marks[kNegative]) return -infinity<Real>();
    int64 carry = 0;
    for (int i = 0; i < kDigits; ++i) carry = (words[i] + carry) >> kDigit;
    return carry < 0 ? -size_of(words, -1) : size_of(words, 1);
  }

 private:
  // The sum times a sign that leaves it not negative.
  CF_DEVICE static Real size_of(const int64* words, int sign) {
    // Digits from the first that is not 0 on: that and the next, the two behind, and whether another is not 0.
    uint64 first = 0, second = 0;
    bool more = false;
    int top = 0;
    uint64 before[3] = {};  // digits below the one at hand
    bool below = false;     // whether one below these is not 0
    int64 carry = 0;
    for (int i = 0; i < kDigits + 2; ++i) {  // the last carry has up to two digits
      const int64 word = (i < kDigits ? sign * words[i] : 0) + carry;
      const uint64 digit = static_cast<uint64>(word) & kMask;
      carry = word >> kDigit;
      if (digit) {
        top = i;
        first = digit << kDigit | before[0];
        second = before[1] << kDigit | before[2];
        more = below;
      }
      below = below || before[2];
      before[2] = before[1];
      before[1] = before[0];
      before[0] = digit;
    }
    if (first == 0) return Real(0);
    int shift = 64 - 2 * kDigit;  // to a number of 64 bits, the last of which tells of all that are cut off
    while (!(first << shift >> 63)) ++shift;
    const int cut = 2 * kDigit - shift;
    uint64 number = first << shift | second >> cut;
    if (more || (second & ((uint64(1) << cut) - 1))) number |= 1;
    const int exponent = kDigit * (top - 3) + cut - (kLast / 2 + kFraction - 1), half = exponent / 2;
    return static_cast<Real>(number) * power_of_two(half) * power_of_two(exponent - half);
  }
  CF_DEVICE static Real power_of_two(int n) {
    const uint64 bits = static_cast<uint64>(n + kLast / 2) << kFraction;
    if constexpr (sizeof(Real) == 4) {
      return ptx::float_of(static_cast<uint32>(bits));
    } else {
      return ptx::double_of(bits);
    }
  }
};

}  // namespace cuflash
