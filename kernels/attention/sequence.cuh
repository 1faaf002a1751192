// Sequence: how long one batch element is and where its rows lie. Dense, packed, paged or cached; the kernels never
// know which.
#pragma once

#include "params.cuh"

namespace cuflash {

// Where a box of a TensorMap starts, in rows and heads; the innermost coordinate is the caller's.
struct BoxOrigin {
  int x1, x2, x3;
};

// The same in a cache, whose TensorMap (dim, row, used, head, page) has a dimension for how many rows of a page are
// used: a box ends where they do.
struct CacheBoxOrigin {
  int x1, x2, x3, x4;

  CF_DEVICE static CacheBoxOrigin of(int rows, int row, int used, int head, int page) {
    return {rows - used + row, used, head, page};
  }
};

struct DenseSequence {
  static constexpr bool kZerosBehind = true;  // boxes of keys hold zeros behind the last key, not others' rows

  int len_q;   // query rows
  int len_kv;  // keys that take part
  int tail_q;  // packed rows behind those that take part in nothing, which its first tile fills; none here
  int tail_kv;
  int64 batch;

  CF_DEVICE DenseSequence(const Attention& a, int batch_index)
      : len_q(a.len_q), len_kv(a.len_kv), tail_q(0), tail_kv(0), batch(batch_index) {}

  // Elements from a tensor's base to row 0 of this sequence (head 0).
  CF_DEVICE int64 q_offset(const Strides& stride) const { return batch * stride.batch; }
  CF_DEVICE int64 kv_offset(const Strides& stride) const { return batch * stride.batch; }

  // Row `row` of a head in a TensorMap (dim, row, head, batch).
  CF_DEVICE BoxOrigin q_box(const Attention&, int row, int head) const { return {row, head, static_cast<int>(batch)}; }
  CF_DEVICE BoxOrigin kv_box(const Attention&, int row, int head) const { return {row, head, static_cast<int>(batch)}; }
  // The same in a TensorMap (dim, head, row, batch), whose boxes hold a group of heads.
  CF_DEVICE BoxOrigin q_group_box(const Attention&, int row, int head) const {
    return {head, row, static_cast<int>(batch)};
  }

  // Query tiles before this sequence and in all, when every sequence starts a new tile.
  CF_DEVICE int64 first_q_tile(int tile) const { return batch * cdiv(len_q, tile); }
  CF_DEVICE static int64 num_q_tiles(const Attention& a, int tile) { return int64(a.batch) * cdiv(a.len_q, tile); }
};

struct VarlenSequence {
  static constexpr bool kZerosBehind = true;

  int len_q;
  int len_kv;
  int tail_q;
  int tail_kv;
  int start_q;  // first packed row
  int start_kv;
  int64 batch;

  CF_DEVICE VarlenSequence(const Attention& a, int batch_index)
      : start_q(a.cu_seqlens_q[batch_index]), start_kv(a.cu_seqlens_kv[batch_index]), batch(batch_index) {
    const bool last = batch_index == a.batch - 1;
    const int rows_q = a.cu_seqlens_q[batch_index + 1] - start_q;
    const int rows_kv = a.cu_seqlens_kv[batch_index + 1] - start_kv;
    CF_ASSERT(start_q >= 0 && rows_q >= 0 && start_q + rows_q <= a.total_q);
    CF_ASSERT(start_kv >= 0 && rows_kv >= 0 && start_kv + rows_kv <= a.total_kv);
    len_q = a.seqused_q ? min_of(a.seqused_q[batch_index], rows_q) : rows_q;
    len_kv = a.seqused_kv ? min_of(a.seqused_kv[batch_index], rows_kv) : rows_kv;
    CF_ASSERT(len_q >= 0 && len_kv >= 0);
    tail_q = (last ? a.total_q - start_q : rows_q) - len_q;
    tail_kv = (last ? a.total_kv - start_kv : rows_kv) - len_kv;
  }

  CF_DEVICE int64 q_offset(const Strides& stride) const { return start_q * stride.row; }
  CF_DEVICE int64 kv_offset(const Strides& stride) const { return start_kv * stride.row; }

  // The same in a ragged TensorMap (dim, row, end, head), whose rows lie `total` before the tensor's: row r of a
  // sequence that ends at `end` and takes part with `len` rows is (total - len + r, end), and rows past `len` are
  // outside.
  CF_DEVICE BoxOrigin q_box(const Attention& a, int row, int head) const {
    return {a.total_q - len_q + row, start_q + len_q, head};
  }
  CF_DEVICE BoxOrigin kv_box(const Attention& a, int row, int head) const {
    return {a.total_kv - len_kv + row, start_kv + len_kv, head};
  }

  CF_DEVICE BoxOrigin q_group_box(const Attention& a, int row, int head) const {
    return {head, a.total_q - len_q + row, start_q + len_q};
  }

  // floor(start / tile) + batch never overlaps the tiles of the sequence before, whatever the lengths are.
  CF_DEVICE int64 first_q_tile(int tile) const { return start_q / tile + batch; }
  CF_DEVICE static int64 num_q_tiles(const Attention& a, int tile) { return a.total_q / tile + a.batch; }
};

// Packed queries over keys in pages, which sequences may share: cu_seqlens_kv says how many keys there are, and a table
// where they lie (tile/rows.cuh).
struct PagedSequence : VarlenSequence {
  static constexpr bool kZerosBehind = false;

  using VarlenSequence::VarlenSequence;

  CF_DEVICE int64 kv_offset(const Strides&) const { return 0; }
};

// Dense queries over keys in a cache, whose lengths the device knows: key 0 lies behind the left padding, and what this
// call appends counts. Lengths beyond the room that there is are cut to it.
struct CacheSequence {
  static constexpr bool kZerosBehind = false;

  int len_q;
  int len_kv;
  int tail_q;
  int tail_kv;
  int start_kv;  // row of the cache that is key 0
  int64 batch;
  int64 element;  // batch element of the cache

  CF_DEVICE CacheSequence(const Attention& a, int batch_index)
      : len_q(a.len_q), tail_q(0), tail_kv(0), start_kv(a.leftpad ? a.leftpad[batch_index] : 0), batch(batch_index),
        element(a.cache_batch ? a.cache_batch[batch_index] : batch_index) {
    CF_ASSERT(start_kv >= 0 && element >= 0);
    len_kv = static_cast<int>(max_of(min_of(used(a, batch_index) + a.appended, int64(a.len_kv)) - start_kv, int64(0)));
  }

  // Rows of the cache that a sequence uses before the call.
  CF_DEVICE static int64 used(const Attention& a, int batch_index) {
    return a.seqused_kv ? a.seqused_kv[batch_index] : a.cached;
  }

  CF_DEVICE int64 q_offset(const Strides& stride) const { return batch * stride.batch; }
  CF_DEVICE int64 kv_offset(const Strides& stride) const { return element * stride.batch + start_kv * stride.row; }
  CF_DEVICE BoxOrigin q_box(const Attention&, int row, int head) const { return {row, head, static_cast<int>(batch)}; }
  CF_DEVICE BoxOrigin q_group_box(const Attention&, int row, int head) const {
    return {head, row, static_cast<int>(batch)};
  }
  CF_DEVICE BoxOrigin kv_box(const Attention&, int row, int head) const {
    return {start_kv + row, head, static_cast<int>(element)};
  }
  CF_DEVICE CacheBoxOrigin cache_box(const Attention& a, int row, int head) const {
    return CacheBoxOrigin::of(a.len_kv, start_kv + row, start_kv + len_kv, head, static_cast<int>(element));
  }

  CF_DEVICE int64 first_q_tile(int tile) const { return batch * cdiv(len_q, tile); }
  CF_DEVICE static int64 num_q_tiles(const Attention& a, int tile) { return int64(a.batch) * cdiv(a.len_q, tile); }
};

// The same with the cache in pages: rows of it count from the first page of a sequence.
struct PagedCacheSequence : CacheSequence {
  CF_DEVICE PagedCacheSequence(const Attention& a, int batch_index) : CacheSequence(a, batch_index) {}

  CF_DEVICE int64 kv_offset(const Strides&) const { return 0; }
};

// Elements from the base of a tensor of queries, or of anything that is numbered like them, to a head's row 0 of a
// sequence.
template <class Sequence>
CF_DEVICE int64 query_offset(const Strides& stride, const Sequence& sequence, int head) {
  return sequence.q_offset(stride) + head * stride.head;
}

// That row itself, and the one in a tensor of keys.
template <class T, class Tensor, class Sequence>
CF_DEVICE T* first_query(Tensor* tensor, const Strides& stride, const Sequence& sequence, int head) {
  return static_cast<T*>(tensor) + sequence.q_offset(stride) + head * stride.head;
}
template <class T, class Tensor, class Sequence>
CF_DEVICE T* first_key(Tensor* tensor, const Strides& stride, const Sequence& sequence, int head) {
  return static_cast<T*>(tensor) + sequence.kv_offset(stride) + head * stride.head;
}

}  // namespace cuflash
