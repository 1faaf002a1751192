// BiasTile: an additive tensor that all batch elements share, of which a block keeps one head's tile in shared memory.
#pragma once

#include "element.cuh"
#include "params.cuh"
#include "ptx/sync.cuh"

namespace cuflash {

// There is none, or it is a term of the score (attention/score.cuh).
struct NoBiasTile {
  template <int kTile>
  struct Buffer {
    CF_DEVICE void load(const Attention&, int /*head*/, int /*threads*/) {}
    CF_DEVICE float at(int /*q*/, int /*kv*/) const { return 0.f; }
  };
};

template <class Element>
struct SharedBiasTile {
  template <int kTile>
  struct alignas(16) Buffer {
    Element bias[kTile][kTile + 8];  // so that a column's neighbours lie in different banks

    // Queries and keys from 0 on; 0 where the tensor ends. The block meets before it reads them.
    CF_DEVICE void load(const Attention& a, int head, int threads) {
      const Element* g_bias = static_cast<const Element*>(a.bias) + head * a.bias_head;
#pragma unroll 4
      for (int index = ptx::thread_index(); index < kTile * kTile; index += threads) {
        const int q = index / kTile, kv = index % kTile;
        const bool some = q < a.len_q && kv < a.len_kv;
        bias[q][kv] = some ? g_bias[q * a.bias_row + kv * a.bias_column] : Element(0.f);
      }
    }
    CF_DEVICE float at(int q, int kv) const { return to_accumulator(bias[q][kv]); }
  };
};

}  // namespace cuflash
