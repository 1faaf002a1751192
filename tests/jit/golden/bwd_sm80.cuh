// Written by cuflash.jit.render for bwd_sm80. Do not edit.
#pragma once

#include "layout.cuh"
#include "element.cuh"
#include "attention/sequence.cuh"
#include "attention/mask.cuh"
#include "attention/score.cuh"
#include "attention/dropout.cuh"
#include "tile/held_bias.cuh"
#include "tile/dq_accum.cuh"
#include "attention/bias_gradient.cuh"
#include "tile/captured_gradient.cuh"

namespace cuflash {

struct Config {
  using Element = double;
  using Sequence = VarlenSequence;
  using Mask = WindowMask;
  using Score = SoftCapScore<double>;
  using Dropout = NoDropout;
  using BiasHeld = NoHeldBias;
  using Reduction = OrderedReduction;
  using BiasGradient = NoBiasGradient;
  using CapturedGradient = NoCapturedGradient;
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kSmemBytes = 12345;
  static constexpr int kDimQk = 24;
  static constexpr int kDimV = 40;
  static constexpr int kTileQ = 64;
  static constexpr int kTileKv = 32;
  static constexpr int kCopyBytes = 8;
  static constexpr int kHalves = 2;
  static constexpr int kStages = 2;
  static constexpr int kDimSplits = 3;
  static constexpr int kWarpsAcross = 2;
};

}  // namespace cuflash
