// Heads: which query of which head each row of a tile is.
//
//   OneHead     row      0    1    2  ...          HeadGroup   row      0    1    2    3    4  ...
//               query    0    1    2                           query    0    0    0    1    1        (group 3)
//               head     h    h    h                           head     h   h+1  h+2   h   h+1
//
// HeadGroup is for few queries: a tile that one head would leave mostly empty takes in every query head that shares its
// keys, which are then read once for all of them.
#pragma once

#include "attention/mask.cuh"
#include "attention/sequence.cuh"
#include "params.cuh"

namespace cuflash {

struct OneHead {
  int first;  // the head
  int kv;     // the head of its keys and values

  CF_DEVICE OneHead(const Attention& a, int index) : first(index), kv(index / (a.heads_q / a.heads_kv)) {}

  // Blocks along the heads, and rows of `queries` queries.
  CF_DEVICE static int count(const Attention& a) { return a.heads_q; }
  CF_DEVICE static int rows(const Attention&, int queries) { return queries; }

  CF_DEVICE int head(int /*row*/) const { return first; }
  // Elements from row 0 to another.
  CF_DEVICE int64 offset(int row, const Strides& stride) const { return row * stride.row; }
  // Where a box of rows starts, from `row` on.
  template <class Sequence>
  CF_DEVICE BoxOrigin box(const Attention& a, const Sequence& sequence, int row) const {
    return sequence.q_box(a, row, first);
  }
  template <class F>
  CF_DEVICE void for_each(F&& f) const {
    f(first);
  }

  // A mask, score or dropout of the tile's rows.
  template <class Policy, class Sequence>
  using Bound = Policy;
  template <class Policy, class Sequence>
  CF_DEVICE Policy bind(const Attention& a, const Sequence& sequence) const {
    return Policy(a, sequence, first);
  }
};

template <class Policy, class Sequence>
struct EachRow;

struct HeadGroup {
  int first;
  int size;
  int kv;

  CF_DEVICE HeadGroup(const Attention& a, int index)
      : first(index * (a.heads_q / a.heads_kv)), size(a.heads_q / a.heads_kv), kv(index) {}

  CF_DEVICE static int count(const Attention& a) { return a.heads_kv; }
  CF_DEVICE static int rows(const Attention& a, int queries) { return queries * (a.heads_q / a.heads_kv); }

  CF_DEVICE int query(int row) const { return row / size; }
  CF_DEVICE int head(int row) const { return first + row % size; }
  CF_DEVICE int64 offset(int row, const Strides& stride) const {
    return query(row) * stride.row + row % size * stride.head;
  }
  // Boxes hold whole groups, or parts of one; `row` is the first of either.
  template <class Sequence>
  CF_DEVICE BoxOrigin box(const Attention& a, const Sequence& sequence, int row) const {
    return sequence.q_group_box(a, query(row), head(row));
  }
  template <class F>
  CF_DEVICE void for_each(F&& f) const {
    for (int i = 0; i < size; ++i) f(first + i);
  }

  template <class Policy, class Sequence>
  using Bound = EachRow<Policy, Sequence>;
  template <class Policy, class Sequence>
  CF_DEVICE EachRow<Policy, Sequence> bind(const Attention& a, const Sequence& sequence) const {
    return {a, sequence, *this};
  }
};

// A policy of one head, made anew for the query and head of every row. It keeps copies, not references: those to
// members of the struct that it is a member of would keep that in memory.
template <class Policy, class Sequence>
struct EachRow {
  const Attention& a;
  const Sequence sequence;
  const HeadGroup heads;

  CF_DEVICE Policy of(int row) const { return Policy(a, sequence, heads.head(row)); }

  CF_DEVICE bool keep(int row, int kv) const { return of(row).keep(heads.query(row), kv); }
  CF_DEVICE auto kv_tiles(int row, int rows, int tile) const {
    const int query = heads.query(row);
    return of(row).kv_tiles(query, heads.query(row + rows - 1) - query + 1, tile);
  }
  template <class Real>
  CF_DEVICE Real apply(Real s, int row, int kv) const {
    return of(row).apply(s, heads.query(row), kv);
  }
  CF_DEVICE auto unit() const { return of(0).unit(); }  // the same for every head
};

}  // namespace cuflash
