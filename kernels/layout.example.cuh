// Written by cuflash.jit.render for FwdParams. Do not edit.
#pragma once

#include "params.cuh"

namespace cuflash {

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
static_assert(sizeof(FwdParams) == 1216, "host layout");
static_assert(CF_OFFSET(FwdParams, attention) == 0, "host layout");
static_assert(CF_OFFSET(FwdParams, q) == 216, "host layout");
static_assert(CF_OFFSET(FwdParams, k) == 224, "host layout");
static_assert(CF_OFFSET(FwdParams, v) == 232, "host layout");
static_assert(CF_OFFSET(FwdParams, out) == 240, "host layout");
static_assert(CF_OFFSET(FwdParams, lse) == 248, "host layout");
static_assert(CF_OFFSET(FwdParams, row_state) == 256, "host layout");
static_assert(CF_OFFSET(FwdParams, rng_state) == 264, "host layout");
static_assert(CF_OFFSET(FwdParams, generator) == 272, "host layout");
static_assert(CF_OFFSET(FwdParams, seed) == 280, "host layout");
static_assert(CF_OFFSET(FwdParams, offset) == 288, "host layout");
static_assert(CF_OFFSET(FwdParams, increment) == 296, "host layout");
static_assert(CF_OFFSET(FwdParams, empty_lse) == 304, "host layout");
static_assert(CF_OFFSET(FwdParams, tail_lse) == 312, "host layout");
static_assert(CF_OFFSET(FwdParams, q_stride) == 320, "host layout");
static_assert(CF_OFFSET(FwdParams, k_stride) == 344, "host layout");
static_assert(CF_OFFSET(FwdParams, v_stride) == 368, "host layout");
static_assert(CF_OFFSET(FwdParams, out_stride) == 392, "host layout");
static_assert(CF_OFFSET(FwdParams, lse_stride) == 416, "host layout");
static_assert(CF_OFFSET(FwdParams, partial_out) == 440, "host layout");
static_assert(CF_OFFSET(FwdParams, partial_state) == 448, "host layout");
static_assert(CF_OFFSET(FwdParams, num_splits) == 456, "host layout");
static_assert(CF_OFFSET(FwdParams, pages) == 464, "host layout");
static_assert(CF_OFFSET(FwdParams, heads_per_section) == 504, "host layout");
static_assert(CF_OFFSET(FwdParams, tickets) == 512, "host layout");
static_assert(CF_OFFSET(FwdParams, q_map) == 576, "host layout");
static_assert(CF_OFFSET(FwdParams, k_map) == 704, "host layout");
static_assert(CF_OFFSET(FwdParams, v_map) == 832, "host layout");
static_assert(CF_OFFSET(FwdParams, out_map) == 960, "host layout");
static_assert(CF_OFFSET(FwdParams, bias_map) == 1088, "host layout");

}  // namespace cuflash
