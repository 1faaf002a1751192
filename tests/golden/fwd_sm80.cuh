// Written by cuflash.jit.render for fwd_sm80. Do not edit.
#pragma once

#include "element.cuh"
#include "params.cuh"
#include "attention/mask.cuh"
#include "attention/score.cuh"
#include "attention/sequence.cuh"
#include "tile/dq_accum.cuh"

namespace cuflash {

struct Config {
  using Element = bf16;
  using Sequence = DenseSequence;
  using Mask = CausalMask;
  using Score = ScaledScore<float>;
  using Reduction = AtomicReduction;
  static constexpr int kDimQk = 128;
  static constexpr int kDimV = 128;
  static constexpr int kThreads = 128;
  static constexpr int kTileQ = 128;
  static constexpr int kTileKv = 64;
  static constexpr int kStages = 1;
  static constexpr int kDimSplits = 1;
  static constexpr int kCopyBytes = 16;
  static constexpr int kBlocksPerSm = 2;
  static constexpr int kSmemBytes = 69632;
};

static_assert(sizeof(Strides) == 24, "host layout");
static_assert(CF_OFFSET(Strides, batch) == 0, "host layout");
static_assert(CF_OFFSET(Strides, row) == 8, "host layout");
static_assert(CF_OFFSET(Strides, head) == 16, "host layout");
static_assert(sizeof(Attention) == 120, "host layout");
static_assert(CF_OFFSET(Attention, cu_seqlens_q) == 0, "host layout");
static_assert(CF_OFFSET(Attention, cu_seqlens_kv) == 8, "host layout");
static_assert(CF_OFFSET(Attention, seqused_kv) == 16, "host layout");
static_assert(CF_OFFSET(Attention, mask) == 24, "host layout");
static_assert(CF_OFFSET(Attention, mask_batch) == 32, "host layout");
static_assert(CF_OFFSET(Attention, mask_head) == 40, "host layout");
static_assert(CF_OFFSET(Attention, mask_row) == 48, "host layout");
static_assert(CF_OFFSET(Attention, mask_column) == 56, "host layout");
static_assert(CF_OFFSET(Attention, softmax_scale) == 64, "host layout");
static_assert(CF_OFFSET(Attention, softcap) == 72, "host layout");
static_assert(CF_OFFSET(Attention, batch) == 80, "host layout");
static_assert(CF_OFFSET(Attention, heads_q) == 84, "host layout");
static_assert(CF_OFFSET(Attention, heads_kv) == 88, "host layout");
static_assert(CF_OFFSET(Attention, len_q) == 92, "host layout");
static_assert(CF_OFFSET(Attention, len_kv) == 96, "host layout");
static_assert(CF_OFFSET(Attention, total_q) == 100, "host layout");
static_assert(CF_OFFSET(Attention, total_kv) == 104, "host layout");
static_assert(CF_OFFSET(Attention, window_left) == 108, "host layout");
static_assert(CF_OFFSET(Attention, window_right) == 112, "host layout");
static_assert(CF_OFFSET(Attention, top_left) == 116, "host layout");
static_assert(sizeof(FwdParams) == 280, "host layout");
static_assert(CF_OFFSET(FwdParams, attention) == 0, "host layout");
static_assert(CF_OFFSET(FwdParams, q) == 120, "host layout");
static_assert(CF_OFFSET(FwdParams, k) == 128, "host layout");
static_assert(CF_OFFSET(FwdParams, v) == 136, "host layout");
static_assert(CF_OFFSET(FwdParams, out) == 144, "host layout");
static_assert(CF_OFFSET(FwdParams, lse) == 152, "host layout");
static_assert(CF_OFFSET(FwdParams, q_stride) == 160, "host layout");
static_assert(CF_OFFSET(FwdParams, k_stride) == 184, "host layout");
static_assert(CF_OFFSET(FwdParams, v_stride) == 208, "host layout");
static_assert(CF_OFFSET(FwdParams, out_stride) == 232, "host layout");
static_assert(CF_OFFSET(FwdParams, lse_stride) == 256, "host layout");

}  // namespace cuflash
