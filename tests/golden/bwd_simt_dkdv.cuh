// Written by cuflash.jit.render for bwd_simt_dkdv. Do not edit.
#pragma once

#include "element.cuh"
#include "params.cuh"
#include "attention/mask.cuh"
#include "attention/score.cuh"
#include "attention/sequence.cuh"
#include "tile/dq_accum.cuh"

namespace cuflash {

struct Config {
  using Element = double;
  using Sequence = VarlenSequence;
  using Mask = WindowMask;
  using Score = SoftCapScore<double>;
  using Reduction = OrderedReduction;
  static constexpr int kDimQk = 24;
  static constexpr int kDimV = 40;
  static constexpr int kThreads = 256;
  static constexpr int kTileQ = 64;
  static constexpr int kTileKv = 32;
  static constexpr int kStages = 2;
  static constexpr int kDimSplits = 3;
  static constexpr int kCopyBytes = 8;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kSmemBytes = 12345;
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
static_assert(sizeof(BwdParams) == 496, "host layout");
static_assert(CF_OFFSET(BwdParams, attention) == 0, "host layout");
static_assert(CF_OFFSET(BwdParams, q) == 120, "host layout");
static_assert(CF_OFFSET(BwdParams, k) == 128, "host layout");
static_assert(CF_OFFSET(BwdParams, v) == 136, "host layout");
static_assert(CF_OFFSET(BwdParams, out) == 144, "host layout");
static_assert(CF_OFFSET(BwdParams, dout) == 152, "host layout");
static_assert(CF_OFFSET(BwdParams, lse) == 160, "host layout");
static_assert(CF_OFFSET(BwdParams, dlse) == 168, "host layout");
static_assert(CF_OFFSET(BwdParams, delta) == 176, "host layout");
static_assert(CF_OFFSET(BwdParams, lse2) == 184, "host layout");
static_assert(CF_OFFSET(BwdParams, dq) == 192, "host layout");
static_assert(CF_OFFSET(BwdParams, dk) == 200, "host layout");
static_assert(CF_OFFSET(BwdParams, dv) == 208, "host layout");
static_assert(CF_OFFSET(BwdParams, dq_accum) == 216, "host layout");
static_assert(CF_OFFSET(BwdParams, dq_turn) == 224, "host layout");
static_assert(CF_OFFSET(BwdParams, q_stride) == 232, "host layout");
static_assert(CF_OFFSET(BwdParams, k_stride) == 256, "host layout");
static_assert(CF_OFFSET(BwdParams, v_stride) == 280, "host layout");
static_assert(CF_OFFSET(BwdParams, out_stride) == 304, "host layout");
static_assert(CF_OFFSET(BwdParams, dout_stride) == 328, "host layout");
static_assert(CF_OFFSET(BwdParams, lse_stride) == 352, "host layout");
static_assert(CF_OFFSET(BwdParams, dlse_stride) == 376, "host layout");
static_assert(CF_OFFSET(BwdParams, delta_stride) == 400, "host layout");
static_assert(CF_OFFSET(BwdParams, dq_stride) == 424, "host layout");
static_assert(CF_OFFSET(BwdParams, dk_stride) == 448, "host layout");
static_assert(CF_OFFSET(BwdParams, dv_stride) == 472, "host layout");

}  // namespace cuflash
