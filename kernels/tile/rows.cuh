// Rows in global memory that make up a tile: one head's, those of a group of heads, or those in the pages of a cache.
#pragma once

#include "attention/heads.cuh"
#include "attention/sequence.cuh"

namespace cuflash {

// Neighbours lie one stride apart.
template <class Element>
struct GlobalRows {
  Element* data;
  int64 stride;
  int count;

  CF_DEVICE GlobalRows from(int row) const { return {data + row * stride, stride, count - row}; }
  CF_DEVICE int64 offset(int row) const { return row * stride; }

  // The place of a row's column number first_col + col, and the one `rows` below it.
  CF_DEVICE Element* at(int row, int first_col, int col) const { return data + row * stride + first_col + col; }
  CF_DEVICE Element* below(Element* place, int /*row*/, int /*col*/, int rows) const { return place + rows * stride; }
};

// Keys or values in the pages that a table names. Rows behind the last key have its place, so that nothing behind the
// number of a sequence's last page is looked up; they are not read.
template <class Element>
struct PagedRows {
  Element* data;  // row 0 of page 0
  const Strides& stride;
  const Pages& pages;
  const int* table;  // page numbers of this sequence
  int first;         // the key that is row 0
  int count;

  CF_DEVICE PagedRows from(int row) const { return {data, stride, pages, table, first + row, count - row}; }

  // A division would cost more than everything else here: it is a product and a shift, whatever the size.
  CF_DEVICE Element* at(int row, int first_col, int col) const {
    const int key = first + min_of(row, count - 1);
    const int index = static_cast<int>(static_cast<int64>(key) * pages.multiplier >> pages.shift);
    const int page = table[index * pages.table_page];
    CF_ASSERT(0 <= page && page < pages.count);
    return data + page * stride.batch + (key - index * pages.size) * stride.row + first_col + col;
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

// Keys or values of a forward, in pages or not, from number `first` on, of the head whose row 0 is at `data`.
template <class Element, class Sequence>
CF_DEVICE GlobalRows<const Element> kv_rows(const FwdParams&, const Sequence& sequence, const Element* data,
                                            const Strides& stride, int first) {
  return {data + first * stride.row, stride.row, sequence.len_kv - first};
}
template <class Element>
CF_DEVICE PagedRows<const Element> kv_rows(const FwdParams& p, const PagedSequence& sequence, const Element* data,
                                           const Strides& stride, int first) {
  const int* table = p.pages.table + sequence.batch * p.pages.table_batch;
  return {data, stride, p.pages, table, first, sequence.len_kv - first};
}

template <class Element>
CF_DEVICE PagedRows<const Element> kv_rows(const FwdParams& p, const PagedCacheSequence& sequence, const Element* data,
                                           const Strides& stride, int first) {
  const int* table = p.pages.table + sequence.batch * p.pages.table_batch;
  return {data, stride, p.pages, table, sequence.start_kv + first, sequence.len_kv - first};
}

// Rows lie where the query and the head of each do.
template <class Element>
struct GroupRows {
  Element* data;
  Strides stride;
  HeadGroup heads;
  int first;  // number of row 0 in the group
  int count;

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
