// Written by cuflash.jit.render for bwd_simt_dkdv. Do not edit.
#pragma once

#include "params.cuh"
#include "element.cuh"
#include "attention/sequence.cuh"
#include "attention/mask.cuh"
#include "attention/score.cuh"
#include "attention/dropout.cuh"
#include "tile/dq_accum.cuh"

namespace cuflash {

struct Config {
  using Element = double;
  using Sequence = VarlenSequence;
  using Mask = WindowMask;
  using Score = SoftCapScore<double>;
  using Dropout = NoDropout;
  using Reduction = OrderedReduction;
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kSmemBytes = 12345;
  static constexpr int kDimQk = 24;
  static constexpr int kDimV = 40;
  static constexpr int kTileQ = 64;
  static constexpr int kTileKv = 32;
  static constexpr int kCopyBytes = 8;
  static constexpr int kStages = 2;
  static constexpr int kDimSplits = 3;
};

static_assert(sizeof(Strides) == 24, "host layout");
static_assert(CF_OFFSET(Strides, batch) == 0, "host layout");
static_assert(CF_OFFSET(Strides, row) == 8, "host layout");
static_assert(CF_OFFSET(Strides, head) == 16, "host layout");
static_assert(sizeof(Attention) == 216, "host layout");
static_assert(CF_OFFSET(Attention, cu_seqlens_q) == 0, "host layout");
static_assert(CF_OFFSET(Attention, cu_seqlens_kv) == 8, "host layout");
static_assert(CF_OFFSET(Attention, seqused_q) == 16, "host layout");
static_assert(CF_OFFSET(Attention, seqused_kv) == 24, "host layout");
static_assert(CF_OFFSET(Attention, mask) == 32, "host layout");
static_assert(CF_OFFSET(Attention, mask_batch) == 40, "host layout");
static_assert(CF_OFFSET(Attention, mask_head) == 48, "host layout");
static_assert(CF_OFFSET(Attention, mask_row) == 56, "host layout");
static_assert(CF_OFFSET(Attention, mask_column) == 64, "host layout");
static_assert(CF_OFFSET(Attention, bias) == 72, "host layout");
static_assert(CF_OFFSET(Attention, bias_batch) == 80, "host layout");
static_assert(CF_OFFSET(Attention, bias_head) == 88, "host layout");
static_assert(CF_OFFSET(Attention, bias_row) == 96, "host layout");
static_assert(CF_OFFSET(Attention, bias_column) == 104, "host layout");
static_assert(CF_OFFSET(Attention, alibi) == 112, "host layout");
static_assert(CF_OFFSET(Attention, alibi_batch) == 120, "host layout");
static_assert(CF_OFFSET(Attention, sink) == 128, "host layout");
static_assert(CF_OFFSET(Attention, rng_state) == 136, "host layout");
static_assert(CF_OFFSET(Attention, softmax_scale) == 144, "host layout");
static_assert(CF_OFFSET(Attention, softcap) == 152, "host layout");
static_assert(CF_OFFSET(Attention, keep_scale) == 160, "host layout");
static_assert(CF_OFFSET(Attention, dropout_p) == 168, "host layout");
static_assert(CF_OFFSET(Attention, batch) == 176, "host layout");
static_assert(CF_OFFSET(Attention, heads_q) == 180, "host layout");
static_assert(CF_OFFSET(Attention, heads_kv) == 184, "host layout");
static_assert(CF_OFFSET(Attention, len_q) == 188, "host layout");
static_assert(CF_OFFSET(Attention, len_kv) == 192, "host layout");
static_assert(CF_OFFSET(Attention, total_q) == 196, "host layout");
static_assert(CF_OFFSET(Attention, total_kv) == 200, "host layout");
static_assert(CF_OFFSET(Attention, window_left) == 204, "host layout");
static_assert(CF_OFFSET(Attention, window_right) == 208, "host layout");
static_assert(CF_OFFSET(Attention, top_left) == 212, "host layout");
static_assert(sizeof(Pages) == 40, "host layout");
static_assert(CF_OFFSET(Pages, table) == 0, "host layout");
static_assert(CF_OFFSET(Pages, table_batch) == 8, "host layout");
static_assert(CF_OFFSET(Pages, table_page) == 16, "host layout");
static_assert(CF_OFFSET(Pages, size) == 24, "host layout");
static_assert(CF_OFFSET(Pages, multiplier) == 28, "host layout");
static_assert(CF_OFFSET(Pages, shift) == 32, "host layout");
static_assert(CF_OFFSET(Pages, count) == 36, "host layout");
static_assert(sizeof(TensorMap) == 128, "host layout");
static_assert(CF_OFFSET(TensorMap, words) == 0, "host layout");
static_assert(sizeof(BwdParams) == 640, "host layout");
static_assert(CF_OFFSET(BwdParams, attention) == 0, "host layout");
static_assert(CF_OFFSET(BwdParams, q) == 216, "host layout");
static_assert(CF_OFFSET(BwdParams, k) == 224, "host layout");
static_assert(CF_OFFSET(BwdParams, v) == 232, "host layout");
static_assert(CF_OFFSET(BwdParams, out) == 240, "host layout");
static_assert(CF_OFFSET(BwdParams, dout) == 248, "host layout");
static_assert(CF_OFFSET(BwdParams, lse) == 256, "host layout");
static_assert(CF_OFFSET(BwdParams, dlse) == 264, "host layout");
static_assert(CF_OFFSET(BwdParams, row_state) == 272, "host layout");
static_assert(CF_OFFSET(BwdParams, delta) == 280, "host layout");
static_assert(CF_OFFSET(BwdParams, shift) == 288, "host layout");
static_assert(CF_OFFSET(BwdParams, dq) == 296, "host layout");
static_assert(CF_OFFSET(BwdParams, dk) == 304, "host layout");
static_assert(CF_OFFSET(BwdParams, dv) == 312, "host layout");
static_assert(CF_OFFSET(BwdParams, dq_accum) == 320, "host layout");
static_assert(CF_OFFSET(BwdParams, dsink) == 328, "host layout");
static_assert(CF_OFFSET(BwdParams, dbias) == 336, "host layout");
static_assert(CF_OFFSET(BwdParams, dbias_batch) == 344, "host layout");
static_assert(CF_OFFSET(BwdParams, dbias_head) == 352, "host layout");
static_assert(CF_OFFSET(BwdParams, dbias_row) == 360, "host layout");
static_assert(CF_OFFSET(BwdParams, dq_turn) == 368, "host layout");
static_assert(CF_OFFSET(BwdParams, q_stride) == 376, "host layout");
static_assert(CF_OFFSET(BwdParams, k_stride) == 400, "host layout");
static_assert(CF_OFFSET(BwdParams, v_stride) == 424, "host layout");
static_assert(CF_OFFSET(BwdParams, out_stride) == 448, "host layout");
static_assert(CF_OFFSET(BwdParams, dout_stride) == 472, "host layout");
static_assert(CF_OFFSET(BwdParams, lse_stride) == 496, "host layout");
static_assert(CF_OFFSET(BwdParams, dlse_stride) == 520, "host layout");
static_assert(CF_OFFSET(BwdParams, delta_stride) == 544, "host layout");
static_assert(CF_OFFSET(BwdParams, dq_stride) == 568, "host layout");
static_assert(CF_OFFSET(BwdParams, dk_stride) == 592, "host layout");
static_assert(CF_OFFSET(BwdParams, dv_stride) == 616, "host layout");

}  // namespace cuflash
