// Dropout: which probabilities survive, a function of (seed, offset, batch, head, query, key) alone, so that any tiling
// of forward and backward draws the same mask.
#pragma once

#include "attention/philox.cuh"
#include "params.cuh"

namespace cuflash {

struct NoDropout {
  template <class Sequence>
  CF_DEVICE NoDropout(const Attention&, const Sequence&, int /*head*/) {}
  CF_DEVICE static constexpr bool keep(int, int) { return true; }
  CF_DEVICE static constexpr double scale(const Attention&) { return 1; }
};

// The scheme of FlashAttention-2 and PyTorch's flash kernels: 16 rows x 32 columns share 32 calls of Philox, each of
// whose 16 bytes decides one element. Call number 4 * (q % 8) + kv % 8 / 2 is lane l of the accumulator layout
// (tile/fragment.cuh); its word kv % 32 / 8 serves that 8-column block, byte 2 * (q % 16 / 8) + kv % 2 this element.
struct ByteDropout {
  uint64 seed;
  uint64 counter;    // of call 0
  uint32 threshold;  // bytes up to this one keep

  template <class Sequence>
  CF_DEVICE ByteDropout(const Attention& a, const Sequence& sequence, int head)
      : seed(a.rng_state[0]), counter(a.rng_state[1] + 32ull * (sequence.batch * a.heads_q + head)),
        threshold(static_cast<uint32>((1.f - static_cast<float>(a.dropout_p)) * 255.0)) {}

  // The four words of call `call` for the 16 x 32 block (q / 16, kv / 32).
  CF_DEVICE Philox draw(int q, int kv, int call) const {
    const uint64 c = counter + call;
    return Philox::draw<7>(static_cast<uint32>(c), static_cast<uint32>(c >> 32), q / 16, kv / 32, seed);
  }
  CF_DEVICE bool keeps(uint32 word, int byte) const { return (word >> (8 * byte) & 255u) <= threshold; }

  CF_DEVICE bool keep(int q, int kv) const {
    return keeps(draw(q, kv, 4 * (q % 8) + kv % 8 / 2).at(kv % 32 / 8), q % 16 / 8 * 2 + kv % 2);
  }
  CF_DEVICE static double scale(const Attention& a) { return a.keep_scale; }
};

// The scheme of PyTorch's memory-efficient kernels: one 32-bit word an element, numbered in row-major order.
struct WordDropout {
  uint64 seed;
  uint64 base;  // number of this head's element (0, 0)
  int row;      // elements of one query row
  float p;

  template <class Sequence>
  CF_DEVICE WordDropout(const Attention& a, const Sequence& sequence, int head)
      : seed(a.rng_state[0]),
        base(a.rng_state[1] + static_cast<uint64>(sequence.batch * a.heads_q + head) * a.len_q * a.len_kv),
        row(sequence.len_kv), p(static_cast<float>(a.dropout_p)) {}

  CF_DEVICE bool keep(int q, int kv) const {
    const uint64 n = base + static_cast<uint64>(q) * row + kv, c = n / 4;
    const Philox random = Philox::draw<10>(static_cast<uint32>(c), static_cast<uint32>(c >> 32), 0, 0, seed);
    const uint32 word = random.at(static_cast<int>(n % 4));
    return static_cast<float>(word) * 2.3283064e-10f + 2.3283064e-10f / 2 > p;  // uniform in (0, 1]
  }
  CF_DEVICE static double scale(const Attention& a) { return a.keep_scale; }
};

}  // namespace cuflash
