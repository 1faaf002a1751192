// Written by cuflash.jit.render for fwd_sm80. Do not edit.
#pragma once

#include "layout.cuh"
#include "element.cuh"
#include "attention/sequence.cuh"
#include "attention/mask.cuh"
#include "attention/score.cuh"
#include "attention/dropout.cuh"
#include "attention/softmax.cuh"
#include "attention/heads.cuh"
#include "attention/split.cuh"
#include "tile/held_bias.cuh"

namespace cuflash {

struct Config {
  using Element = bf16;
  using Sequence = DenseSequence;
  using Mask = CausalMask;
  using Score = ScaledScore<float>;
  using Dropout = NoDropout;
  using Sink = NoSink;
  using Heads = OneHead;
  using Split = NoSplit;
  using BiasHeld = NoHeldBias;
  static constexpr int kThreads = 128;
  static constexpr int kBlocksPerSm = 2;
  static constexpr int kSmemBytes = 69632;
  static constexpr int kDimQk = 128;
  static constexpr int kDimV = 128;
  static constexpr int kTileQ = 128;
  static constexpr int kTileKv = 64;
  static constexpr int kCopyBytes = 16;
  static constexpr int kHalves = 2;
};

}  // namespace cuflash
