// Philox4x32: counter-based random bits (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
#pragma once

#include "std.cuh"

namespace cuflash {

struct Philox {
  uint32 word[4];

  // A word by a number known at run time only, without sending the array to memory.
  CF_DEVICE uint32 at(int i) const {
    const uint32 low = i % 2 ? word[1] : word[0], high = i % 2 ? word[3] : word[2];
    return i / 2 ? high : low;
  }

  template <int kRounds>
  CF_DEVICE static Philox draw(uint32 c0, uint32 c1, uint32 c2, uint32 c3, uint64 seed) {
    uint32 k0 = static_cast<uint32>(seed), k1 = static_cast<uint32>(seed >> 32);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const uint64 a = uint64(0xD2511F53u) * c0, b = uint64(0xCD9E8D57u) * c2;
      c0 = static_cast<uint32>(b >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32>(b);
      c2 = static_cast<uint32>(a >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32>(a);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return Philox{{c0, c1, c2, c3}};
  }
};

}  // namespace cuflash
