// BatchShare: which batch elements of which head a block works on that takes short sequences one after the other.
#pragma once

#include "params.cuh"
#include "ptx/sync.cuh"

namespace cuflash {

// Neighbours differ in the head: blocks in flight read whole rows.
struct BatchShare {
  int head;
  int part;        // number of the block among those of the head
  int first, end;  // batch elements

  CF_DEVICE explicit BatchShare(const Attention& a)
      : head(static_cast<int>(ptx::block_index() % a.heads_q)), part(static_cast<int>(ptx::block_index() / a.heads_q)) {
    const int parts = ptx::num_blocks() / a.heads_q;
    first = static_cast<int>(int64(a.batch) * part / parts);
    end = static_cast<int>(int64(a.batch) * (part + 1) / parts);
  }
};

}  // namespace cuflash
