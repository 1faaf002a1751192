// Written by cuflash.jit.render for bwd_sm80. Do not edit.
#pragma once

#include "layout.cuh"
#include "element.cuh"
#include "attention/sequence.cuh"
#include "attention/mask.cuh"
#include "attention/score.cuh"
#include "attention/dropout.cuh"
#include "attention/mods.cuh"
#include "tile/held_bias.cuh"
#include "tile/dq_accum.cuh"
#include "attention/bias_gradient.cuh"
#include "tile/captured_gradient.cuh"

namespace cuflash {

// score * captured0[h, q]
struct ScoreMod {
  const Attention* a;
  CF_DEVICE ScoreMod(const Attention& attention, int b, int h) : a(&attention) {
  }
  template <class I0, class I1>
  CF_DEVICE float captured0(I0 i0, I1 i1) const { return mods::real_of(static_cast<const fp16*>(a->captured0)[(static_cast<int>(mods::nearest(i0, a->captured0_size[0])) * a->captured0_size[1] + mods::nearest(i1, a->captured0_size[1]))]); }
  static constexpr bool kBoundedSlope = false;
  static constexpr bool kFiniteBeyond = false;
  template <class Real>
  CF_DEVICE static Real unit(Real inner) { return static_cast<Real>(0x1.0000000000000p+0); }
  template <class Real>
  CF_DEVICE Real value(Real s, Real unit, int b, int h, Place q, Place k) const {
    const Real x0 = static_cast<Real>(captured0(h, q.at));
    const Real x1 = (s * unit) * x0;
    return x1;
  }
  template <class Real>
  CF_DEVICE Real slope(Real s, Real unit, int b, int h, Place q, Place k) const {
    const Real x0 = static_cast<Real>(captured0(h, q.at));
    return x0;
  }
  template <class Real>
  CF_DEVICE void add_gradients(Real s, Real unit, int b, int h, Place q, Place k, Real ds) const {
    ptx::red_add(static_cast<Real*>(a->dcaptured0) + (static_cast<int>(mods::nearest(h, a->captured0_size[0])) * a->captured0_size[1] + mods::nearest(q.at, a->captured0_size[1])), ds * (s * unit));
  }
};

// captured0[q] == captured0[k]
struct MaskMod {
  const Attention* a;
  CF_DEVICE MaskMod(const Attention& attention, int b, int h) : a(&attention) {
  }
  template <class I0>
  CF_DEVICE int64 captured0(I0 i0) const { return mods::int_of(static_cast<const int64*>(a->captured1)[mods::nearest(i0, a->captured1_size[0]) * a->captured1_stride[0]]); }
  template <class Real>
  CF_DEVICE bool value(int b, int h, Place q, Place k) const {
    const int64 x0 = static_cast<int64>(captured0(q.at));
    const int64 x1 = static_cast<int64>(captured0(k.at));
    const bool x2 = x0 == x1;
    return x2;
  }
};

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
