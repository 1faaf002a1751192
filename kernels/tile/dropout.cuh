// Dropout of whole fragments: the same bits as Dropout::keep, drawn as the registers lie.
#pragma once

#include "attention/dropout.cuh"
#include "ptx/sync.cuh"
#include "tile/fragment.cuh"

namespace cuflash {

// f(r, n, i) for every element of a fragment for which keep(row, column) is false. 32 decisions are made in a loop and
// applied after it: their random numbers in line for every element would take longer to compile than all the rest.
template <class Fragment, class Keep, class F>
CF_DEVICE void for_each_not_kept(const Keep& keep, F&& f) {
  const int lane = ptx::lane_index();
#pragma unroll
  for (int first = 0; first < Fragment::kElements; first += 32) {
    uint32 kept = 0;
#pragma unroll 1
    for (int e = first; e < min_of(first + 32, Fragment::kElements); ++e) {
      const int r = Fragment::row_number(e), n = Fragment::block_number(e);
      kept |= static_cast<uint32>(keep(row_of(lane, r), col_of(lane, n, e % 2))) << e % 32;
    }
#pragma unroll
    for (int e = first; e < min_of(first + 32, Fragment::kElements); ++e) {
      if (!(kept >> e % 32 & 1u)) f(Fragment::row_number(e), Fragment::block_number(e), e % 2);
    }
  }
}

// Zeroes every dropped element of a fragment whose rows are queries from q on and columns are keys from kv on.
template <class Dropout, class Fragment>
CF_DEVICE void drop(const Dropout& dropout, Fragment& fragment, int q, int kv) {
  for_each_not_kept<Fragment>([&](int row, int col) { return dropout.keep(q + row, kv + col); },
                              [&](int r, int n, int i) { fragment.at(r, n, i) = 0; });
}
template <class Fragment>
CF_DEVICE void drop(const NoDropout&, Fragment&, int, int) {}

// ByteDropout was made for this layout: the lane's own call decides its 16 elements of 16 rows x 32 columns.
template <class Fragment>
CF_DEVICE void drop(const ByteDropout& dropout, Fragment& fragment, int q, int kv) {
  static_assert(Fragment::kN % 4 == 0);
#pragma unroll
  for (int m = 0; m < Fragment::kM; ++m) {
#pragma unroll
    for (int n = 0; n < Fragment::kN; n += 4) {
      const Philox random = dropout.draw(q + m * 16, kv + n * 8, ptx::lane_index());
#pragma unroll
      for (int block = 0; block < 4; ++block) {
#pragma unroll
        for (int byte = 0; byte < 4; ++byte) {
          if (!dropout.keeps(random.word[block], byte)) fragment.at(m * 2 + byte / 2, n + block, byte % 2) = 0;
        }
      }
    }
  }
}

// The elements that are kept of a transposed fragment, whose rows are keys from kv on and columns queries from q on.
template <class Fragment, class Dropout>
CF_DEVICE ElementSet<Fragment> kept_transposed(const Dropout& dropout, int q, int kv) {
  ElementSet<Fragment> kept;
  for_each_not_kept<Fragment>([&](int row, int col) { return dropout.keep(q + col, kv + row); },
                              [&](int r, int n, int i) { kept.remove(r, n, i); });
  return kept;
}
template <class Fragment>
CF_DEVICE ElementSet<Fragment> kept_transposed(const NoDropout&, int, int) {
  return {};
}

// Each lane draws the call of its own number and fetches what its transposed elements need from eight others.
template <class Fragment>
CF_DEVICE ElementSet<Fragment> kept_transposed(const ByteDropout& dropout, int q, int kv) {
  const int lane = ptx::lane_index();
  ElementSet<Fragment> kept;
#pragma unroll
  for (int m = 0; m < Fragment::kM; ++m) {
    const int half = (kv / 16 + m) % 2;  // of the 32 keys that share calls
#pragma unroll
    for (int n = 0; n < Fragment::kN; n += 2) {
      const Philox random = dropout.draw(q + n * 8, kv + m * 16, lane);
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        const uint32 word = random.at(2 * half + corner / 2);
        const uint32 fetched = ptx::shuffle(word, lane % 4 * 8 + corner % 2 * 4 + lane / 8);
#pragma unroll
        for (int q_half = 0; q_half < 2; ++q_half) {
          if (!dropout.keeps(fetched, 2 * q_half + lane / 4 % 2)) {
            kept.remove(m * 2 + corner / 2, n + q_half, corner % 2);
          }
        }
      }
    }
  }
  return kept;
}

}  // namespace cuflash
