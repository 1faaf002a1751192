// Rows in global memory that make up a tile: one head's, those of a group of heads, or those in the pages of a cache.
#pragma once

#include "attention/heads.cuh"
#include "attention/sequence.cuh"
#include "ptx/sync.cuh"

namespace cuflash {

// Neighbours lie one stride apart.
template <class Element>
struct GlobalRows {
  Element* data;
  int64 stride;
  int count;

  CF_DEVICE GlobalRows from(int row) const { return {data + row * stride, stride, count - row}; }
  CF_DEVICE bool has(int row) const { return row < count; }
  CF_DEVICE int64 offset(int row) const { return row * stride; }

  // The place of a row's column number first_col + col, and the one `rows` below it.
  CF_DEVICE Element* at(int row, int first_col, int col) const { return data + row * stride + first_col + col; }
  CF_DEVICE Element* below(Element* place, int /*row*/, int /*col*/, int rows) const { return place + rows * stride; }
};

// Where a key lies in the pages that a table names.
struct PagedKey {
  int page;
  int row;

  CF_DEVICE int64 offset(const Strides& stride) const { return page * stride.batch + row * stride.row; }
};

// A division would cost more than everything else here: it is a product and a shift, whatever the size.
CF_DEVICE PagedKey look_up(const Pages& pages, const int* table, int key) {
  const int index = static_cast<int>(static_cast<int64>(key) * pages.multiplier >> pages.shift);
  const int page = table[index * pages.table_page];
  CF_ASSERT(0 <= page && page < pages.count);
  return {page, key - index * pages.size};
}

// Keys or values in pages. Rows behind the last key have its place, so that nothing behind the number of a sequence's last
// page is looked up; they are not read. Those before the first that a query sees have the place of that one, as the pages
// before may have been given to others.
template <class Element>
struct PagedRows {
  Element* data;  // row 0 of page 0
  const Strides& stride;
  const Pages& pages;
  const int* table;  // page numbers of this sequence
  int first;         // the key that is row 0
  int count;
  int visible;  // the first key that is seen

  CF_DEVICE PagedRows from(int row) const { return {data, stride, pages, table, first + row, count - row, visible}; }
  CF_DEVICE bool has(int row) const { return row < count; }

  CF_DEVICE Element* at(int row, int first_col, int col) const {
    const PagedKey key = look_up(pages, table, max_of(first + min_of(row, count - 1), visible));
    return data + key.offset(stride) + first_col + col;
  }
  CF_DEVICE Element* below(Element* /*place*/, int row, int col, int rows) const { return at(row + rows, 0, col); }
};

// Rows of one head of a sequence in a tensor of queries, or of anything that is numbered like them, and in one of keys.
template <class T, class Tensor, class Sequence>
CF_DEVICE GlobalRows<T> query_rows(Tensor* tensor, const Strides& stride, const Sequence& sequence, int head) {
  return {first_query<T>(tensor, stride, sequence, head), stride.row, sequence.len_q};
}
template <class T, class Tensor, class Sequence>
CF_DEVICE GlobalRows<T> key_rows(Tensor* tensor, const Strides& stride, const Sequence& sequence, int head) {
  return {first_key<T>(tensor, stride, sequence, head), stride.row, sequence.len_kv};
}

// Keys or values of a forward, in pages or not, from number `first` on, of the head whose row 0 is at `data`. No query of
// the tile sees one before number `visible`.
template <class Element, class Sequence>
CF_DEVICE GlobalRows<const Element> kv_rows(const FwdParams&, const Sequence& sequence, const Element* data,
                                            const Strides& stride, int first, int /*visible*/) {
  return {data + first * stride.row, stride.row, sequence.len_kv - first};
}
template <class Element>
CF_DEVICE PagedRows<const Element> kv_rows(const FwdParams& p, const PagedSequence& sequence, const Element* data,
                                           const Strides& stride, int first, int visible) {
  const int* table = p.pages.table + sequence.batch * p.pages.table_batch;
  return {data, stride, p.pages, table, first, sequence.len_kv - first, visible};
}

template <class Element>
CF_DEVICE PagedRows<const Element> kv_rows(const FwdParams& p, const PagedCacheSequence& sequence, const Element* data,
                                           const Strides& stride, int first, int visible) {
  const int* table = p.pages.table + sequence.batch * p.pages.table_batch;
  const int start = sequence.start_kv;
  return {data, stride, p.pages, table, start + first, sequence.len_kv - first, start + visible};
}

// Where a box of keys starts that lies in one page, if there are pages.
template <class Sequence>
CF_DEVICE BoxOrigin key_box(const FwdParams& p, const Sequence& sequence, int key, int head) {
  return sequence.kv_box(p.attention, key, head);
}
CF_DEVICE BoxOrigin paged_box(const FwdParams& p, int64 batch, int row, int head) {
  const PagedKey key = look_up(p.pages, p.pages.table + batch * p.pages.table_batch, row);
  return {key.row, head, key.page};
}
CF_DEVICE BoxOrigin key_box(const FwdParams& p, const PagedSequence& sequence, int key, int head) {
  return paged_box(p, sequence.batch, key, head);
}
CF_DEVICE BoxOrigin key_box(const FwdParams& p, const PagedCacheSequence& sequence, int key, int head) {
  return paged_box(p, sequence.batch, sequence.start_kv + key, head);
}

// Rows whose offsets were looked up before. Those before `begin` are not read either.
template <class Element, int kRows>
struct FoundRows {
  Element* data;
  const int64* offsets;  // kRows, a power of two
  int begin;
  int count;

  CF_DEVICE bool has(int row) const { return begin <= row && row < count; }
  CF_DEVICE Element* at(int row, int first_col, int col) const { return data + offsets[row % kRows] + first_col + col; }
  CF_DEVICE Element* below(Element* /*place*/, int row, int col, int rows) const { return at(row + rows, 0, col); }
};

// The first key that a query of the tile sees, of lists any.
template <class Mask, class Bound>
CF_DEVICE int first_visible_key(const Bound& mask, int q_first, int tile_q) {
  if constexpr (Mask::kFullFromStart || Mask::Walk::kListed) {
    return 0;
  } else {
    return mask.kv_tiles(q_first, tile_q, 1).begin;
  }
}

// Finds the keys and values that a warp copies, kRows neighbours at a time, which one lane each looks up while those
// before are copied: a copy that waited for the table would come late.
template <class Sequence, int kRows>
struct KeyFinder {
  struct Offsets {};  // in shared memory

  int first, count;  // key, and how many there are from number 0 on

  CF_DEVICE void turn(const FwdParams&, const Sequence& sequence, int /*first_visible*/) { count = sequence.len_kv; }
  CF_DEVICE void look_up(const FwdParams&, int key) { first = key; }
  CF_DEVICE void settle(const FwdParams&, Offsets&) {}
  template <class Element>
  CF_DEVICE GlobalRows<const Element> keys(const FwdParams& p, const Offsets&, const Element* data) const {
    return {data + first * p.k_stride.row, p.k_stride.row, count - first};
  }
  template <class Element>
  CF_DEVICE GlobalRows<const Element> values(const FwdParams& p, const Offsets&, const Element* data) const {
    return {data + first * p.v_stride.row, p.v_stride.row, count - first};
  }
};

// The same in pages, whose table has the sequence's key number 0 at `start`.
template <int kRows>
struct PagedKeyFinder {
  struct Offsets {
    int64 k[kRows], v[kRows];
  };

  const int* table;
  int start, first_visible, len_kv;
  int next, first;  // keys that were looked up, and those that were settled
  PagedKey mine;

  template <class Sequence>
  CF_DEVICE void turn(const FwdParams& p, const Sequence& sequence, int start_kv, int visible) {
    table = p.pages.table + sequence.batch * p.pages.table_batch;
    start = start_kv, first_visible = visible, len_kv = sequence.len_kv;
  }

  // Starts with the keys from `key` on; those that no query sees have the place of one that is seen.
  CF_DEVICE void look_up(const FwdParams& p, int key) {
    next = key;
    const int seen = clamp_to(key + ptx::lane_index() % kRows, first_visible, len_kv - 1);
    mine = cuflash::look_up(p.pages, table, start + seen);
  }
  // Hands them to the warp, whose copies of those before have been started.
  CF_DEVICE void settle(const FwdParams& p, Offsets& offsets) {
    first = next;
    ptx::sync_warp();
    offsets.k[ptx::lane_index() % kRows] = mine.offset(p.k_stride);
    offsets.v[ptx::lane_index() % kRows] = mine.offset(p.v_stride);
    ptx::sync_warp();
  }
  template <class Element>
  CF_DEVICE FoundRows<const Element, kRows> keys(const FwdParams&, const Offsets& offsets, const Element* data) const {
    return {data, offsets.k, first_visible - first, len_kv - first};
  }
  template <class Element>
  CF_DEVICE FoundRows<const Element, kRows> values(const FwdParams&, const Offsets& offsets,
                                                   const Element* data) const {
    return {data, offsets.v, first_visible - first, len_kv - first};
  }
};

template <int kRows>
struct KeyFinder<PagedSequence, kRows> : PagedKeyFinder<kRows> {
  CF_DEVICE void turn(const FwdParams& p, const PagedSequence& sequence, int visible) {
    PagedKeyFinder<kRows>::turn(p, sequence, 0, visible);
  }
};
template <int kRows>
struct KeyFinder<PagedCacheSequence, kRows> : PagedKeyFinder<kRows> {
  CF_DEVICE void turn(const FwdParams& p, const PagedCacheSequence& sequence, int visible) {
    PagedKeyFinder<kRows>::turn(p, sequence, sequence.start_kv, visible);
  }
};

// Rows lie where the query and the head of each do.
template <class Element>
struct GroupRows {
  Element* data;
  Strides stride;
  HeadGroup heads;
  int first;  // number of row 0 in the group
  int count;

  CF_DEVICE bool has(int row) const { return row < count; }
  CF_DEVICE int64 offset(int row) const { return heads.offset(first + row, stride) - heads.offset(first, stride); }
  CF_DEVICE Element* at(int row, int first_col, int col) const { return data + offset(row) + first_col + col; }
  CF_DEVICE Element* below(Element* /*place*/, int row, int col, int rows) const { return at(row + rows, 0, col); }
};

// Rows of a tile from number `first` on, which lies at `data`.
template <class Element>
CF_DEVICE GlobalRows<Element> rows_at(const OneHead&, Element* data, const Strides& stride, int /*first*/, int count) {
  return {data, stride.row, count};
}
template <class Element>
CF_DEVICE GroupRows<Element> rows_at(const HeadGroup& heads, Element* data, const Strides& stride, int first,
                                     int count) {
  return {data, stride, heads, first, count};
}

// The same when number 0 lies at `data`.
template <class Heads, class Element>
CF_DEVICE auto rows_of(const Heads& heads, Element* data, const Strides& stride, int first, int count) {
  return rows_at(heads, data + heads.offset(first, stride), stride, first, count);
}

}  // namespace cuflash
