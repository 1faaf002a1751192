// The arguments of every kernel: plain data, mirrored in Python by jit/params.py, which reads this file.
// One declaration a line, types from {int, int64, float, double, pointers, structs above}; the comment gives the shape.
// A struct that derives from one above has its members first.
#pragma once

#include "captured.cuh"
#include "std.cuh"

namespace cuflash {

// Distances between neighbours along each axis, in elements. Dense tensors are (batch, row, head, dim) in any memory
// order; packed ones are (row, head, dim) and leave `batch` at 0. The last dimension is always contiguous.
struct Strides {
  int64 batch;
  int64 row;
  int64 head;
};

// What both directions share: what a written score or mask reads, sizes, lengths, mask and score.
struct Attention : Captured {
  const int* cu_seqlens_q;    // [batch + 1] first packed row of each sequence; null when dense
  const int* cu_seqlens_kv;   // [batch + 1]
  const int* seqused_q;       // [batch] queries and keys of a packed sequence that take part; null: all
  const int* seqused_kv;      // in a cache: rows in use before the call, left padding included; null: `cached` of each
  const uint8* mask;          // boolean (batch, heads_q, len_q, len_kv) by strides, 0 = hidden; null: band mask
  int64 mask_batch;           // strides of `mask` in bytes, 0 where it broadcasts
  int64 mask_head;
  int64 mask_row;
  int64 mask_column;
  const void* bias;           // added to the logits, (batch, heads_q, len_q, len_kv) by strides; null: none
  int64 bias_batch;           // strides of `bias` in elements, 0 where it broadcasts
  int64 bias_head;
  int64 bias_row;
  int64 bias_column;
  const float* alibi;         // slopes, (batch, heads_q) with a batch stride of 0 or heads_q; null: none
  int64 alibi_batch;
  const float* sink;          // [heads_q] logits that take probability but have no value; null: none
  const uint64* rng_state;    // [2] Philox seed and offset of this call's dropout; null: none
  double softmax_scale;
  double softcap;             // 0: none
  double keep_scale;          // what kept probabilities are multiplied by, usually 1 / (1 - p_dropout)
  double dropout_p;           // probability of dropping
  int batch;
  int heads_q;
  int heads_kv;
  int len_q;                  // rows of a dense sequence, or the longest packed one; of a cache, those there is room for
  int len_kv;
  int total_q;                // rows of the packed tensors; 0 when dense
  int total_kv;
  int window_left;            // keys visible left of the diagonal (Band masks)
  int window_right;
  int top_left;               // 1: the diagonal starts at key 0; 0: it ends at the last key
  int appended;               // keys that the call itself adds to each sequence of a cache
  const int* leftpad;         // [batch] rows of a cache before a sequence's first key; null: none
  const int* cache_batch;     // [batch] which batch element of a cache holds a sequence; null: its own number
  int64 cached;
};

// Where the keys of PagedSequence lie. Its tensors of keys and values are (page, row, head, dim), and `batch` of their
// strides is the distance between pages.
struct Pages {
  const int* table;           // (batch, max_pages) by strides: the page of keys [i * size, (i + 1) * size); null: none
  int64 table_batch;          // strides of `table` in elements
  int64 table_page;
  int size;                   // keys of a page
  int multiplier;             // j / size = j * multiplier >> shift for 0 <= j < 2^30
  int shift;
  int count;                  // pages of the whole cache
};

// What is written to a cache before attention (cache/append.cuh).
struct Append {
  const void* k_new;          // [batch, appended, heads_kv, dim_qk]; null: nothing is appended
  const void* v_new;          // [batch, appended, heads_kv, dim_v]
  const void* q;              // [batch, len_q, heads_q, dim_qk] as given, where FwdParams.q is what they are rotated into
  const void* rotary_cos;     // [rotary_rows, rotary_dim / 2] by position in the cache; null: nothing is rotated
  const void* rotary_sin;
  int64 rotary_cos_row;       // strides in elements
  int64 rotary_sin_row;
  int rotary_rows;
  int turn_together;          // 1: all queries are at the position of the first new key
  Strides k_new_stride;
  Strides v_new_stride;
  Strides q_stride;
};

// A tensor as the copy engine sees it: 128 opaque bytes that the driver makes (jit/tensormap.py).
struct alignas(64) TensorMap {
  uint64 words[16];
};

struct FwdParams {
  Attention attention;
  const void* q;              // [batch, len_q, heads_q, dim_qk]
  const void* k;              // [batch, len_kv, heads_kv, dim_qk] or [pages, size, heads_kv, dim_qk]
  const void* v;              // [batch, len_kv, heads_kv, dim_v] or [pages, size, heads_kv, dim_v]
  void* out;                  // [batch, len_q, heads_q, dim_v]
  void* lse;                  // [batch, heads_q, len_q] or [heads_q, total_q], accumulator type, natural log
  void* row_state;            // like lse: the RowState of each row (attention/softmax.cuh); null: not wanted
  int64* rng_state;           // [2] where fwd_rng leaves the seed and offset of this call, what attention.rng_state reads
  int64* generator;           // [2] seed and offset kept on the device, advanced by each call; null: the two below
  int64 seed;
  int64 offset;
  int64 increment;            // Philox counters this call uses up
  float empty_lse;            // lse of rows that see no key: -inf, or +inf as PyTorch has it; every row would convert a double
  float tail_lse;             // the same of packed rows that take part in nothing
  Strides q_stride;
  Strides k_stride;
  Strides v_stride;
  Strides out_stride;
  Strides lse_stride;
  void* partial_out;          // [num_splits, rows, heads_q, dim_v], accumulator type (attention/split.cuh); or slots of
                              // tiles of rows, sm80_few (attention/ranges.cuh)
  void* partial_state;        // [num_splits, rows, heads_q] of RowState, or likewise
  int num_splits;             // blocks that share the keys of one query tile; 1: the two above may be null
  Pages pages;
  Append append;
  int heads_per_section;      // heads whose tiles are worked on together, so that their keys stay in L2; sm90 only
  int* tickets;               // zeroed, and zero again at the end; null: none. sm90: [2], works drawn so far, blocks done;
                              // sm80_few: parts of each query tile that are there
  int* part_slots;            // [query tiles, 2] the first slot of a query tile's parts, and how many there are; sm90's
                              // KeyRanges alone (attention/ranges.cuh)
  int heads_in_step;          // key heads whose blocks walk the same keys at a time, KeyRanges alone; divides heads_kv
  TensorMap q_map;            // boxes of q, k, v, out and attention.bias; sm90 only
  TensorMap k_map;
  TensorMap v_map;
  TensorMap out_map;
  TensorMap bias_map;         // empty where the kernel loads no boxes of it
};

// Of a forward that also finds how its results change along changes of what it reads. Tangents are like what they are
// of; null: not at all. Here out and lse may be null: not wanted.
struct JvpParams : FwdParams {
  const void* tangent_q;
  const void* tangent_k;
  const void* tangent_v;
  const void* tangent_bias;
  int64 tangent_bias_batch;   // strides in elements, 0 where it broadcasts
  int64 tangent_bias_head;
  int64 tangent_bias_row;
  int64 tangent_bias_column;
  const float* tangent_sink;  // [heads_q]
  void* tangent_out;
  void* tangent_lse;
  Strides tangent_q_stride;
  Strides tangent_k_stride;
  Strides tangent_v_stride;
  Strides tangent_out_stride;
  Strides tangent_lse_stride;
  TensorMap tangent_q_map;    // boxes; sm90 only
  TensorMap tangent_k_map;
  TensorMap tangent_v_map;
};

struct BwdParams {
  Attention attention;
  const void* q;              // [batch, len_q, heads_q, dim_qk]
  const void* k;              // [batch, len_kv, heads_kv, dim_qk]
  const void* v;              // [batch, len_kv, heads_kv, dim_v]
  const void* out;            // [batch, len_q, heads_q, dim_v]
  const void* dout;           // [batch, len_q, heads_q, dim_v]
  const void* lse;            // [batch, heads_q, len_q] or [heads_q, total_q]; -inf and +inf both mean an empty row
  const void* dlse;           // like lse, its upstream gradient; null: zero
  const void* row_state;      // like delta: what the forward left; null: lse must do
  void* delta;                // like lse: rowsum(dout * out) - dlse; null where a short kernel alone reads it
  void* shift;                // like lse: the RowShift of each row (attention/softmax.cuh)
  void* dq;                   // [batch, len_q, heads_q, dim_qk]
  void* dk;                   // [batch, len_kv, heads_kv, dim_qk]
  void* dv;                   // [batch, len_kv, heads_kv, dim_v]
  void* dq_accum;             // tiles of dq in fragment order: zeroed (tile/dq_accum.cuh), sm90's of its own (tile/query_tiles.cuh)
  void* row_tiles;            // RowTile of each of these tiles (tile/query_tiles.cuh); sm90 only
  float* dsink;               // [heads_q]
  void* dbias;                // (1 or batch, 1 or heads_q, 1 or len_q, 1 or len_kv), accumulator type, contiguous rows
  int64 dbias_batch;          // strides in elements
  int64 dbias_head;
  int64 dbias_row;
  void* dbias_parts;          // [bias_parts] of dbias, to be added up (attention/bias_gradient.cuh); null where there is one
  int bias_parts;             // blocks that share what adds to one element of dbias, which then has parts
  int heads_per_section;      // key heads whose tiles are worked on together, the longest first; sm90 only
  int* dq_turn;               // [heads_q, tiles] zeroed: key tiles already added to each dq tile; deterministic only
  Strides q_stride;
  Strides k_stride;
  Strides v_stride;
  Strides out_stride;
  Strides dout_stride;
  Strides lse_stride;
  Strides dlse_stride;
  Strides delta_stride;       // of delta, row_state and shift
  Strides dq_stride;
  Strides dk_stride;
  Strides dv_stride;
  TensorMap q_map;            // boxes of q, k, v, dout, dq, dk and dv; sm90 only
  TensorMap k_map;
  TensorMap v_map;
  TensorMap dout_map;
  TensorMap dq_map;
  TensorMap dk_map;
  TensorMap dv_map;
  TensorMap bias_map;         // of attention.bias; empty where the kernel loads no boxes of it
};

// One of the results that are merged (forward/merge.cuh): attention of the same queries over some of the keys.
struct MergePart {
  const void* out;            // [batch, len, heads, dim]
  const void* lse;            // [batch, heads, len], accumulator type
  void* dout;                 // gradients of the two, contiguous; backward only
  void* dlse;
  Strides out_stride;
  Strides lse_stride;
};

struct MergeParams {
  MergePart parts[32];
  int count;                  // of parts
  int heads;
  int len;
  int dim;
  int64 rows;                 // batch * len * heads
  void* out;                  // [batch, len, heads, dim], contiguous; read by the backward, in accumulator type
  void* lse;                  // [batch, heads, len], contiguous
  const void* dout;           // upstream gradients of the two; backward only, dlse may be null: zero
  const void* dlse;
  Strides dout_stride;
  Strides dlse_stride;
};

}  // namespace cuflash
