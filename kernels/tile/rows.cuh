// Rows in global memory that make up a tile: one head's, or those of a group of heads.
#pragma once

#include "attention/heads.cuh"

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
