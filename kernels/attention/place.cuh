// Place: a query or a key, and what of its number the compiler knows once loops are unrolled.
#pragma once

#include "std.cuh"

namespace cuflash {

struct Place {
  int at;
  int known;  // a term of `at`: the same for all lanes and tiles

  CF_DEVICE constexpr Place(int number, int constant = 0) : at(number), known(constant) {}
  CF_DEVICE constexpr operator int() const { return at; }
};

}  // namespace cuflash
