// Dropout of whole fragments: the same bits as Dropout::keep, drawn as the registers lie.
#pragma once

#include "attention/dropout.cuh"
#include "ptx/sync.cuh"
#include "tile/fragment.cuh"

namespace cuflash {

// f(m, n, i) for every element of a fragment for which keep(row, column) is false. 32 decisions are made in a loop and
// applied after it: their random numbers in line for every element would take longer to compile than all the rest.
template <class Fragment, class Keep, class F>
CF_DEVICE void for_each_not_kept(Fragment&, const Keep& keep, F&& f) {
  const int lane = ptx::lane_index();
  constexpr int kElements = Fragment::kM * Fragment::kN * 4;
#pragma unroll
  for (int first = 0; first < kElements; first += 32) {
    uint32 kept = 0;
#pragma unroll 1
    for (int e = first; e < min_of(first + 32, kElements); ++e) {
      const int m = e / 4 / Fragment::kN, n = e / 4 % Fragment::kN;
      kept |= static_cast<uint32>(keep(m * 16 + row_of(lane, e % 4), n * 8 + col_of(lane, e % 4))) << e % 32;
    }
#pragma unroll
    for (int e = first; e < min_of(first + 32, kElements); ++e) {
      if (!(kept >> e % 32 & 1u)) f(e / 4 / Fragment::kN, e / 4 % Fragment::kN, e % 4);
    }
  }
}

// f(m, n, i) for every dropped element of a fragment whose rows are queries from q on and columns are keys from kv on.
template <class Dropout, class Fragment, class F>
CF_DEVICE void for_each_dropped(const Dropout& dropout, Fragment& fragment, int q, int kv, F&& f) {
  for_each_not_kept(fragment, [&](int row, int col) { return dropout.keep(q + row, kv + col); }, f);
}

template <class Fragment, class F>
CF_DEVICE void for_each_dropped(const NoDropout&, Fragment&, int, int, F&&) {}
template <class Fragment, class F>
CF_DEVICE void for_each_dropped_transposed(const NoDropout&, Fragment&, int, int, F&&) {}

// ByteDropout was made for this layout: the lane's own call decides its 16 elements of 16 rows x 32 columns.
template <class Fragment, class F>
CF_DEVICE void for_each_dropped(const ByteDropout& dropout, Fragment&, int q, int kv, F&& f) {
  static_assert(Fragment::kN % 4 == 0);
#pragma unroll
  for (int m = 0; m < Fragment::kM; ++m) {
#pragma unroll
    for (int n = 0; n < Fragment::kN; n += 4) {
      const Philox random = dropout.draw(q + m * 16, kv + n * 8, ptx::lane_index());
#pragma unroll
      for (int block = 0; block < 4; ++block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (!dropout.keeps(random.word[block], i)) f(m, n + block, i);
        }
      }
    }
  }
}

// The same for a transposed fragment, whose rows are keys and columns are queries.
template <class Dropout, class Fragment, class F>
CF_DEVICE void for_each_dropped_transposed(const Dropout& dropout, Fragment& fragment, int q, int kv, F&& f) {
  for_each_not_kept(fragment, [&](int row, int col) { return dropout.keep(q + col, kv + row); }, f);
}

// Each lane draws the call of its own number and fetches what its transposed elements need from eight others.
template <class Fragment, class F>
CF_DEVICE void for_each_dropped_transposed(const ByteDropout& dropout, Fragment&, int q, int kv, F&& f) {
  const int lane = ptx::lane_index();
#pragma unroll
  for (int m = 0; m < Fragment::kM; ++m) {
    const int half = (kv / 16 + m) % 2;  // of the 32 keys that share calls
#pragma unroll
    for (int n = 0; n < Fragment::kN; n += 2) {
      const Philox random = dropout.draw(q + n * 8, kv + m * 16, lane);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32 word = random.at(2 * half + i / 2);
        const uint32 fetched = ptx::shuffle(word, lane % 4 * 8 + i % 2 * 4 + lane / 8);
#pragma unroll
        for (int q_half = 0; q_half < 2; ++q_half) {
          if (!dropout.keeps(fetched, 2 * q_half + lane / 4 % 2)) f(m, n + q_half, i);
        }
      }
    }
  }
}

}  // namespace cuflash
